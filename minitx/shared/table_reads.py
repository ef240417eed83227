"""Sums of table reads: what stands in the place of a product once its results are in a table.

Two shapes of it: single entries of one table, or whole rows of one table a group of inputs. Both
are done for some tokens at a time, so that what is read never takes much memory, and both add up in
the same order for any number of tokens: a token gives the same bits alone and among others.
"""

import numpy as np

from minitx import ledger

READS = 1 << 16  # numbers that are gathered at a time, so that they stay near the processor


def sum_entries(table, base, codes, dtype):
    """``y[i, n] = sum over s of table[base[i, s] + codes[s, n]]``, in ``dtype``.

    table: one-dimensional. base (n, S) whole numbers; codes (S, N) whole numbers of any type.
    """
    S, N = codes.shape
    columns = max(1, min(N, READS // S))
    rows = max(1, READS // (S * columns))
    y = np.empty((len(base), N), dtype)
    for a in range(0, N, columns):
        for i in range(0, len(base), rows):
            where = base[i : i + rows, :, None] + codes[:, a : a + columns]  # (rows, S, columns)
            table.take(where).sum(1, dtype=dtype, out=y[i : i + rows, a : a + columns])
    return y  # (n, N)


def sum_rows(tables, codes, columns=slice(None)):
    """``y[i] = sum over s of tables[s, codes[i, s]]``, only these columns (a slice or indices).

    tables (S, K, N); codes (n, S) integers below K -> (n, columns).
    """
    S, K, N = tables.shape
    entries = tables.reshape(S * K, N)[:, columns]
    where = codes + np.arange(S) * K  # (n, S)
    rows = max(1, READS // (S * N))
    y = np.empty((len(codes), entries.shape[1]), tables.dtype)
    for i in range(0, len(codes), rows):
        entries[where[i : i + rows]].sum(1, out=y[i : i + rows])
    return y


def as_rows(x, width: int):
    """x (..., D) as rows (n, width) in one piece of memory, filled up with the VALUE 0."""
    rows = np.ascontiguousarray(x.reshape(-1, x.shape[-1]))
    if rows.shape[1] == width:
        return rows
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def note(multiplications: int, reads: int, weight_bytes: int) -> None:
    """Count in the ledger. Every read is also one addition; multiplications that remain count as
    multiply-adds."""
    ledger.count(multiplications, weight_bytes)
    ledger.event("table reads", reads)
