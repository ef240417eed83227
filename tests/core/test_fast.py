"""The fast order of the work gives what the plain formulas of ops.py give."""

import numpy as np
import pytest

from minitx import fast, ops


@pytest.mark.parametrize("rows", (1, 2, 4, 5, 100, 200))
@pytest.mark.parametrize("shape", ((3, 5), (256, 300), (96, 3000)))
@pytest.mark.parametrize("order", "CF")
def test_matmul_equals_plain_product(rows, shape, order):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((2, rows, shape[0])), rng.standard_normal(shape)
    for rows_of_x in (x[0], x):
        found = fast.matmul(rows_of_x, np.array(w, order=order))
        np.testing.assert_allclose(found, rows_of_x @ w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T, S", ((1, 1), (1, 9), (5, 9), (9, 9), (70, 70), (70, 200), (200, 200)))
def test_attention_equals_plain_attention(T, S):
    rng = np.random.default_rng(S)
    q, k, v = (rng.standard_normal((4, n, 8)) for n in (T, S, S))
    expected = ops.plain_attention(q, k, v, 0.3, ops.causal_mask(T, S))
    np.testing.assert_allclose(ops.attention(q, k, v, 0.3), expected, atol=1e-12)


def test_attention_with_shared_key_heads_equals_plain_attention_with_copies():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 80, 8)) for heads in (6, 2, 2))
    expected = ops.plain_attention(
        q, k.repeat(3, axis=0), v.repeat(3, axis=0), 0.3, ops.causal_mask(80, 80)
    )
    np.testing.assert_allclose(ops.attention(q, k, v, 0.3), expected, atol=1e-12)


def test_attention_with_a_mask_of_its_own_equals_plain_attention():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 90, 8))
    mask = rng.random((90, 90)) < 0.5
    mask[:, 0] = False  # every query sees one key at least
    expected = ops.plain_attention(q, k, v, 0.3, mask)
    np.testing.assert_allclose(ops.attention(q, k, v, 0.3, mask), expected, atol=1e-12)


def test_block_mask_is_the_causal_mask_of_a_square():
    for T in (1, 2, fast.ROWS):
        np.testing.assert_array_equal(fast.block_mask(T), ops.causal_mask(T, T))


def test_softmax_by_hand():
    # e^0 = 1 and e^(ln 3) = 3, so the weights are 1/4 and 3/4, also far from 0
    for shift in (0, 1000, -1000):
        found = ops.softmax(np.array([[shift, shift + np.log(3)], [0, 0]]))
        np.testing.assert_allclose(
            found, [[0.25, 0.75], [0.5, 0.5]], atol=1e-12, err_msg=f"rows shifted by {shift}"
        )
