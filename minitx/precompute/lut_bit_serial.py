"""Bit-serial lookup (T-MAC): tables hold signed sums of inputs, the weights' bits index them.

The card and the options, the part that runs (online), the indices (offline), notes.
"""

from typing import Annotated

import numpy as np

from minitx import ledger
from minitx.shared.table_lookup import (
    READS,
    as_rows,
    constant_matrices,
    count_reads,
    replace_matrices,
    sum_entries,
    weight_and_bias,
)
from minitx.technique import at_least, between, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=False,
    neutral={"layers": 0},
    after=("low_rank", "perforate"),
    event="table reads",
    presets={"paper": {"bits": 4, "group": 4}},
)
def lut_bit_serial(
    lm,
    *,
    bits: Annotated[int, "bits of a weight", between(1, 8)] = 8,
    group: Annotated[int, "inputs that share a table (paper: g)", between(1, 8)] = 8,
    layers: Annotated[
        int | None, "blocks changed, the last ones; default: all", at_least(0)
    ] = None,
    head: Annotated[bool, "replace the output head too"] = False,
):
    """Quantize weights and read sums of the inputs from tables indexed by the weights' bits.

    Paper:     Wei et al., "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on
               Edge", EuroSys 2025, arXiv 2407.00088. Relative: "LUT-GEMM", arXiv 2206.09557.
    Fidelity:  a reconstruction from summaries (T-MAC's readme, LUT-GEMM's abstract).
    Kind:      approximate: quantizes the weights. The product with them is exact.
               8 bits are nearly free. With 4 (preset=paper) a general model loses much more than
               stories does, for there is one scale per output (Notes).
    Idea:      One bit of each weight only says which inputs to add up. A few inputs have few such
               sums: compute all of them once per token, for all outputs.
    Offline:   quantize W (in, out): w = scale[o] (u - zero[o]) for each output o,
               u        = round(w / scale[o]) + zero[o]               integers from 0 to 2^bits - 1
               scale[o] = (max(W[:, o], 0) - min(W[:, o], 0)) / (2^bits - 1)
               zero[o]  = round(-min(W[:, o], 0) / scale[o])
               bit j of index[i, g, o] is bit i of the j-th integer u of group g and output o
    Online:    sums[g, m] = sum over inputs j of group g of (x_j if bit j of m is 1, else -x_j)
               s[i, o]    = sum over g of sums[g, index[i, g, o]]
               dot[o]     = sum over i of 2^i (s[i, o] + sum(x)) / 2                       = x u
                            since a bit is (sign + 1) / 2: sum bit x = (sum sign x + sum x) / 2
               y[o]       = scale[o] (dot[o] - zero[o] sum(x)) + b[o]
    Saves:     in * out multiply-adds become bits * in * out / group reads and as many additions
               (in * out if bits = group; at 4 the paper's SIMD kernels read 16 entries with one
               byte-shuffle instruction) and 2 out multiplications. Weights take bits / 32 of
               float32 if packed; here an index takes a byte: bits / (4 group), 1/4 by default.
    In NumPy:  0.07x the speed of dense: gathering entries is far slower than BLAS.
    Not for:   q k^T and p v, where both sides change.
    Proof:     tests/precompute/test_lut_bit_serial.py; literal version:
               tests/precompute/literal_lut_bit_serial.py
    Tutorial:  tutorials/10_tables_instead_of_products.py
    """
    nodes = constant_matrices("lut_bit_serial", lm, layers, head)
    return replace_matrices(
        lm, nodes, lambda node: BitSerialLinear.of(*weight_and_bias(node), bits, group)
    )


# Online ------------------------------------------------------------------------------------------


@part
class BitSerialLinear(Part):
    """x @ w + b with the weights quantized to few bits; x stays in float."""

    index: np.ndarray  # (bits, groups, out)
    scale: np.ndarray  # (out,)
    zero: np.ndarray  # (out,) the integer that stands for 0
    group: int
    b: np.ndarray | None = None

    @classmethod
    def of(cls, w, b, bits: int, group: int) -> "BitSerialLinear":
        """From w (in, out) and a bias (out,) or None."""
        u, scale, zero = quantize(w, bits)
        index = table_index(u.astype(np.uint8), bits, group)
        return cls(index, scale.astype(w.dtype), zero.astype(w.dtype), group, b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        index, zero, scale = self.index[:, :, columns], self.zero[columns], self.scale[columns]
        groups, out = index.shape[1:]
        rows = as_rows(x, groups * self.group)  # (n, in)
        dot = integer_product(rows, index, self.group)  # (n, out)
        count_reads(2 * dot.size, len(rows) * index.size, index.nbytes)
        computed = len(rows) * groups << self.group - 1
        ledger.count(additions=computed)
        ledger.event("table entries computed", computed)
        y = (dot - zero * rows.sum(1)[:, None]) * scale
        if self.b is not None:
            y += self.b[columns]
        return y.reshape(*x.shape[:-1], out)


def integer_product(rows, index, group: int):
    """``rows @ u`` (n, out), for rows (n, groups * group) and the index (bits, groups, out) of u.

    A bit is (sign + 1) / 2, so sum(bit x) = (sum(sign x) + sum(x)) / 2.
    """
    total = rows.sum(1)[:, None]
    bits, groups, out = index.shape
    dot = np.zeros((len(rows), out), rows.dtype)
    step = max(1, READS // (groups << group))  # tokens whose tables are computed at a time
    for a in range(0, len(rows), step):
        sums = signed_sums(rows[a : a + step], group)  # (step, groups, 2^group)
        base = np.arange(len(sums) * groups).reshape(-1, groups) << group
        for i in range(bits):
            s = sum_entries(sums.reshape(-1), base, index[i], rows.dtype)
            dot[a : a + step] += 2**i * ((s + total[a : a + step]) / 2)
    return dot


def signed_sums(rows, group: int):
    """rows (n, groups * group) -> tables (n, groups, 2^group). Entry m is the sum over j of
    x_j where bit j of m is 1, else -x_j. Half of them are computed; the others are their
    negatives, ``sums[~m] = -sums[m]``."""
    x = rows.reshape(len(rows), -1, group)
    sums = np.zeros((*x.shape[:2], 1), rows.dtype)
    for j in range(group - 1):
        x_j = x[..., j, None]
        sums = np.concatenate([sums - x_j, sums + x_j], -1)
    half = sums - x[..., -1:]  # the last bit is 0
    return np.concatenate([half, -half[..., ::-1]], -1)


# Offline -----------------------------------------------------------------------------------------


def quantize(w, bits: int):
    """w (in, out) as (u, scale, zero): integers u (in, out) from 0 to 2^bits - 1, and for each
    column a scale and a zero point. The range of a column always includes 0."""
    w = np.asarray(w, np.float64)
    low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
    scale = (high - low) / (2**bits - 1)
    scale[scale == 0] = 1
    zero = np.rint(-low / scale)
    return (np.rint(w / scale) + zero).clip(0, 2**bits - 1), scale, zero


def table_index(u, bits: int, group: int):
    """The index (bits, groups, out) of integers u (in, out): bit j of ``[i, g, o]`` is bit i of
    ``u[g * group + j, o]``. Missing rows of the last group count as 0."""
    inputs, out = u.shape
    padded = np.zeros((-(-inputs // group) * group, out), np.uint8)
    padded[:inputs] = u
    grouped = padded.reshape(-1, group, out)
    found = np.zeros((bits, len(grouped), out), np.uint8)
    for i in range(bits):
        for j in range(group):
            found[i] |= (grouped[:, j] >> i & 1) << j
    return found


# Notes:
#
# - On ``stories`` (minitx sweep lut-bit-serial preset=default,paper --stories 20): loss above dense
#   +0.0001 and +0.0029, speed 0.07x and 0.11x; both take 0.12x of the multiply-adds and 0.34x of
#   the memory, since an index of 4 bits takes a byte too. 2 bits cost +1.54: one scale per output
#   is too coarse.
# - SmolLM2-135M-Instruct (not shipped) loses on a text, in nats per token: 0.007 at 8 bits, 0.06 at
#   6, 0.19 at 5, 0.59 at 4 and 3.5 at 3.
# - T-MAC also quantizes the tables to int8, which is approximate. Left out.
# - T-MAC's kernels apply the sign of an entry as they read it, so they store only half of each
#   table.
