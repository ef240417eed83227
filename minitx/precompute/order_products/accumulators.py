"""Sums of whole numbers as an accumulator of few bits makes them, one product after another.

Products of 8-bit numbers take 15 bits with their sign, and a sum of many takes more. An accumulator
that saturates (stays at the end of its range, as signal processors do) is wrong as soon as a
running sum leaves the range, be it on the way: a *transient* overflow, in the words of PQS (Natesh
and Kung, 2025, arXiv 2504.09064), which another order may avoid, against a *persistent* one, where
the whole sum does not fit. An accumulator that wraps around (two's complement) is right whenever
the whole sum fits, in any order.
"""

from dataclasses import dataclass

import numpy as np

from minitx import ledger
from minitx.shared.ordering import in_order
from minitx.shared.symmetric import quantize_symmetric
from minitx.tree import Part, part


@dataclass(frozen=True)
class Sums:
    """What an accumulator ends with, and where it went wrong."""

    found: np.ndarray  # (n, out) what a saturating accumulator ends with
    exact: np.ndarray  # (n, out) the whole sums
    left: np.ndarray  # (n, out) booleans: some running sum left the range
    persistent: np.ndarray  # (n, out) booleans: the whole sum is outside

    @property
    def transient(self) -> np.ndarray:
        return self.left & ~self.persistent


def accumulate(x, w, order, bits: int) -> Sums:
    """x (n, in) and w (in, out), whole numbers, w in its order (in, out) or (in, 1): ordering.py.

    Up to the first overflow saturating or not is the same, so ``left`` is true of both.
    """
    low, high = limits(bits)
    found = np.zeros((len(x), w.shape[1]), np.int64)
    exact, left = found.copy(), np.zeros(found.shape, bool)
    x, w = x.astype(np.int64), w.astype(np.int64)  # int8 products would wrap around
    for k in range(len(w)):
        product = x[:, order[k]] * w[k]
        exact += product
        found += product
        left |= (found < low) | (found > high)
        np.clip(found, low, high, out=found)
    return Sums(found, exact, left, (exact < low) | (exact > high))


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest number of so many bits, one of them for the sign."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def bits_for(low: int, high: int) -> int:
    """The bits, with one for the sign, that hold all whole numbers from low to high."""
    return 1 + max(int(high).bit_length(), int(-low - 1).bit_length() if low < 0 else 0)


def bits_needed(x, w, order) -> int:
    """The bits that hold every running sum of x (n, in) with w (in, out), added in its order."""
    total, low, high = np.zeros((len(x), w.shape[1]), np.int64), 0, 0
    x, w = x.astype(np.int64), w.astype(np.int64)
    for k in range(len(w)):
        total += x[:, order[k]] * w[k]
        low, high = min(low, total.min()), max(high, total.max())
    return bits_for(low, high)


@part
class NarrowLinear(Part):
    """x @ w + b from 8-bit numbers, added in order by a saturating accumulator of few bits."""

    codes: np.ndarray  # (in, out) int8, in order: the k-th weight of output o, over its scale
    scale: np.ndarray  # (out,)
    order: np.ndarray  # (in, out) or (in, 1): the input that goes with it
    by: str
    accumulator: int  # bits
    b: np.ndarray | None = None

    @staticmethod
    def of(w, b, order, by: str, accumulator: int) -> "NarrowLinear":
        codes, scale = quantize_symmetric(w.T, 8)
        codes = in_order(codes.T.astype(np.int8), order)
        return NarrowLinear(codes, scale, order, by, accumulator, b)

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_symmetric(rows, 8)  # each token has its own scale
        sums = accumulate(codes, self.codes, self.order, self.accumulator)
        ledger.product(x, self.codes)
        ledger.count(weight_bytes=self.order.nbytes)
        ledger.event("sums", sums.left.size)
        ledger.event("sums that do not fit", sums.persistent)
        ledger.event("sums that overflow on the way", lambda: sums.transient)
        y = sums.found.astype(x.dtype) * scale[:, None] * self.scale
        y = y.reshape(*x.shape[:-1], len(self.scale))
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self(x)[..., columns]
