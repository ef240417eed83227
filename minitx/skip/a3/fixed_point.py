"""Attention in fixed point, with the exponential from two small tables, as in A3's hardware.

This shows what the arithmetic does to a model's answers. The numbers are floats that are rounded to
the hardware's bits, so nothing gets faster.
"""

import math
from functools import cache

import numpy as np

from minitx import fast, ledger
from minitx.tree import Part, part


@part
class Rounding(Part):
    """Round to fixed point: a sign, integer bits and fraction bits. Larger numbers saturate."""

    integer_bits: int
    fraction_bits: int

    @property
    def bits(self) -> int:
        """Of a number, with its sign."""
        return 1 + self.integer_bits + self.fraction_bits

    def __call__(self, x):
        unit = 2.0**-self.fraction_bits
        largest = 2.0**self.integer_bits - unit
        return (np.rint(x / unit) * unit).clip(-largest, largest)


@part
class FixedPointAttend(Part):
    """Attention to the kept keys in fixed point; ``arithmetic`` of ``SparseAttention``.

    With f fraction bits in q, k and v, products have 2 f. Sums get as many integer bits as they
    need, so they are exact and cannot overflow. Only the exponentials and the softmax weights are
    rounded, to 2 f fraction bits (1 stays 1); the unit here is 2^-2f. Softmax weights of at most
    half a unit become 0, so for 2^(2f + 1) or more equal keys the output is 0.
    """

    tables: bool  # the exponential from two tables instead of the exact one
    fraction_bits: int  # f
    rounding: Part | None  # of q, k and v; None: floats, and only the exponential is from tables

    @property
    def bits(self) -> int | None:
        """Of the wider factor: a number of q, k and v, or a softmax weight from 0 to 1."""
        return max(self.rounding.bits, 2 * self.fraction_bits + 1) if self.rounding else None

    def __call__(self, q, k, v, scale, kept, floor):
        """As ``sparse_attention.attend_masked``: q (..., H, T, d), k and v (..., K, S, d), kept
        booleans (..., K, G, T, S) -> (..., H, T, d), or as wide as the values are."""
        rows = q.reshape(*kept.shape[:-1], q.shape[-1]) * scale  # (..., K, G, T, d)
        k, v = k[..., None, :, :], v[..., None, :, :]  # (..., K, 1, S, d)
        if q.shape[-2] == 1:
            k, v, kept = gather_kept(k, v, kept)
        read = k.nbytes + v.nbytes
        ledger.count(2 * q.size * k.shape[-2], cache_bytes=read, bits=self.bits)
        if self.rounding:  # in float64, where sums of such numbers are exact
            rows, k, v = (self.rounding(x.astype(np.float64)) for x in (rows, k, v))
        s = rows @ k.swapaxes(-1, -2)  # (..., K, G, T, S)
        s[~kept] = fast.MASKED
        s -= s.max(-1, keepdims=True)
        if floor:
            kept = s >= math.log(floor)
            ledger.event("keys kept", kept)
        weights = exp_from_tables(s, self.fraction_bits) if self.tables else np.exp(s)
        weights = np.where(kept, self._round(weights), 0)
        weights /= weights.sum(-1, keepdims=True)
        return (self._round(weights) @ v).astype(q.dtype).reshape(*q.shape[:-1], v.shape[-1])

    def _round(self, x):
        unit = 4.0**-self.fraction_bits
        return np.rint(x / unit) * unit if self.rounding else x


def gather_kept(k, v, kept):
    """For one query per head: of k, v (..., K, 1, S, d) only the kept keys (..., K, G, 1, S), as
    (..., K, G, n, d), with n the most that a head keeps. Heads that keep fewer than n are filled up
    with dropped keys, which the returned mask (..., K, G, 1, n) marks as dropped."""
    n = int(kept.sum(-1).max())
    order = np.argsort(~kept, -1, kind="stable")[..., 0, :n]  # (..., K, G, n)
    k, v = (np.take_along_axis(x, order[..., None], -2) for x in (k, v))
    return k, v, np.take_along_axis(kept, order[..., None, :], -1)


# The exponential ---------------------------------------------------------------------------------


def exp_from_tables(x, fraction_bits: int):
    """exp(x) for x <= 0, with x rounded to 2 f fraction bits (f = fraction_bits):
    exp(x) = exp(-high) exp(-low), with high the integer part of -x and low its fraction.

    Each table has 2^(2f) entries: 256 for f = 4, where one table for all 16 bits would have 65,536.
    From -x = 2^(2f) on the result is 0, since exp of that is below half a unit. The paper does not
    give the width of an entry; ours are floats.
    """
    size = 4**fraction_bits
    code = np.rint(-x * size)
    inside = code < size * size
    high, low = np.divmod(np.where(inside, code, 0).astype(np.int64), size)
    integer, fraction = exp_tables(size, x.dtype)
    return np.where(inside, integer[high] * fraction[low], 0)


@cache
def exp_tables(size: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """exp(-i) and exp(-i / size) for the integers i from 0 to size - 1, both (size,)."""
    i = np.arange(size, dtype=np.float64)
    return np.exp(-i).astype(dtype), np.exp(-i / size).astype(dtype)
