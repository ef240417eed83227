"""lut_bit_serial: sums read from tables equal the integer product bit for bit."""

import literal_lut_bit_serial as literal
import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm

from minitx.errors import MinitxError
from minitx.precompute.lut_bit_serial import (
    BitSerialLinear,
    integer_product,
    quantize,
    signed_sums,
    table_index,
)
from minitx.technique import apply

RNG = np.random.default_rng(3)


def test_worked_example_by_hand():
    """x = 3 -1 2 5; weights u = 3 0 2 1 of 2 bits, zero point 2: w = 1 -2 0 -1.

    Table: entry 0 is -3 + 1 - 2 - 5 = -9, all minus; entry 9 = 1001b has + at x_0 and x_3:
    3 + 1 - 2 + 5 = 7; entry 5 = 0101b has + at x_0 and x_2: 3 + 1 + 2 - 5 = 1.
    Low bits of u: 1 0 0 1 -> index 9 -> 7. High bits: 1 0 1 0 -> index 5 -> 1.
    sum x = 9; x u = (7 + 9) / 2 + 2 (1 + 9) / 2 = 18; y = 18 - 2 * 9 = 0.
    """
    x, u = np.array([[3.0, -1, 2, 5]]), np.array([[3], [0], [2], [1]])
    sums = [-9, -3, -11, -5, -5, 1, -7, -1, 1, 7, -1, 5, 5, 11, 3, 9]
    assert_same(signed_sums(x, 4), [[sums]], "table")
    assert (sums[9], sums[5]) == (7, 1)
    index = table_index(u, 2, 4)
    assert_same(index[:, 0, 0], [9, 5], "index of each bit")
    assert integer_product(x, index, 4) == 18
    assert BitSerialLinear(index, np.ones(1), np.full(1, 2.0), 4)(x) == 0
    y, tables, places = literal.lut_bit_serial(x[0].tolist(), u.tolist(), [2], [1], 2, 4)
    assert (y, tables, places) == ([0], [sums], [[[9]], [[5]]]), "the literal version differs"


@pytest.mark.parametrize("bits, group", [(1, 1), (3, 4), (2, 3), (8, 2)])
def test_lut_bit_serial_equals_the_literal_version(bits, group):
    x, w, b = RNG.normal(size=(6, 18)), RNG.normal(size=(18, 9)), RNG.normal(size=9)
    u, scale, zero = quantize(w, bits)
    part = BitSerialLinear.of(w, b, bits, group)
    for row in x:
        y, tables, index = literal.lut_bit_serial(
            row.tolist(), u.astype(int).tolist(), zero, scale, bits, group
        )
        assert_same(part.index, index, "index")
        padded = np.pad(row, (0, -len(row) % group))
        assert_same(signed_sums(padded[None], group)[0], tables, atol=1e-13)
        assert_same(part(row), y + b, "outputs", atol=1e-12)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_table_reads_equal_the_integer_product_bit_for_bit(bits, group):
    """18 inputs, which 4 does not divide, and a zero point for each output."""
    x = RNG.integers(-100, 101, (7, 18)).astype(np.float64)
    u, zero = RNG.integers(0, 2**bits, (18, 11)), RNG.integers(0, 2**bits, 11).astype(np.float64)
    part = BitSerialLinear(table_index(u, bits, group), np.ones(11), zero, group)
    assert_same(part(x), x @ (u - zero))


def test_the_second_half_of_a_table_is_the_negative_of_the_first():
    sums = signed_sums(RNG.normal(size=(3, 8)), 4)
    assert_same(sums[..., ::-1], -sums)


def test_float_inputs_are_multiplied_by_the_quantized_weights():
    x, w, b = RNG.normal(size=(6, 18)), RNG.normal(size=(18, 9)), RNG.normal(size=9)
    u, scale, zero = quantize(w, 3)
    assert u.min() == 0 and u.max() == 7
    expected = x @ (scale * (u - zero)) + b
    assert_same(BitSerialLinear.of(w, b, 3, 4)(x), expected, atol=1e-13)
    assert abs(scale * (u - zero) - w).max() <= scale.max(), "a weight is off by over one step"


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(bits=0), "bits must be an integer, 1 to 8; got 0"),
        (dict(bits=9), "bits must be an integer, 1 to 8; got 9"),
        (dict(group=9), "group must be an integer, 1 to 8; got 9"),
        (dict(layers=3), "layers must be at most 2, the blocks of this model; got 3"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(MinitxError, match=f"^lut_bit_serial: {words}"):
        apply(tiny_lm(), {"lut_bit_serial": options})
