"""The digest of a model: whatever may change what it computes changes it, and nothing else does."""

import enum
import subprocess
import sys
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES, KINDS, tiny_lm, tiny_model

from minitx.digest import digest, source_digest
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.technique import apply
from minitx.tree import Part, map_weights, part, weights


@pytest.mark.parametrize("family", KINDS)
def test_equal_models_have_equal_digests(family):
    model = tiny_model(family)
    copy = map_weights(model, lambda w: w.copy())
    assert digest(copy) == digest(model) and len(digest(model)) == 32


def test_models_that_differ_have_different_digests():
    model = tiny_model()
    others = {
        "another family": tiny_model("gpt2"),
        "other weights": tiny_model(seed=2),
        "another dtype": tiny_model(dtype=np.float64),
        "rotary tables, which are no weights": tiny_model(rope_base=500.0),
        "an epsilon": tiny_model(norm_eps=1.1e-5),
        "one block less": tiny_model(layers=1),
        "a technique": apply(tiny_lm(), {"ffn_skip": True}).model,
        "a technique's setting": apply(tiny_lm(), {"ffn_skip": {"skip": 1, "warm_up": 3}}).model,
    }
    found = {digest(other): what for what, other in others.items()}
    assert len(found) == len(others), "two of them look the same"
    assert digest(model) not in found


def test_a_setting_that_the_printed_tree_rounds_is_seen():
    a, b = (
        apply(tiny_lm(), {"early_exit": {"threshold": value}}).model for value in (0.9, 0.9 + 1e-9)
    )
    assert repr(a) == repr(b) and digest(a) != digest(b)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bit_of_every_weight_counts(family):
    model = tiny_model(family)
    before, seen = digest(model), set()
    for path, old in weights(model).items():
        new = old.copy()
        new.flat[-1] = np.nextafter(new.flat[-1], np.float32(np.inf))
        seen.add(digest(map_weights(model, lambda w, old=old, new=new: new if w is old else w)))
        assert before not in seen, path
    assert len(seen) == len(weights(model))


@part
class Holds(Part):
    value: object


def test_what_a_field_holds_cannot_be_mistaken_for_something_else():
    x = np.arange(6, dtype=np.float32)
    values = [
        *(
            None,
            0,
            0.0,
            False,
            "",
            "0",
            "None",
            (),
            (0,),
            (0, 0),
            (1, 23),
            (12, 3),
            ((0,), 0),
            ((0, 0),),
            ("0",),
        ),
        *(x, x.reshape(2, 3), x.reshape(3, 2), x.reshape(2, 3).T, x.astype(np.float64)),
        *(x[:0], x.view(np.int32), (x, x), x[:, None], np.sin, np.cos, len),
    ]
    digests = [digest(Holds(value)) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [digest(Holds(value)) for value in values]
    assert digest(Holds(x[::2])) == digest(Holds(x[::2].copy())), "strides are not what is held"


def test_where_a_part_stands_counts():
    model = tiny_model()
    a, b = model.stack.blocks
    turned = replace(model, stack=replace(model.stack, blocks=(b, a)))
    assert digest(turned) != digest(model)


# Functions and other values, in any process ------------------------------------------------------


class Color(enum.Enum):
    RED, GREEN = 1, 2


class Number(enum.IntEnum):
    ONE = 1


@dataclass
class Pair:
    a: object
    b: object


Point, Spot = namedtuple("Point", "x y"), namedtuple("Spot", "x y")
FACTOR = 3


def power(exponent, base=2):
    """A function that has captured a value."""
    return lambda x: base * x**exponent


def factorial(n):
    return n * factorial(n - 1) if n else 1


def scaled(x):
    return FACTOR * x


def around(x):
    return scaled(x) + 1


def itself():
    found = []
    found.append(found)
    return found


def values():
    """Each must have a digest of its own, and the same one in another process."""
    return {
        "another": factorial,
        "one that uses a constant": scaled,
        "one that uses a function": around,
        "a lambda": lambda x: x + 1,
        "a lambda with another constant": lambda x: x + 2,
        "a lambda with another operation": lambda x: x - 1,
        "a lambda with another name": lambda x: x.T,
        "and another": lambda x: x.size,
        "a set among its constants": lambda x: x in {"a", "b", "c", "d", "e"},
        "another set": lambda x: x in {"a", "b", "c", "d", "f"},
        "with a default": lambda x, n=1: x + n,
        "with another": lambda x, n=2: x + n,
        "with a keyword default": lambda x, *, n=2: x + n,
        "a closure": power(2),
        "with another value": power(3),
        "with another float": power(2.0),
        "with an array": power(np.arange(3)),
        "a partial": partial(power, 2),
        "with another argument": partial(power, 3),
        "by keyword": partial(power, exponent=2),
        "a bound method": Pair(1, 2).__eq__,
        "of another": Pair(1, 3).__eq__,
        "of a part": Holds(1).forget,
        "of another part": Holds(2).forget,
        "a builtin": len,
        "another builtin": abs,
        "a text's method": "abc".startswith,
        "another text's": "abd".startswith,
        "a function of NumPy": np.mean,
        "another of NumPy": np.median,
        "one with a cache": cache(power),
        "a ufunc": np.sin,
        "another ufunc": np.cos,
        "an enum": Color.RED,
        "another member": Color.GREEN,
        "an enum that is 1": Number.ONE,
        "the number 1": 1,
        "True": True,
        "1.0": 1.0,
        "NumPy's 1": np.int64(1),
        "NumPy's smaller 1": np.int32(1),
        "a path": Path("a/b"),
        "its text": "a/b",
        "its bytes": b"a/b",
        "a tuple": (1, 2),
        "a list": [1, 2],
        "a point": Point(1, 2),
        "a spot": Spot(1, 2),
        "a set": {1, 2},
        "a dict": {"a": 1, "b": 2},
        "a dict in another order": {"b": 2, "a": 1},
        "a dict of others": {"a": 2, "b": 1},
        "a dataclass": Pair(1, 2),
        "with a part": Pair(1, Holds(1)),
        "with another part": Pair(1, Holds(2)),
        "a part in a list": [Holds(1)],
        "a type": np.float32,
        "a dtype": np.dtype("f4"),
        "a class": Pair,
        "a list that contains itself": itself(),
        "a text of words": {"some", "words", "in", "a", "set"},
        "a text that is no UTF-8": "\udcff",
    }


def test_values_that_differ_have_different_digests():
    found = {}
    for what, value in values().items():
        found.setdefault(digest(Holds(value)), []).append(what)
    assert [names for names in found.values() if len(names) > 1] == []


PROCESS = """
import sys
sys.path[:0] = ["tests", "tests/core"]
from test_digest import Holds, digest, values, tiny_lm, apply
for value in values().values():
    print(digest(Holds(value)).hex())
print(digest(tiny_lm("gpt2").model).hex())
print(digest(apply(tiny_lm(), {"speculative": {"draft": "self"}}).decode).hex())
"""


def test_digests_are_the_same_in_another_process():
    """Of functions too, whose address differs, and of sets, whose order does."""
    found = subprocess.run([sys.executable, "-c", PROCESS], capture_output=True, text=True)
    expected = {what: digest(Holds(value)).hex() for what, value in values().items()}
    expected["a model"] = digest(tiny_lm("gpt2").model).hex()
    loop = apply(tiny_lm(), {"speculative": {"draft": "self"}}).decode
    expected["a loop with a second model"] = digest(loop).hex()
    lines = found.stdout.split()
    assert len(lines) == len(expected), found.stderr
    assert [what for what, line in zip(expected, lines) if expected[what] != line] == []


def test_lambdas_of_a_library_are_told_apart():
    """Where a name alone would be the same."""
    lambdas = [eval(f"lambda x: x + {n}", {"__name__": "minitx.ops"}) for n in (1, 2)]
    assert digest(Holds(lambdas[0])) != digest(Holds(lambdas[1]))


def test_constant_that_a_function_uses_by_name_counts(monkeypatch):
    before = digest(Holds(scaled)), digest(Holds(around))
    monkeypatch.setitem(globals(), "FACTOR", 4)
    assert digest(Holds(scaled)) != before[0] and digest(Holds(around)) != before[1]


def written(body):
    """A part that is defined again with another body, as in a notebook."""
    space = {"Part": Part, "__name__": "notebook"}
    exec(f"class Mine(Part):\n    def __call__(self, x):\n        return {body}", space)
    return part(space["Mine"])()


def test_part_that_is_defined_again_under_its_name_is_another():
    assert digest(written("x + 1")) == digest(written("x + 1")) != digest(written("x + 2"))


def test_an_open_ledger_changes_no_digest():
    """It wraps the methods of the parts' classes."""
    mine = Holds(written("x"))
    before = digest(mine)
    with counting(mine):
        assert digest(mine) == before


@pytest.mark.parametrize("value", [object(), iter([1]), np.random.default_rng(0), itself], ids=str)
def test_value_that_cannot_be_identified_is_refused(value):
    if value is itself:  # an array of objects
        value = np.array([object()])
    with pytest.raises(MinitxError, match="cannot be told from others") as caught:
        digest(Holds(value))
    assert "\n" not in str(caught.value)


def test_ordered_dict_is_refused_rather_than_mistaken():
    with pytest.raises(MinitxError):
        digest(Holds(OrderedDict(a=1)))


def test_source_that_computes_has_a_digest(tmp_path, monkeypatch):
    from minitx import digest as module

    assert len(source_digest()) == 32
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    (tmp_path / "lab").mkdir()

    def found():
        source_digest.cache_clear()
        return source_digest()

    seen = [found()]
    for name, text in (("a.py", "x = 1"), ("a.py", "x = 2"), ("b.py", "x = 2")):
        (tmp_path / name).write_text(text)
        seen.append(found())
    (tmp_path / "lab" / "c.py").write_text("x = 1")
    assert found() == seen[-1] and len({*seen}) == 4
    source_digest.cache_clear()


def test_tokenizer_is_told_apart_by_the_bytes_of_its_tokens():
    """majority_vote compares texts, so it holds the tokenizer."""

    @part
    class Reads(Part):
        tokenizer: object

    class Letters:
        def __init__(self, tokens):
            self.tokens = tokens

        def __len__(self):
            return len(self.tokens)

        def token_bytes(self, token, previous=None):
            return self.tokens[token]

    one, same, other = ((b"a", b"bc"), (b"a", b"bc"), (b"ab", b"c"))
    assert digest(Reads(Letters(one))) == digest(Reads(Letters(same)))
    assert digest(Reads(Letters(one))) != digest(Reads(Letters(other)))
