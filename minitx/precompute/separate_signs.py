"""The positive and the negative weights of a matrix in two matrices without signs.

The card and the options, the parts that run (online), the split (offline), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ops
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.shared.symmetric import quantize_symmetric
from minitx.technique import between, technique
from minitx.tree import Part, part


@technique(level="matrices", exact=True, neutral=None, after=("low_rank",))
def separate_signs(
    lm,
    *,
    bits: Annotated[
        int | None, "quantize weights to so many bits, sign included; default: not", between(2, 8)
    ] = None,
    matrices: Annotated[
        Literal["all", "ffn", "attention"], "the matrices to change; never the head"
    ] = "all",
):
    """Split each weight matrix into its positive and negative parts.

    Paper:     named by David Spuler's page "Weight Precomputations" (positive apart from negative
               weights), without a method. Analog crossbars, whose conductances have no sign, store
               weights like this (from memory, unconfirmed).
    Fidelity:  our own: plain algebra.
    Kind:      exact; the difference of two sums rounds more coarsely than one sum. With bits= it is
               approximate: inputs take 8 bits, weights `bits`; the split itself stays exact.
    Idea:      Unsigned numbers need no zero points, and their sum only rises: it is largest at its
               end, and a bound on it is known before any input.
    Offline:   W+ = max(W, 0),  W- = max(-W, 0),  W = W+ - W-
               with bits=, of the integers round(W / scale), scale per output: bits - 1 bits each
    Online:    y    = x W+ - x W- + b
               with bits=, x = x+ - x- is split too:
               up   = x+ W+ + x- W-
               down = x+ W- + x- W+
               y    = (up - down) * scale + b
    Saves:     nothing here: zeros are multiplied too, 2 products instead of one, 4 with bits=.
               Hardware that skips zeros does the same multiply-adds as before.
    In NumPy:  0.5x the speed of dense and twice the memory; with bits=8, 0.2x and 0.6x.
    Not for:   the head.
    Proof:     tests/precompute/test_separate_signs.py; literal version:
               tests/precompute/literal_separate_signs.py
    """

    def split(linear: Linear):
        if bits is None:
            return SplitLinear(*split_signs(linear.w), linear.b)
        return UnsignedLinear.of(linear, bits)

    return change_linears(lm, linears(lm, matrices), split)


# Online ------------------------------------------------------------------------------------------


@part
class SplitLinear(Part):
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
    """x @ w + b from unsigned integers alone."""

    plus: np.ndarray  # (in, out) uint8
    minus: np.ndarray  # (in, out) uint8
    scale: np.ndarray  # (out,)
    bits: int  # of a weight, sign included: plus and minus need one less
    b: np.ndarray | None = None

    @staticmethod
    def of(linear: Linear, bits: int) -> "UnsignedLinear":
        codes, scale = quantize_symmetric(linear.w.T, bits)
        plus, minus = split_signs(np.ascontiguousarray(codes.T))
        return UnsignedLinear(plus.astype(np.uint8), minus.astype(np.uint8), scale, bits, linear.b)

    def __call__(self, x):
        codes, scale = quantize_symmetric(x, 8)  # each token has its own scale
        up, down = self.sums(*split_signs(codes))
        y = (up - down).astype(x.dtype) * scale[..., None] * self.scale
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]

    def sums(self, x_plus, x_minus):
        """(up, down) (..., out): integers >= 0, for inputs (..., in) of such.

        Multiplied in float32, which holds integers up to 2^24 exactly and for which there is a fast
        BLAS, or in float64 where the sums can be larger.
        """
        kind = np.float32 if len(self.plus) * 127 * 127 < 1 << 24 else np.float64
        x_plus, x_minus = x_plus.astype(kind), x_minus.astype(kind)
        plus, minus = self.plus.astype(kind), self.minus.astype(kind)
        up = ops.linear(x_plus, plus) + ops.linear(x_minus, minus)
        return up, ops.linear(x_plus, minus) + ops.linear(x_minus, plus)


# Offline -----------------------------------------------------------------------------------------


def split_signs(w) -> tuple[np.ndarray, np.ndarray]:
    """(w+, w-), both >= 0, whose difference is w."""
    return np.maximum(w, 0), np.maximum(-w, 0)


# Notes:
#
# - up and down never exceed 127 sum|W|, which is known before any input: unsigned accumulators of
#   log2(127 sum|W| + 1) bits cannot overflow, in whatever order they add (minitx cost
#   separate-signs).
# - Two matrices of bits - 1 bits take more memory than one of `bits`; at bits=2 as much: two masks,
#   with nothing left to multiply.
# - For inputs >= 0, x W+ + b is an upper bound of y after half the work.
