"""sparse_attention: attention over the keys that a selector keeps, for prompts, chunks and tokens.

Also its pieces: which keys a query sees, top_k, what is remembered of each key, and the two ways to
attend to the kept keys; and the symmetric quantization that several selectors use.
"""

import numpy as np
import pytest
from qkv import random_qkv, run
from same import assert_same

from minitx import fast, ops
from minitx.ledger import counting
from minitx.shared.sparse_attention import (
    SparseAttention,
    Visible,
    attend_gathered,
    attend_masked,
    per_key,
    top_k,
)
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Layer
from minitx.tree import Part, part


@part
class EveryThird(Part):
    """A selector that keeps each query's own key and the keys 0, 3, 6, ..."""

    def keeps_all(self, S):
        return False

    def remember(self, k, layer):
        return per_key(self, k, lambda new: (new.sum(-1), 2 * new), layer)

    def __call__(self, q, k, known, visible):
        sums, twice = known
        assert_same(sums[..., : visible.S], k.sum(-1), "known of other keys")
        assert_same(twice[..., : visible.S, :], 2 * k, "known of other keys")
        *lead, H, T, _ = q.shape
        K = k.shape[-3]
        kept = np.zeros((*lead, K, H // K, T, visible.S), bool)
        kept[..., ::3] = True
        t = np.arange(T)
        kept[..., t, visible.S - T + t] = True
        return visible.hide(kept, False)


def literal_attention(q, k, v, scale, floor, start=0):
    """(output, keys kept): one query and head at a time, with dicts of keys."""
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


# Attention ---------------------------------------------------------------------------------------


def test_attention_over_two_of_three_keys_by_hand():
    """The query 2 sees keys 0, 1, 2 and keeps 0 and 2. With scale 1 its scores there are 0 and
    log 3, so the weights are 1/4 and 3/4: the output is 10 / 4 + 30 * 3/4 = 25."""
    q = np.array([[[1.0, 0]]])  # (H, 1, d)
    k = np.array([[[0.0, 0], [9, 9], [np.log(3), 0]]])  # (K, S, d)
    v = np.array([[[10.0], [20], [30]]])
    kept = np.array([[[[True, False, True]]]])  # (K, G, 1, S)
    for attend in (attend_gathered, attend_masked):
        assert_same(attend(q, k, v, 1.0, kept), [[[25]]], attend.__name__, tolerance=1e-7)


@pytest.mark.parametrize("sizes", [(90,), (1,) * 90, (30, 1, 59)])
@pytest.mark.parametrize("floor", [0.0, 0.2])
def test_sparse_attention_in_prompts_chunks_and_tokens_equals_literal(sizes, floor):
    q, k, v = random_qkv(1, S=90)
    attend = SparseAttention(EveryThird(), 0.5, floor)
    with counting(attend) as counts:
        found = run(attend, q, k, v, sizes)
    expected, kept = literal_attention(q, k, v, 0.5, floor)
    assert_same(found, expected, "attention output", atol=1e-12)
    assert counts.events["keys kept"] == kept
    assert counts.events["keys seen"] == 4 * 90 * 91 // 2
    assert ("keys scored" in counts.events) == bool(floor)


@part
class Everything(EveryThird):
    """Would keep every key, and does if it is called."""

    def keeps_all(self, S):
        return True

    def __call__(self, q, k, known, visible):
        found = super().__call__(q, k, known, visible)
        return visible.hide(np.ones_like(found), False)


def test_selector_that_keeps_all_is_called_only_if_there_is_a_floor():
    """Without a floor, attention is dense and nothing is counted. With one, all keys are scored and
    some are dropped after it."""
    q, k, v = random_qkv(1, S=20)
    for floor, called in ((0.0, False), (0.5, True)):
        attend = SparseAttention(Everything(), 0.5, floor)
        with counting(attend) as counts:
            found = run(attend, q, k, v, (20,))
        assert ("keys seen" in counts.events) == called, f"floor {floor}"
        dense = abs(found - ops.attention(q, k, v, 0.5)).max() < 1e-12
        assert dense != called, f"floor {floor} drops no key, or attention is not dense without it"


@pytest.mark.parametrize("sizes", [(12,), (1,) * 12, (5, 7)])
def test_sparse_attention_in_padded_batch_equals_each_sequence_alone(sizes):
    q, k, v = random_qkv(2, lead=(2,), S=12)
    start = np.array([0, 4])
    found = run(SparseAttention(EveryThird(), 0.5, 0.2), q, k, v, sizes, Layer(12, start))
    for row in (0, 1):
        expected, _ = literal_attention(q[row], k[row], v[row], 0.5, 0.2, start[row])
        assert_same(
            found[row, :, start[row] :], expected[:, start[row] :], f"sequence {row}", atol=1e-12
        )


def test_decoding_reads_only_the_kept_rows():
    q, k, v = random_qkv(3, S=30)
    attend, layer = SparseAttention(EveryThird(), 0.5), Layer(30)
    run(attend, q, k, v, (29,), layer)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    kept = 4 * 11  # keys 0, 3, ..., 27 and the query's own, in 4 heads
    assert counts.entries[""].multiply_adds == 2 * 8 * kept
    assert counts.entries[""].cache_bytes == 2 * 8 * 8 * kept


def test_gathered_equals_masked_attention():
    rng = np.random.default_rng(4)
    q, k, v = random_qkv(4, lead=(3,), S=1)[0], *rng.standard_normal((2, 3, 2, 40, 8))
    kept = rng.random((3, 2, 2, 1, 40)) < 0.3
    kept[..., 7] = True
    for floor in (0.0, 0.1, 1.0):
        both = [attend(q, k, v, 0.5, kept, floor) for attend in (attend_gathered, attend_masked)]
        np.testing.assert_allclose(*both, atol=1e-13, err_msg=f"gathered, masked; floor {floor}")
    only_key_7 = np.arange(40) == np.full((3, 2, 2, 1, 1), 7)
    alone = attend_gathered(q, k, v, 0.5, only_key_7)
    assert_same(alone, np.repeat(v[..., 7:8, :], 2, -3), "one key: its own value", atol=1e-13)


# Selecting ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("step", [0.5, 1e-9])  # many ties, or none
def test_top_k_equals_sorting_and_ties_go_to_the_lower_index(seed, step):
    rng = np.random.default_rng(seed)
    p = np.round(rng.standard_normal((3, 5, 20)) / step) * step
    p[1, 2] = fast.MASKED
    for r in (1, 7, 20, rng.integers(1, 21, (3, 5)), rng.integers(1, 21, (1, 5))):
        found = top_k(p, np.array(r))
        for row, many, kept in zip(
            p.reshape(-1, 20), np.broadcast_to(r, (3, 5)).reshape(-1), found.reshape(-1, 20)
        ):
            best = sorted(range(20), key=lambda j: (-row[j], j))[:many]
            assert set(np.flatnonzero(kept)) == set(best), f"not the {many} largest of {row}"


def test_visible_counts_and_hides_keys():
    assert Visible(1, 9).count.tolist() == [9] and Visible(1, 9).mask is None
    assert Visible(3, 9).count.reshape(-1).tolist() == [7, 8, 9], "the last 3 of 9 tokens"
    padded = Visible(3, 9, np.array([0, 8]))  # the second sequence has one real token, row 8
    assert padded.count.reshape(2, 3).tolist() == [[7, 8, 9], [1, 1, 1]]
    assert padded.total((2, 4, 2)) == 8 * (7 + 8 + 9 + 3)
    p = padded.hide(np.zeros((2, 4, 2, 3, 9)), 1)
    seen = [np.flatnonzero(p[1, 0, 0, t] == 0).tolist() for t in range(3)]
    assert seen == [[6], [7], [8]], "a padding query sees itself, a real one no padding"
    assert np.flatnonzero(p[0, 3, 1, 1] == 0).tolist() == list(range(8))


# What is remembered of each key ------------------------------------------------------------------


def test_per_key_computes_each_key_once_and_again_after_a_rewind():
    k = np.arange(24.0).reshape(1, 12, 2)
    owner, layer, asked = EveryThird(), Layer(12), []

    def make(new):
        asked.append(new[0, :, 0].tolist())
        return (new * 10,)

    for S in (3, 3, 5):
        (known,) = per_key(owner, k[:, :S], make, layer)
        assert_same(known[:, :S], 10 * k[:, :S])
    assert asked == [[0, 2, 4], [6, 8]], "every key is computed once, when it is new"
    layer.memory.rewind(4)
    (known,) = per_key(owner, -k[:, :6], make, layer)
    assert asked[2:] == [[-8, -10]], "keys from the rewound position on are computed again"
    assert known[0, :6, 0].tolist() == [0, 20, 40, 60, -80, -100]
    one_pass = Layer(12, remember=False)
    per_key(owner, k, make, one_pass)
    assert len(asked[3]) == 12 and not one_pass.memory.kept, "one pass leaves nothing behind"


# Symmetric quantization --------------------------------------------------------------------------


def test_quantize_symmetric_by_hand():
    """4 bits: L = 7. For [1.4, -0.6, 0.25] the scale is 1.4 / 7 = 0.2, so 7, -3 and
    1.25, which rounds to 1. Zeros have the scale 1, and dtypes stay."""
    integers, scales = quantize_symmetric(np.array([[1.4, -0.6, 0.25], [0, 0, 0]], np.float32), 4)
    assert integers.tolist() == [[7, -3, 1], [0, 0, 0]]
    assert_same(scales, [0.2, 1], tolerance=1e-6)
    assert integers.dtype == scales.dtype == np.float32
