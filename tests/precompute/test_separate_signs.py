"""separate_signs: the difference of two unsigned sums, exact on integers, and its bounds."""

import literal_separate_signs as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.separate_signs import SplitLinear, UnsignedLinear, split_signs
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import apply
from minitx.tree import walk

rng = np.random.default_rng(0)
W, B = rng.normal(size=(24, 10)), rng.normal(size=10)
IDS = np.arange(20) * 7 % 258


def test_worked_example_by_hand():
    """x = 2 1, weights of the first output .5 and 0, of the second -2 and 3:
    y = (2 * .5, 1 * 3) - (0, 2 * 2) = 1 -1."""
    plus, minus = split_signs(np.array([[0.5, -2.0], [0.0, 3.0]]))
    assert plus.tolist() == [[0.5, 0], [0, 3]] and minus.tolist() == [[0, 2], [0, 0]]
    assert SplitLinear(plus, minus)(np.array([2.0, 1.0])).tolist() == [1, -1]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_separate_signs_equals_the_literal_version(bits):
    part, x = UnsignedLinear.of(Linear(W), bits), rng.normal(size=(1, 24))
    codes, _ = quantize_symmetric(x, 8)
    up, down = part.sums(*split_signs(codes))
    for o, w in enumerate(W.T.tolist()):
        y, its_up, its_down = literal.unsigned_product(x[0].tolist(), w, bits)
        assert (up[0, o], down[0, o]) == (its_up, its_down), f"sums of output {o}"
        assert_same(part(x)[0, o], y, tolerance=1e-12)
        y = literal.difference_of_sums(x[0].tolist(), w)
        assert_same(SplitLinear(*split_signs(W))(x)[0, o], y, tolerance=1e-9)


def test_each_weight_is_in_one_of_the_two_matrices():
    plus, minus = split_signs(W)
    assert_same(plus - minus, W)
    assert not (plus * minus).any() and plus.min() >= 0 and minus.min() >= 0


def test_float_difference_equals_the_product():
    part, x = SplitLinear(*split_signs(W), B), rng.normal(size=(3, 5, 24))
    assert_same(part(x), x @ W + B, atol=1e-13)
    assert_same(part.outputs(x, slice(4, None)), (x @ W + B)[..., 4:], atol=1e-13)
    x = abs(x)
    assert (x @ part.plus + B >= part(x) - 1e-12).all(), "x W+ + b is no upper bound"


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_integer_sums_are_exact_and_bounded(bits, dtype):
    w, x = W.astype(dtype), rng.normal(size=(3, 5, 24)).astype(dtype)
    part = UnsignedLinear.of(Linear(w, B.astype(dtype)), bits)
    assert part.plus.dtype == part.minus.dtype == np.uint8
    assert max(part.plus.max(), part.minus.max()) == 2 ** (bits - 1) - 1  # in bits - 1 bits
    signed = part.plus.astype(int) - part.minus
    codes, scale = quantize_symmetric(x, 8)
    codes = codes.astype(int)
    up, down = part.sums(*split_signs(codes))
    assert_same(up - down, codes @ signed)
    largest = 127 * abs(signed).sum(0)  # known before any input
    assert up.min() >= 0 and down.min() >= 0 and (np.maximum(up, down) <= largest).all()
    expected = (codes @ signed) * scale[..., None] * part.scale + B
    assert_same(part(x), expected, tolerance=1e-5, atol=1e-5)
    assert_same(part.outputs(x, slice(3, None)), part(x)[..., 3:])
    assert part(x).dtype == dtype


def test_2_bit_weights_become_two_masks():
    part = UnsignedLinear.of(Linear(W), 2)
    assert set(np.unique(part.plus)) == set(np.unique(part.minus)) == {0, 1}


def test_sums_beyond_float32_are_exact():
    w = np.where(rng.random((3000, 2)) < 0.999, 1.0, -1.0).astype(np.float32)
    w[0] = -1
    part = UnsignedLinear.of(Linear(w), 8)
    x = np.full((1, 3000), 127)
    x[0, -1] = 126
    up, down = part.sums(*split_signs(x))
    assert_same(up - down, x @ (127 * w.astype(np.int64)))
    assert up.max() > 1 << 24


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_multiply_adds(family):
    dense = tiny_lm(family, dtype=np.float64)
    expected, totals = dense.logits(IDS), []
    for options in ({}, {"bits": 8}):
        lm = apply(dense, {"separate_signs": options})
        error = abs(lm.logits(IDS) - expected).max() / abs(expected).max()
        assert error <= (0.2 if options else 1e-12)
        with counting(lm) as counts:
            lm.logits(IDS)
        totals.append(counts.total().multiply_adds)
    with counting(dense) as counts:
        dense.logits(IDS)
    work = counts.total().multiply_adds
    linears = sum(n.w.size for _, n in walk(dense) if type(n) is Linear) * len(IDS)
    assert totals == [work + linears, work + 3 * linears]  # zeros are multiplied too


def test_a_batch_equals_its_rows():
    lm = apply(tiny_lm(), {"separate_signs": {"bits": 6}})
    prompts = [[7, 2, 9, 0], [3], [10, 9]]
    assert lm.generate(prompts, 6) == [lm.generate(p, 6) for p in prompts]


@pytest.mark.parametrize("bits", [1, 9])
def test_bad_options_are_refused(bits):
    message = f"bits must be an integer, 2 to 8, or None; got {bits}."
    with pytest.raises(MinitxError, match=f"^separate_signs: {message}"):
        apply(tiny_lm(), {"separate_signs": {"bits": bits}})
