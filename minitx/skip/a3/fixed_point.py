"""Attention in fixed point, and an exponential from two small tables, as A3's hardware has them.

For looking at what the arithmetic does to a model's answers: floats stand for the whole numbers of
the hardware, so nothing is faster here. After Ham et al. 2020; what they leave open was chosen here
and is said where it is done.
"""

import math
from functools import cache

import numpy as np

from minitx import fast, ledger
from minitx.tree import Part, part


@part
class Rounded(Part):
    """Numbers with a sign, i integer bits and f fraction bits; larger ones become the largest."""

    i: int
    f: int

    def __call__(self, x):
        unit = 2.0**-self.f
        largest = 2.0**self.i - unit
        return (np.rint(x / unit) * unit).clip(-largest, largest)


@part
class FixedPoint(Part):
    """Attention to the kept keys; for ``SparseAttention.arithmetic``.

    With inputs of i and f bits products have 2 i and 2 f, and of sums of n of them the integer part
    has log2 n bits more: no width can overflow, so what is left to do is to round the exponentials
    and the weights to 2 f fraction bits (1 stays 1). Weights below half of that unit are lost: of
    2^(2f + 1) equal keys nothing is left.
    """

    tables: bool  # the exponential from two tables, or rounded from the exact one
    f: int
    rounded: Part | None  # of the inputs, or None: floats, only the exponential is from tables

    def __call__(self, q, k, v, scale, kept, floor):
        """As ``choosing.masked``: q (..., H, T, d), k and v (..., K, S, d), kept booleans
        (..., K, G, T, S) -> (..., H, T, d)."""
        rows = q.reshape(*kept.shape[:-1], q.shape[-1]) * scale  # (..., K, G, T, d)
        k, v = k[..., None, :, :], v[..., None, :, :]  # (..., K, 1, S, d)
        if q.shape[-2] == 1:
            k, v, kept = packed(k, v, kept)
        ledger.count(2 * q.size * k.shape[-2], cache_bytes=k.nbytes + v.nbytes)
        if self.rounded:  # in float64, in which sums of such whole numbers are exact
            rows, k, v = (self.rounded(x.astype(np.float64)) for x in (rows, k, v))
        s = rows @ k.swapaxes(-1, -2)  # (..., K, G, T, S)
        s[~kept] = fast.MASKED
        s -= s.max(-1, keepdims=True)
        if floor:
            kept = s >= math.log(floor)
            ledger.event("keys kept", kept)
        weights = exp_by_tables(s, self.f) if self.tables else np.exp(s)
        weights = np.where(kept, self._short(weights), 0)
        weights /= weights.sum(-1, keepdims=True)
        return (self._short(weights) @ v).astype(q.dtype).reshape(q.shape)

    def _short(self, x):
        unit = 4.0**-self.f
        return np.rint(x / unit) * unit if self.rounded else x


def packed(k, v, kept):
    """For one query a head: of k, v (..., K, 1, S, d) only keys that are kept (..., K, G, 1, S), as
    (..., K, G, n, d), and which of these n are: heads that keep fewer are filled up with others."""
    n = int(kept.sum(-1).max())
    chosen = np.argsort(~kept, -1, kind="stable")[..., 0, :n]  # (..., K, G, n)
    k, v = (np.take_along_axis(x, chosen[..., None], -2) for x in (k, v))
    return k, v, np.take_along_axis(kept, chosen[..., None, :], -1)


# The exponential ---------------------------------------------------------------------------------


def exp_by_tables(x, f: int):
    """exp(x) for x <= 0, rounded to 2 f fraction bits: exp(hi + lo) = exp(hi) exp(lo), where hi is
    the whole part and lo the fraction of -x.

    Each of the two tables has 2^(2f) entries, 256 with f = 4, where one table of all 16 bits would
    have 65,536. Beyond the end stands 0: exp(-2^(2f)) is less than half of the unit 2^(-2f). The
    paper does not tell the width of an entry; here entries are as exact as x.
    """
    size = 4**f
    code = np.rint(-x * size)
    inside = code < size * size
    hi, lo = np.divmod(np.where(inside, code, 0).astype(np.int64), size)
    upper, lower = exp_tables(size, x.dtype)
    return np.where(inside, upper[hi] * lower[lo], 0)


@cache
def exp_tables(size: int, dtype) -> tuple[np.ndarray, np.ndarray]:
    """exp(-hi) for whole numbers hi and exp(-lo / size), both (size,)."""
    hi = np.arange(size, dtype=np.float64)
    return np.exp(-hi).astype(dtype), np.exp(-hi / size).astype(dtype)
