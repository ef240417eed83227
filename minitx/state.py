"""Memory: everything that a running sequence remembers. The parts of the model remember nothing.

A ``State`` belongs to one sequence (or one batch of them) and holds one ``Layer`` per block. The
stack hands each block its own layer. A technique that has to remember something (hashes, streaks,
counters) keeps it in ``layer.memory``, or in ``layer.shared`` if all blocks are to see it, so that
``rewind`` reaches it too.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from minitx.errors import MinitxError


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
    """What one block remembers: ``position`` tokens so far, and their keys and values.

    keys, values: (..., K, capacity, d), of which the first ``position`` rows are real. Stored by
    head, so that a step of decoding multiplies them where they lie, without a copy.
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
        self.position = 0
        self.capacity = capacity
        self.start = start  # (B,) first real token of each row of a left-padded batch, or None
        self.remember = remember
        self.keys: Any = None
        self.values: Any = None
        self.memory = Memory()  # of this block's parts
        self.shared = Memory() if shared is None else shared  # of all blocks together

    def extend(self, k, v):
        """Append the keys and values (..., K, T, d) of T new tokens; returns all of them so far,
        (..., K, S, d). ``position`` moves on only when the block is done: see ``Stack``."""
        if not self.remember:
            return k, v
        end = self.position + k.shape[-2]
        if self.keys is None:
            self.keys, self.values = (
                np.empty((*a.shape[:-2], self.capacity, a.shape[-1]), a.dtype) for a in (k, v)
            )
        if end > self.capacity:
            raise MinitxError(
                f"The sequence would grow to {end} tokens but the model's context is "
                f"{self.capacity}; use a shorter prompt or fewer new tokens."
            )
        self.keys[..., self.position : end, :] = k
        self.values[..., self.position : end, :] = v
        return self.keys[..., :end, :], self.values[..., :end, :]

    def rewind(self, position: int) -> None:
        self.position = min(self.position, position)  # later rows are overwritten when needed
        self.memory.rewind(position)


class State:
    """The memory of one running sequence, or of a batch that runs in step.

    layers: one ``Layer`` per block. position: tokens seen so far, padding included.
    start: (B,) the first real position of each row when a batch is padded on the left, else None.
    remember=False: for one pass over whole sequences (training), where nothing is kept.
    """

    def __init__(self, layers: int, capacity: int, start=None, remember: bool = True):
        self.position = 0
        self.start = start
        self.capacity = capacity
        self.shared = Memory()
        self.layers = [Layer(capacity, start, remember, self.shared, i) for i in range(layers)]

    @property
    def bytes_per_token(self) -> int:
        """What the keys and values of one token take, in all layers that hold some."""
        kept = [a for layer in self.layers for a in (layer.keys, layer.values) if a is not None]
        return sum(array.nbytes for array in kept) // self.capacity

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on, in every layer and every technique's memory."""
        if not 0 <= position <= self.position:
            raise MinitxError(
                f"Cannot rewind to position {position}: the sequence has {self.position} tokens."
            )
        self.position = position
        self.shared.rewind(position)
        for layer in self.layers:
            layer.rewind(position)


def positions(position: int, T: int, start=None):
    """Where T new tokens stand: a slice, or for rows that start late an array (B, T), in which the
    padding is put at position 0 (its result is never looked at)."""
    if start is None:
        return slice(position, position + T)
    return np.maximum(own_positions(position, T, start), 0)


def own_positions(position: int, T: int, start=None) -> np.ndarray:
    """Where T new tokens stand in their own sequences: (T,), or (B, T) for rows that start late, in
    which padding is negative."""
    where = np.arange(position, position + T)
    return where if start is None else where - start[:, None]
