"""Everything that a running sequence remembers. The parts of the model remember nothing.

Three things that are often one integer are kept apart:

- the *positions* of the tokens in hand (``Tokens``): what RoPE rotates by;
- the *rows* of a layer's KV cache, each of which knows the position of its token (``Layer``);
- which rows a query sees: the *mask*, which compares positions (``Layer.mask``).

As long as every token has one row, in order, row r holds position r and nothing is looked up. A
layer may hold fewer rows than there are tokens (eviction, token skipping), or in another order.

A ``State`` belongs to one sequence, or to one batch that runs in step, and has one ``Layer`` for
each block. A technique that has to remember something more (hashes, counters) keeps it in
``layer.memory``, or in ``layer.shared`` if all blocks are to see it: so ``rewind`` and ``fork``
reach it too.
"""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from minitx.errors import MinitxError

SPARE = 32  # rows allocated beyond those in use, where a cache is kept small


class Tokens:
    """The tokens in hand: where the rows of x (..., T, D) stand in the sequence.

    positions: a slice of consecutive positions, or an array (T,). start: (B,) the first real
    position of each row of a batch that is padded on the left, or None.
    """

    def __init__(self, positions, start: np.ndarray | None = None):
        self.positions, self.start = positions, start
        consecutive = isinstance(positions, slice)
        self.end = positions.stop if consecutive else -1  # -1: not consecutive
        self.lookup = positions if start is None else np.maximum(self.own, 0)
        # lookup: indexes a table by position; padding looks at 0, and its result is never used

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
        """Positions in each row's own sequence: (T,), or (B, T) with padding negative."""
        return self.array if self.start is None else self.array - self.start[:, None]

    def only(self, which) -> "Tokens":
        """Those of the tokens that ``which`` selects: indices, or booleans (T,)."""
        return Tokens(self.array[which], self.start)


class Memory:
    """What techniques remember, by the part that owns it."""

    def __init__(self):
        self.kept: dict[Any, Any] = {}

    def recall(self, owner: Any, make: Callable[[], Any]) -> Any:
        """What ``owner`` keeps here, made by ``make()`` the first time. It needs a method
        ``rewind(position)`` that forgets every token from ``position`` on."""
        if owner not in self.kept:
            self.kept[owner] = make()
        return self.kept[owner]

    def rewind(self, position: int) -> None:
        for kept in self.kept.values():
            kept.rewind(position)


class Layer:
    """What one block remembers: its KV cache, and what its techniques keep beside it.

    keys, values: (..., K, allocated, d), of which the first ``count`` rows are in use. Stored by
    head, so that a step of decoding multiplies them where they lie, without a copy.
    row_positions: the position of each row, for all heads or by key head; None: row r holds r.
    tokens: those in hand, set by whoever runs the block (``Stack``, or ``take`` by hand).
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
        self.capacity = capacity  # tokens in the longest sequence
        self.start = start  # (B,) first real token of each row of a left-padded batch, or None
        self.remember = remember  # False: one pass, after which nothing is kept
        self.tokens = Tokens(slice(0, 0), start)
        self.keys: Any = None
        self.values: Any = None
        self.count = 0
        self.row_positions: np.ndarray | None = None  # (count,) or (..., K, count)
        self.visible: np.ndarray | None = None  # rows that this step may see; None: all
        self.rewindable_to = 0  # the earliest position that can still be returned to, besides 0
        self.evicted_by = ""  # the technique that has freed what lies before
        self.memory = Memory()  # of this block's parts
        self.shared = Memory() if shared is None else shared  # of all blocks together

    @classmethod
    def once(cls, T: int) -> "Layer":
        """For one pass over T tokens, from the first one on, of which nothing is kept."""
        return cls(T, remember=False).take(T)

    def take(self, T: int) -> "Layer":
        """Take the next T tokens in hand; returns the layer. For running a block by hand."""
        first = self.tokens.end
        self.tokens = Tokens(slice(first, first + T), self.start)
        return self

    # Rows ----------------------------------------------------------------------------------------

    def store(self, k, v) -> None:
        """Store the keys and values (..., K, T, d) of the tokens in hand, in a row each."""
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
        """Keys and values (..., K, S, d) of the rows that this step may see."""
        if self.visible is not None:
            return self.keys[..., self.visible, :], self.values[..., self.visible, :]
        return self.keys[..., : self.count, :], self.values[..., : self.count, :]

    def row_tokens(self) -> Tokens:
        """The tokens that those rows belong to."""
        if self.visible is None and self.row_positions is None:
            return Tokens(slice(0, self.count), self.start)
        return Tokens(self._seen_positions(), self.start)

    def mask(self):
        """Which rows the tokens in hand must not see: booleans that broadcast to
        (..., K, G, T, S), True where a row belongs to a later token or to padding. None where they
        are the newest tokens and the rows are in order, which ``ops.attention`` knows to mask."""
        if self.row_positions is None and self.start is None and self.tokens.end == self.count:
            return None
        query = self.tokens.array[:, None]  # (T, 1)
        row = self._seen_positions()[..., None, :]  # (1, S), or by key head (..., K, 1, S)
        if row.ndim > 2:
            row = row[..., None, :, :]  # (..., K, 1, 1, S)
        mask = row > query
        if self.start is not None:
            mask = mask | (row < self.start[:, None, None, None, None])  # (B, 1 or K, 1, T, S)
        elif len(query) == 1 and not mask.any():
            return None
        return mask

    def keep(self, rows: np.ndarray) -> None:
        """Free all rows but these: (n,) in rising order, or one set for each key head
        (..., K, n)."""
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
        """Room for ``end`` rows. What is never written takes no memory, so a cache that keeps
        every token is allocated in full at once."""
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

    # Going back ----------------------------------------------------------------------------------

    def check_rewind(self, position: int) -> None:
        if 0 < position < self.rewindable_to:
            raise MinitxError(
                f"Cannot rewind to position {position}: {self.evicted_by} has freed what that "
                f"needs; rewind to {self.rewindable_to} or later, or to 0."
            )

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on; its rows are overwritten when needed."""
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
        if earlier[..., :count].all():  # the rows that go are the last ones, in every head
            self.row_positions, self.count = self.row_positions[..., :count], count
        else:
            self.keep(np.flatnonzero(earlier))

    def __deepcopy__(self, memo):
        """A copy with arrays of its own, of which only the rows in use are copied."""
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
    """The memory of one running sequence, or of a batch that runs in step.

    layers: one ``Layer`` for each block. position: tokens seen so far, padding included. tokens:
    those in hand. prompt: how many tokens of the sequence are its prompt, where that is known.
    start: (B,) the first real position of each row of a batch padded on the left, else None.
    remember=False: for one pass over whole sequences (training), where nothing is kept.
    """

    def __init__(self, layers: int, capacity: int, start=None, remember: bool = True):
        self.position = 0
        self.start = start
        self.capacity = capacity
        self.prompt: int | None = None
        self.tokens = Tokens(slice(0, 0), start)
        self.shared = Memory()
        self.layers = [Layer(capacity, start, remember, self.shared, i) for i in range(layers)]

    def take(self, T: int) -> Tokens:
        """Take the next T tokens in hand. MinitxError if the context has no room for them."""
        end = self.position + T
        if end > self.capacity:
            raise MinitxError(
                f"The sequence would grow to {end} tokens but the model's context is "
                f"{self.capacity}; use a shorter prompt or fewer new tokens."
            )
        self.tokens = Tokens(slice(self.position, end), self.start)
        return self.tokens

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values in use, in all layers."""
        return sum(
            array[..., : layer.count, :].nbytes
            for layer in self.layers
            for array in (layer.keys, layer.values)
            if array is not None
        )

    @property
    def bytes_per_token(self) -> int:
        """Cache bytes for each token seen so far, in all layers that hold some."""
        return self.cache_bytes // max(self.position, 1)

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on, in every layer and every technique's memory.
        MinitxError if there are not so many, or if a technique has freed rows that this needs."""
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
        """A copy that goes on by itself, rewound to ``position`` (the end, by default)."""
        other = copy.deepcopy(self)
        if position is not None:
            other.rewind(position)
        return other
