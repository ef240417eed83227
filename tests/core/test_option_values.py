"""Every option of every technique with values that nobody should give: each is refused in one
sentence or works, within a second and without gigabytes. What is allowed is declared with the
option, so the same list is tried on all of them."""

import resource
import sys
import time

import numpy as np
import pytest
from tiny import KINDS, tiny_lm

from minitx.errors import LONGEST_MESSAGE, MinitxError
from minitx.technique import Range, apply, at_least, between, techniques
from minitx.values import MOST, SEEDS, as_number, need_float_dtype, need_seed

# Notes that a value can never pay: the models are tiny.
pytestmark = pytest.mark.filterwarnings("ignore::minitx.errors.MinitxWarning")

OPTIONS = [(t, option) for t in techniques() for option in t.options.values()]
each_option = pytest.mark.parametrize(
    "t, option", OPTIONS, ids=[f"{t.name} {option.name}" for t, option in OPTIONS]
)

NUMBERS = [
    0, -1, 2**31, 2**63, 10**20, 10**400, -(10**400), 1e308, 1.7e308, -1.7e308, 1e-320,
    float("nan"), float("inf"), float("-inf"), np.longdouble("1e4000"), np.float32("nan"),
    *(np.dtype(kind).type(1) for kind in "bBhHiIlLqQefdgFD?"), np.uint8(255), np.int8(-128),
]  # fmt: skip
OTHERS = ["", "x", "9" * 5000, "\x1b[2J", True, None, [], [1] * 10**5, {}, (), object(), 1j, b""]
WORDS = [
    "", "x", "9" * 5000, "-" + "9" * 400, "1e999999999", "1.7e308", "1e-320", "nan", "inf", "-1",
    "0", "None", "True", "0x10", "1_0", "\u0661", "\x1b[2J\n", "1,2", "9" * 10**5, ",", "+",
    "attn" + "9" * 30,
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def in_an_empty_folder(tmp_path_factory):
    """A word may be the name of a file that a technique writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        yield


def outcome(run, *arguments):
    """What it returns, or its MinitxError, whose message is checked."""
    began = time.process_time()
    try:
        found = run(*arguments)
    except MinitxError as error:
        found = error
        text = str(error)
        assert text.isprintable() and len(text) <= LONGEST_MESSAGE, f"unclear: {text[:500]!r}"
    took = time.process_time() - began
    assert took < 2, f"{arguments[1:]} took {took:.1f} s of CPU time"
    return found


@each_option
def test_option_has_a_lower_and_an_upper_limit(t, option):
    if option._kind() in (int, float) and not option.choices():
        limits = option.range or between(-MOST, MOST)
        assert -sys.float_info.max < limits.low < limits.high <= SEEDS.high
        for outside in (limits.low - 1, limits.high * 2 + 1):
            assert isinstance(outcome(t.checked, {option.name: outside}), MinitxError)


@each_option
def test_nasty_value_is_refused_or_becomes_a_plain_one(t, option):
    for value in NUMBERS + OTHERS:
        found = outcome(t.checked, {option.name: value})
        if not isinstance(found, MinitxError):
            kept = found[option.name]
            assert type(kept) in (int, float, bool, str, type(None)), (
                f"{value!r} stays {type(kept)}"
            )
    for word in WORDS:
        outcome(t.read, [f"{option.name}={word}"])


@pytest.fixture(scope="module")
def fitting():
    """The first tiny model that each technique's demo setting fits."""
    found = {}
    for t in techniques():
        for family in KINDS:
            lm = tiny_lm(family)
            if t.name not in found and not isinstance(
                outcome(apply, lm, {t.name: t.demo}), Exception
            ):
                found[t.name] = lm
    return found


@each_option
def test_values_at_the_limits_run_or_are_refused(t, option, fitting):
    """No value that the declaration allows crashes, hangs or takes gigabytes on a tiny model."""
    kind = option._kind()
    if option.name == "stories" or option.choices() or kind is bool:
        pytest.skip("more stories take longer, as they should; each choice is tried elsewhere")
    limits = option.range or between(-MOST, MOST)
    values = [w for w in WORDS if w != "None"] if kind is str else [limits.low, limits.high]
    values += [1e-320, limits.high * (1 - 1e-15)] if kind is float else []
    few = {"stories": 1} if "stories" in t.options else {}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in values:
        made = outcome(apply, fitting[t.name], {t.name: t.demo | few | {option.name: value}})
        if not isinstance(made, MinitxError):
            outcome(made.generate, [1, 2, 3, 4, 5, 6, 7, 8], 4)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 500_000, f"took {grown / 1000:.0f} MB"


# The checks themselves ---------------------------------------------------------------------------


def test_implied_limit_is_mentioned_only_to_those_who_exceed_it():
    counts = at_least(1, limit=1000)
    assert str(counts) == "at least 1" and counts.in_words() == "1 to 1000"
    assert 1 in counts and 1000 in counts and 0 not in counts and 1001 not in counts
    assert str(Range(0, 1, open_low=True)) == "above 0 and at most 1"
    assert str(at_least(0, below=1)) == "at least 0 and below 1" and 1 not in at_least(0, below=1)


def test_numbers_are_converted_to_pythons():
    for value in (np.uint8(3), np.int64(3), 3):
        assert as_number(value, int) == 3 and type(as_number(value, int)) is int
        assert type(as_number(value, float)) is float
    for value in (True, np.bool_(True), "3", None, 3.0, np.float32(3), [3], 3j):
        with pytest.raises(ValueError):
            as_number(value, int)
    with pytest.raises(ValueError):
        as_number(10**400, float)


def test_seed_is_a_python_integer_from_0():
    assert need_seed(np.uint8(255)) + 1 == 256, "a seed of NumPy wraps around"
    assert need_seed(2**64 - 1) == 2**64 - 1
    for wrong in (-1, 2**64, 10**400, 1.0, True, None, "1", np.float64(1), float("nan")):
        with pytest.raises(MinitxError, match="seed must be an integer, .*; got "):
            need_seed(wrong)


def test_dtype_is_float32_or_float64_or_refused():
    assert need_float_dtype("float32") == need_float_dtype(np.float32) == np.dtype(np.float32)
    for wrong in ("foo", "", None, 3, "f2", ">f4", [("a", "f4")], object(), "O", "f4,f4", {}, "\n"):
        with pytest.raises(MinitxError, match="dtype must be float32 or float64, got "):
            need_float_dtype(wrong)
