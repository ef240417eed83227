"""A witness beside each part that chooses keys: how many it keeps, how much attention
they hold.

It computes the exact softmax of the queries and keys that are there, whatever the method knows of
them. What it does is not counted by the ledger, and changes nothing.
"""

from dataclasses import dataclass, replace

import numpy as np

from minitx import fast
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.state import Layer
from minitx.technique import swap
from minitx.tree import Part, part


@dataclass
class KeyTally:
    """Sums over rows of all heads."""

    seen: int = 0  # pairs of a query and a key it sees
    kept: int = 0
    rows: int = 0
    mass: float = 0.0  # of the exact attention on the keys that are kept
    best: float = 0.0  # on as many of the best

    def complete(self, tokens: int, heads: int) -> None:
        """Bring the sums up to those of sequences of so many tokens and so many heads in all: rows
        that no part was asked to choose for keep all their keys."""
        rows, pairs = tokens * heads, tokens * (tokens + 1) // 2 * heads
        missing = rows - self.rows
        self.mass += missing
        self.best += missing
        self.kept += pairs - self.seen
        self.rows, self.seen = rows, pairs


@part
class Witness(Part):
    """Chooses what ``choose`` does, and writes down how much of the exact attention that is.

    floor: as of the attention around it (see SparseAttention). weigh: or count keys only.
    """

    selector: Part
    scale: float
    floor: float
    tally: KeyTally
    weigh: bool = True

    def keeps_all(self, S: int) -> bool:
        return self.selector.keeps_all(S)

    def remember(self, k, layer: Layer):
        return self.selector.remember(k, layer)

    def __call__(self, q, k, known, visible: Visible):
        kept = self.selector(q, k, known, visible)  # (..., K, G, T, S)
        left = kept
        if self.weigh or self.floor:
            p = fast.attention_weights(q, k, self.scale, visible.mask).reshape(kept.shape)
            p /= p.sum(-1, keepdims=True)
            left = kept & (p >= self.floor * (p * kept).max(-1, keepdims=True))
        self.tally.seen += visible.total(kept.shape[:-2])
        self.tally.kept += int(left.sum())
        self.tally.rows += kept[..., 0].size
        if self.weigh:
            self.tally.mass += float((p * left).sum(dtype=np.float64))
            self.tally.best += best_mass(p, left.sum(-1))
        return kept


def best_mass(p, r) -> float:
    """Sum over rows of p (..., S) of the r (...) largest in each."""
    largest_first = -np.sort(-p, -1)
    sums = largest_first.cumsum(-1, dtype=np.float64)
    return float(np.take_along_axis(sums, r[..., None] - 1, -1).sum())


def witnessed(lm: Part, tally: KeyTally, weigh: bool = True) -> Part:
    """The LM with a witness around every part that chooses."""
    return swap(
        lm,
        SparseAttention,
        lambda a: replace(a, selector=Witness(a.selector, a.scale, a.floor, tally, weigh)),
    )
