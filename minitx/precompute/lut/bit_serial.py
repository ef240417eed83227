"""Products with whole numbers of few bits, one bit at a time, by reading sums of the inputs.

Weights are ``scale (u - zero)`` with u of b bits. For each group of g inputs, a table of their sums
under all 2^g choices of signs is made when the token comes; g bits of u, one of each weight of the
group, are the index of the sum to read. The tables know no weights: all outputs share them.
"""

import numpy as np

from minitx import ledger
from minitx.shared.table_reads import READS, as_rows, note, sum_entries
from minitx.tree import Part, part


def planes(u, b: int, g: int):
    """Indices (b, R, N) of whole numbers u (D, N) of b bits. Bit j of ``[i, r, n]`` is bit i of
    ``u[r g + j, n]``; rows that are missing in the last group count as 0."""
    D, N = u.shape
    padded = np.zeros((-(-D // g) * g, N), np.uint8)
    padded[:D] = u
    grouped = padded.reshape(-1, g, N)
    found = np.zeros((b, len(grouped), N), np.uint8)
    for i in range(b):
        for j in range(g):
            found[i] |= (grouped[:, j] >> i & 1) << j
    return found


def signed_sums(rows, g: int, half: bool):
    """The tables of rows (n, R g): (n, R, 2^g), entry m the sum of +x_j where bit j of m is set and
    -x_j where it is not. ``half``: only those without the last bit, (n, R, 2^(g-1)); the others are
    their negatives, ``L[~m] = -L[m]``."""
    x = rows.reshape(len(rows), -1, g)
    found = np.zeros((*x.shape[:2], 1), rows.dtype)
    for j in range(g):
        lower = found - x[..., j, None]
        last = half and j == g - 1
        found = lower if last else np.concatenate([lower, found + x[..., j, None]], -1)
    return found


def bit_serial_sums(rows, index, g: int, half: bool):
    """``rows @ u`` (n, N), for rows (n, R g) and the indices (b, R, N) of u.

    A sum s_i of signs stands for (s_i + sum x) / 2, since a bit is (sign + 1) / 2.
    """
    total = rows.sum(1)[:, None]
    bits, R, N = index.shape
    dot = np.zeros((len(rows), N), rows.dtype)
    step = max(1, READS // (R << g))  # tokens whose tables are made at a time
    for a in range(0, len(rows), step):
        tables = signed_sums(rows[a : a + step], g, half)  # (step, R, K)
        if half:  # the second half mirrors the first; other machines flip signs as they read
            tables = np.concatenate([tables, -tables[..., ::-1]], -1)
        base = np.arange(tables.shape[0] * R).reshape(-1, R) << g
        for i in range(bits):
            s = sum_entries(tables.reshape(-1), base, index[i], rows.dtype)
            dot[a : a + step] += 2**i * ((s + total[a : a + step]) / 2)
    return dot


def in_codes(w, b: int):
    """A matrix w (D, N) as (u, scale, zero): whole numbers u (D, N) of b bits, and for each column
    a scale and the whole number that stands for 0. The range of a column always holds 0."""
    w = np.asarray(w, np.float64)
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    scale = (high - low) / (2**b - 1)
    scale[scale == 0] = 1
    zero = np.rint(-low / scale)
    return (np.rint(w / scale) + zero).clip(0, 2**b - 1), scale, zero


@part
class BitSerialLinear(Part):
    """x @ w + b with the weights rounded to few bits and x as it is."""

    index: np.ndarray  # (b, R, N)
    scale: np.ndarray  # (N,)
    zero: np.ndarray  # (N,) whole numbers
    g: int
    half: bool
    b: np.ndarray | None = None

    @classmethod
    def of(cls, w, b, bits: int, g: int, half: bool) -> "BitSerialLinear":
        u, scale, zero = in_codes(w, bits)
        index = planes(u.astype(np.uint8), bits, g)
        return cls(index, scale.astype(w.dtype), zero.astype(w.dtype), g, half, b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        index = self.index[:, :, columns]
        R, N = index.shape[1:]
        rows = as_rows(x, R * self.g)
        dot = bit_serial_sums(rows, index, self.g, self.half)
        note(2 * dot.size, len(rows) * index.size, index.nbytes)
        ledger.event("table entries made", len(rows) * R << self.g - self.half)
        zero, scale = self.zero[columns], self.scale[columns]
        y = (dot - zero * rows.sum(1)[:, None]) * scale
        if self.b is not None:
            y += self.b[columns]
        return y.reshape(*x.shape[:-1], N)
