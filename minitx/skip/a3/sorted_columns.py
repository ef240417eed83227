"""Every column of the keys in ascending order, kept up to date as keys come and go.

So the keys with the largest or the smallest number in a column are found without looking at the
others: column j's largest product with a query is at one of its two ends. What is done with that is
told elsewhere (skip/a3.py).

Equal numbers stand in the order of their keys. Shapes: keys (..., K, S, d); columns (..., K, d, n).
"""

from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.state import Layer
from minitx.tree import Part


class Columns(NamedTuple):
    """``values`` (..., K, d, n) ascending along the last axis, and the key that each comes from."""

    values: np.ndarray
    rows: np.ndarray  # int32

    def until(self, end: int) -> "Columns":
        """Those of the keys before ``end`` alone."""
        if end >= self.rows.shape[-1]:
            return self
        # every column loses the same keys, so what is left is a rectangle again, and in order
        kept, shape = self.rows < end, (*self.rows.shape[:-1], end)
        return Columns(self.values[kept].reshape(shape), self.rows[kept].reshape(shape))


def sort(k, first: int = 0) -> Columns:
    """Columns of the keys k (..., K, n, d), which are the keys ``first`` and following."""
    columns = np.ascontiguousarray(k.swapaxes(-1, -2))  # (..., K, d, n)
    order = columns.argsort(-1, kind="stable")
    return Columns(np.take_along_axis(columns, order, -1), (order + first).astype(np.int32))


def merge(old: Columns, new: Columns) -> Columns:
    """One from two, where all keys of ``new`` come after those of ``old``."""
    values = np.concatenate([old.values, new.values], -1)
    order = values.argsort(-1, kind="stable")
    rows = np.concatenate([old.rows, new.rows], -1)
    return Columns(np.take_along_axis(values, order, -1), np.take_along_axis(rows, order, -1))


class SortedColumns:
    """The columns of a block's cache, in arrays with room for ``capacity`` keys."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.count = 0
        self.room: Columns | None = None  # (..., K, d, capacity), of which count are in use

    def now(self) -> Columns | None:
        """The columns of all keys so far; None before the first."""
        return self.room and Columns(*(array[..., : self.count] for array in self.room))

    def extend(self, k) -> Columns | None:
        """Bring the columns up to the keys k (..., K, n, d), of which the first ``count`` are in
        them already."""
        n = k.shape[-2]
        if n - self.count == 1 and self.room:
            self._insert(k[..., -1, :])
        elif n > self.count:
            new = sort(k[..., self.count :, :], self.count)
            self._keep(merge(self.now(), new) if self.count else new)
        return self.now()

    def _insert(self, x) -> None:
        """One key x (..., K, d): in each column what is larger makes room for it."""
        n = self.count
        values, rows = self.room
        later = values[..., :n] > x[..., None]  # (..., K, d, n): false, then true
        # All numbers are compared, where a search would look at a few: one step for all columns is
        # faster than a search for each, up to about 2,000 keys.
        for array in self.room:
            np.copyto(array[..., 1 : n + 1], array[..., :n], where=later)
        place = n - later.sum(-1, keepdims=True)
        np.put_along_axis(values, place, x[..., None], -1)
        np.put_along_axis(rows, place, n, -1)
        self.count = n + 1
        ledger.event("sorted numbers moved", lambda: later.sum() + x.size)

    def _keep(self, columns: Columns) -> None:
        if self.room is None:
            shape = (*columns.rows.shape[:-1], self.capacity)
            self.room = Columns(*(np.empty(shape, array.dtype) for array in columns))
        self.count = columns.rows.shape[-1]
        for array, found in zip(self.room, columns):
            array[..., : self.count] = found
        ledger.event("sorted numbers moved", columns.rows.size)

    def rewind(self, position: int) -> None:
        if position < self.count:
            for array, left in zip(self.room, self.now().until(position)):
                array[..., :position] = left
            self.count = position


def remembered(owner: Part, k, layer: Layer) -> Columns | None:
    """The columns of the keys k (..., K, n, d), the first n of the block's cache, and of what else
    was sorted before."""
    if not layer.remember:
        return sort(k) if k.shape[-2] else None
    return layer.memory.recall(owner, lambda: SortedColumns(layer.capacity)).extend(k)
