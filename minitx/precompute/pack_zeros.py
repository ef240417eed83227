"""Matrices with zeros, kept as the weights that are left and one bit for each place."""

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.technique import technique
from minitx.tree import Part, part


@technique(level="matrices", exact=True, neutral={"least": 1.1}, after=("low_rank",))
def pack_zeros(lm, *, least: float = 0.0):
    """Keep a pruned matrix without its zeros, and unpack it whenever it multiplies.

    Paper: no single one; storing values beside a bit mask is standard practice. Hardware for 2:4
        keeps two values and two positions of 2 bits for each run of 4, which takes as much: a bit a
        weight, four times 2 bits being eight times one. The mask serves every other pattern too.
    Kind: exact, bit for bit: it is the same matrix again when it multiplies.
    Skips or precomputes: the zeros, in memory alone.
    Offline: of W (in, out) the values that are not 0, in the order of W, and the bits W != 0. Only
        matrices of which at least the share ``least`` is 0.
    Online: W = 0; W[bits] = values; y = x W + b.
    Saves: with a share p of zeros 4 p - 1/8 bytes a weight (float32), so a matrix with less than
        1/32 of zeros grows: give least=0.1, say. No multiply-add; the ledger's bytes are those of
        values and bits. In NumPy unpacking takes many times as long as the product with one token,
        and is done again for each: telling a story is several times slower. For a prompt of some
        hundred tokens it takes less than their product. For memory, not for speed; and there must
        be room for one unpacked matrix.
    Neutral: least above 1: no matrix has so many zeros.
    Not for: matrices without zeros; see --prune.
    """
    if not least >= 0:
        raise MinitxError(f"pack_zeros needs a share of zeros of at least 0, not {least:g}.")

    def packed(linear: Linear) -> Part:
        zeros = 1 - np.count_nonzero(linear.w) / linear.w.size
        return PackedZeros.of(linear) if zeros >= least else linear

    return change_linears(lm, linears(lm.model, "all"), packed)


@part
class PackedZeros(Part):
    """x @ w + b, with w (in, out) unpacked for each product."""

    values: np.ndarray  # (weights that are not 0,)
    bits: np.ndarray  # (in * out / 8,) uint8: which those are, in the order of w
    b: np.ndarray | None
    inputs: int
    width: int  # out

    @staticmethod
    def of(linear: Linear) -> "PackedZeros":
        w = linear.w
        kept = w != 0
        return PackedZeros(w[kept], np.packbits(kept), linear.b, *w.shape)

    @property
    def w(self) -> np.ndarray:
        """The matrix (in, out), unpacked."""
        w = np.zeros(self.inputs * self.width, self.values.dtype)
        kept = np.unpackbits(self.bits, count=len(w)).view(bool)
        w[np.flatnonzero(kept)] = self.values  # w[kept] = ... takes twice as long
        return w.reshape(self.inputs, self.width)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs; what is unpacked is the whole matrix."""
        w = self.w[:, columns]
        # the product counts w, which is no array of the model: these are
        ledger.count(weight_bytes=self.values.nbytes + self.bits.nbytes - w.nbytes)
        return ops.linear(x, w, None if self.b is None else self.b[columns])
