"""The exact head's searches: never another token than the dense head's, and counted work."""

import literal_exact_head as literal
import numpy as np
import pytest

from minitx import fast, ops
from minitx.ledger import counting
from minitx.model import Head, TiedHead
from minitx.skip.exact_head import ExactHead, preview, scan

dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def searches(W, k=None, block=1):
    """Both searches in the rows of W (V, D)."""
    return scan(W, block), preview(W, k or max(1, W.shape[1] // 4))


def decaying(rng, V, D, pace=12.0, dtype=np.float32):
    """Rows whose spectrum falls like exp(-i / pace)."""
    W = rng.standard_normal((V, D)) * np.exp(-np.arange(D) / pace)
    Q, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return (W @ Q).astype(dtype)


def spread(rng, V, D, dtype=np.float32):
    """Rows of very unequal length."""
    return (rng.standard_normal((V, D)) * rng.lognormal(0, 1, (V, 1))).astype(dtype)


def aligned(rng, W):
    """A row x (D,) near the direction of one of W's rows, with noise of half its length."""
    row, noise = W[rng.integers(len(W))], rng.standard_normal(W.shape[1])
    noise *= 0.5 * np.linalg.norm(row) / np.linalg.norm(noise)
    return (row + noise).astype(W.dtype)


def run(search, x):
    """(what the search says, rows read, multiply-adds, bytes)"""
    with counting(search) as counts:
        found = search(x)
    total = counts.total()
    return found, counts.events["head rows read"], total.multiply_adds, total.weight_bytes


# Worked examples ---------------------------------------------------------------------------------

W4 = np.array([[3, 0], [0, 2], [1, 1], [0.5, -0.5]])


@dtypes
def test_the_worked_example_skips_the_two_short_rows(dtype):
    """z = 1.8, 1.6, 1.4, -0.1; the bound of row 1 is 2, of row 2 it is 1.414 < 1.8."""
    search, x = scan(W4.astype(dtype), 1), np.array([0.6, 0.8], dtype)
    np.testing.assert_allclose(search.n, [3, 2, 2**0.5, 0.5**0.5], rtol=1e-6)
    assert run(search, x)[:3] == (0, 2, 4)


def test_the_worked_example_with_a_bias_as_one_more_column():
    W, x = np.c_[W4, [0, 0.5, 0, 0]], np.array([0.6, 0.8, 1])
    for search in searches(W, k=2):
        assert search(x) in (1, None)
    assert scan(W, 1)(x) == 1  # 2.1, though row 0 is longer


def test_of_equal_rows_the_dense_head_has_to_choose():
    rows, x = np.array([[0, 1], [2, 0], [1, 0], [2, 0.0]]), np.array([1, 0.0])
    for search in searches(rows):
        assert search(x) is None
    for head in (TiedHead(rows), Head(rows.T.copy())):
        for search in searches(rows):
            assert ExactHead(head, search, False).argmax(x) == 1


# Against the dense head and the twin -------------------------------------------------------------


@dtypes
def test_a_thousand_random_heads(dtype):
    """Also with equal rows, rows of zeros and x = 0: the smallest id of the largest logits, in the
    arithmetic of the dense head, and but for ties in float64."""
    rng = np.random.default_rng(1)
    told = 0
    for i in range(1000):
        V, D = int(rng.integers(1, 90)), int(rng.integers(1, 24))
        make = (spread, decaying)[i % 2]
        W = make(rng, V, D, dtype=dtype)
        W[rng.random(V) < 0.2] = W[rng.integers(V)]
        W[rng.random(V) < 0.1] = 0
        x = aligned(rng, W) if i % 3 else rng.standard_normal(D).astype(dtype)
        x = 0 * x if i % 50 == 7 else x
        z = W.astype(np.float64) @ x
        k, block = int(rng.integers(1, D + 1)), int(rng.integers(1, V + 2))
        for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
            dense = head.argmax(x)
            for search in searches(W, k, block):
                assert ExactHead(head, search, False).argmax(x) == dense
                found = search(x)
                told += found is not None
                assert found is None or found == z.argmax() == dense
    assert told > 1000  # of 4000: the searches are not always undecided


@dtypes
def test_large_heads_whose_products_are_summed_up_in_another_way(dtype):
    rng = np.random.default_rng(2)
    for make in (spread, decaying):
        W = make(rng, 2000, 40, dtype=dtype)
        assert W.size > fast.LARGE
        W[1500:] = W[:500]  # the winner is often there twice
        for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
            for search in searches(W, block=300):
                for _ in range(30):
                    x = aligned(rng, W)
                    assert ExactHead(head, search, False).argmax(x) == head.argmax(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12, 1e30])
def test_logits_that_differ_by_little_more_than_rounding(scale):
    """Pairs of rows that differ in the last bits, so that kernels may order them differently."""
    rng = np.random.default_rng(3)
    W = np.repeat(spread(rng, 60, 48), 2, axis=0)
    W[1::2] *= (1 + rng.integers(-40, 40, (60, 1)) * 2.0**-24).astype(np.float32)
    for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
        for search in searches(W, k=12):
            for _ in range(50):
                x = aligned(rng, W) * np.float32(scale)
                assert ExactHead(head, search, False).argmax(x) == head.argmax(x)


def test_the_literal_twin_reads_the_same_rows():
    rng = np.random.default_rng(4)
    fewer = 0
    for i in range(60):
        V, D = 40 + i, int(rng.integers(2, 12))
        W = (spread, decaying)[i % 2](rng, V, D, dtype=np.float64)
        x, k, block = aligned(rng, W), int(rng.integers(1, D + 1)), int(rng.integers(1, 9))
        token = literal.dense(W, x)
        by_norm, by_preview = searches(W, k, block)
        assert literal.norms(W, x, block) == run(by_norm, x)[:2] and by_norm(x) == token
        expected, candidates = literal.svd(W, x, k, by_preview.rotation)
        assert expected == token
        if len(candidates) > V // 8 + 1:
            assert by_preview(x) is None
        else:
            assert run(by_preview, x)[:2] == (token, len(candidates))
            fewer += 1
    assert 10 < fewer < 60


@dtypes
def test_no_logit_exceeds_its_bound(dtype):
    rng = np.random.default_rng(5)
    for _ in range(200):
        V, D = int(rng.integers(1, 300)), int(rng.integers(1, 64))
        W = spread(rng, V, D, dtype)
        x = rng.standard_normal(D).astype(dtype)
        search = preview(W, int(rng.integers(1, D + 1)))
        P, u = search.bounds(x)
        z = W.astype(np.float64) @ x.astype(np.float64)
        room = search.doubt * search.longest * np.linalg.norm(x)
        assert P.dtype == u.dtype == dtype
        assert (u + room >= z).all()
        top = int(P.argmax())
        assert ops.scores(x, W[top : top + 1])[0] <= z.max() + room
        assert room < (2e-2 if dtype == np.float32 else 1e-10) * search.longest * np.linalg.norm(x)


def test_a_preview_of_full_width_leaves_the_winner_alone():
    rng = np.random.default_rng(6)
    W = rng.standard_normal((500, 32))
    search = preview(W, 32)
    assert not search.r.any()
    for _ in range(50):
        x = rng.standard_normal(32)
        assert run(search, x)[:2] == ((W @ x).argmax(), 1)


# Counted -----------------------------------------------------------------------------------------


def test_counted_is_predicted():
    """The card's formulas, and the bytes of what they multiply."""
    rng = np.random.default_rng(7)
    V, D, k, block = 3000, 48, 12, 100
    W = decaying(rng, V, D)
    asked = 0
    for _ in range(40):
        x = aligned(rng, W)
        _, c, multiply_adds, size = run(preview(W, k), x)
        if c:
            assert multiply_adds == D * D + V * (k + 1) + D * (1 + c)
            assert size == 4 * multiply_adds
            assert multiply_adds < 0.5 * V * D
        asked += not c
    assert asked < 40
    W = spread(rng, V, D)
    search = scan(W, block)
    for _ in range(10):
        _, read, multiply_adds, size = run(search, aligned(rng, W))
        assert read % block == 0 and 0 < read < 0.5 * V
        assert multiply_adds == read * D and size == 4 * multiply_adds


def test_a_dense_head_that_had_to_be_asked_is_counted_on_top():
    V, D, k = 400, 16, 4
    W = np.random.default_rng(8).standard_normal((V, D))
    search = preview(W, k)
    head = ExactHead(TiedHead(W), search, False)
    x = np.random.default_rng(9).standard_normal(D)
    assert search(x) is None
    with counting(head) as counts:
        assert head.argmax(x) == (W @ x).argmax()
    assert counts.total().multiply_adds == D * D + V * (k + 1) + D + V * D
    assert counts.events == {"head rows": V, "head rows read": V, "heads in full": 1}
