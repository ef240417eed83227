"""What the techniques share that choose keys: rows, what is remembered, ties, and the two ways to
attend to what is kept."""

import numpy as np
import pytest
from qkv import random_qkv, run

from minitx import fast
from minitx.ledger import counting
from minitx.shared.sparse_attention import (
    SparseAttention,
    Visible,
    attend_gathered,
    attend_masked,
    per_key,
    top_k,
)
from minitx.state import Layer
from minitx.tree import Part, part


@part
class EveryThird(Part):
    """Keeps a query's own key and every third one, counted from the first."""

    def keeps_all(self, S):
        return False

    def remember(self, k, layer):
        return per_key(self, k, lambda new: (new.sum(-1), 2 * new), layer)

    def __call__(self, q, k, known, visible):
        sums, twice = known
        np.testing.assert_array_equal(sums[..., : visible.S], k.sum(-1))
        np.testing.assert_array_equal(twice[..., : visible.S, :], 2 * k)
        *lead, H, T, _ = q.shape
        K = k.shape[-3]
        kept = np.zeros((*lead, K, H // K, T, visible.S), bool)
        kept[..., ::3] = True
        t = np.arange(T)
        kept[..., t, visible.S - T + t] = True
        return visible.hide(kept, False)


def by_hand(q, k, v, scale, floor, start=0):
    """Query by query and head by head, with lists of keys."""
    H, T, d = q.shape
    G = H // len(k)
    out, kept = np.zeros_like(q), 0
    for h in range(H):
        for t in range(T):
            seen = [t] if t < start else range(start, t + 1)
            s = {j: scale * float(q[h, t] @ k[h // G, j]) for j in seen if j % 3 == 0 or j == t}
            s = {j: x for j, x in s.items() if not floor or x >= max(s.values()) + np.log(floor)}
            w = {j: np.exp(x - max(s.values())) for j, x in s.items()}
            out[h, t] = sum(w[j] * v[h // G, j] for j in w) / sum(w.values())
            kept += len(w)
    return out, kept


@pytest.mark.parametrize("sizes", [(90,), (1,) * 90, (30, 1, 59)])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_rows_chunks_and_single_tokens(sizes, floor):
    q, k, v = random_qkv(1, S=90)
    attend = SparseAttention(EveryThird(), 0.5, floor)
    with counting(attend) as counts:
        found = run(attend, q, k, v, sizes)
    expected, kept = by_hand(q, k, v, 0.5, floor)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert counts.events["keys kept"] == kept
    assert counts.events["keys seen"] == 4 * 90 * 91 // 2
    assert ("keys scored" in counts.events) == bool(floor)


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7)])
def test_a_padded_batch(sizes):
    q, k, v = random_qkv(2, lead=(2,), S=12)
    start = np.array([0, 4])
    found = run(SparseAttention(EveryThird(), 0.5, 0.2), q, k, v, sizes, Layer(12, start))
    for row in (0, 1):
        expected, _ = by_hand(q[row], k[row], v[row], 0.5, 0.2, start[row])
        np.testing.assert_allclose(
            found[row, :, start[row] :], expected[:, start[row] :], atol=1e-12
        )


def test_only_what_is_kept_is_read_at_decoding():
    q, k, v = random_qkv(3, S=30)
    attend, layer = SparseAttention(EveryThird(), 0.5), Layer(30)
    run(attend, q, k, v, (29,), layer)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    kept = 4 * 11  # 0, 3, ... 27 and the query's own
    assert counts.entries[""].multiply_adds == 2 * 8 * kept
    assert counts.entries[""].cache_bytes == 2 * 8 * 8 * kept


def test_gathered_is_masked():
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(4, lead=(3,), S=1)[0], *rng.standard_normal((2, 3, 2, 40, 8))
    kept = rng.random((3, 2, 2, 1, 40)) < 0.3
    kept[..., 7] = True
    for floor in (0.0, 0.1, 1.0):
        two = [attend(q, k, v, 0.5, kept, floor) for attend in (attend_gathered, attend_masked)]
        np.testing.assert_allclose(*two, atol=1e-13)
    alone = attend_gathered(q, k, v, 0.5, np.arange(40) == np.full((3, 2, 2, 1, 1), 7))
    np.testing.assert_allclose(alone, np.repeat(v[..., 7:8, :], 2, -3), atol=1e-13)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.5, 1e-9])  # many ties, or none
def test_largest_of_equals_takes_the_earlier(seed, step):
    rng = np.random.default_rng(seed)
    p = np.round(rng.standard_normal((3, 5, 20)) / step) * step
    p[1, 2] = fast.MASKED
    for r in (1, 7, 20, rng.integers(1, 21, (3, 5)), rng.integers(1, 21, (1, 5))):
        found = top_k(p, np.array(r))
        for row, many, kept in zip(
            p.reshape(-1, 20), np.broadcast_to(r, (3, 5)).reshape(-1), found.reshape(-1, 20)
        ):
            first = sorted(range(20), key=lambda j: (-row[j], j))[:many]
            assert set(np.flatnonzero(kept)) == set(first)


def test_seen():
    assert Visible(1, 9).count.tolist() == [9] and Visible(1, 9).mask is None
    assert Visible(3, 9).count.reshape(-1).tolist() == [7, 8, 9]
    padded = Visible(3, 9, np.array([0, 8]))
    assert padded.count.reshape(2, 3).tolist() == [[7, 8, 9], [1, 1, 1]]
    assert padded.total((2, 4, 2)) == 8 * (7 + 8 + 9 + 3)
    p = padded.hide(np.zeros((2, 4, 2, 3, 9)), 1)
    assert [np.flatnonzero(p[1, 0, 0, t] == 0).tolist() for t in range(3)] == [[6], [7], [8]]
    assert np.flatnonzero(p[0, 3, 1, 1] == 0).tolist() == list(range(8))


def test_keys_are_asked_about_once_and_again_after_a_rewind():
    k = np.arange(24.0).reshape(1, 12, 2)
    owner, layer, asked = EveryThird(), Layer(12), []

    def make(new):
        asked.append(new[0, :, 0].tolist())
        return (new * 10,)

    for S in (3, 3, 5):
        (known,) = per_key(owner, k[:, :S], make, layer)
        np.testing.assert_array_equal(known[:, :S], 10 * k[:, :S])
    assert asked == [[0, 2, 4], [6, 8]]
    layer.memory.rewind(4)
    (known,) = per_key(owner, -k[:, :6], make, layer)
    assert asked[2:] == [[-8, -10]]
    assert known[0, :6, 0].tolist() == [0, 20, 40, 60, -80, -100]
    passing = Layer(12, remember=False)
    per_key(owner, k, make, passing)
    assert len(asked[3]) == 12 and not passing.memory.kept
