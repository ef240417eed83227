"""Positive and negative weights in two matrices without signs."""

from typing import Literal

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import technique
from minitx.tree import Part, part


@technique(level="matrices", exact=True, neutral=None, after=("low_rank",))
def separate_signs(
    lm,
    *,
    bits: int | None = None,
    matrices: Literal["all", "ffn", "attention"] = "all",
):
    """Keep each matrix as two without signs: what adds, and what takes away.

    Paper: listed by David Spuler's page "Weight Precomputations" (separating positive and negative
        weights), without a method; the algebra below is plain. Analog crossbars, whose conductances
        have no sign, keep their weights so (from memory, unconfirmed).
    Kind: exact in real arithmetic; the difference of two sums rounds more coarsely than one sum.
        With bits=B it is approximate: inputs are rounded to 8 bits and weights to B, sign included;
        separating the signs of those whole numbers is exact bit for bit.
    Skips or precomputes: the signs of weights, and with them zero points: all numbers are >= 0.
    Offline: W+ = max(W, 0), W- = max(-W, 0), so W = W+ - W-. With bits: W / scale rounded first,
        one scale an output; magnitudes are unsigned numbers of B - 1 bits.
    Online: y = x W+ - x W- + b. With bits the input is separated too, x = x+ - x-:
        up = x+ W+ + x- W-, down = x+ W- + x- W+, y = (up - down) scale. Both sums only ever rise.
    Saves: nothing in NumPy, which multiplies the zeros too: 2 products in the place of one, 4 with
        bits. Where zeros are left out (each weight stands in one of the two matrices) it takes as
        many multiply-adds as before and one subtraction an output. What it buys: numbers of B - 1
        bits without a sign, so unsigned products and no zero points; and sums that only rise: the
        end is the largest value, and is at most 127 sum |W|, known beforehand, so unsigned
        accumulators of log2(127 sum |W| + 1) bits never overflow, in whatever order they add. Two
        matrices of B - 1 bits take more memory than one of B; for B = 2 as much: two masks, with
        nothing left to multiply. For inputs >= 0, x W+ + b is an upper bound of y at half time.
    Neutral: nothing to set.
    Not for: a head, which is none of the matrices. Weights of less than 2 or more than 8 bits.
    """
    if bits is not None and not 2 <= bits <= 8:
        raise MinitxError(
            f"separate_signs takes weights of 2 to 8 bits, not {bits}; give bits=8, or None to "
            "leave them as they are."
        )

    def apart(linear: Linear):
        if bits is None:
            return SeparatedSigns(*separated(linear.w), linear.b)
        return UnsignedLinear.of(linear, bits)

    return change_linears(lm, linears(lm, matrices), apart)


def separated(w) -> tuple[np.ndarray, np.ndarray]:
    """(w+, w-), neither with a sign, whose difference is w."""
    return np.maximum(w, 0), np.maximum(-w, 0)


@part
class SeparatedSigns(Part):
    """x @ plus - x @ minus + b"""

    plus: np.ndarray  # (in, out)
    minus: np.ndarray  # (in, out)
    b: np.ndarray | None = None

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        y = ops.linear(x, self.plus[:, columns]) - ops.linear(x, self.minus[:, columns])
        return y if self.b is None else y + self.b[columns]


@part
class UnsignedLinear(Part):
    """x @ w + b from whole numbers none of which has a sign."""

    plus: np.ndarray  # (in, out) uint8
    minus: np.ndarray  # (in, out) uint8
    scale: np.ndarray  # (out,)
    bits: int  # of a weight with its sign: one more than these numbers have
    b: np.ndarray | None = None

    @staticmethod
    def of(linear: Linear, bits: int) -> "UnsignedLinear":
        codes, scale = quantize_symmetric(linear.w.T, bits)
        plus, minus = separated(np.ascontiguousarray(codes.T))
        return UnsignedLinear(plus.astype(np.uint8), minus.astype(np.uint8), scale, bits, linear.b)

    def __call__(self, x):
        codes, scale = quantize_symmetric(x, 8)  # each token has its own scale
        up, down = self.sums(*separated(codes))
        y = (up - down).astype(x.dtype) * scale[..., None] * self.scale
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]

    def sums(self, x_plus, x_minus):
        """(up, down) (..., out): whole numbers >= 0, for inputs (..., in) of such.

        float32 holds whole numbers up to 2^24 and BLAS multiplies no others fast, so that is what
        they are multiplied in, or in float64 where there are too many for that.
        """
        kind = np.float32 if len(self.plus) * 127 * 127 < 1 << 24 else np.float64
        x_plus, x_minus = x_plus.astype(kind), x_minus.astype(kind)
        plus, minus = self.plus.astype(kind), self.minus.astype(kind)
        up = ops.linear(x_plus, plus) + ops.linear(x_minus, minus)
        return up, ops.linear(x_plus, minus) + ops.linear(x_minus, plus)
