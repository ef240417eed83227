"""Exercises 7 to 11: the solutions do what minitx's own parts do, in float64."""

import numpy as np
import pytest
from same import assert_same

from minitx import ops
from minitx.learn import ex07_fold_norm as ex07
from minitx.learn import ex08_first_layer as ex08
from minitx.learn import ex09_slim_attention as ex09
from minitx.learn import ex10_quantization as ex10
from minitx.learn import ex11_lookup_table as ex11
from minitx.model import QKV, Linear, RMSNorm, split_heads
from minitx.precompute.first_layer import token_table
from minitx.precompute.lut_product import ProductTable
from minitx.precompute.lut_product import pack as pack_rows
from minitx.precompute.quantize import dequantize, quantize_groups_symmetric
from minitx.precompute.slim_attention import solve
from minitx.shared.folding import fold_into

RNG = np.random.default_rng(0)


def test_fold_equals_the_library():
    gain, bias, W, b = (RNG.standard_normal(shape) for shape in (5, 5, (5, 7), 7))
    found_W, found_b = ex07.fold(gain, bias, W, b)
    expected = fold_into(Linear(W, b), gain, bias)
    assert_same(found_W, expected.w, "the folded matrix", tolerance=1e-12)
    assert_same(found_b, expected.b, "the folded bias", tolerance=1e-12)


def test_first_layer_table_equals_the_library():
    shapes = (5, 4), 4, (4, 8), (4, 2), (4, 2)
    E, gain, Wq, Wk, Wv = (RNG.standard_normal(shape) for shape in shapes)
    found = ex08.make_table(E, gain, Wq, Wk, Wv, 0.1)
    qkv = QKV(Linear(Wq), Linear(Wk), Linear(Wv))
    expected = token_table(E, RMSNorm(gain, 0.1), qkv, None)
    assert_same(found, expected, "the table of the first layer", tolerance=1e-12)


def test_rotation_that_exercise_8_gives_is_the_library_s():
    x, positions = RNG.standard_normal((5, 12)), np.arange(3, 8)
    cos, sin = ops.rope_tables(4, 10, 100.0, np.float64)
    heads = x.reshape(5, 3, 4).swapaxes(0, 1)  # (heads, T, d)
    expected = ops.rotate(heads, cos[positions], sin[positions]).swapaxes(0, 1).reshape(5, 12)
    found = ex08.rotate(x, positions, 4)
    assert_same(found, expected, "rows that are rotated", tolerance=1e-12)


def test_w_kv_equals_the_library():
    Wk, Wv = RNG.standard_normal((2, 4, 4)) + 2 * np.eye(4)
    expected, _ = solve(Wk, Wv)
    assert_same(ex09.make_w_kv(Wk, Wv), expected, "W_kv", tolerance=1e-10)


def test_values_of_slim_attention_are_those_of_the_model():
    n, (Wk, Wv) = RNG.standard_normal((5, 6)), RNG.standard_normal((2, 6, 6)) + 2 * np.eye(6)
    W_kv = ex09.make_w_kv(Wk, Wv)
    k, v = ex09.keys_and_values(n @ Wk, W_kv, 3, lambda x: 2 * x)
    assert_same(k, 2 * split_heads(n @ Wk, 3), "keys", tolerance=1e-12)
    assert_same(v, split_heads(n @ Wv, 3), "values made from keys", tolerance=1e-10)
    weights = RNG.dirichlet(np.ones(5), 3)  # (H, S)
    found = ex09.attend(weights, n @ Wk, W_kv)
    expected = (weights[:, None] @ v)[:, 0]
    assert_same(found, expected, "weighted sums of values, from summed keys", tolerance=1e-10)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantization_equals_the_library(bits):
    W = RNG.standard_normal((6, 5))
    W[:3, 0] = 0
    codes, scales = ex10.quantize(W, bits, 3)
    expected, expected_scales, _ = quantize_groups_symmetric(W.reshape(2, 3, 5), bits)
    assert_same(codes, expected.reshape(6, 5), f"codes of {bits} bits")
    assert_same(scales, expected_scales, "scales", tolerance=1e-12)
    zero_points = RNG.integers(-128, 128, (2, 5)).astype(np.int8)
    found = ex10.dequantize(codes, scales, zero_points)
    restored = dequantize(expected, expected_scales, zero_points).reshape(6, 5)
    assert_same(found, restored, "dequantized weights", tolerance=1e-12)


def test_product_table_equals_the_library():
    ba, bw, d, n = 3, 4, 2, 7
    x = RNG.integers(1 - 2 ** (ba - 1), 2 ** (ba - 1), n)  # the least integer is never used there
    w = RNG.integers(1 - 2 ** (bw - 1), 2 ** (bw - 1), (n, 5))
    x_codes = ex11.pack(x, ba, d)
    w_codes = np.stack([ex11.pack(column, bw, d) for column in w.T], axis=1)
    assert_same(x_codes, pack_rows(x[None], ba, d)[0], "codes of inputs")
    assert_same(w_codes, pack_rows(w.T, bw, d).T, "codes of weights")
    library = ProductTable.of(ba, bw, d, "vertical")
    found = ex11.dot(x_codes, w_codes, ex11.make_table(ba, bw, d))
    assert_same(found, library.sums(x_codes[None], w_codes)[0], "sums of table entries")
    assert_same(found, x @ w, "dot products by table")
