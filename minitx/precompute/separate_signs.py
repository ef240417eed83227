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


@technique(level="matrices", exact=True, neutral=None, after=("low_rank", "perforate"))
def separate_signs(
    lm,
    *,
    bits: Annotated[
        int | None,
        "bits per quantized weight, sign included; default: keep floats",
        between(2, 8),
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
               No saving on the shipped models: what it shows is for hardware without signs.
    Idea:      Without signs, a sum of products only rises: it is largest at its end, and a bound on
               it is known before any input.
    Offline:   W+ = max(W, 0),  W- = max(-W, 0),  so W = W+ - W-                     W (in, out)
               with bits=, split the integers round(W / scale[o]) instead; each half takes bits - 1
               bits. scale[o] = max|W[:, o]| / (2^(bits-1) - 1) for each output o
    Online:    y    = x W+ - x W- + b
               with bits=, split the inputs' integers too: round(x / scale_x) = x+ - x-,
               scale_x = max|x| / 127, one per token
               up   = x+ W+ + x- W-
               down = x+ W- + x- W+
               y    = (up - down) * scale_x * scale + b
    Saves:     nothing here: zeros are multiplied too, 2 products instead of one, 4 with bits=.
               Hardware that skips zeros does the same multiply-adds as before.
    In NumPy:  0.5x the speed of dense, 2x its memory; with bits=8, 0.2x the speed, 0.6x the memory.
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
        """(up, down), each (..., out), from x+ and x- (..., in): all integers >= 0.

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
#   log2(127 sum|W| + 1) bits cannot overflow, in whatever order they add. The
#   worst case over all weights: minitx cost separate-signs --config weights/stories/config.json
# - Two matrices of bits - 1 bits take more memory than one of `bits`. At bits=2 they take as much,
#   and are two masks of zeros and ones, with nothing left to multiply.
# - For inputs >= 0, x W+ + b is an upper bound of y after half the work.
