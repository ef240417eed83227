"""The state of a running sequence: its KV cache and whatever else must be remembered. The parts of
the model are stateless.

Three things that are often a single integer are kept apart:

- the *positions* of the tokens of this step (``Tokens``): the angle of RoPE;
- the *rows* of a layer's KV cache, each of which knows its token's position (``Layer``);
- which rows a query may see: the *mask*, which compares positions (``Layer.mask``).

While every token has one row, in order, row r holds position r and nothing is looked up. A layer
may also hold fewer rows than there are tokens (eviction, token skipping), or in another order.

A ``State`` belongs to one sequence, or to one batch that advances together, and has one ``Layer``
per block. A technique that has to remember more (hashes, counters) keeps it in ``layer.memory``,
or in ``layer.shared`` if all blocks need it, so that ``rewind`` and ``fork`` include it.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from minitx.errors import MinitxError

SPARE = 32  # extra rows to allocate when a cache that was shrunk grows again


class Tokens:
    """The tokens of this step: the positions of the rows of x (..., T, D) in the sequence.

    positions: a slice of consecutive positions, or an array (T,). start: (B,) the first real
    position of each sequence of a batch padded on the left, or None. In a batch of two where the
    second sequence has one padding token in front, start = [0, 1]; for the first three positions

        array   [0, 1, 2]                   positions in the padded batch, the same for all
        own     [[0, 1, 2], [-1, 0, 1]]     positions within each sequence, negative in padding
        lookup  [[0, 1, 2], [ 0, 0, 1]]     the same as an index into a table of positions
        end     3                           one after the last position; -1: not consecutive

    unseen: (T, T) booleans, True where a token of this step must not see another one, although it
    has an earlier position or the same: it is on another branch of a tree. None: there are no
    branches (shared/token_tree.py makes some). The rows of the step are the last in the KV cache.
    """

    def __init__(self, positions, start: np.ndarray | None = None, unseen=None):
        self.positions, self.start, self.unseen = positions, start, unseen
        consecutive = isinstance(positions, slice)
        self.end = positions.stop if consecutive else -1  # -1: not consecutive
        self.lookup = positions if start is None else np.maximum(self.own, 0)
        # lookup: the index into a table by position; padding looks up 0, and is never used

    def __len__(self) -> int:
        if isinstance(self.positions, slice):
            return self.positions.stop - self.positions.start
        return len(self.positions)

    @cached_property
    def array(self) -> np.ndarray:
        """The positions as an array (T,)."""
        if isinstance(self.positions, slice):
            return np.arange(self.positions.start, self.positions.stop)
        return self.positions

    @property
    def own(self) -> np.ndarray:
        """Positions within each sequence: (T,), or (B, T) where padding is negative."""
        return self.array if self.start is None else self.array - self.start[:, None]

    def only(self, which) -> "Tokens":
        """A subset of the tokens: ``which`` is an array of indices, or of booleans (T,)."""
        unseen = None if self.unseen is None else self.unseen[which]  # by any token of the step
        return Tokens(self.array[which], self.start, unseen)


class Memory:
    """What techniques remember of a sequence, keyed by the part that owns it. step: the position at
    which the current step began, if all blocks share this memory."""

    def __init__(self):
        self.kept: dict[Any, Any] = {}
        self.step = 0

    def recall(self, owner: Any, make: Callable[[], Any]) -> Any:
        """The memory of ``owner``, made by ``make()`` the first time. It needs a method
        ``rewind(position)`` that forgets every token from ``position`` on."""
        if owner not in self.kept:
            self.kept[owner] = make()
        return self.kept[owner]

    def rewind(self, position: int) -> None:
        for kept in self.kept.values():
            kept.rewind(position)


class Layer:
    """The state of one block: its KV cache, and what techniques keep beside it.

    keys, values: (..., K, allocated, d); the first ``count`` rows are in use. Heads come before
    rows, so that a decoding step multiplies each head's keys without copying them.
    row_positions: the position of each row, for all heads or per key head; None: row r holds r.
    tokens: the tokens of this step, set by whoever runs the block (``Stack``, or ``take``).
    """

    def __init__(
        self,
        capacity: int,
        start: np.ndarray | None = None,
        remember: bool = True,
        shared: Memory | None = None,
        index: int | None = None,
    ):
        self.index = index  # of the block
        self.capacity = capacity  # the longest sequence, in tokens
        self.start = start  # (B,) first real token of each sequence of a left-padded batch, or None
        self.remember = remember  # False: a single pass, nothing is kept
        self.tokens = Tokens(slice(0, 0), start)
        self.keys: Any = None
        self.values: Any = None
        self.count = 0
        self.row_positions: np.ndarray | None = None  # (count,) or (..., K, count)
        self.visible: np.ndarray | None = None  # rows visible in this step; None: all
        self.rewindable_to = 0  # the earliest position, besides 0, that rewind can reach
        self.evicted_by = ""  # the technique that freed the rows before rewindable_to
        self.memory = Memory()  # of this block's parts
        self.shared = Memory() if shared is None else shared  # of all blocks together

    @classmethod
    def once(cls, T: int) -> "Layer":
        """A layer for a single pass over the first T tokens, after which nothing is kept."""
        return cls(T, remember=False).take(T)

    def take(self, T: int) -> "Layer":
        """Advance to the next T tokens; returns the layer. For running a block by hand."""
        first = self.shared.step = self.tokens.end
        self.tokens = Tokens(slice(first, first + T), self.start)
        return self

    # Rows -----------------------------------------------------------------------------------------

    def store(self, k, v) -> None:
        """Append the keys and values (..., K, T, d) of this step's tokens, one row each."""
        T = k.shape[-2]
        if not self.remember:
            self.keys, self.values, self.count = k, v, T
            self.row_positions = None if self.tokens.end == T else self.tokens.array
            return
        first, end = self.count, self.count + T
        in_order = self.row_positions is None and self.tokens.end == end
        if not in_order:
            self._note_positions(first)
        self._allocate(k, v, end)
        self.keys[..., first:end, :] = k
        self.values[..., first:end, :] = v
        self.count = end

    def rows(self):
        """Keys and values (..., K, S, d) of the visible rows."""
        if self.visible is not None:
            return self.keys[..., self.visible, :], self.values[..., self.visible, :]
        return self.keys[..., : self.count, :], self.values[..., : self.count, :]

    def row_tokens(self) -> Tokens:
        """The tokens of those rows."""
        if self.visible is None and self.row_positions is None:
            return Tokens(slice(0, self.count), self.start)
        return Tokens(self._seen_positions(), self.start)

    def mask(self):
        """The attention mask of this step's tokens: booleans that broadcast to (..., K, G, T, S),
        True where a row belongs to a later token, to another branch or to padding. None if these
        are the newest tokens and the rows are in order: then ``ops.attention`` applies the causal
        mask itself."""
        if self.row_positions is None and self.start is None and self.tokens.end == self.count:
            return None
        query = self.tokens.array[:, None]  # (T, 1)
        row = self._seen_positions()[..., None, :]  # (1, S), or by key head (..., K, 1, S)
        if row.ndim > 2:
            row = row[..., None, :, :]  # (..., K, 1, 1, S)
        mask = row > query
        if self.tokens.unseen is not None:
            mask[..., -self.tokens.unseen.shape[-1] :] |= self.tokens.unseen
        if self.start is not None:
            mask = mask | (row < self.start[:, None, None, None, None])  # (B, 1 or K, 1, T, S)
        elif len(query) == 1 and not mask.any():
            return None  # one query that sees every row needs no mask
        return mask

    def keep(self, rows: np.ndarray) -> None:
        """Free all rows except these: (n,) in ascending order, or a set per key head (..., K,
        n)."""
        if self.row_positions is None:
            self.row_positions = np.arange(self.count)
        n = rows.shape[-1]
        if rows.ndim > 1:
            wide = np.broadcast_to(self.row_positions, (*rows.shape[:-1], self.count))
            self.row_positions = np.take_along_axis(wide, rows, -1)
        else:
            self.row_positions = self.row_positions[..., rows]
        for name in ("keys", "values"):
            old = getattr(self, name)
            if rows.ndim > 1:
                kept = np.take_along_axis(old, rows[..., None], -2)
            else:
                kept = old[..., rows, :]
            if old.shape[-2] > 2 * (n + SPARE):  # give the memory back
                old = np.empty((*old.shape[:-2], n + SPARE, old.shape[-1]), old.dtype)
                setattr(self, name, old)
            old[..., :n, :] = kept
        self.count = n

    def _seen_positions(self) -> np.ndarray:
        if self.row_positions is None:
            return np.arange(self.count) if self.visible is None else self.visible
        return self.row_positions if self.visible is None else self.row_positions[..., self.visible]

    def _note_positions(self, first: int) -> None:
        if self.row_positions is None:
            self.row_positions = np.arange(first)
        new = self.tokens.array
        new = np.broadcast_to(new, (*self.row_positions.shape[:-1], len(new)))
        self.row_positions = np.concatenate([self.row_positions, new], -1)

    def _allocate(self, k, v, end: int) -> None:
        """Make room for ``end`` rows. Pages that are never written take no memory, so the first
        allocation is for the whole context."""
        if self.keys is None:
            room = max(self.capacity, end)
            self.keys, self.values = (
                np.empty((*a.shape[:-2], room, a.shape[-1]), a.dtype) for a in (k, v)
            )
        elif end > self.keys.shape[-2]:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = np.empty((*old.shape[:-2], end + SPARE, old.shape[-1]), old.dtype)
                new[..., : self.count, :] = old[..., : self.count, :]
                setattr(self, name, new)

    # Going back -----------------------------------------------------------------------------------

    def check_rewind(self, position: int) -> None:
        if 0 < position < self.rewindable_to:
            raise MinitxError(
                f"Cannot rewind to position {position}: {self.evicted_by} has freed cache rows "
                f"that this needs; rewind to {self.rewindable_to} or later, or to 0."
            )

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on. Its rows are overwritten later."""
        if position == 0:
            self.count, self.row_positions, self.rewindable_to = 0, None, 0
        elif self.row_positions is None:
            self.count = min(self.count, position)
        else:
            self._forget_rows(position)
        end = position if self.tokens.end < 0 else min(position, self.tokens.end)
        self.tokens = Tokens(slice(end, end), self.start)
        self.memory.rewind(position)

    def _forget_rows(self, position: int) -> None:
        earlier = self.row_positions < position
        count = int(earlier.sum(-1).max())
        if earlier[..., :count].all():  # in every head, the forgotten rows are the last ones
            self.row_positions, self.count = self.row_positions[..., :count], count
        else:
            self.keep(np.flatnonzero(earlier))

    def __deepcopy__(self, memo):
        """A copy with its own arrays; only rows in use are copied."""
        other = copy.copy(self)
        memo[id(self)] = other
        if self.remember and self.keys is not None:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = np.empty_like(old)
                new[..., : self.count, :] = old[..., : self.count, :]
                setattr(other, name, new)
        other.memory = copy.deepcopy(self.memory, memo)
        other.shared = copy.deepcopy(self.shared, memo)
        return other


class State:
    """The state of one running sequence, or of a batch that advances together.

    layers: one ``Layer`` per block. position: tokens processed so far, padding included. tokens:
    those of this step. prompt: the length of the prompt, if known (for techniques that treat prompt
    and generated tokens differently). batch: the shape of the batch, () for one sequence; None
    before the first tokens. start: (B,) the first real position of each sequence of a
    batch padded on the left, else None. remember=False: for a single pass over whole sequences
    (training), after which nothing is kept.
    """

    def __init__(self, layers: int, capacity: int, start=None, remember: bool = True):
        self.position = 0
        self.start = start
        self.capacity = capacity
        self.prompt: int | None = None
        self.batch: tuple | None = None if start is None else start.shape
        self.tokens = Tokens(slice(0, 0), start)
        self.shared = Memory()
        self.layers = [Layer(capacity, start, remember, self.shared, i) for i in range(layers)]

    def take(self, T: int) -> Tokens:
        """Set the tokens of this step: the T positions from ``position`` on. Whoever runs them adds
        T to ``position`` afterwards. MinitxError if they do not fit the context."""
        end = self.position + T
        if end > self.capacity:
            raise MinitxError(
                f"The sequence would grow to {end} tokens but the model's context is "
                f"{self.capacity}; use a shorter prompt or fewer new tokens."
            )
        self.tokens = Tokens(slice(self.position, end), self.start)
        self.shared.step = self.position
        return self.tokens

    def need_batch(self, shape: tuple) -> None:
        """Refuse ids (*shape, T) if the tokens before them were a batch of another shape: () for
        one sequence, (B,) for B of them."""
        if self.batch is None:
            self.batch = shape
        if shape != self.batch:
            raise MinitxError(
                f"The state belongs to a batch of shape {self.batch} and the ids to one of shape "
                f"{shape} (() is a single sequence); use a new state."
            )

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache in use, over all layers."""
        return sum(
            array[..., : layer.count, :].nbytes
            for layer in self.layers
            for array in (layer.keys, layer.values)
            if array is not None
        )

    @property
    def bytes_per_token(self) -> int:
        """Bytes of the KV cache per token processed so far."""
        return self.cache_bytes // max(self.position, 1)

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on, in every layer and every technique's memory.
        MinitxError if there are fewer tokens, or if a technique has freed rows that this needs."""
        if not 0 <= position <= self.position:
            raise MinitxError(
                f"Cannot rewind to position {position}: the sequence has {self.position} tokens."
            )
        for layer in self.layers:
            layer.check_rewind(position)
        self.position = position
        self.shared.rewind(position)
        for layer in self.layers:
            layer.rewind(position)

    def fork(self, position: int | None = None) -> "State":
        """An independent copy, rewound to ``position`` (default: the end)."""
        other = copy.deepcopy(self)
        if position is not None:
            other.rewind(position)
        return other
