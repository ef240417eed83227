"""Sparse attention: each query attends only to the keys that a selector keeps for it.

A selector is a part that guesses, before any exact score is computed, which keys matter to which
query. elsa, a3, dota, predictive_attention and sparse_memory each bring one. What follows the
selection is the same for all, and written here once: exact scores, softmax, and the weighted sum of
the values, over the kept keys only.

A selector has three methods:

    selector.keeps_all(S)                  True if it would keep all of S keys. Then the selector is
                                           not called, and attention is dense (unless ``floor`` or
                                           ``arithmetic`` is set: see ``SparseAttention``)
    known = selector.remember(k, layer)    what it knows of each cached key, such as a hash;
                                           ``per_key`` computes it once, when the key is new
    kept = selector(q, k, known, visible)  the selection: booleans (..., K, G, T, S)

for queries q (..., H, T, d) and keys k (..., K, S, d): H query heads, K key heads, G = H / K query
heads for each key head, T queries, S keys, d head width. ``visible`` says which keys each query
sees (``Visible``). ``known`` may be longer than S, since its arrays have the cache's capacity; only
the first S entries count.

A selection is valid if every query keeps at least one key, and only keys that it sees, and if the
keys of a query do not depend on the other queries: a prompt read in one pass, in chunks, or token
by token keeps the same keys. The shortest complete selector is ``BestKeys`` in
lab/frontier/attention_baselines.py.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np

from minitx import fast, ledger, ops
from minitx.model import Attend, AttendUnequalGroups
from minitx.state import Layer
from minitx.technique import NoSuchPart
from minitx.tree import Part, part, walk


@part
class SparseAttention(Part):
    """Softmax attention of each query over the keys that the selector keeps."""

    needs_all_rows = True  # needs every token's cache row
    selector: Part
    scale: float  # 1 / sqrt(d)
    floor: float = 0.0  # after scoring, drop keys with weight < floor * largest weight
    arithmetic: Part | None = None  # called instead of ``attend_gathered`` and ``attend_masked``

    def __call__(self, q, k, v, layer: Layer):
        if self.selector.keeps_all(k.shape[-2]) and not self.floor and not self.arithmetic:
            return ops.attention(q, k, v, self.scale, layer.mask())
        known = self.selector.remember(k, layer)
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        positions = layer.tokens.array  # (T,), cache rows too: needs_all_rows
        for a in range(0, len(positions), fast.ROWS):  # a block of queries at a time
            b = min(a + fast.ROWS, len(positions))
            end = int(positions[b - 1]) + 1  # no query of this block sees a later key
            visible = Visible(b - a, end, layer.start, positions[a:b])
            block = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
            out[..., a:b, :] = self.attend_block(*block, known, visible)
        return out  # (..., H, T, d), or as wide as the values are

    def attend_block(self, q, k, v, known, visible: "Visible"):
        kept = self.selector(q, k, known, visible)  # (..., K, G, T, S)
        ledger.event("keys seen", lambda: visible.total(kept.shape[:-2]))
        ledger.event("keys scored" if self.floor else "keys kept", kept)
        attend = self.arithmetic or (attend_gathered if visible.T == 1 else attend_masked)
        return attend(q, k, v, self.scale, kept, self.floor)


class Visible:
    """Which of S keys each of T queries sees: those up to its own.

    own (T,): each query's own cache row, ascending; default: the last T of the S rows.
    start (B,): in a batch padded on the left, each sequence's first real row. Rows before it are
    padding, which no real query sees; a padding query sees only itself, so it has one key too.

    mask: True where a query must not see a key. (T, T) for the newest T keys if the queries are the
    T newest tokens, since all of them see every earlier key; (T, S) for other queries; (B, 1, 1, T,
    S) in a padded batch; None for a single query that sees everything.
    """

    def __init__(self, T: int, S: int, start: np.ndarray | None = None, own=None):
        self.T, self.S = T, S
        self.own = np.arange(S - T, S) if own is None else own
        if start is None and self.own[0] == S - T:  # the queries are the T newest tokens
            self.mask = fast.newest_mask(T)
            return
        self.mask = np.arange(S) > self.own[:, None]  # (T, S)
        if start is not None:
            self.mask = self.mask | (np.arange(S) < start[:, None, None, None, None])
            self.mask[..., np.arange(T), self.own] = False

    @cached_property
    def count(self) -> np.ndarray:
        """How many keys each query sees: (1,), (T,) or (B, 1, 1, T), to broadcast to
        (..., K, G, T)."""
        if self.mask is None:
            return np.array([self.S])
        return self.S - self.mask.sum(-1)

    def total(self, heads: tuple) -> int:
        """The number of visible (query, key) pairs in all heads (..., K, G)."""
        return int(np.broadcast_to(self.count, (*heads, self.T)).sum())

    def hide(self, p, value=fast.MASKED):
        """Overwrite p (..., K, G, T, S) with ``value`` at every key that is masked; returns p. Mask
        before ranking: otherwise a later key could be kept instead of one that the query sees."""
        if self.mask is not None:
            np.copyto(p[..., self.S - self.mask.shape[-1] :], value, where=self.mask)
        return p


# What a selector knows of each key ---------------------------------------------------------------


def per_key(owner: Part, k, make: Callable, layer: Layer) -> tuple[np.ndarray, ...]:
    """``make(k)`` for all cached keys k (..., K, S, d), computed once per key and kept beside the
    cache, under ``owner``.

    make: a function of n new keys (..., K, n, d) that returns a tuple of arrays (..., K, n) or
    (..., K, n, any). What it computes for one key must not depend on the others: a scale shared by
    all keys would change old entries when a larger key arrives. If another technique skips this
    layer for some tokens, their entries are computed at the next call.
    """
    if not layer.remember:  # a single pass, as in training: nothing is kept after it
        return make(k)
    # recall(owner, PerKey): the PerKey that is stored for this owner, made at the first call
    return layer.memory.recall(owner, PerKey).extend(k, make, layer.capacity)


class PerKey:
    """Arrays beside a layer's KV cache, with one entry for each cached key."""

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
            all_heads = (slice(None),) * len(heads)
            for array, a in zip(self.arrays, new):
                array[(*all_heads, slice(done, S))] = a
            self.count = S
        return self.arrays

    def rewind(self, position: int) -> None:
        self.count = min(self.count, position)


# Selecting the k largest -------------------------------------------------------------------------


def top_k(p, r):
    """Booleans like the scores p (..., T, S): True at the r largest of each row. Ties go to the
    lower index.

    r: integers from 1 to S that broadcast to (..., T). Masked keys (MASKED) rank last, so none is
    selected as long as r is at most the number of keys that the query sees.
    """
    S = p.shape[-1]
    if np.size(r) == 1:
        r = int(np.reshape(r, -1)[0])
        least = np.partition(p, S - r, -1)[..., S - r, None]  # the r-th largest, (..., T, 1)
    else:
        r = np.broadcast_to(r, p.shape[:-1])[..., None]  # (..., T, 1)
        least = np.take_along_axis(np.sort(p, -1), S - r, -1)
    kept = p > least
    tied = p == least
    return kept | tied & (tied.cumsum(-1) <= r - kept.sum(-1, keepdims=True))


# Attention over the kept keys --------------------------------------------------------------------


def attend_gathered(q, k, v, scale, kept, floor=0.0):
    """For one token, q (..., H, 1, d): gather the kept rows of k and v, and compute with those.

    kept (..., K, G, 1, S). Head by head, since heads differ in how many keys they keep: a few small
    products are several times faster than sums over one list of (head, key) pairs.
    """
    S, d, width = k.shape[-2], k.shape[-1], v.shape[-1]
    # k and v per key head; v may have a single head for all
    queries, out = (q * scale).reshape(-1, d), np.empty((q.size // d, width), q.dtype)
    k, v = k.reshape(-1, S, d), v.reshape(-1, S, width)
    for h, row in enumerate(kept.reshape(-1, S)):
        index = np.flatnonzero(row)
        keys = k[h * len(k) // len(queries)].take(index, 0)  # (n, d)
        weights = keys @ queries[h]
        weights -= weights.max()
        np.exp(weights, out=weights)
        if floor:
            above = weights >= floor  # the largest weight is 1, so at least one key is left
            weights, index = weights[above], index[above]
        values = v[h * len(v) // len(queries)].take(index, 0)
        ledger.count(keys.size + values.size, cache_bytes=keys.nbytes + values.nbytes)
        if floor:
            ledger.event("keys kept", len(values))
        np.dot(weights, values, out=out[h])
        out[h] /= weights.sum()
    return out.reshape(*q.shape[:-1], width)


def attend_masked(q, k, v, scale, kept, floor=0.0):
    """For a prompt, q (..., H, T, d): compute every score, then mask those that are not kept.

    kept (..., K, G, T, S). Nothing is saved here: each query keeps other keys, and with many
    queries one dense product is faster than gathering rows for each.
    """
    # ``unnormalized_weights`` expects one mask per key head. Here each query head has its own, so
    # it becomes a group by itself: one more axis of size 1 for q, two more for k, v and the mask.
    rows = q.reshape(*kept.shape[:-2], 1, *q.shape[-2:])  # (..., K, G, 1, T, d)
    k, v = k[..., None, None, :, :], v[..., None, None, :, :]  # (..., K, 1, 1, S, d)
    work = q.size // q.shape[-1] * k.shape[-2] * (k.shape[-1] + v.shape[-1])
    ledger.count(work, cache_bytes=k.nbytes + v.nbytes)
    mask = ~kept[..., None, None, :, :]  # (..., K, G, 1, 1, T, S)
    p = fast.unnormalized_weights(rows, k, scale, mask)  # (..., K, G, 1, T, S), the largest is 1
    if floor:
        p[p < floor] = 0
        ledger.event("keys kept", lambda: np.count_nonzero(p))
    return fast.weighted_sum(p, v).reshape(*q.shape[:-1], v.shape[-1])


# Checks ------------------------------------------------------------------------------------------


def need_equal_groups(attn: Part) -> None:
    """NoSuchPart if key heads serve different numbers of query heads (head_prune)."""
    for _, node in walk(attn):
        if type(node) is AttendUnequalGroups:
            raise NoSuchPart(Attend, found=node)
