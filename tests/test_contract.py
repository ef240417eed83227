"""What every technique has to keep to, run over all that are registered, and over every pair.

On small random models of all three families: where a technique refuses a family, it has to say so
in one sentence, and it has to fit at least one.
"""

import hashlib
import itertools

import numpy as np
import pytest
from tiny import FAMILIES, KINDS, tiny_lm

from minitx.errors import MinitxError
from minitx.technique import HEADINGS, LEVELS, apply, names, techniques
from minitx.tree import walk, weights

ALL = techniques()
IDS = np.random.default_rng(0).integers(0, 258, 40)


def with_technique(technique, family, options=None, dtype=np.float64):
    """(dense, changed) models, or skip a family that is refused."""
    lm = tiny_lm(family, dtype=dtype)
    try:
        return lm, apply(
            lm, {technique.name: technique.neutral or {} if options is None else options}
        )
    except MinitxError as error:
        assert technique.name in str(error) and str(error).count("\n") == 0
        pytest.skip(str(error))


def logits_in_chunks(lm, ids, sizes):
    state, found = lm.model.new_state(), []
    for size in sizes:
        found.append(lm.model(ids[:size], state))
        ids = ids[size:]
    assert not len(ids)
    return np.concatenate(found)


each = pytest.mark.parametrize("technique", ALL, ids=lambda t: t.name)
family = pytest.mark.parametrize("family", KINDS)


@each
def test_it_fits_a_family(technique):
    fits = 0
    for name in KINDS:
        try:
            apply(tiny_lm(name), {technique.name: True})
            fits += 1
        except MinitxError:
            pass
    assert fits


@each
@family
def test_neutral_or_exact_is_the_dense_model(technique, family):
    """Neutral: bit for bit. Exact: in float64 and float32 as far as rounding allows, and the same
    greedy continuation."""
    if technique.neutral is not None:
        dense, changed = with_technique(technique, family, dtype=np.float32)
        np.testing.assert_array_equal(changed.logits(IDS), dense.logits(IDS))
    if technique.exact:
        for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-5)):
            dense, changed = with_technique(technique, family, {}, dtype)
            expected = dense.logits(IDS)
            error = abs(changed.logits(IDS) - expected).max() / abs(expected).max()
            assert error <= tolerance
            assert changed.generate(IDS[:5], 30) == dense.generate(IDS[:5], 30)


@each
@family
@pytest.mark.parametrize("options", ["neutral", "default"])
def test_chunks_and_single_tokens_give_what_one_pass_gives(technique, family, options):
    _, lm = with_technique(technique, family, None if options == "neutral" else {})
    whole = lm.logits(IDS)
    for sizes in ((40,), (7, 20, 13), (1,) * 40):
        found = logits_in_chunks(lm, IDS, sizes)
        np.testing.assert_allclose(found, whole, atol=1e-10 * abs(whole).max())


@each
@family
@pytest.mark.parametrize("back_to", [0, 25, 39])
def test_rewind_and_replay(technique, family, back_to):
    _, lm = with_technique(technique, family, {})
    state = lm.model.new_state()
    once = [lm.model(IDS[t : t + 1], state) for t in range(40)]
    lm.model((IDS[:8] + 1) % 258, state)  # something else, to be forgotten
    state.rewind(40)
    state.rewind(back_to)
    again = [lm.model(IDS[t : t + 1], state) for t in range(back_to, 40)]
    np.testing.assert_array_equal(again, once[back_to:])


@each
@family
def test_two_sequences_do_not_disturb_each_other(technique, family):
    _, lm = with_technique(technique, family, {})
    other = (IDS * 7 + 3) % 258

    def run(order):
        states = {0: lm.model.new_state(), 1: lm.model.new_state()}
        found = {0: [], 1: []}
        for which in order:
            t = len(found[which])
            found[which].append(lm.model((IDS, other)[which][t : t + 1], states[which]))
        return found

    apart, mixed = run([0] * 20 + [1] * 20), run([0, 1, 1, 0] * 10)
    for which in (0, 1):
        np.testing.assert_array_equal(mixed[which], apart[which])


@each
@family
def test_the_dense_model_is_left_as_it_was(technique, family):
    lm = tiny_lm(family)
    drawn = repr(lm)

    def prints():
        return {path: hashlib.sha256(w).hexdigest() for path, w in weights(lm).items()}

    before = prints()
    try:
        changed = apply(lm, {technique.name: True})
    except MinitxError as error:
        pytest.skip(str(error))
    changed.generate(IDS[:5], 10)
    assert prints() == before and repr(lm) == drawn
    assert repr(changed) != drawn  # what runs is what is printed


@each
@family
def test_everything_stays_float32(technique, family):
    _, lm = with_technique(technique, family, {}, np.float32)
    assert lm.logits(IDS).dtype == np.float32
    state = lm.model.new_state()
    for ids in (IDS[:9], IDS[9:10]):
        assert lm.model(ids, state).dtype == np.float32
    for layer in state.layers:
        for kept in (layer.keys, layer.values):  # or whole numbers that stand for floats
            assert kept is None or kept.dtype == np.float32 or kept.dtype.kind in "iu"
    for path, node in walk(lm):
        for name, value in vars(node).items():
            if isinstance(value, np.ndarray) and value.dtype.kind == "f":
                assert value.dtype == np.float32, f"{path}.{name}"


@each
def test_the_card_is_complete(technique):
    card = technique.card
    assert card.summary.endswith(".") and "\n" not in card.summary
    assert list(card.sections) == list(HEADINGS)
    assert all(card.sections.values())
    assert technique.exact == card.sections["Kind"].lower().startswith("exact")
    assert technique.level in LEVELS


@each
def test_options_have_types_and_defaults_that_pass(technique):
    for option in technique.options.values():
        assert option.check(option.default) == option.default
        if option.default is not None:
            assert option.check(option.read(str(option.default))) == option.default
    assert technique.checked(technique.neutral or {}) == (technique.neutral or {})
    assert technique.exact or technique.neutral is not None


def test_files_and_techniques_have_the_same_names():
    assert {t.name for t in ALL} == set(names())
    assert {t.name: t.function.__module__ for t in ALL} == names()


PAIRS = list(itertools.combinations(ALL, 2))
# On the skipless model only those with what is for it alone: the others were tried on three.
PAIRED = [(family, pair) for family in FAMILIES for pair in PAIRS]
PAIRED += [("skipless", pair) for pair in PAIRS if "remove_weights" in [t.name for t in pair]]


@pytest.mark.parametrize(
    "family, pair", PAIRED, ids=[f"{f}-{p[0].name} and {p[1].name}" for f, p in PAIRED]
)
def test_every_pair_composes_or_is_refused(family, pair):
    lm = tiny_lm(family, dtype=np.float64)
    wanted = {t.name: t.neutral or {} for t in pair}
    try:
        for name, options in wanted.items():
            apply(lm, {name: options})
    except MinitxError as error:
        pytest.skip(str(error))
    try:
        both = apply(lm, wanted)
    except MinitxError as error:
        assert all(name in str(error) for name in wanted), "a refusal names both"
        return
    expected = lm.logits(IDS)
    assert abs(both.logits(IDS) - expected).max() <= 1e-12 * abs(expected).max()
    assert repr(both) == repr(apply(lm, dict(reversed(wanted.items()))))


EXACT = [t.name for t in ALL if t.exact and t.level != "decode"]  # what changes the model


@family
def test_every_combination_of_exact_ones_is_the_dense_model(family):
    """All subsets that fit; where some of a subset do not fit each other, neither does it."""
    lm = tiny_lm(family, dtype=np.float64)
    expected, refused, tried = lm.logits(IDS), [], []
    for count in range(1, len(EXACT) + 1):
        for chosen in map(set, itertools.combinations(EXACT, count)):
            if any(few <= chosen for few in refused):
                continue
            try:
                both = apply(lm, dict.fromkeys(chosen, True))
            except MinitxError as error:
                assert count == 1 or any(name in str(error) for name in chosen)
                refused.append(chosen)
                continue
            error = abs(both.logits(IDS) - expected).max() / abs(expected).max()
            assert error <= 1e-12, chosen
            tried.append(chosen)
    assert max(map(len, tried)) >= (1 if family == "skipless" else 3)
