"""Matrices without signs: the difference of two sums, exact on whole numbers, and its bounds."""

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.separate_signs import SeparatedSigns, UnsignedLinear, separated
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import apply
from minitx.tree import walk

rng = np.random.default_rng(0)
W, B = rng.normal(size=(24, 10)), rng.normal(size=10)
IDS = np.arange(20) * 7 % 258


def test_each_weight_stands_in_one_of_the_two():
    plus, minus = separated(np.array([[0.5, -2.0], [0.0, 3.0]]))
    assert plus.tolist() == [[0.5, 0], [0, 3]] and minus.tolist() == [[0, 2], [0, 0]]
    plus, minus = separated(W)
    np.testing.assert_array_equal(plus - minus, W)
    assert not (plus * minus).any() and plus.min() >= 0 and minus.min() >= 0


def test_float_sums():
    part, x = SeparatedSigns(*separated(W), B), rng.normal(size=(3, 5, 24))
    np.testing.assert_allclose(part(x), x @ W + B, atol=1e-13)
    np.testing.assert_allclose(part.outputs(x, slice(4, None)), (x @ W + B)[..., 4:], atol=1e-13)
    x = abs(x)  # then the positive half is an upper bound
    assert (x @ part.plus + B >= part(x) - 1e-12).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_numbers_are_separated_bit_for_bit(bits, dtype):
    w, x = W.astype(dtype), rng.normal(size=(3, 5, 24)).astype(dtype)
    part = UnsignedLinear.of(Linear(w, B.astype(dtype)), bits)
    assert part.plus.dtype == part.minus.dtype == np.uint8
    assert max(part.plus.max(), part.minus.max()) == 2 ** (bits - 1) - 1  # bits - 1 bits
    signed = part.plus.astype(int) - part.minus
    codes, scale = quantize_symmetric(x, 8)
    codes = codes.astype(int)
    up, down = part.sums(*separated(codes))
    np.testing.assert_array_equal(up - down, codes @ signed)
    largest = 127 * abs(signed).sum(0)  # known beforehand
    assert up.min() >= 0 and down.min() >= 0 and (np.maximum(up, down) <= largest).all()
    expected = (codes @ signed) * scale[..., None] * part.scale + B
    np.testing.assert_allclose(part(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(part.outputs(x, slice(3, None)), part(x)[..., 3:])
    assert part(x).dtype == dtype


def test_two_bits_leave_two_masks():
    part = UnsignedLinear.of(Linear(W), 2)
    assert set(np.unique(part.plus)) == set(np.unique(part.minus)) == {0, 1}


def test_many_inputs_are_still_exact():
    """More than float32 can hold the sums of."""
    w = np.where(rng.random((3000, 2)) < 0.999, 1.0, -1.0).astype(np.float32)
    w[0] = -1
    part = UnsignedLinear.of(Linear(w), 8)
    x = np.full((1, 3000), 127)
    x[0, -1] = 126
    up, down = part.sums(*separated(x))
    np.testing.assert_array_equal(up - down, x @ (127 * w.astype(np.int64)))
    assert up.max() > 1 << 24


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_counts(family):
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


def test_a_batch_is_its_rows():
    lm = apply(tiny_lm(), {"separate_signs": {"bits": 6}})
    prompts = [[7, 2, 9, 0], [3], [10, 9]]
    assert lm.generate(prompts, 6) == [lm.generate(p, 6) for p in prompts]


@pytest.mark.parametrize("bits", [1, 9])
def test_refusals(bits):
    with pytest.raises(MinitxError, match=f"^separate_signs takes weights .* not {bits};"):
        apply(tiny_lm(), {"separate_signs": {"bits": bits}})
