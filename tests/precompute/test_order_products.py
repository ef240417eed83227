"""Orders of weights against a literal twin: what is exact, what overflows, what an order costs."""

from collections import Counter
from dataclasses import replace

import literal_order_products as literal
import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

import minitx
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.order_products import accumulators
from minitx.precompute.order_products.accumulators import (
    NarrowLinear,
    accumulate,
    bits_for,
    bits_needed,
    limits,
)
from minitx.shared import ordering
from minitx.shared.ordering import ORDERS, OrderedLinear, in_order
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import apply
from minitx.training.calibration import Rows, calibration_texts, watch_inputs
from minitx.tree import nbytes, walk

rng = np.random.default_rng(0)
W = rng.normal(size=(24, 10))
W[3, :4], W[7, 2:6] = 0, W[8, 2:6]  # zeros, and weights that are equal
IDS = np.arange(20) * 7 % 258


def wanted(w, by):
    """The order of each output, by the twin."""
    if by == "largest_rows_first":
        return [literal.largest_rows_first(w.tolist())] * w.shape[1]
    if by == "stored":
        return [list(range(len(w)))] * w.shape[1]
    return [getattr(literal, by)(column) for column in w.T.tolist()]


# The orders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERS)
def test_orders_are_those_of_the_literal_twin(by):
    order = np.broadcast_to(ORDERS[by](W), W.shape)
    np.testing.assert_array_equal(order.T, wanted(W, by))
    assert order.dtype == np.uint8
    assert ORDERS[by](rng.normal(size=(300, 2))).dtype == np.uint16


def test_a_worked_example():
    w = np.array([[0.5], [-3.0], [2.0], [-1.0], [0.0]])
    order = ordering.positives_first(w)
    assert order[:, 0].tolist() == [2, 0, 1, 3, 4]
    assert in_order(w, order)[:, 0].tolist() == [2.0, 0.5, -3.0, -1.0, 0.0]
    assert ordering.alternating(w)[:, 0].tolist() == [2, 1, 0, 3, 4]  # 2, -1, -0.5, -1.5
    assert ordering.largest_first(w)[:, 0].tolist() == [1, 2, 3, 0, 4]


def test_sums_of_alternating_weights_stay_small():
    """Until one sign is used up, within the largest magnitude; then straight to the whole sum."""
    for seed in range(20):
        w = np.random.default_rng(seed).normal(0.3, 1, (40, 6))
        running = in_order(w, ordering.alternating(w)).cumsum(0)
        bound = np.maximum(abs(w).max(0), abs(w.sum(0)))
        assert (abs(running) <= bound + 1e-12).all()
        assert (abs(in_order(w, ordering.positives_first(w)).cumsum(0)) > bound).any()


# Sums in order -----------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERS)
def test_whole_numbers_are_added_bit_for_bit(by):
    x, w = rng.integers(-127, 128, (9, 24)), rng.integers(-127, 128, (24, 10))
    order = ORDERS[by](w)
    part = OrderedLinear(in_order(w, order), order, by)
    np.testing.assert_array_equal(part(x), x @ w)
    np.testing.assert_array_equal(accumulate(x, in_order(w, order), order, 32).found, x @ w)


@pytest.mark.parametrize("by", ORDERS)
def test_sums_outputs_and_pieces(by, monkeypatch):
    x, b, order = rng.normal(size=(3, 5, 24)), rng.normal(size=10), ORDERS[by](W)
    part = OrderedLinear(in_order(W, order), order, by, b)
    np.testing.assert_allclose(part(x), x @ W + b, atol=1e-13)
    np.testing.assert_allclose(part.outputs(x, slice(4, None)), (x @ W + b)[..., 4:], atol=1e-13)
    whole = part(x)
    monkeypatch.setattr(ordering, "GATHERED", 500)  # two rows at a time
    np.testing.assert_array_equal(part(x), whole)
    if order.shape[1] > 1:  # in that order and no other
        one, expected = order[:, 0].astype(int), 0.0
        for i in one:
            expected += x[0, 0, i] * W[i, 0]
        assert part(x)[0, 0, 0] == expected + b[0]


def test_with_inputs_that_are_not_negative_a_sum_below_zero_may_stop():
    x, b = abs(rng.normal(size=(30, 24))), rng.normal(-1, 1, 10)
    order = ordering.positives_first(W)
    expected, made = np.maximum(x @ W + b, 0), 0
    for row, right in zip(x, expected):
        for o in range(10):
            found, n = literal.stopped_early(row, W[:, o], order[:, o], b[o])
            assert abs(found - right[o]) < 1e-12
            made += n
    assert made < 0.95 * x.size * 10  # and it does
    signed = rng.normal(size=(30, 24))  # with inputs of both signs it would be wrong
    found = [literal.stopped_early(r, W[:, 0], order[:, 0], b[0])[0] for r in signed]
    assert abs(found - np.maximum(signed @ W[:, 0] + b[0], 0)).max() > 0.1


# Narrow accumulators -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("by", ORDERS)
def test_overflows_are_those_of_the_literal_twin(by, bits):
    x, w = rng.integers(-127, 128, (6, 24)), rng.integers(-127, 128, (24, 10))
    order = ORDERS[by](w)
    sums = accumulate(x, in_order(w, order), order, bits)
    low, high = limits(bits)
    for t in range(6):
        for o, one in enumerate(wanted(w, by)):
            products = [int(x[t, i] * w[i, o]) for i in one]
            found, left = literal.saturating(products, bits)
            whole = sum(products)
            assert (sums.found[t, o], sums.left[t, o], sums.exact[t, o]) == (found, left, whole)
            fits = low <= whole <= high
            assert sums.persistent[t, o] == (not fits)
            assert sums.transient[t, o] == (left and fits)
            if fits:  # an accumulator that wraps around needs no order, nor do sorted products
                assert literal.wrapping(products, bits) == whole
                if max(map(abs, products)) <= high:
                    assert literal.saturating(literal.balanced(products), bits) == (whole, False)


# Inputs 127, 1, 1 (8 bits, scale 1) with weights of 8 bits, each column an output, scale 1 too. An
# accumulator of 8 bits holds -128 to 127. Products added as stored, and what is left in it:
#   o  weights          products          running sums, saturating    the whole sum
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
WHOLE = [2, 127, 381, -127, -1, 1, -381]
TRANSIENT = [0, 1, 0, 1, 0, 1, 0]
PERSISTENT = [0, 0, 1, 0, 0, 0, 1]


def test_order_products_accumulator_8_saturates_by_hand():
    order = ordering.stored(EXAMPLE_W)
    sums = accumulate(EXAMPLE_X, EXAMPLE_W, order, 8)
    expected = dict(found=SATURATED, exact=WHOLE, transient=TRANSIENT, persistent=PERSISTENT)
    for name, row in expected.items():
        np.testing.assert_array_equal(getattr(sums, name), [row], err_msg=name)
    left = np.add(TRANSIENT, PERSISTENT)
    np.testing.assert_array_equal(sums.left, [left], err_msg="some running sum left the range")
    b = np.arange(7.0)
    part = NarrowLinear.of(EXAMPLE_W, b, order, "stored", 8)
    with counting(part) as counts:
        y = part(np.concatenate([EXAMPLE_X, [[127.0, 0, 0]]]))  # the second: 127 w[0], which fits
    np.testing.assert_array_equal(y[0], SATURATED + b, err_msg="saturated sums and the bias")
    np.testing.assert_array_equal(y[1], 127 * EXAMPLE_W[0] + b, err_msg="products that fit")
    expected = {
        "sums": 14,
        "sums that do not fit": 2,
        "sums that overflow on the way": 3,
    }
    assert counts.events == expected, f"expected {expected}, counted {dict(counts.events)}"


def test_order_products_accumulator_8_alternating_avoids_a_transient_overflow_by_hand():
    """Output 1 again, weights 1, 127, -127: as stored, and positives first (127, 1, -127), the sum
    is 127 after the first product and would be 254 after the second: it ends at 0. Alternating
    takes 127, then -127 since the weights so far add up to more than 0, then 1: 127, 0, 127."""
    w = EXAMPLE_W[:, 1:2]
    for by, right, overflows in (
        ("stored", 0, 1),
        ("positives_first", 0, 1),
        ("alternating", 127, 0),
    ):
        part = NarrowLinear.of(w, None, ORDERS[by](w), by, 8)
        with counting(part) as counts:
            y = part(EXAMPLE_X)
        assert y.tolist() == [[right]], f"{by}: expected {right}, got {y}"
        found = counts.events["sums that overflow on the way"]
        assert found == overflows, f"{by}: expected {overflows} transient overflows, got {found}"


def test_order_products_accumulator_8_scales_of_input_and_weights_by_hand():
    """Input 127/4 1/4 1/4: codes 127 1 1 and scale 1/4. Weights twice those of the example have the
    same codes and scale 2. So the sums are those of the example, times 1/2."""
    part = NarrowLinear.of(EXAMPLE_W * 2, None, ordering.stored(EXAMPLE_W), "stored", 8)
    found = part(EXAMPLE_X / 4)
    np.testing.assert_array_equal(found, [np.array(SATURATED) / 2], err_msg="scaled sums")


def test_order_products_accumulator_8_in_a_model_counts_the_overflows_of_the_literal_twin():
    lm = apply(tiny_lm("gpt2"), {"order_products": {"accumulator": 8, "matrices": "ffn"}})
    ids, expected = IDS[:6], Counter()
    narrow = {id(node): node for _, node in walk(lm) if type(node) is NarrowLinear}
    assert len(narrow) == 4 and {node.accumulator for node in narrow.values()} == {8}
    assert {node.by for node in narrow.values()} == {"positives_first"}
    read = watch_inputs(lm, NarrowLinear, [ids], Rows)
    for key, node in narrow.items():
        codes = quantize_symmetric(read[key].all, 8)[0].astype(int)
        for row in codes.tolist():
            for o in range(node.codes.shape[1]):
                products = [row[i] * int(c) for i, c in zip(node.order[:, o], node.codes[:, o])]
                left, fits = literal.saturating(products, 8)[1], -128 <= sum(products) <= 127
                expected["sums"] += 1
                expected["sums that do not fit"] += not fits
                expected["sums that overflow on the way"] += left and fits
    with counting(lm) as counts:
        lm.logits(ids)
    assert counts.events == expected, f"expected {dict(expected)}, counted {dict(counts.events)}"
    assert min(expected.values()) > 0, f"the example has overflows of both kinds: {expected}"


def test_bits():
    assert [bits_for(*limits(b)) for b in (8, 12, 16)] == [8, 12, 16]
    assert bits_for(0, 127) == 8 and bits_for(0, 128) == 9 and bits_for(-129, 0) == 9
    assert bits_for(-127 * 127, 127 * 127) == 15  # one product
    x, w = rng.integers(-127, 128, (20, 24)), rng.integers(-127, 128, (24, 10))
    for by in ORDERS:
        order = ORDERS[by](w)
        bits = bits_needed(x, in_order(w, order), order)
        assert not accumulate(x, in_order(w, order), order, bits).left.any()
        assert accumulate(x, in_order(w, order), order, bits - 1).left.any()


def test_alternating_is_best_and_signs_first_worst_where_inputs_are_alike_and_not_negative():
    x = rng.integers(90, 128, (50, 128))
    codes, _ = quantize_symmetric(rng.normal(size=(10, 128)), 8)
    w, left, needed = codes.T.astype(int), {}, {}
    whole = x @ w
    for by in ("positives_first", "stored", "alternating"):
        order = ORDERS[by](w)
        left[by] = accumulate(x, in_order(w, order), order, 17).transient.mean()
        needed[by] = bits_needed(x, in_order(w, order), order)
    assert left["alternating"] == 0 < left["stored"] < left["positives_first"]
    assert needed["alternating"] == bits_for(whole.min(), whole.max()) < needed["positives_first"]


def test_a_narrow_linear_is_the_rounded_product_where_nothing_overflows():
    x, b = rng.normal(size=(2, 7, 24)), rng.normal(size=10)
    part = NarrowLinear.of(W, b, ordering.alternating(W), "alternating", 22)
    codes, scale = quantize_symmetric(W.T, 8)
    xs, x_scale = quantize_symmetric(x, 8)
    expected = (xs * x_scale[..., None]) @ (codes * scale[:, None]).T + b
    np.testing.assert_allclose(part(x), expected, atol=1e-12)
    np.testing.assert_allclose(part(x), x @ W + b, atol=0.2)
    np.testing.assert_array_equal(part.outputs(x, slice(3, None)), part(x)[..., 3:])
    assert part.codes.dtype == np.int8
    narrow = replace(part, accumulator=14)
    assert abs(narrow(x) - expected).max() > 0.2


def test_on_a_story_signs_first_overflows_and_no_order_saves_a_bit():
    """What the hidden neurons of a ReLU model are multiplied with: inputs that are not negative."""
    lm = minitx.load("stories-relu")
    down = lm.model.stack.blocks[-1].ffn.down
    x = watch_inputs(lm, Linear, calibration_texts(lm, 1), Rows)[id(down)].all[::16]
    x, codes = (
        quantize_symmetric(x, 8)[0].astype(int),
        quantize_symmetric(down.w.T, 8)[0].T.astype(int),
    )
    assert x.min() == 0 and (x == 0).mean() > 0.5
    whole, left, needed = bits_for((x @ codes).min(), (x @ codes).max()), {}, {}
    for by in ("positives_first", "alternating", "stored"):
        order = ORDERS[by](down.w)
        w = in_order(codes, order)
        left[by] = accumulate(x, w, order, whole - 1).transient.mean()
        needed[by] = bits_needed(x, w, order)
    assert left["positives_first"] > 3 * max(left["stored"], left["alternating"])
    assert needed["stored"] <= whole + 1 and needed["alternating"] <= whole + 1


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_counts(family, by):
    dense = tiny_lm(family, dtype=np.float64)
    lm = apply(dense, {"order_products": {"order": by}})
    expected, totals = dense.logits(IDS), []
    assert abs(lm.logits(IDS) - expected).max() <= 1e-12 * abs(expected).max()
    assert f"by={by}" in repr(lm)
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits(IDS)
        totals.append(counts.total())
    linears = [node for _, node in walk(dense) if type(node) is Linear]
    orders = sum(m.w.size if ORDERS[by](m.w).shape[1] > 1 else len(m.w) for m in linears)
    assert totals[1].multiply_adds == totals[0].multiply_adds
    assert totals[1].weight_bytes - totals[0].weight_bytes == orders == nbytes(lm) - nbytes(dense)


@pytest.mark.parametrize("options", [{}, {"accumulator": 14}])
def test_a_batch_is_its_rows(options):
    lm = apply(tiny_lm("gpt2"), {"order_products": options})
    prompts = [[7, 2, 9, 0], [3]]
    assert lm.generate(prompts, 3) == [lm.generate(p, 3) for p in prompts]


def test_overflows_are_counted_and_wide_accumulators_have_none():
    dense = tiny_lm("gpt2")
    errors, counted = [], []
    for bits in (32, 14, 10):
        lm = apply(dense, {"order_products": {"order": "stored", "accumulator": bits}})
        with counting(lm) as counts:
            errors.append(abs(lm.logits(IDS) - dense.logits(IDS)).max())
        counted.append(counts.events)
        assert lm.logits(IDS).dtype == np.float32
    outputs = sum(n.w.shape[1] for _, n in walk(dense) if type(n) is Linear)
    assert all(events["sums"] == outputs * len(IDS) for events in counted)
    names = "sums that do not fit", "sums that overflow on the way"
    assert not any(counted[0][name] for name in names)
    assert counted[1][names[0]] > 0 and counted[1][names[1]] > 0
    assert counted[2][names[0]] > counted[1][names[0]] and errors[0] < errors[1] < errors[2]


def test_some_of_the_matrices():
    lm = apply(tiny_lm("gpt2"), {"order_products": {"matrices": "ffn"}})
    assert all(
        type(node) is not Linear if ".ffn." in path else type(node) is not OrderedLinear
        for path, node in walk(lm)
    )


@pytest.mark.parametrize("bits", [7, 33])
def test_refusals(bits):
    with pytest.raises(MinitxError, match=f"^order_products takes accumulators .* not {bits};"):
        apply(tiny_lm(), {"order_products": {"accumulator": bits}})
    assert accumulators.limits(8) == (-128, 127)
