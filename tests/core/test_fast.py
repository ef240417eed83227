"""The fast order of the work gives what the plain formulas of ops.py give."""

import numpy as np
import pytest
from same import assert_same

from minitx import fast, ops


@pytest.mark.parametrize("rows", (1, 2, 4, 5, 100, 200))
@pytest.mark.parametrize("shape", ((3, 5), (256, 300), (96, 3000)))
@pytest.mark.parametrize("order", "CF")
def test_matmul_equals_plain_product(rows, shape, order):
    rng = np.random.default_rng(rows)
    x, w = rng.standard_normal((2, rows, shape[0])), rng.standard_normal(shape)
    for rows_of_x in (x[0], x):
        found = fast.matmul(rows_of_x, np.array(w, order=order))
        assert_same(found, rows_of_x @ w, tolerance=1e-12, atol=1e-12)


def in_a_block_of_all_matrices(w, nbytes: int):
    """A column-major copy of w that is a view of a larger block, as memory_layout.py makes it."""
    columns = np.zeros(nbytes, np.uint8)[: w.nbytes].view(w.dtype).reshape(w.T.shape)
    columns[:] = w.T
    return columns.T


@pytest.mark.parametrize("nbytes", (8 << 20, 32 << 20), ids=("from the cache", "from memory"))
@pytest.mark.parametrize("rows", (1, 2, 3, 4, 5, 8, 9, 16, 17))
def test_matmul_of_several_rows_block_by_block_equals_plain_product(rows, nbytes):
    """300 x 3,001: blocks of equal size, and a last one that is smaller."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((rows, 300), np.float32)
    w = rng.standard_normal((300, 3001), np.float32)
    block = in_a_block_of_all_matrices(w, nbytes)
    assert fast.bytes_with(block) == nbytes and block.flags.f_contiguous
    expected = x.astype(np.float64) @ w.astype(np.float64)
    for given in (x, np.asfortranarray(x), x[:, None], x[None]):
        found = fast.matmul(given, block)
        assert found.dtype == np.float32 and found.shape == (*given.shape[:-1], 3001)
        what = "the product of several rows differs from x @ w"
        assert_same(found.reshape(rows, 3001), expected, what, tolerance=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, nbytes, called", ((8, 32 << 20, 1), (9, 32 << 20, 0), (8, 8 << 20, 0)))
def test_several_rows_are_multiplied_from_memory_where_the_model_is_large(
    n, nbytes, called, monkeypatch
):
    calls, plain = [], fast.blocks_from_memory
    monkeypatch.setattr(fast, "blocks_from_memory", lambda *given: calls.append(1) or plain(*given))
    w = in_a_block_of_all_matrices(np.ones((300, 3001), np.float32), nbytes)
    fast.matmul(np.ones((n, 300), np.float32), w)
    assert len(calls) == called


def test_blocks_stay_below_the_limit_of_small_products_and_cover_all_columns():
    """Each product of a block takes at most ``SMALL`` multiply-adds, unless a column has more."""
    for shape, numbers in (((3001, 300), 60_000), ((10, 7), 7), ((3, 50), 20), ((5, 4), 1000)):
        blocks = list(fast.column_blocks(np.empty(shape), numbers))
        starts = [a for a, _ in blocks]
        ends = [min(b, shape[0]) for _, b in blocks]
        assert starts == [0, *ends[:-1]] and ends[-1] == shape[0]
        assert all((b - a) * shape[1] <= max(numbers, shape[1]) for a, b in blocks)


def test_gradients_of_several_rows_go_through_the_plain_product():
    """A traced array cannot be written into, as the blocks do."""
    from minitx.training.autograd.array import Traced

    w = np.asfortranarray(np.ones((300, 3001), np.float32))
    for x in (Traced(np.ones((5, 300), np.float32)), np.ones((5, 300), np.float32)):
        assert type(fast.matmul(x, Traced(w))) is Traced


@pytest.mark.parametrize("T, S", ((1, 1), (1, 9), (5, 9), (9, 9), (70, 70), (70, 200), (200, 200)))
def test_attention_equals_plain_attention(T, S):
    rng = np.random.default_rng(S)
    q, k, v = (rng.standard_normal((4, n, 8)) for n in (T, S, S))
    expected = ops.plain_attention(q, k, v, 0.3, ops.causal_mask(T, S))
    assert_same(ops.attention(q, k, v, 0.3), expected, atol=1e-12)


def test_attention_with_shared_key_heads_equals_plain_attention_with_copies():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((heads, 80, 8)) for heads in (6, 2, 2))
    expected = ops.plain_attention(
        q, k.repeat(3, axis=0), v.repeat(3, axis=0), 0.3, ops.causal_mask(80, 80)
    )
    assert_same(ops.attention(q, k, v, 0.3), expected, atol=1e-12)


def test_attention_with_a_mask_of_its_own_equals_plain_attention():
    rng = np.random.default_rng(1)
    q, k, v = rng.standard_normal((3, 2, 90, 8))
    mask = rng.random((90, 90)) < 0.5
    mask[:, 0] = False  # every query sees one key at least
    expected = ops.plain_attention(q, k, v, 0.3, mask)
    assert_same(ops.attention(q, k, v, 0.3, mask), expected, atol=1e-12)


def test_block_mask_is_the_causal_mask_of_a_square():
    for T in (1, 2, fast.ROWS):
        assert_same(fast.block_mask(T), ops.causal_mask(T, T))


def test_softmax_by_hand():
    # e^0 = 1 and e^(ln 3) = 3, so the weights are 1/4 and 3/4, also far from 0
    for shift in (0, 1000, -1000):
        found = ops.softmax(np.array([[shift, shift + np.log(3)], [0, 0]]))
        assert_same(found, [[0.25, 0.75], [0.5, 0.5]], f"rows shifted by {shift}", atol=1e-12)
