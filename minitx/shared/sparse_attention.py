"""Attention over chosen keys: what all techniques share that tell which keys matter.

Each of them is a part that chooses: it says, for every query and key, whether the key is kept. It
may know something about each key (a code, a hash), made once when the key comes. What follows is
the same for all and stands here: exact scores, softmax and values of the kept keys alone.

A part that chooses has

- ``__call__(q, k, known, visible)``: booleans (..., K, G, T, S) for queries q (..., H, T, d) and keys
  k (..., K, S, d), of which they see what ``seen`` (``Visible``) says. Each row keeps one key at least
  and none that it does not see, and is decided by itself: a chunk keeps what single tokens keep;
- ``remember(k, layer)``: what it knows of all keys so far, which is ``known`` in each call (of
  which the first S are to be looked at); see ``remembered``;
- ``keeps_all(S)``: with its settings, can no key of S be left out? Then it is not asked at all.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from minitx import fast, ledger, ops
from minitx.state import Layer
from minitx.tree import Part, part


@part
class SparseAttention(Part):
    """Attention of each query over the keys that are chosen for it.

    floor: of these, once they are scored, too, are those left out that weigh less than this share
    of the heaviest. arithmetic: what does the same as ``gathered`` and ``masked`` in numbers other
    than floats, if anything does.
    """

    needs_all_rows = True
    selector: Part
    scale: float  # 1 / sqrt(d)
    floor: float = 0.0
    arithmetic: Part | None = None

    def __call__(self, q, k, v, layer: Layer):
        if self.selector.keeps_all(k.shape[-2]) and not self.floor and not self.arithmetic:
            return ops.attention(q, k, v, self.scale, layer.mask())
        known = self.selector.remember(k, layer)
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        where = layer.tokens.array  # positions (T,), which are rows too
        for a in range(0, len(where), fast.ROWS):
            b = min(a + fast.ROWS, len(where))
            end = int(where[b - 1]) + 1  # none of these queries sees a later key
            visible = Visible(b - a, end, layer.start, where[a:b])
            block = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
            out[..., a:b, :] = self.rows(*block, known, visible)
        return out  # (..., H, T, d), or as wide as the values are

    def rows(self, q, k, v, known, visible: "Visible"):
        kept = self.selector(q, k, known, visible)  # (..., K, G, T, S)
        ledger.event("keys seen", lambda: visible.total(kept.shape[:-2]))
        ledger.event("keys scored" if self.floor else "keys kept", kept)
        attend = self.arithmetic or (attend_gathered if visible.T == 1 else attend_masked)
        return attend(q, k, v, self.scale, kept, self.floor)


class Visible:
    """Which of S keys each of T queries sees: all up to its own row. In a batch that is padded on
    the left, from ``start`` (B,) on; a row of padding sees itself, so that none is empty.

    own (T,): the queries' own rows, in rising order; by default the last T.
    mask: booleans (T, n), or (B, 1, 1, T, S) for such a batch: True where a query must not see one
    of the n newest keys. None for a single query that sees all.
    """

    def __init__(self, T: int, S: int, start: np.ndarray | None = None, own=None):
        self.T, self.S = T, S
        self.own = np.arange(S - T, S) if own is None else own
        if start is None and self.own[0] == S - T:  # the newest, one after another
            self.mask = fast.newest_mask(T)
            return
        self.mask = np.arange(S) > self.own[:, None]  # (T, S)
        if start is not None:
            self.mask = self.mask | (np.arange(S) < start[:, None, None, None, None])
            self.mask[..., np.arange(T), self.own] = False

    @cached_property
    def count(self) -> np.ndarray:
        """How many keys each query sees: (1,), (T,) or (B, 1, 1, T), for (..., K, G, T)."""
        if self.mask is None:
            return np.array([self.S])
        return self.S - self.mask.sum(-1)

    def total(self, heads: tuple) -> int:
        """How many pairs of a query and a key it sees there are, for (..., K, G) heads."""
        return int(np.broadcast_to(self.count, (*heads, self.T)).sum())

    def hide(self, p, value=fast.MASKED):
        """Write ``value`` wherever p (..., K, G, T, S) is about a key that is not seen; gives p."""
        if self.mask is not None:
            np.copyto(p[..., self.S - self.mask.shape[-1] :], value, where=self.mask)
        return p


# What is known of each key -----------------------------------------------------------------------


def per_key(owner: Part, k, make: Callable, layer: Layer) -> tuple[np.ndarray, ...]:
    """What ``make`` tells of the keys k (..., K, S, d), each asked about once, when it is new.

    make: from some keys (..., K, n, d) a tuple of arrays (..., K, n) or (..., K, n, any); what it
    tells of a key must not depend on the others. Keys that came while this block's attention was
    passed by are asked about when it is next at work.
    """
    if not layer.remember:
        return make(k)
    return layer.memory.recall(owner, PerKey).extend(k, make, layer.capacity)


class PerKey:
    """Arrays beside a block's cache, with one entry for each of its keys."""

    def __init__(self):
        self.count = 0
        self.arrays: tuple[np.ndarray, ...] = ()

    def extend(self, k, make: Callable, capacity: int) -> tuple[np.ndarray, ...]:
        done, S = self.count, k.shape[-2]
        heads = k.shape[:-2]  # (..., K)
        if done < S:
            new = make(k[..., done:, :])
            if not self.arrays:
                self.arrays = tuple(
                    np.empty((*heads, capacity, *a.shape[len(heads) + 1 :]), a.dtype) for a in new
                )
            every = (slice(None),) * len(heads)
            for array, a in zip(self.arrays, new):
                array[(*every, slice(done, S))] = a
            self.count = S
        return self.arrays

    def rewind(self, position: int) -> None:
        self.count = min(self.count, position)


# Choosing the largest ----------------------------------------------------------------------------


def top_k(p, r):
    """Booleans like p (..., T, S): the r largest numbers of each row, of equals the earlier; r are
    integers from 1 to S that broadcast to (..., T). Of keys not seen, which are MASKED, none is
    among them if r is at most the number of those that are."""
    S = p.shape[-1]
    if np.size(r) == 1:
        r = int(np.reshape(r, -1)[0])
        least = np.partition(p, S - r, -1)[..., S - r, None]  # that is kept, (..., T, 1)
    else:
        r = np.broadcast_to(r, p.shape[:-1])[..., None]  # (..., T, 1)
        least = np.take_along_axis(np.sort(p, -1), S - r, -1)
    kept = p > least
    equal = p == least
    return kept | equal & (equal.cumsum(-1) <= r - kept.sum(-1, keepdims=True))


# Attending to what is kept -----------------------------------------------------------------------


def attend_gathered(q, k, v, scale, kept, floor=0.0):
    """One query a head, q (..., H, 1, d), over its kept keys (..., K, G, 1, S), and nothing else.

    Head by head, since each keeps another number of keys: products of these few heads are several
    times faster than sums over one list of all pairs of a query and a key.
    """
    S, d, width = k.shape[-2], k.shape[-1], v.shape[-1]
    queries, mixed = (q * scale).reshape(-1, d), np.empty((q.size // d, width), q.dtype)
    k, v = k.reshape(-1, S, d), v.reshape(-1, S, width)  # G rows of queries for each; v may be one
    for h, row in enumerate(kept.reshape(-1, S)):
        key = np.flatnonzero(row)
        keys = k[h * len(k) // len(queries)].take(key, 0)  # (n, d)
        weights = keys @ queries[h]
        weights -= weights.max()
        np.exp(weights, out=weights)
        if floor:
            heavy = weights >= floor  # the heaviest is 1, so one is left
            weights, key = weights[heavy], key[heavy]
        values = v[h * len(v) // len(queries)].take(key, 0)
        ledger.count(keys.size + values.size, cache_bytes=keys.nbytes + values.nbytes)
        if floor:
            ledger.event("keys kept", len(values))
        np.dot(weights, values, out=mixed[h])
        mixed[h] /= weights.sum()
    return mixed.reshape(*q.shape[:-1], width)


def attend_masked(q, k, v, scale, kept, floor=0.0):
    """The same for many rows: all scores are computed, and those not kept (..., K, G, T, S) are cut
    off, since for many rows the product of all is faster than gathering. Each head stands for
    itself, since heads that share keys do not share what they keep."""
    rows = q.reshape(*kept.shape[:-2], 1, *q.shape[-2:])  # (..., K, G, 1, T, d)
    k, v = k[..., None, None, :, :], v[..., None, None, :, :]  # (..., K, 1, 1, S, d)
    work = q.size // q.shape[-1] * k.shape[-2] * (k.shape[-1] + v.shape[-1])
    ledger.count(work, cache_bytes=k.nbytes + v.nbytes)
    mask = ~kept[..., None, None, :, :]  # (..., K, G, 1, 1, T, S)
    p = fast.attention_weights(rows, k, scale, mask)  # (..., K, G, 1, T, S), the heaviest is 1
    if floor:
        p[p < floor] = 0
        ledger.event("keys kept", lambda: np.count_nonzero(p))
    return fast.weighted_sum(p, v).reshape(*q.shape[:-1], v.shape[-1])
