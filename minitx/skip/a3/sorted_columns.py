"""The columns of the cached keys in ascending order, kept up to date while the cache grows.

Column j of the keys k (S, d) is k[:, j]. Sorted, its largest and smallest numbers are at its ends.
Equal numbers are in the order of their keys. Shapes: keys (..., K, S, d) for K key heads, S cached
keys and head width d; columns (..., K, d, n), of the first n keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.state import Layer
from minitx.tree import Part


class Columns(NamedTuple):
    """Sorted columns of n keys, and the cache row that each number comes from."""

    values: np.ndarray  # (..., K, d, n) ascending along the last axis
    rows: np.ndarray  # (..., K, d, n) int32

    def of_head(self, head: tuple) -> "Columns":
        """The columns (d, n) of one key head."""
        return Columns(self.values[head], self.rows[head])

    def between(self, first: int, end: int) -> "Columns":
        """The columns of the keys first .. end - 1 alone."""
        n = self.rows.shape[-1]
        if first <= 0 and end >= n:
            return self
        # Each column loses the same keys, so what is left is still d columns of equal length, in
        # order.
        kept = (self.rows >= first) & (self.rows < end)
        shape = *self.rows.shape[:-1], max(0, min(end, n) - max(first, 0))
        return Columns(self.values[kept].reshape(shape), self.rows[kept].reshape(shape))


def sort_columns(k, first: int = 0) -> Columns:
    """Columns of the keys k (..., K, n, d), which are in the cache rows from ``first`` on."""
    columns = np.ascontiguousarray(k.swapaxes(-1, -2))  # (..., K, d, n)
    order = columns.argsort(-1, kind="stable")
    return Columns(np.take_along_axis(columns, order, -1), (order + first).astype(np.int32))


def merge_columns(old: Columns, new: Columns) -> Columns:
    """The columns of both; all keys of ``new`` come after those of ``old``."""
    values = np.concatenate([old.values, new.values], -1)
    order = values.argsort(-1, kind="stable")
    rows = np.concatenate([old.rows, new.rows], -1)
    return Columns(np.take_along_axis(values, order, -1), np.take_along_axis(rows, order, -1))


class SortedColumns:
    """The columns of one layer's cached keys, in arrays with room for ``capacity`` keys."""

    def __init__(self, capacity: int, rounded: Callable = np.asarray):
        self.capacity = capacity
        self.rounded = rounded  # makes of keys what is sorted
        self.count = 0
        self.arrays: Columns | None = None  # (..., K, d, capacity), of which count are in use

    def current(self) -> Columns | None:
        """The columns of all keys so far; None before the first."""
        return self.arrays and Columns(*(array[..., : self.count] for array in self.arrays))

    def extend(self, k) -> Columns | None:
        """The columns of the keys k (..., K, n, d), of which the first ``count`` are sorted
        already."""
        n = k.shape[-2]
        if n > self.count:
            k = self.rounded(k[..., self.count :, :])  # the new ones
        if n - self.count == 1 and self.arrays:
            self._insert(k[..., -1, :])
        elif n > self.count:
            new = sort_columns(k, self.count)
            self._store(merge_columns(self.current(), new) if self.count else new)
        return self.current()

    def _insert(self, x) -> None:
        """Insert one key x (..., K, d): the larger numbers of each column move up by one."""
        n = self.count
        values, rows = self.arrays
        # Comparing with all numbers, in one call for all columns, is faster than a binary search in
        # each, up to about 2,000 keys.
        larger = values[..., :n] > x[..., None]  # (..., K, d, n): false, then true
        for array in self.arrays:
            # source and target overlap; NumPy copies as if they did not
            np.copyto(array[..., 1 : n + 1], array[..., :n], where=larger)
        place = n - larger.sum(-1, keepdims=True)
        np.put_along_axis(values, place, x[..., None], -1)
        np.put_along_axis(rows, place, n, -1)
        self.count = n + 1
        ledger.event("sorted values moved", lambda: larger.sum() + x.size)

    def _store(self, columns: Columns) -> None:
        if self.arrays is None:
            shape = (*columns.rows.shape[:-1], self.capacity)
            self.arrays = Columns(*(np.empty(shape, array.dtype) for array in columns))
        self.count = columns.rows.shape[-1]
        for array, new in zip(self.arrays, columns):
            array[..., : self.count] = new
        ledger.event("sorted values moved", columns.rows.size)

    def rewind(self, position: int) -> None:
        """Remove the keys from this position on."""
        if position < self.count:
            for array, left in zip(self.arrays, self.current().between(0, position)):
                array[..., :position] = left
            self.count = position


def cached_columns(owner: Part, k, layer: Layer, rounded: Callable = np.asarray) -> Columns | None:
    """The columns of ``rounded(k)`` for the keys k (..., K, n, d), the first n of the layer's
    cache; only keys that are new since the last call are sorted. None if there are no keys."""
    if not layer.remember:
        return sort_columns(rounded(k)) if k.shape[-2] else None
    return layer.memory.recall(owner, lambda: SortedColumns(layer.capacity, rounded)).extend(k)
