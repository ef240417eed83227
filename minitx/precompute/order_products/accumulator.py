"""A narrow accumulator, simulated: it adds int8 products one after another and counts overflows.

A product of two int8 numbers takes 15 bits with its sign; a sum of many takes more. A saturating
accumulator (which stays at the end of its range, as in signal processors) is wrong as soon as a
running sum leaves the range:

- persistent overflow: the total itself does not fit;
- transient overflow: the total fits, but a running sum did not. Another order may avoid it.

An accumulator that wraps around (two's complement) needs no order: its transient overflows undo
themselves. The two kinds are PQS's (Natesh and Kung, 2025, arXiv 2504.09064).
"""

from dataclasses import dataclass

import numpy as np

from minitx import ledger
from minitx.shared.ordering import in_order
from minitx.shared.symmetric import quantize_symmetric
from minitx.tree import Part, part


@dataclass(frozen=True)
class Sums:
    """What the accumulator ends with, and where it overflowed: arrays (n, out)."""

    saturated: np.ndarray  # what a saturating accumulator ends with
    exact: np.ndarray  # the totals
    overflowed: np.ndarray  # booleans: some running sum left the range
    persistent: np.ndarray  # booleans: the total is outside the range

    @property
    def transient(self) -> np.ndarray:
        return self.overflowed & ~self.persistent


def accumulate(x, w, order, bits: int) -> Sums:
    """Integers x (n, in) and w (in, out), whose rows are in order (see ``in_order``); order is
    (in, out) or (in, 1).

    Up to the first overflow, saturating and wrapping accumulators agree, so ``overflowed`` is true
    of both.
    """
    low, high = limits(bits)
    total = np.zeros((len(x), w.shape[1]), np.int64)
    exact, overflowed = total.copy(), np.zeros(total.shape, bool)
    x, w = x.astype(np.int64), w.astype(np.int64)  # int8 products would wrap around
    for k in range(len(w)):
        product = x[:, order[k]] * w[k]
        exact += product
        total += product
        overflowed |= (total < low) | (total > high)
        np.clip(total, low, high, out=total)
    return Sums(total, exact, overflowed, (exact < low) | (exact > high))


def limits(bits: int) -> tuple[int, int]:
    """The range of a signed integer of ``bits`` bits."""
    return -(1 << bits - 1), (1 << bits - 1) - 1


def bits_for(low: int, high: int) -> int:
    """The width of a signed integer that holds all integers from low to high; for tests."""
    return 1 + max(int(high).bit_length(), int(-low - 1).bit_length() if low < 0 else 0)


def bits_needed(x, w, order) -> int:
    """The accumulator width at which no running sum of x (n, in) and w (in, out), w in its order,
    overflows; for tests."""
    total, low, high = np.zeros((len(x), w.shape[1]), np.int64), 0, 0
    x, w = x.astype(np.int64), w.astype(np.int64)
    for k in range(len(w)):
        total += x[:, order[k]] * w[k]
        low, high = min(low, total.min()), max(high, total.max())
    return bits_for(low, high)


@part
class SaturatingLinear(Part):
    """``x @ w + b`` in int8, added in order by a narrow saturating accumulator."""

    codes: np.ndarray  # int8 (in, out), in order: the k-th weight of output o, divided by its scale
    scale: np.ndarray  # (out,)
    order: np.ndarray  # (in, out) or (in, 1): the input of the k-th product
    ordering: str  # the name of that order
    accumulator_bits: int
    b: np.ndarray | None = None

    @staticmethod
    def of(w, b, order, ordering: str, accumulator_bits: int) -> "SaturatingLinear":
        codes, scale = quantize_symmetric(w.T, 8)
        codes = in_order(codes.T.astype(np.int8), order)
        return SaturatingLinear(codes, scale, order, ordering, accumulator_bits, b)

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1])
        codes, scale = quantize_symmetric(rows, 8)  # each token has its own scale
        sums = accumulate(codes, self.codes, self.order, self.accumulator_bits)
        ledger.product(x, self.codes, bits=8)
        ledger.count(weight_bytes=self.order.nbytes)
        ledger.event("dot products", sums.exact.size)
        ledger.event("persistent overflows", sums.persistent)
        ledger.event("transient overflows", lambda: sums.transient)
        y = sums.saturated.astype(x.dtype) * scale[:, None] * self.scale
        y = y.reshape(*x.shape[:-1], len(self.scale))
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self(x)[..., columns]
