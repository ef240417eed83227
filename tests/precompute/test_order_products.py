"""order_products: the orders, exact sums, overflows of narrow accumulators, what an order costs."""

from collections import Counter
from dataclasses import replace

import literal_order_products as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

import minitx
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute import order_products as module
from minitx.precompute.order_products import OrderedLinear, orderings
from minitx.precompute.order_products.accumulator import (
    SaturatingLinear,
    accumulate,
    bits_for,
    bits_needed,
    limits,
)
from minitx.precompute.order_products.orderings import ORDERINGS
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.shared.ordering import in_order
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import apply
from minitx.tree import nbytes, walk

rng = np.random.default_rng(0)
W = rng.normal(size=(24, 10))
W[3, :4], W[7, 2:6] = 0, W[8, 2:6]  # zeros and ties
IDS = np.arange(20) * 7 % 258


def expected_orders(w, by):
    """The order of each output, by the literal version."""
    if by == "largest_rows_first":
        return [literal.largest_rows_first(w.tolist())] * w.shape[1]
    if by == "original":
        return [list(range(len(w)))] * w.shape[1]
    return [getattr(literal, by)(column) for column in w.T.tolist()]


# The orders --------------------------------------------------------------------------------------


def test_orders_by_hand():
    """Five weights of one output, inputs 0 to 4, and the order in which they are added:

    w                  0.5   -3    2   -1    0
    positives_first    2 0.5 | -3 -1 0         inputs 2 0 1 3 4
    largest_first      -3 2 -1 0.5 0           inputs 1 2 3 0 4
    alternating        2 -3 0.5 -1 0           inputs 2 1 0 3 4    sums 2 -1 -0.5 -1.5 -1.5
    """
    w = np.array([[0.5], [-3.0], [2.0], [-1.0], [0.0]])
    order = orderings.positives_first(w)
    assert order[:, 0].tolist() == [2, 0, 1, 3, 4]
    assert in_order(w, order)[:, 0].tolist() == [2.0, 0.5, -3.0, -1.0, 0.0]
    assert orderings.largest_first(w)[:, 0].tolist() == [1, 2, 3, 0, 4]
    assert orderings.alternating(w)[:, 0].tolist() == [2, 1, 0, 3, 4]


@pytest.mark.parametrize("by", ORDERINGS)
def test_orders_equal_the_literal_version(by):
    order = np.broadcast_to(ORDERINGS[by](W), W.shape)
    assert_same(order.T, expected_orders(W, by))
    assert order.dtype == np.uint8
    assert ORDERINGS[by](rng.normal(size=(300, 2))).dtype == np.uint16


def test_alternating_running_sums_of_weights_stay_small():
    """Within the largest magnitude until one sign is used up; then straight to the total."""
    for seed in range(20):
        w = np.random.default_rng(seed).normal(0.3, 1, (40, 6))
        running = in_order(w, orderings.alternating(w)).cumsum(0)
        bound = np.maximum(abs(w).max(0), abs(w.sum(0)))
        assert (abs(running) <= bound + 1e-12).all()
        assert (abs(in_order(w, orderings.positives_first(w)).cumsum(0)) > bound).any()


# Sums in order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERINGS)
def test_integer_sums_are_exact_in_every_order(by):
    x, w = rng.integers(-127, 128, (9, 24)), rng.integers(-127, 128, (24, 10))
    order = ORDERINGS[by](w)
    part = OrderedLinear(in_order(w, order), order, by)
    assert_same(part(x), x @ w)
    assert_same(accumulate(x, in_order(w, order), order, 32).saturated, x @ w)


@pytest.mark.parametrize("by", ORDERINGS)
def test_products_columns_and_blocks_of_rows_agree(by, monkeypatch):
    x, b, order = rng.normal(size=(3, 5, 24)), rng.normal(size=10), ORDERINGS[by](W)
    part = OrderedLinear(in_order(W, order), order, by, b)
    assert_same(part(x), x @ W + b, atol=1e-13)
    assert_same(part.outputs(x, slice(4, None)), (x @ W + b)[..., 4:], atol=1e-13)
    whole = part(x)
    monkeypatch.setattr(module, "GATHERED", 500)  # two rows at a time
    assert_same(part(x), whole)
    if order.shape[1] > 1:  # added in that order and no other
        one, expected = order[:, 0].astype(int), 0.0
        for i in one:
            expected += x[0, 0, i] * W[i, 0]
        assert part(x)[0, 0, 0] == expected + b[0]


def test_positives_first_sums_below_0_may_stop_if_no_input_is_negative():
    x, b = abs(rng.normal(size=(30, 24))), rng.normal(-1, 1, 10)
    order = orderings.positives_first(W)
    expected, computed = np.maximum(x @ W + b, 0), 0
    for row, right in zip(x, expected):
        for o in range(10):
            found, n = literal.stopped_early(row, W[:, o], order[:, o], b[o])
            assert abs(found - right[o]) < 1e-12
            computed += n
    assert computed < 0.95 * x.size * 10, "some products are saved"
    signed = rng.normal(size=(30, 24))  # with inputs of both signs it is wrong
    found = [literal.stopped_early(r, W[:, 0], order[:, 0], b[0])[0] for r in signed]
    assert abs(found - np.maximum(signed @ W[:, 0] + b[0], 0)).max() > 0.1


# Narrow accumulators -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("by", ORDERINGS)
def test_overflows_equal_the_literal_version(by, bits):
    x, w = rng.integers(-127, 128, (6, 24)), rng.integers(-127, 128, (24, 10))
    order = ORDERINGS[by](w)
    sums = accumulate(x, in_order(w, order), order, bits)
    low, high = limits(bits)
    for t in range(6):
        for o, one in enumerate(expected_orders(w, by)):
            products = [int(x[t, i] * w[i, o]) for i in one]
            found, overflowed = literal.saturating(products, bits)
            total = sum(products)
            assert (sums.saturated[t, o], sums.exact[t, o]) == (found, total)
            assert sums.overflowed[t, o] == overflowed
            fits = low <= total <= high
            assert sums.persistent[t, o] == (not fits)
            assert sums.transient[t, o] == (overflowed and fits)
            if fits:  # neither a wrapping accumulator nor products sorted online overflow
                assert literal.wrapping(products, bits) == total
                if max(map(abs, products)) <= high:
                    assert literal.saturating(literal.sorted_online(products), bits) == (
                        total,
                        False,
                    )


# Inputs 127, 1, 1 (int8, scale 1) and int8 weights, each column an output, scale 1 too. An 8-bit
# accumulator holds -128 to 127. Products added in the original order, and what it ends with:
#   o  weights          products          running sums, saturating    the total
#   0     1 -127    2    127 -127    2    127,    0,    2                 2
#   1     1  127 -127    127  127 -127    127, 254 -> 127,    0           127   transient overflow
#   2     1  127  127    127  127  127    127, 254 -> 127, 254 -> 127     381   persistent
#   3    -1 -127  127   -127 -127  127   -127, -254 -> -128, -1          -127   transient
#   4    -1   -1  127   -127   -1  127   -127, -128,   -1                  -1   -128 just fits
#   5     1    1 -127    127    1 -127    127, 128 -> 127,    0             1   128 does not
#   6    -1 -127 -127   -127 -127 -127   -127, -254 -> -128, -255 -> -128 -381  persistent
EXAMPLE_X = np.array([[127.0, 1, 1]])
EXAMPLE_W = np.array(
    [
        [1.0, 1, 1, -1, -1, 1, -1],
        [-127, 127, 127, -127, -1, 1, -127],
        [2, -127, 127, 127, 127, -127, -127],
    ]
)
SATURATED = [2, 0, 127, -1, -1, 0, -128]
TOTAL = [2, 127, 381, -127, -1, 1, -381]
TRANSIENT = np.array([0, 1, 0, 1, 0, 1, 0], bool)
PERSISTENT = np.array([0, 0, 1, 0, 0, 0, 1], bool)


def test_accumulator_of_8_bits_saturates_by_hand():
    order = orderings.original(EXAMPLE_W)
    sums = accumulate(EXAMPLE_X, EXAMPLE_W, order, 8)
    expected = dict(saturated=SATURATED, exact=TOTAL, transient=TRANSIENT, persistent=PERSISTENT)
    for name, row in expected.items():
        assert_same(getattr(sums, name), [row], name)
    either = TRANSIENT | PERSISTENT
    assert_same(sums.overflowed, [either], "a running sum overflowed")
    b = np.arange(7.0)
    part = SaturatingLinear.of(EXAMPLE_W, b, order, "original", 8)
    with counting(part) as counts:
        y = part(np.concatenate([EXAMPLE_X, [[127.0, 0, 0]]]))  # the second: 127 w[0], which fits
    assert_same(y[0], SATURATED + b, "saturated sums and the bias")
    assert_same(y[1], 127 * EXAMPLE_W[0] + b, "products that fit")
    expected = {"dot products": 14, "persistent overflows": 2, "transient overflows": 3}
    assert counts.events == expected, f"expected {expected}, counted {dict(counts.events)}"


def test_alternating_avoids_a_transient_overflow_by_hand():
    """Output 1 again, weights 1, 127, -127. In this order, and positives first (127, 1, -127), the
    sum is 127 after the first product and would be 254 after the second: it ends at 0. Alternating
    takes 127, then -127 since the weights so far sum to more than 0, then 1: 127, 0, 127."""
    w = EXAMPLE_W[:, 1:2]
    for by, right, overflows in (
        ("original", 0, 1),
        ("positives_first", 0, 1),
        ("alternating", 127, 0),
    ):
        part = SaturatingLinear.of(w, None, ORDERINGS[by](w), by, 8)
        with counting(part) as counts:
            y = part(EXAMPLE_X)
        assert y.tolist() == [[right]], f"{by}: expected {right}, got {y}"
        found = counts.events["transient overflows"]
        assert found == overflows, f"{by}: expected {overflows} transient overflows, got {found}"


def test_scales_of_inputs_and_weights_multiply_the_saturated_sum_by_hand():
    """Input 127/4 1/4 1/4: codes 127 1 1 and scale 1/4. Weights twice those of the example have the
    same codes and scale 2. So the sums are those of the example, times 1/2."""
    part = SaturatingLinear.of(EXAMPLE_W * 2, None, orderings.original(EXAMPLE_W), "original", 8)
    found = part(EXAMPLE_X / 4)
    assert_same(found, [np.array(SATURATED) / 2], "scaled sums")


def test_overflows_counted_in_a_model_equal_the_literal_version():
    lm = apply(tiny_lm("gpt2"), {"order_products": {"accumulator_bits": 8, "matrices": "ffn"}})
    ids, expected = IDS[:6], Counter()
    narrow = {id(node): node for _, node in walk(lm) if type(node) is SaturatingLinear}
    assert len(narrow) == 4 and {node.accumulator_bits for node in narrow.values()} == {8}
    assert {node.ordering for node in narrow.values()} == {"positives_first"}
    read = watch_inputs(lm, SaturatingLinear, [ids], Rows)
    for key, node in narrow.items():
        codes = quantize_symmetric(read[key].all, 8)[0].astype(int)
        for row in codes.tolist():
            for o in range(node.codes.shape[1]):
                products = [row[i] * int(c) for i, c in zip(node.order[:, o], node.codes[:, o])]
                overflowed = literal.saturating(products, 8)[1]
                fits = -128 <= sum(products) <= 127
                expected["dot products"] += 1
                expected["persistent overflows"] += not fits
                expected["transient overflows"] += overflowed and fits
    with counting(lm) as counts:
        lm.logits(ids)
    assert counts.events == expected, f"expected {dict(expected)}, counted {dict(counts.events)}"
    assert min(expected.values()) > 0, f"the example needs overflows of both kinds: {expected}"


def test_bits_for_a_range_and_bits_needed_by_an_order():
    assert [bits_for(*limits(b)) for b in (8, 12, 16)] == [8, 12, 16]
    assert bits_for(0, 127) == 8 and bits_for(0, 128) == 9 and bits_for(-129, 0) == 9
    assert bits_for(-127 * 127, 127 * 127) == 15  # one product
    x, w = rng.integers(-127, 128, (20, 24)), rng.integers(-127, 128, (24, 10))
    for by in ORDERINGS:
        order = ORDERINGS[by](w)
        bits = bits_needed(x, in_order(w, order), order)
        assert not accumulate(x, in_order(w, order), order, bits).overflowed.any()
        assert accumulate(x, in_order(w, order), order, bits - 1).overflowed.any()


def test_alternating_is_best_and_positives_first_worst_if_inputs_are_alike_and_positive():
    x = rng.integers(90, 128, (50, 128))
    codes, _ = quantize_symmetric(rng.normal(size=(10, 128)), 8)
    w, transient, needed = codes.T.astype(int), {}, {}
    whole = x @ w
    for by in ("positives_first", "original", "alternating"):
        order = ORDERINGS[by](w)
        transient[by] = accumulate(x, in_order(w, order), order, 17).transient.mean()
        needed[by] = bits_needed(x, in_order(w, order), order)
    assert transient["alternating"] == 0 < transient["original"] < transient["positives_first"]
    assert needed["alternating"] == bits_for(whole.min(), whole.max()) < needed["positives_first"]


def test_saturating_linear_is_the_int8_product_if_nothing_overflows():
    x, b = rng.normal(size=(2, 7, 24)), rng.normal(size=10)
    part = SaturatingLinear.of(W, b, orderings.alternating(W), "alternating", 22)
    codes, scale = quantize_symmetric(W.T, 8)
    xs, x_scale = quantize_symmetric(x, 8)
    expected = (xs * x_scale[..., None]) @ (codes * scale[:, None]).T + b
    assert_same(part(x), expected, atol=1e-12)
    assert_same(part(x), x @ W + b, atol=0.2)
    assert_same(part.outputs(x, slice(3, None)), part(x)[..., 3:])
    assert part.codes.dtype == np.int8
    narrow = replace(part, accumulator_bits=14)
    assert abs(narrow(x) - expected).max() > 0.2


def test_on_stories_positives_first_overflows_and_no_order_saves_a_bit():
    """W_down of a ReLU model, whose inputs are not negative."""
    lm = minitx.load("stories-relu")
    down = lm.model.stack.blocks[-1].ffn.down
    x = watch_inputs(lm, Linear, calibration_ids("test", lm, 1), Rows)[id(down)].all[::16]
    x, codes = (
        quantize_symmetric(x, 8)[0].astype(int),
        quantize_symmetric(down.w.T, 8)[0].T.astype(int),
    )
    assert x.min() == 0 and (x == 0).mean() > 0.5
    total, transient, needed = bits_for((x @ codes).min(), (x @ codes).max()), {}, {}
    for by in ("positives_first", "alternating", "original"):
        order = ORDERINGS[by](down.w)
        w = in_order(codes, order)
        transient[by] = accumulate(x, w, order, total - 1).transient.mean()
        needed[by] = bits_needed(x, w, order)
    assert transient["positives_first"] > 3 * max(transient["original"], transient["alternating"])
    assert needed["original"] <= total + 1 and needed["alternating"] <= total + 1


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_dense_ones_and_orders_are_counted(family, by):
    dense = tiny_lm(family, dtype=np.float64)
    lm = apply(dense, {"order_products": {"order": by}})
    expected, totals = dense.logits(IDS), []
    assert abs(lm.logits(IDS) - expected).max() <= 1e-12 * abs(expected).max()
    assert f"ordering={by}" in repr(lm)
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits(IDS)
        totals.append(counts.total())
    linears = [node for _, node in walk(dense) if type(node) is Linear]
    orders = sum(m.w.size if ORDERINGS[by](m.w).shape[1] > 1 else len(m.w) for m in linears)
    assert totals[1].multiply_adds == totals[0].multiply_adds
    assert totals[1].weight_bytes - totals[0].weight_bytes == orders == nbytes(lm) - nbytes(dense)


@pytest.mark.parametrize("options", [{}, {"accumulator_bits": 14}])
def test_batch_rows_equal_single_prompts(options):
    lm = apply(tiny_lm("gpt2"), {"order_products": options})
    prompts = [[7, 2, 9, 0], [3]]
    assert lm.generate(prompts, 3) == [lm.generate(p, 3) for p in prompts]


def test_wide_accumulators_never_overflow_and_narrow_ones_do():
    dense = tiny_lm("gpt2")
    errors, counted = [], []
    for bits in (32, 14, 10):
        lm = apply(dense, {"order_products": {"order": "original", "accumulator_bits": bits}})
        with counting(lm) as counts:
            errors.append(abs(lm.logits(IDS) - dense.logits(IDS)).max())
        counted.append(counts.events)
        assert lm.logits(IDS).dtype == np.float32
    outputs = sum(n.w.shape[1] for _, n in walk(dense) if type(n) is Linear)
    assert all(events["dot products"] == outputs * len(IDS) for events in counted)
    names = "persistent overflows", "transient overflows"
    assert not any(counted[0][name] for name in names)
    assert counted[1][names[0]] > 0 and counted[1][names[1]] > 0
    assert counted[2][names[0]] > counted[1][names[0]] and errors[0] < errors[1] < errors[2]


def test_only_the_chosen_matrices_are_reordered():
    lm = apply(tiny_lm("gpt2"), {"order_products": {"matrices": "ffn"}})
    assert all(
        type(node) is not Linear if ".ffn." in path else type(node) is not OrderedLinear
        for path, node in walk(lm)
    )


@pytest.mark.parametrize("bits", [7, 33])
def test_bad_accumulator_widths_are_refused(bits):
    message = f"accumulator_bits must be an integer, 8 to 32, or None; got {bits}"
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"order_products": {"accumulator_bits": bits}})
    assert limits(8) == (-128, 127)


@pytest.mark.parametrize("other", ["separate_magnitudes", "separate_signs", "prune"])
def test_matrices_that_are_reordered_already_are_refused_by_name(other):
    """Also if other matrices of the model are still plain ones."""
    wanted = {"order_products": {"matrices": "ffn"}, other: {"matrices": "ffn"}}
    try:
        apply(tiny_lm(), wanted)
    except MinitxError as error:
        assert "use one of the two" in str(error) and "none" not in str(error)
        assert "order_products" in str(error) and other in str(error)
    else:
        assert other == "prune", "which goes first"
