"""The baselines of frontier attention: which keys each keeps, against loops written by hand. A
query keeps the same keys in a prompt, in a chunk, alone, and in a padded batch."""

from itertools import combinations

import numpy as np
import pytest
from qkv import random_qkv, run
from tiny import tiny_lm

from minitx import fast, ops
from minitx.lab.frontier.attention_baselines import (
    BASELINES,
    SINKS,
    BestKeys,
    NewestKeys,
    RandomKeys,
    baseline,
    random_numbers,
)
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.state import Layer

SELECTORS = {
    "oracle": lambda r: BestKeys(r),
    "window": lambda r: NewestKeys(r),
    "random": lambda r: RandomKeys(r, 3),
}
each_selector = pytest.mark.parametrize("make", SELECTORS.values(), ids=SELECTORS)


def kept_by(selector, q, k, T=None, start=None):
    """(..., K, G, T, S) of the T newest queries, by default all."""
    S = k.shape[-2]
    T = S if T is None else T
    return selector(q[..., S - T :, :], k, (), Visible(T, S, start))


@each_selector
@pytest.mark.parametrize("r", [1, 3, 7, 30])
def test_each_query_keeps_r_keys_and_none_that_is_masked(make, r):
    q, k, _ = random_qkv(1)
    kept = kept_by(make(r), q, k)
    n = np.arange(1, 31)
    np.testing.assert_array_equal(kept.sum(-1), np.broadcast_to(np.minimum(n, r), (2, 2, 30)))
    assert not (kept & fast.block_mask(30)).any()


def test_oracle_keeps_the_most_mass_of_any_r_keys():
    q, k, _ = random_qkv(2, S=9)
    kept = kept_by(BestKeys(3), q, k)
    for h in range(4):
        for i in range(9):
            weights = np.exp(0.5 * q[h, i] @ k[h // 2, : i + 1].T)
            found = weights[kept[h // 2, h % 2, i, : i + 1]].sum()
            every = combinations(weights, min(3, i + 1))
            assert found == pytest.approx(max(sum(some) for some in every))


@pytest.mark.parametrize("r", range(1, 12))
def test_window_keeps_the_first_and_the_newest_keys(r):
    q, k, _ = random_qkv(3, S=20)
    kept = kept_by(NewestKeys(r), q, k)
    sinks = min(SINKS, r - 1)
    for i in range(20):
        expected = set(range(max(0, i + 1 - (r - sinks)), i + 1)) | set(range(min(sinks, i + 1)))
        assert {*np.flatnonzero(kept[0, 0, i])} == expected and i in expected
    assert (kept == kept[0, 0]).all()


def test_random_keys_differ_by_query_head_and_seed():
    q, k, _ = random_qkv(4, H=8, K=2, S=200)
    kept = kept_by(RandomKeys(20, 5), q, k)
    np.testing.assert_array_equal(kept, kept_by(RandomKeys(20, 5), 0 * q, k + 1))
    heads = kept.reshape(8, 200, 200)
    assert len({head.tobytes() for head in heads}) == 8
    assert len({row.tobytes() for row in heads[0, 100:]}) == 100
    assert (kept_by(RandomKeys(20, 6), q, k) != kept).any()
    # Each key is as likely as any other: 8 heads * 100 rows draw the first 100 keys 20 / n times.
    times = heads[:, 100:, :100].sum((0, 1))
    expected = 8 * sum(20 / n for n in range(101, 201))
    assert abs(times.mean() - expected) < 0.03 * expected
    assert times.std() < 1.3 * expected**0.5


def test_random_numbers_are_uniform_and_uncorrelated():
    drawn = random_numbers(7, np.arange(300)[:, None], np.arange(300))
    assert drawn.dtype == np.float32 and 0 <= drawn.min() and drawn.max() < 1
    shares = np.histogram(drawn, 10, (0, 1))[0] / drawn.size
    assert abs(shares - 0.1).max() < 0.005
    assert abs(np.corrcoef(drawn[:-1].reshape(-1), drawn[1:].reshape(-1))[0, 1]) < 0.01


@each_selector
@pytest.mark.parametrize("sizes", [(90,), (1,) * 90, (30, 1, 59)])
def test_prompt_chunks_and_single_tokens_are_the_same(make, sizes):
    q, k, v = random_qkv(5, S=90)
    whole = run(SparseAttention(make(6), 0.5), q, k, v, (90,))
    np.testing.assert_allclose(
        run(SparseAttention(make(6), 0.5), q, k, v, sizes), whole, atol=1e-12
    )


@each_selector
@pytest.mark.parametrize("sizes", [(12,), (5, 7), (1,) * 12])
def test_padded_batch_equals_each_sequence_alone(make, sizes):
    q, k, v = random_qkv(6, lead=(2,), S=12)
    start = np.array([0, 4])
    found = run(SparseAttention(make(3), 0.5), q, k, v, sizes, Layer(12, start))
    for row in (0, 1):
        own = (row, slice(None), slice(start[row], None))
        alone = run(SparseAttention(make(3), 0.5), q[own], k[own], v[own], (12 - start[row],))
        np.testing.assert_allclose(found[own], alone, atol=1e-12)


@each_selector
def test_r_of_all_keys_is_dense_attention(make):
    q, k, v = random_qkv(7, dtype=np.float32)
    found = run(SparseAttention(make(30), 0.5), q, k, v, (30,))
    np.testing.assert_array_equal(found, ops.attention(q, k, v, 0.5))


@pytest.mark.parametrize("name", BASELINES)
def test_baseline_in_a_model_changes_only_queries_that_see_more_than_r_keys(name):
    lm, ids = tiny_lm(), np.arange(20)
    dense = lm.logits(ids)
    found = baseline(lm, name, 3).logits(ids)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    np.testing.assert_allclose(found[:3], dense[:3], rtol=1e-4, atol=1e-4)
    assert abs(found[3:] - dense[3:]).max() > 1e-3
    np.testing.assert_array_equal(baseline(lm, name, 48).logits(ids), dense)


def test_random_keys_differ_by_block():
    blocks = baseline(tiny_lm(), "random", 3).model.stack.blocks
    assert [block.attn.attend.selector.seed for block in blocks] == [0, 1]


def test_only_the_oracle_reads_all_keys():
    for name, scores_all in (("oracle", 1), ("window", 0), ("random", 0)):
        lm = baseline(tiny_lm(), name, 5)
        state = lm.model.new_state()
        lm.model(np.arange(29), state)
        with counting(lm) as counts:
            lm.model(np.arange(1), state)
        attend = [e for path, e in counts.entries.items() if ".attend" in path]
        layers, H, K, d = 2, 2, 1, 8
        done = sum(e.multiply_adds for e in attend)
        assert done == layers * H * (30 * d * scores_all + 2 * 5 * d)
        read = sum(e.cache_bytes for e in attend)
        assert read == layers * 4 * (K * 30 * d * scores_all + H * 2 * 5 * d)
