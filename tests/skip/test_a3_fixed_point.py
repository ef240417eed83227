"""a3's fixed point and its exponential from tables; attention with them: see also test_a3.py."""

import literal_a3 as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from test_a3 import part

from minitx import ops
from minitx.skip.a3.fixed_point import Rounded, exp_by_tables, exp_tables


def test_rounded_numbers():
    x = np.array([0.03, 0.04, -0.04, 1.0, 15.93, 15.99, 16, -1e9, 3.1])
    expected = [0, 0.0625, -0.0625, 1, 15.9375, 15.9375, 15.9375, -15.9375, 3.125]
    np.testing.assert_array_equal(Rounded(4, 4)(x), expected)
    assert [literal.fixed(number, 4, 4) for number in x] == expected
    assert Rounded(4, 4)(x.astype(np.float32)).dtype == np.float32


def test_tables_have_256_entries_for_a_code_of_16_bits():
    upper, lower = exp_tables(256, np.dtype(np.float64))
    assert len(upper) == len(lower) == 256
    np.testing.assert_allclose(upper[3] * lower[128], np.exp(-3.5), rtol=1e-15)


@pytest.mark.parametrize("f, unit", [(1, 1 / 4), (3, 1 / 64), (4, 1 / 256), (8, 2.0**-16)])
@pytest.mark.parametrize("dtype, noise", [(np.float64, 1e-15), (np.float32, 2e-7)])
def test_the_error_of_the_tables(f, unit, dtype, noise):
    x = -np.linspace(0, 2 * 4**f, 100_001).astype(dtype)
    found = exp_by_tables(x, f)
    assert found.dtype == dtype and found[0] == 1
    rounded = np.rint(x / unit) * unit
    inside = -rounded < 4**f
    np.testing.assert_allclose(found[inside], np.exp(rounded[inside]), 2 * noise, 1e-37)
    assert abs(found - np.exp(x)).max() <= unit / 2 + noise
    if f == 4:
        assert unit / 2 == 1 / 512 and abs(found - np.exp(x)).max() > 1 / 600  # no better either
    assert not found[~inside].any() and (~inside).any()
    assert [literal.table_exp(float(y), f) for y in x[:50]] == pytest.approx(found[:50], rel=1e-6)


def test_far_below_is_0_and_not_the_entry_of_some_other_code():
    np.testing.assert_array_equal(exp_by_tables(np.array([-256, -300, -1e30]), 4), 0)
    found = exp_by_tables(np.array([-1e30, 0], np.float32), 8)
    np.testing.assert_array_equal(found, [0, 1])


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_more_bits_come_closer_and_none_are_many(sizes):
    q, k, v = random_qkv(6)
    exact = ops.attention(q, k, v, 0.5)
    errors = []
    for f in (2, 4, 6, 8):
        found = run(part(M=None, T=0.0, i=4, f=f, exp="tables"), q, k, v, sizes)
        errors.append(abs(found - exact).max())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 > 0.02 > errors[-1]
    alone = run(part(M=None, T=0.0, exp="tables"), q, k, v, sizes)
    assert 1e-6 < abs(alone - exact).max() < 0.01


def test_outputs_are_whole_multiples_of_their_unit():
    """Weights have 2 f fraction bits and values f."""
    q, k, v = random_qkv(7, dtype=np.float32)
    for exp in ("exact", "tables"):
        found = run(part(i=4, f=2, exp=exp), q, k, v, (29, 1))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found * 64, np.rint(found * 64))
        assert (found * 16 != np.rint(found * 16)).any()


def test_weights_below_half_a_unit_are_lost():
    """What hardware of this width does with many equal keys: 1 / 512 rounds to 0."""
    ones = np.ones((1, 600, 2))
    found = run(part(M=None, T=0.0, i=4, f=4), ones, ones, ones, (600,))[0, :, 0]
    assert found[0] == 1 and found[510] == 511 / 256 and not found[511:].any()


def test_the_search_reads_rounded_numbers():
    """Keys that are 0 after rounding have no positive product: then the first is kept."""
    q, v = np.ones((1, 3, 2)), np.eye(3, 2)[None]
    k = np.array([[[0.01, 0.01], [0.02, 0.02], [0.03, 0.03]]])
    for sizes in ((3,), (1, 1, 1)):
        np.testing.assert_array_equal(run(part(1.0, i=4, f=4), q, k, v, sizes)[0, -1], v[0, 0])
        assert run(part(1.0), q, k, v, sizes)[0, -1, 0] != 1
