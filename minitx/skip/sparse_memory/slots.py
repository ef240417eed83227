"""A memory of few slots: what is written, what is read, what is evicted, and how to undo it.

The bookkeeping of the technique sparse_memory, over flat heads. Time is counted in tokens.
"""

from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.shared.sparse_attention import Visible
from minitx.skip.sparse_memory.nearest import best
from minitx.tree import Part


class Step(NamedTuple):
    """What one token changed: enough to undo it."""

    slot: np.ndarray  # (M,) where it was written
    token: np.ndarray  # (M,) which token was there, -1: none
    last: np.ndarray  # (M,) and when it was last accessed
    held: list | None  # the trees before
    read: list  # [] or [(memories, slots), when these were last accessed]


class Slots:
    """N slots in each of M memories: one for every key head, and every sequence of a batch.

    token, last: (M, N) which token is in a slot, and which token last accessed it. rows: for each
    array of the source (keys, and what the index knows of them), (M, capacity, any) by tokens, the
    same by slots (M, N, any). The source is the layer's, and has evicted tokens too.
    """

    def __init__(self, source: tuple, index: Part, K: int, N: int, delta: float):
        M = len(source[0])
        self.source, self.index = source, index
        self.K, self.N, self.delta = K, N, delta
        self.rows = tuple(np.zeros((M, N, a.shape[2]), a.dtype) for a in source)
        self.token = np.full((M, N), -1)
        self.last = np.full((M, N), -1)
        self.held = [index.empty()] * M if index.history else None
        self.count = 0  # tokens written
        self.journal: list[Step] = []  # one step for each of them

    def run(self, q, visible: Visible):
        """Kept keys (M, G, T, S) of q (M, G, T, d), of the tokens ``visible.own``."""
        first = int(visible.own[0])
        consecutive = first == visible.S - visible.T  # otherwise others in between skip this layer
        kept = np.zeros((*q.shape[:-1], visible.S), bool)
        free = min(max(self.N - first, 0), visible.T) if self.held is None and consecutive else 0
        if free:
            kept[:, :, :free, : first + free] = self.while_free(q[:, :, :free], first)
        for t in range(
            free, visible.T
        ):  # one by one: what one row reads settles what the next evicts
            while self.count <= visible.own[t]:
                self.write(self.count)
            slots = self.read(q[:, :, t : t + 1])  # (M, G, 1, n)
            m, g, _, slot = np.nonzero(slots)
            kept[m, g, t, self.token[m, slot]] = True
        return kept

    def write(self, t: int) -> None:
        """Token t goes into a free slot, or the one that was accessed longest ago; of several, into
        that of the oldest token."""
        each = np.arange(len(self.token))
        slot = np.full_like(each, t)
        if t >= self.N:
            # The paper keeps a linked list, O(1); in NumPy a look at N numbers is faster.
            slot = (self.last * (t + 1) + self.token).argmin(-1)
            ledger.event("keys evicted", len(slot))
        step = Step(slot, self.token[each, slot], self.last[each, slot], self.held, [])
        old = self.rows[0][each, slot] if t >= self.N else [None] * len(each)  # a copy
        self.place(slot, np.full_like(slot, t), t)
        self.journal.append(step)
        self.count = t + 1
        if self.held is not None:
            n, put = min(self.count, self.N), self.index.put
            self.held = [put(self.held[m], self.rows[0][m, :n], slot[m], old[m], m) for m in each]

    def place(self, slot, token, last) -> None:
        """Put a token (M,), known from the source, into a slot (M,)."""
        each = np.arange(len(slot))
        for row, source in zip(self.rows, self.source):
            row[each, slot] = source[each, token]
        self.token[each, slot], self.last[each, slot] = token, last

    def read(self, q):
        """Kept slots (M, G, 1, n) for q (M, G, 1, d) of the token written last."""
        t, n = self.count - 1, min(self.count, self.N)
        keys, *facts = (a[:, :n] for a in self.rows)
        order = self.token if self.count > self.N else None
        kept, p = best(self.index, self.K, q, keys, facts, Visible(1, n), self.held, order)
        hit = accessed(p, kept, self.delta)[:, 0]
        at = np.nonzero(hit)
        self.journal[t].read[:] = at, self.last[at]
        self.last[at] = t
        return kept

    def while_free(self, q, first: int):
        """The same for many tokens that find free slots, q (M, G, T, d): kept (M, G, T, S). Slot
        and token have the same number, and nothing is evicted, so rows do not wait."""
        S = first + q.shape[2]
        keys, *facts = (a[:, :S] for a in self.source)
        kept, p = best(self.index, self.K, q, keys, facts, Visible(q.shape[2], S))
        before = self.last[:, None, :S].copy()  # (M, 1, S)
        for t in range(first, S):
            self.write(t)
        t = np.arange(first, S)[:, None]
        own = t == np.arange(S)  # (T, S)
        hit = accessed(p, kept, self.delta)  # (M, T, S)
        times = np.concatenate([before, np.where(hit | own, t, -1)], 1)
        np.maximum.accumulate(times, 1, out=times)  # (M, T + 1, S), before each row and after
        self.last[:, :S] = times[:, -1]
        for i in range(S - first):
            at = np.nonzero(hit[:, i])
            self.journal[first + i].read[:] = at, times[:, i][at]
        return kept

    def rewind(self, position: int) -> None:
        """Undo the tokens from ``position`` on, the last first, each by what it changed."""
        while self.count > position:
            step = self.journal.pop()
            self.count -= 1
            if step.read:
                at, last = step.read
                self.last[at] = last
            if self.count < self.N:  # the slot was free
                for row in (*self.rows, self.token, self.last):
                    row[:, self.count] = 0 if row.ndim > 2 else -1
            else:
                self.place(step.slot, step.token, step.last)
            self.held = step.held


def accessed(p, kept, delta: float):
    """Which keys weigh more than delta in some query head, (M, T, n), by scores p (M, G, T, n)."""
    a = np.exp(p - p.max(-1, keepdims=True))  # the best of all is kept
    a *= kept
    a /= a.sum(-1, keepdims=True)
    return (a > delta).any(1)
