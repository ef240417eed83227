"""How much of the exact attention lies on the keys that a selector keeps: its attention mass.

Each selector is wrapped in a part that computes the exact softmax of the same queries and keys,
whatever the selector knows of them, and adds up the weights. It changes nothing, and the ledger
does not count its work.
"""

from dataclasses import dataclass, replace

import numpy as np

from minitx import fast
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.state import Layer
from minitx.technique import swap
from minitx.tree import Part, part


@dataclass
class KeyTotals:
    """Sums over the queries of all heads."""

    seen: int = 0  # pairs of a query and a key that it sees
    kept: int = 0  # pairs that are kept
    rows: int = 0  # queries
    mass: float = 0.0  # exact attention weights on the kept keys
    best: float = 0.0  # on as many keys with the largest weights

    def add_dense(self, tokens: int, heads: int) -> None:
        """Add the queries for which no selector was called, of sequences with ``tokens`` tokens
        over ``heads`` heads: they keep all their keys."""
        rows, pairs = tokens * heads, tokens * (tokens + 1) // 2 * heads
        missing = rows - self.rows
        self.mass += missing
        self.best += missing
        self.kept += pairs - self.seen
        self.rows, self.seen = rows, pairs


@part
class MeasuredSelector(Part):
    """Selects what ``selector`` does, and adds the attention mass of these keys to ``totals``.

    floor: as of the ``SparseAttention`` around it. mass=False: only count keys, which is faster.
    """

    selector: Part
    scale: float
    floor: float
    totals: KeyTotals
    mass: bool = True

    def keeps_all(self, S: int) -> bool:
        return self.selector.keeps_all(S)

    def remember(self, k, layer: Layer):
        return self.selector.remember(k, layer)

    def __call__(self, q, k, known, visible: Visible):
        selected = self.selector(q, k, known, visible)  # (..., K, G, T, S)
        kept = selected
        if self.mass or self.floor:
            p = fast.unnormalized_weights(q, k, self.scale, visible.mask).reshape(kept.shape)
            p /= p.sum(-1, keepdims=True)
            kept = selected & (p >= self.floor * (p * selected).max(-1, keepdims=True))
        self.totals.seen += visible.total(kept.shape[:-2])
        self.totals.kept += int(kept.sum())
        self.totals.rows += kept[..., 0].size
        if self.mass:
            self.totals.mass += float((p * kept).sum(dtype=np.float64))
            self.totals.best += best_mass(p, kept.sum(-1))
        return selected


def best_mass(p, r) -> float:
    """Sum over rows of p (..., S) of the r (...) largest in each."""
    descending = -np.sort(-p, -1)
    sums = descending.cumsum(-1, dtype=np.float64)
    return float(np.take_along_axis(sums, r[..., None] - 1, -1).sum())


def with_measured_selectors(lm: Part, totals: KeyTotals, mass: bool = True) -> Part:
    """The LM with every selector wrapped in a ``MeasuredSelector``."""
    return swap(
        lm,
        SparseAttention,
        lambda a: replace(a, selector=MeasuredSelector(a.selector, a.scale, a.floor, totals, mass)),
    )
