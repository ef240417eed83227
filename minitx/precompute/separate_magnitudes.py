"""A few large weights of each output stay in float, the others are quantized to few bits.

The card and the options, the part that runs (online), the packed codes (offline), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.shared.ordering import largest_first
from minitx.technique import between, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=False,
    neutral={"share": 1.0},
    after=("low_rank", "perforate"),
    presets={"aggressive": {"bits": 4}},
)
def separate_magnitudes(
    lm,
    *,
    bits: Annotated[int, "bits of a quantized weight", between(2, 8)] = 5,
    share: Annotated[
        float, "share of each output's weights that stays in float", between(0, 1)
    ] = 0.01,
    matrices: Annotated[
        Literal["all", "ffn", "attention"], "the matrices to change; never the head"
    ] = "all",
):
    """Keep the largest weights in float, sparse, and quantize the rest to few bits.

    Paper:     named by David Spuler's page "Weight Precomputations" (high-magnitude weights apart
               from low-magnitude ones), without a method. Used for outliers in SqueezeLLM (Kim et
               al., 2023, arXiv 2306.07629) and SpQR (Dettmers et al., 2023, arXiv 2306.03078).
    Fidelity:  the plain form, our own choices: each output keeps its own largest. Both papers
               choose weights, grids and scales with more care.
    Kind:      approximate; exact at share=1, which leaves every matrix as it is.
    Idea:      One large weight stretches the scale of all that share it. Without it, the same bits
               make finer steps.
    Offline:   for each output o of W (in, out), k = share * in (at least 1 unless share is 0):
               rows[j, o], values[j, o] = the k weights with the largest |w|, taken out of W
               scale[o] = max|w| of the rest / (2^(bits-1) - 1);  code = round(w / scale[o])
    Online:    W' = code * scale;  W'[rows[j, o], o] = values[j, o];  y = x W' + b
    Saves:     memory. An output takes in * bits + 32 bits for its scale + k (32 + i) bits for the
               large weights instead of 32 * in; a row number takes i = 8 bits up to 256 inputs,
               16 beyond. No multiply-adds.
    In NumPy:  0.1x the speed of dense when decoding: every call builds W' first. One call with many
               tokens builds it once.
    Not for:   the head. Where memory allows one bit more for every weight: that gains more (Notes).
    Proof:     tests/precompute/test_separate_magnitudes.py; literal version:
               tests/precompute/literal_separate_magnitudes.py
    """

    def separate(linear: Linear) -> Part:
        if outliers(len(linear.w), share) == len(linear.w):  # every weight stays in float
            return linear
        return OutlierLinear.of(linear, bits, share)

    return change_linears(lm, linears(lm, matrices), separate)


# Online ------------------------------------------------------------------------------------------


@part
class OutlierLinear(Part):
    """x @ w + b, a few weights of each output in float and the others in few bits."""

    planes: np.ndarray  # (in, bits, out / 8 rounded up) uint8: packed codes
    scale: np.ndarray  # (out,)
    rows: np.ndarray  # (k, out) row of each large weight
    values: np.ndarray  # (k, out) the large weights
    b: np.ndarray | None = None

    @staticmethod
    def of(linear: Linear, bits: int, share: float) -> "OutlierLinear":
        w, largest = linear.w, 2 ** (bits - 1) - 1
        rows = largest_first(w)[: outliers(len(w), share)]
        at = rows.astype(np.intp)
        values = np.take_along_axis(w, at, axis=0)
        rest = w.astype(np.float64)
        np.put_along_axis(rest, at, 0.0, axis=0)
        scale = abs(rest).max(0) / largest
        scale[scale == 0] = 1.0
        codes = np.rint(rest / scale) + largest  # 0 .. 2 * largest
        return OutlierLinear(pack(codes, bits), scale.astype(w.dtype), rows, values, linear.b)

    @property
    def w(self):
        """The weights (in, out) as they are multiplied."""
        largest = 2 ** (self.planes.shape[1] - 1) - 1
        codes = unpack(self.planes, len(self.scale)).view(np.int8)
        # codes up to 254 wrap in int8; the subtraction wraps back, to -largest .. largest
        w = (codes - np.int8(largest)).astype(self.scale.dtype) * self.scale
        np.put_along_axis(w, self.rows.astype(np.intp), self.values, axis=0)
        return w

    def __call__(self, x):
        w = self.w
        # ops.linear counts the bytes of w; fewer were read
        read = (self.planes, self.scale, self.rows, self.values)
        ledger.count(weight_bytes=lambda: sum(a.nbytes for a in read) - w.nbytes)
        return ops.linear(x, w, self.b)

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]


# Offline -----------------------------------------------------------------------------------------


def outliers(inputs: int, share: float) -> int:
    """k: how many weights of an output stay in float."""
    return max(round(share * inputs), 1 if share else 0)


def pack(codes, bits: int):
    """codes (in, out), integers from 0 to 2^bits - 1 -> bit planes (in, bits, out / 8 rounded up)
    uint8: the lowest bit first, the bits of 8 neighbours in a byte."""
    codes = codes.astype(np.uint8)
    return np.stack([np.packbits(codes >> i & 1, axis=1) for i in range(bits)], axis=1)


def unpack(planes, outputs: int):
    """The codes (in, out) of ``pack``, as uint8."""
    codes = np.zeros((len(planes), outputs), np.uint8)
    for i in range(planes.shape[1]):
        codes |= np.unpackbits(planes[:, i], axis=1, count=outputs) << np.uint8(i)
    return codes


# Notes:
#
# - W' is built in every call so that it takes no memory in between.
# - At the same memory the weights are a little nearer to the dense ones than with a scale for each
#   group of inputs. The group size that takes as much memory:
#   minitx cost separate-magnitudes --config weights/stories/config.json
# - On ``stories`` (minitx sweep separate-magnitudes bits=4,5 share=0.01,0 --stories 20):
#
#       bits  share   memory   loss above dense
#         4    0      0.219x       +0.0053
#         4    0.01   0.230x       +0.0049
#         5    0      0.247x       +0.0019
#         5    0.01   0.258x       +0.0008
#
#   From 4 bits without large weights in float, one bit more takes off 0.0034 for 0.028x of memory;
#   1 % in float takes off 0.0004 for 0.011x.
# - SmolLM2-135M-Instruct (not shipped) loses on a text, in nats per token: 0.10 at 5 bits and 0.28
#   at 4 (preset=aggressive), with 1 % of the weights in float.
