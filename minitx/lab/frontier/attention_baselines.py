"""Baselines for techniques that select keys: the best keys, a recent window, and random keys.

Three selectors (shared/sparse_attention.py) that keep r of the keys that a query sees, or all if
there are fewer. None of them saves anything: the ``oracle`` computes every score to know the best
keys, and ``window`` and ``random`` predict nothing. What a technique keeps should hold nearly the
attention mass of the oracle's keys, and far more than that of random ones.
"""

import numpy as np

from minitx import fast, ledger
from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention, Visible, top_k
from minitx.state import Layer
from minitx.technique import swap, wrap
from minitx.tree import Part, part

SINKS = 4  # first keys that a window keeps too: much attention rests there (Xiao et al., 2024)


def baseline(lm: Part, name: str, r: int) -> Part:
    """The LM in which every query keeps the r keys that this baseline selects."""
    make = BASELINES[name]

    def change(attn: Part, index: int) -> Part:
        return swap(attn, Attend, lambda dense: SparseAttention(make(r, index), dense.scale))

    return wrap(lm, "attn", change)


@part
class BestKeys(Part):
    """Top-r of the exact scores: no other r keys hold more of a query's attention."""

    r: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        scores = fast.attention_scores(q, k, 1)  # (..., K, G*T, S)
        ledger.count(q.size * k.shape[-2], cache_bytes=k.nbytes)
        scores = scores.reshape(*scores.shape[:-2], -1, visible.T, visible.S)
        return top_k(visible.hide(scores), np.minimum(visible.count, self.r))


@part
class NewestKeys(Part):
    """A sliding window: the newest keys, and the first few (at most ``SINKS``) of the sequence."""

    r: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        i, j = own_positions(visible)
        sinks = min(SINKS, self.r - 1)
        kept = (j < sinks) | (j > i - (self.r - sinks))
        return visible.hide(for_each_head(kept, q, k), False)


@part
class RandomKeys(Part):
    """Random keys: different ones for each query, head and block, the same ones in every run."""

    r: int
    seed: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        i, j = own_positions(visible)
        head = np.arange(q.shape[-3]).reshape(k.shape[-3], -1, 1, 1)  # (K, G, 1, 1)
        p = for_each_head(random_numbers(self.seed, head, i, j), q, k)
        return top_k(visible.hide(p), np.minimum(visible.count, self.r))


BASELINES = {
    "oracle": lambda r, block: BestKeys(r),
    "window": lambda r, block: NewestKeys(r),
    "random": lambda r, block: RandomKeys(r, block),
}


def own_positions(visible: Visible) -> tuple[np.ndarray, np.ndarray]:
    """Positions of queries (..., T, 1) and keys (..., T, S) in their own sequence, whose first key
    is 0 even if padding precedes it: so they are the same in every batch."""
    shape = (*visible.count.shape[:-1], visible.T)
    n = np.broadcast_to(visible.count, shape)[..., None]  # keys that each query sees, (..., T, 1)
    column = np.arange(visible.S - visible.T, visible.S)[:, None]  # of each query, (T, 1)
    first = column + 1 - n  # column of the first key it sees, (..., T, 1)
    return n - 1, np.arange(visible.S) - first


def for_each_head(rows, q, k):
    """Rows that may be the same for all heads, as an array of their own (..., K, G, T, S)."""
    *lead, H, T, _ = q.shape
    K, S = k.shape[-3], k.shape[-2]
    return np.array(np.broadcast_to(rows, (*lead, K, H // K, T, S)))


def random_numbers(seed: int, *indices) -> np.ndarray:
    """Pseudo-random numbers from 0 to 1, each a hash (steps of SplitMix64) of the seed and its
    indices, which are integer arrays that broadcast. So a query draws the same numbers in a chunk
    as by itself."""
    z = np.array(seed).astype(np.uint64)
    for index in indices:
        z = (z ^ np.asarray(index).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
