"""A few large weights as they are, all the others in few bits."""

from typing import Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.bit_planes import pack, unpack
from minitx.shared.linears import change_linears, linears
from minitx.shared.ordering import largest_first
from minitx.technique import technique
from minitx.tree import Part, part


@technique(level="matrices", exact=False, neutral={"share": 1.0}, after=("low_rank",))
def separate_magnitudes(
    lm,
    *,
    bits: int = 4,
    share: float = 0.01,
    matrices: Literal["all", "ffn", "attention"] = "all",
):
    """Keep the largest weights in full, sparse, and round the rest to few bits.

    Paper: listed by David Spuler's page "Weight Precomputations" (separating high-magnitude from
        low-magnitude weights), without a method. What it is used for: the outliers of SqueezeLLM
        (Kim et al., 2023, arXiv 2306.07629, "dense and sparse") and SpQR (Dettmers et al., 2023,
        arXiv 2306.03078). Those choose weights, grids and scales with more care; here it is the
        plain form, in which each output keeps its own largest. All choices below were made here.
    Kind: approximate.
    Skips or precomputes: bits of the weights. One large weight stretches the scale of all that
        share it; without it the same bits make finer steps.
    Offline: for each output o the k = share * in weights (at least 1, unless share is 0) of largest
        |w| are taken out: rows[j, o], values[j, o]. For the rest s[o] = max |w| / c with
        c = 2^(bits - 1) - 1, and code = rint(w / s[o]), kept as planes of bits.
    Online: W^ = code s; W^[rows[j, o], o] = values[j, o]; y = x W^ + b. W^ is made anew each time,
        so that it takes no memory in between.
    Saves: memory: bits + (32 + k (32 + i)) / in bits a weight in the place of 32, i = 8 bits for a
        row number up to 256 inputs, 16 beyond. No multiply-add. At the same memory its outputs are
        a little nearer to the dense ones than those of plain rounding with a scale for each group
        of inputs (`minitx cost separate-magnitudes` names that group size); where all weights may
        have one bit more, that buys more. In NumPy it is several times slower than the plain
        product for one token, since W^ has to be made first; a pass over many tokens makes it once.
    Neutral: share = 1: every weight is kept as it is.
    Not for: a head, which is none of the matrices. Weights of less than 2 or more than 8 bits.
    """
    if not 2 <= bits <= 8:
        raise MinitxError(f"separate_magnitudes takes 2 to 8 bits, not {bits}; give bits=4.")
    if not 0 <= share <= 1:
        raise MinitxError(
            f"separate_magnitudes keeps a share of 0 to 1 of the weights, not {share:g}; give "
            "share=0.01."
        )
    wanted = linears(lm, matrices)
    return change_linears(lm, wanted, lambda linear: OutlierLinear.of(linear, bits, share))


def kept(inputs: int, share: float) -> int:
    """How many of an output's weights are kept in full."""
    return max(round(share * inputs), 1 if share else 0)


@part
class OutlierLinear(Part):
    """x @ w + b, a few weights of each output in full and the others in few bits."""

    planes: np.ndarray  # (in, bits, out / 8 rounded up) uint8: see bit_planes.py
    scale: np.ndarray  # (out,)
    rows: np.ndarray  # (k, out) where the large weights stand
    values: np.ndarray  # (k, out)
    b: np.ndarray | None = None

    @staticmethod
    def of(linear: Linear, bits: int, share: float) -> "OutlierLinear":
        w, largest = linear.w, 2 ** (bits - 1) - 1
        rows = largest_first(w)[: kept(len(w), share)]
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
        w = (codes - np.int8(largest)).astype(self.scale.dtype) * self.scale
        np.put_along_axis(w, self.rows.astype(np.intp), self.values, axis=0)
        return w

    def __call__(self, x):
        w = self.w
        # what is read is smaller than what ops.linear is given
        read = (self.planes, self.scale, self.rows, self.values)
        ledger.count(weight_bytes=lambda: sum(a.nbytes for a in read) - w.nbytes)
        return ops.linear(x, w, self.b)

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]
