"""Reordered layers: by hand, a literal version, caches, counts and depth, figures.

The contract tests (test_contract.py) run on models of two layers; here there are six.
"""

from dataclasses import replace
from functools import cache

import literal_layer_reorder as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, check_close, in_chunks, tiny_model

import minitx
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Stack
from minitx.shared.least_loss import mean_loss
from minitx.skip.layer_reorder import in_words, plan
from minitx.state import State
from minitx.technique import apply
from minitx.tree import Part, part

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
family = pytest.mark.parametrize("family", FAMILIES)


@cache
def dense(family="llama", dtype=np.float64) -> LM:
    return LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)


def reordered(family="llama", dtype=np.float64, **options) -> LM:
    return apply(dense(family, dtype), {"layer_reorder": options})


# Worked example ----------------------------------------------------------------------------------


@part
class Double(Part):
    """A layer that doubles x: its update is x."""

    def __call__(self, x, layer):
        return x * 2


@part
class AddOne(Part):
    """A layer whose update is 1."""

    def __call__(self, x, layer):
        return x + 1


def by_hand(**options) -> float:
    """x = 3 through the layers: double, add 1, double, add 1."""
    blocks = (Double(), AddOne(), Double(), AddOne())
    lm = LM(replace(tiny_model(), stack=Stack(blocks)))
    stack = apply(lm, {"layer_reorder": dict(first=0, last=0) | options}).model.stack
    state = State(4, 8)
    state.take(1)
    return float(stack(np.full((1, 1), 3.0), state)[0, 0])


def test_orders_by_hand():
    assert by_hand(order="none") == ((3 * 2) + 1) * 2 + 1  # 15
    # add 1, double, add 1, double: ((3 + 1) * 2 + 1) * 2
    assert by_hand(order="swap") == 18, "neighbours change places"
    assert by_hand(order="reverse") == by_hand(layers="1,0,3,2") == 18
    # (double, add 1) on 3: 3 + 3 + 1 = 7; then on 7: 7 + 7 + 1
    assert by_hand(order="parallel") == 15, "the updates of a pair are added"
    # all four on 3: 3 + (3 + 1 + 3 + 1)
    assert by_hand(order="parallel", group=4) == 11
    # their mean: 3 + 8 / 4
    assert by_hand(order="parallel", group=4, combine="mean") == 5, "the mean of the updates"
    # double; then (add 1, double) on 6: 6 + 1 + 6; then add 1
    assert by_hand(order="parallel", first=1, last=1) == 14


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(order="none"), "0 1 2 3 4 5"),
        (dict(order="swap"), "0 2 1 4 3 5"),
        (dict(order="swap", first=0), "1 0 3 2 4 5"),  # of five, the last has no neighbour
        (dict(order="reverse"), "0 4 3 2 1 5"),
        (dict(order="reverse", first=2, last=0), "0 1 5 4 3 2"),
        (dict(order="parallel"), "0 (1 2) (3 4) 5"),
        (dict(order="parallel", last=0, group=3), "0 (1 2 3) (4 5)"),
        (dict(order="parallel", first=4, last=4), "0 1 2 3 4 5"),
        (dict(order="reverse", first=9), "0 1 2 3 4 5"),
    ],
)
def test_plans_by_hand(options, words):
    full = dict(first=1, last=1, group=2, seed=0) | options
    found = plan(full.pop("order"), L, **full)
    assert in_words(found) == words
    if options["order"] in ("swap", "reverse", "parallel"):
        expected = literal.groups_of(
            options["order"], L, full["first"], full["last"], full["group"]
        )
        assert [list(group) for group in found] == expected, "the literal version's groups differ"


def test_shuffle_moves_the_middle_only_and_depends_on_the_seed():
    found = [plan("shuffle", 12, 2, 3, 2, seed) for seed in (0, 0, 1)]
    for groups in found:
        flat = [index for group in groups for index in group]
        assert sorted(flat) == list(range(12)) and flat[:2] == [0, 1] and flat[9:] == [9, 10, 11]
    assert found[0] == found[1] != found[2]


# Against the literal version, and what holds for it ----------------------------------------------


@family
@pytest.mark.parametrize(
    "options",
    [
        dict(order="reverse"),
        dict(order="swap", first=0, last=0),
        dict(order="parallel", group=3, last=0),
        dict(order="parallel", first=0, last=0, combine="mean"),
    ],
    ids=lambda o: o["order"],
)
def test_logits_equal_the_literal_version_in_chunks_too(family, options):
    lm = reordered(family, **options)
    full = dict(first=1, last=1, group=2) | options
    mean = full.pop("combine", "sum") == "mean"
    order = full.pop("order")
    expected = literal.run(dense(family).model, IDS, literal.groups_of(order, L, **full), mean)
    check_close(lm.logits(IDS), expected, 1e-12, "logits")
    check_close(in_chunks(lm, IDS, (7, 20, 13)), expected, 1e-10, "in chunks")
    assert abs(dense(family).logits(IDS) - expected).max() > 1e-3, "the example changes nothing"


def test_every_order_that_moves_nothing_is_the_dense_model():
    for options in (dict(order="none"), dict(first=9), dict(order="parallel", group=1)):
        assert reordered(**options).model is dense().model, options
    assert reordered(layers="0+1+2+3+4+5").model is dense().model


def test_each_layer_keeps_its_own_cache_slot():
    """The rows of layer l are in slot l, made by its own weights, wherever it runs."""
    lm, slots = reordered(order="reverse"), {}
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    by_hand = lm.model.new_state()
    x = lm.model.embed(IDS[:20], slice(0, 20))
    for index in (0, 4, 3, 2, 1, 5):
        layer = by_hand.layers[index].take(20)
        x = lm.model.stack.blocks[index](x, layer)
        slots[index] = layer.rows()[0]
    for index, layer in enumerate(state.layers):
        assert layer.index == index and layer.count == 20
        assert_same(layer.rows()[0], slots[index], f"keys of layer {index}")


def test_a_ragged_batch_equals_its_rows():
    lm = reordered(first=0, last=0)
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist()]
    assert lm.generate(prompts, 12) == [lm.generate(prompt, 12) for prompt in prompts]


# Cost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(order="reverse")], ids=["parallel", "reverse"])
def test_all_the_work_remains_and_only_depth_falls(options):
    """The card's ``Saves``: no multiply-adds; four middle layers in pairs take two steps."""
    lm, totals = reordered(**options), []
    for model in (dense(), lm):
        with counting(model) as counts:
            in_chunks(model, IDS, (12, 28))
        totals.append(counts.total())
    assert totals[0] == totals[1], "a layer ran more or less often"
    assert len(lm.model.stack.groups) == (4 if options == {} else 6)
    # of (1 2) and (3 4) one each is off its place; of 4 3 2 1 all four
    moved = 2 if options == {} else 4
    assert counts.events["layer runs out of order"] == 40 * moved, "layers off their place"


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layers="0,1,2"), "layers='0,1,2' must name each of the layers 0 to 5 once"),
        (dict(layers="0,1,2,3,4,4"), "must name each of the layers 0 to 5 once, separated by"),
        (dict(layers=""), "must name each of the layers"),
        (dict(layers="5,4,3,2,1,0", order="swap"), "got both layers and order; give only one"),
        (dict(first=-1), "layer_reorder: first must be an integer, at least 0; got -1"),
        (dict(group=0), "layer_reorder: group must be an integer, at least 1, or None; got 0"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        reordered(**options)
    assert "\n" not in str(caught.value) and "layer_reorder" in str(caught.value)


def test_models_it_does_not_fit_are_refused():
    with pytest.raises(MinitxError, match="layer_reorder needs residual connections and this"):
        apply(LM(tiny_model("skipless"), TOKENIZER), {"layer_reorder": {"order": "none"}})
    for order in (dict(order="reverse", first=0), dict(first=0)):
        flags = {"layer_reorder": order, "first_layer": True}
        with pytest.raises(MinitxError, match=r"layer_reorder would run layer \d .* first_layer"):
            apply(dense(), flags)
    with pytest.raises(MinitxError, match="early_exit.*layer_reorder|layer_reorder.*early_exit"):
        apply(dense(), {"layer_reorder": True, "early_exit": True})


def test_first_layer_with_layer_0_in_its_place_stays_exact():
    both = apply(dense(), {"layer_reorder": {"order": "reverse"}, "first_layer": True})
    check_close(both.logits(IDS), reordered(order="reverse").logits(IDS), 1e-12, "logits")


# Figures -----------------------------------------------------------------------------------------


def test_on_stories_late_layers_commute_and_early_ones_do_not():
    lm = minitx.load("stories")
    texts = calibration_ids("layer_reorder", lm, 3)
    dense_loss = mean_loss(lm, texts)

    def price(**options) -> float:
        return mean_loss(apply(lm, {"layer_reorder": options}), texts) - dense_loss

    assert abs(price(order="reverse", first=4)) < 0.005, "layers 4, 5 and 6 in reverse"
    assert price(order="reverse") > 1, "layers 1 to 6 in reverse"
    assert 0.005 < price() < 0.03, "three pairs side by side"
    assert 0.05 < price(group=1 << 40, combine="mean") < 0.4, "the mean of all middle layers"
