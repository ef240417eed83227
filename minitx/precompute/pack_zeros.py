"""Sparse storage: a pruned matrix as its nonzero values and a bitmask.

The card, the part that unpacks and multiplies (online), notes.
"""

import warnings
from typing import Annotated

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxWarning
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.technique import at_least, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=True,
    neutral={"min_sparsity": 1.1},
    after=("low_rank", "perforate"),
    demo={"min_sparsity": 0.0},
)
def pack_zeros(
    lm,
    *,
    min_sparsity: Annotated[
        float,
        "pack only matrices with at least this share of zeros; above 1: none",
        at_least(0),
    ] = 0.04,
):
    """Store a pruned matrix as its nonzero values and a bitmask; unpack it for each product.

    Paper:     none alone: a standard sparse format.
    Fidelity:  ours.
    Kind:      exact, bit for bit: the unpacked matrix is the same.
    Idea:      A zero takes 4 bytes in a dense array and 1 bit in a mask.
    Offline:   of W (in, out), row by row: values = W[W != 0];  mask = W != 0, eight bits to a byte
    Online:    W = 0;  W[mask] = values;  y = x W + b
    Saves:     memory: with a share p of zeros 4 (1 - p) + 1/8 bytes per weight instead of 4, which
               is less if p > 1/32. That much is read for each product. No multiply-adds.
    In NumPy:  slower: each call unpacks the matrix again, which takes many times as long as the
               product with one token, but less than a product with some hundred tokens.
    Not for:   matrices without zeros: prune first.
    Proof:     tests/precompute/test_pack_zeros.py;
               literal version: tests/precompute/literal_pack_zeros.py
    """
    found = linears(lm.model, "all")
    wanted = {key: linear for key, linear in found.items() if sparsity(linear.w) >= min_sparsity}
    if not wanted and min_sparsity <= 1:
        warnings.warn(
            f"pack_zeros packed nothing: no matrix has a share of {min_sparsity:g} or more of "
            "zeros; prune first (--prune).",
            MinitxWarning,
            stacklevel=2,
        )
    return change_linears(lm, wanted, BitmaskLinear.of)


def sparsity(w) -> float:
    """The share of zeros."""
    return 1 - np.count_nonzero(w) / w.size


@part
class BitmaskLinear(Part):
    """``x @ w + b``; w (in, out) is unpacked for each product."""

    values: np.ndarray  # (number of nonzero weights,), in row-major order
    mask: np.ndarray  # uint8 (in * out / 8,): a bit for each weight, 1 if it is nonzero
    b: np.ndarray | None
    inputs: int
    width: int  # out

    @staticmethod
    def of(linear: Linear) -> "BitmaskLinear":
        w = linear.w
        nonzero = w != 0
        return BitmaskLinear(w[nonzero], np.packbits(nonzero), linear.b, *w.shape)

    @property
    def w(self) -> np.ndarray:
        """The dense matrix (in, out)."""
        w = np.zeros(self.inputs * self.width, self.values.dtype)
        nonzero = np.unpackbits(self.mask, count=len(w)).view(bool)
        w[np.flatnonzero(nonzero)] = self.values  # w[nonzero] = ... takes twice as long
        return w.reshape(self.inputs, self.width)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result; the whole matrix is unpacked."""
        w = self.w[:, columns]
        # The ledger counts multiply-adds and bytes read. ops.linear will add the bytes of w, but
        # what was read are the values and the mask.
        ledger.count(weight_bytes=self.values.nbytes + self.mask.nbytes - w.nbytes)
        return ops.linear(x, w, None if self.b is None else self.b[columns])


# Notes:
#
# - Hardware for 2:4 stores two values and two 2-bit indices for each four weights: the indices take
#   4 bits per four weights, as the mask does. The mask fits any other pattern too.
# - There must be memory for one unpacked matrix beside the packed ones.
# - Only matrices with more than 1/32 of zeros shrink: min_sparsity=0.04 leaves the others dense.
