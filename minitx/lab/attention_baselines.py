"""Keys that are chosen without predicting anything: what a predictor is measured against.

Three choosers (see choosing.py) that all keep r of the keys which a row sees, or all if they are
fewer: the best there are (``oracle``), the first few and the newest (``window``), and any
(``random``). None of them is a technique: the oracle computes every score to know the best, and the
others look at nothing. What a technique keeps should be near the oracle's and far from random.
"""

import numpy as np

from minitx.model import Attend
from minitx.shared.sparse_attention import SparseAttention, Visible, top_k
from minitx.skip.sparse_memory.nearest import scores
from minitx.state import Layer
from minitx.technique import swap, wrap
from minitx.tree import Part, part

SINKS = 4  # first keys that a window keeps too: much attention rests there (Xiao et al., 2024)


def baseline(lm: Part, name: str, r: int) -> Part:
    """The language model with every row's keys chosen by the baseline of that name."""
    make = BASELINES[name]

    def change(attn: Part, index: int) -> Part:
        return swap(attn, Attend, lambda dense: SparseAttention(make(r, index), dense.scale))

    return wrap(lm, "attn", change)


@part
class BestKeys(Part):
    """Exact top-r: no choice of r keys keeps more of a row's attention."""

    r: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        by_group = q.reshape(*k.shape[:-2], -1, *q.shape[-2:])  # (..., K, G, T, d)
        p = visible.hide(scores(by_group, k, None))
        return top_k(p, np.minimum(visible.count, self.r))


@part
class NewestKeys(Part):
    """A sliding window: the newest keys, and the first few (at most ``SINKS``) of all."""

    r: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        i, j = own_places(visible)
        sinks = min(SINKS, self.r - 1)
        kept = (j < sinks) | (j > i - (self.r - sinks))
        return visible.hide(for_each_head(kept, q, k), False)


@part
class RandomKeys(Part):
    """Keys at random: anew for each query, head and block, and the same ones in every run."""

    r: int
    seed: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.r

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        i, j = own_places(visible)
        head = np.arange(q.shape[-3]).reshape(k.shape[-3], -1, 1, 1)  # (K, G, 1, 1)
        p = for_each_head(random_numbers(self.seed, head, i, j), q, k)
        return top_k(visible.hide(p), np.minimum(visible.count, self.r))


BASELINES = {
    "oracle": lambda r, block: BestKeys(r),
    "window": lambda r, block: NewestKeys(r),
    "random": lambda r, block: RandomKeys(r, block),
}


def own_places(visible: Visible) -> tuple[np.ndarray, np.ndarray]:
    """Where queries (..., T, 1) and keys (..., T, S) stand in their own sequence, whose first key
    is 0 also where padding comes before it: then the place says the same in every batch."""
    n = np.broadcast_to(visible.count, (*visible.count.shape[:-1], visible.T))[
        ..., None
    ]  # (..., T, 1)
    column = np.arange(visible.S - visible.T, visible.S)[:, None]  # of each query, (T, 1)
    first = column + 1 - n  # column of the first key it sees, (..., T, 1)
    return n - 1, np.arange(visible.S) - first


def for_each_head(rows, q, k):
    """Rows that may be the same for all heads as an array of their own (..., K, G, T, S)."""
    *lead, H, T, _ = q.shape
    K, S = k.shape[-3], k.shape[-2]
    return np.array(np.broadcast_to(rows, (*lead, K, H // K, T, S)))


def random_numbers(seed: int, *places) -> np.ndarray:
    """Numbers from 0 to 1 that follow from the seed and the places (whole numbers that broadcast)
    alone, so that a row draws the same in a chunk as by itself (mixing steps of SplitMix64)."""
    z = np.array(seed).astype(np.uint64)
    for place in places:
        z = (z ^ np.asarray(place).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
