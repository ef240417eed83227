"""The digest of a model: whatever may change what it computes changes it, and nothing else does."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import FAMILIES, KINDS, tiny_lm, tiny_model

from minitx.digest import digest
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
