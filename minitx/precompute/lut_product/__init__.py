"""LUTIN: one table, shared by all matrices, holds the dot products of short low-bit vectors.

The card and the options, the part that runs (online), then the table and the weight codes
(offline). bit_search.py finds the fewest bits that are accurate enough.
"""

from typing import Annotated, Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.shared.symmetric import quantize_symmetric
from minitx.shared.table_lookup import (
    as_rows,
    constant_matrices,
    count_reads,
    replace_matrices,
    sum_entries,
    weight_and_bias,
)
from minitx.technique import above, at_least, between, technique
from minitx.tree import Part, part, table


@technique(
    level="matrices",
    exact=False,
    neutral={"layers": 0},
    after=("low_rank", "perforate"),
    event="table reads",
    presets={"aggressive": {"input_bits": 4, "weight_bits": 4, "length": 2}},
)
def lut_product(
    lm,
    *,
    input_bits: Annotated[int, "bits of an input (paper: ba)", between(2, 8)] = 8,
    weight_bits: Annotated[int, "bits of a weight (paper: bw)", between(2, 8)] = 8,
    length: Annotated[int, "integers packed into one code (paper: d)", between(1, 16)] = 1,
    layout: Annotated[
        Literal["vertical", "horizontal"],
        "vertical: one row of the table per input code; horizontal: one per weight code",
    ] = "vertical",
    layers: Annotated[
        int | None, "blocks changed, the last ones; default: all", at_least(0)
    ] = None,
    head: Annotated[bool, "replace the output head too"] = False,
    limit: Annotated[
        float, "MiB that the table may take; more is an error", above(0, limit=16384)
    ] = 256.0,
    search: Annotated[bool, "find input_bits, weight_bits and length by calibration"] = False,
    drop: Annotated[float, "search: accuracy that may be lost", between(0, 1)] = 0.01,
    cache: Annotated[
        int, "search: bytes of CPU cache that the table has to fit in", at_least(1)
    ] = 65536,
    stories: Annotated[
        int, "search: calibration stories (with calibrate: passages of the text)", between(1, 1000)
    ] = 16,
):
    """Replace matrix products by reads from one table of all short integer dot products.

    Paper:     Lin et al., "LUTIN", ISLPED 2024, doi 10.1145/3665314.3670804.
    Fidelity:  a reconstruction from the abstract and a reader's notes. They name ba, bw, d, the two
               layouts and the two-stage search. Unconfirmed guesses of ours: that the table holds
               all dot products of two codes, and when the search stops.
    Kind:      approximate: quantizes inputs and weights. The integer product itself is exact.
               8 bits, where the search of the paper begins, are nearly free. 4 bits in pairs
               (preset=aggressive) do for stories and break a general model (Notes).
    Idea:      Short vectors of few-bit integers have few dot products: compute all of them once.
    Offline:   code of v = sum over j of (v[j] + 2^(bits-1)) << (bits * j),  v: `length` integers,
               bits: input_bits for x, weight_bits for W; the last group is filled with v[j] = 0
               table[cx, cw] = dot(integers of code cx, integers of code cw)   for all matrices
               ws[o]    = max|W[:, o]| / (2^(weight_bits-1) - 1)     W (in, out), o an output
               cw[g, o] = code of group g: `length` integers round(W[:, o] / ws[o])
    Online:    xs       = max|x| / (2^(input_bits-1) - 1)            one scale per token
               cx[g]    = code of group g: `length` integers round(x / xs)
               acc[o]   = sum over g of table[cx[g], cw[g, o]]       an integer
               y[o]     = xs ws[o] acc[o] + b[o]
    Saves:     in * out multiply-adds become in * out / length reads and as many additions, and
               in + 2 out multiplications (for the scales). A code takes 1, 2 or 4 bytes: weights
               take weight_bits / 32 of float32 only if length * weight_bits is 8, 16 or 32.
               The table has 2^(length * (input_bits + weight_bits)) entries.
    In NumPy:  0.1x the speed of dense: gathering entries is far slower than BLAS.
    Not for:   q k^T and p v, where both sides change. search=true: models
               without a tokenizer, unless calibrate gives ids.
    Proof:     tests/precompute/test_lut_product.py; literal version:
               tests/precompute/literal_lut_product.py
    Tutorial:  tutorials/10_tables_instead_of_products.py
    """
    nodes = constant_matrices("lut_product", lm, layers, head)
    if search:
        from minitx.precompute.lut_product.bit_search import find_bits  # which needs this module

        found = find_bits(lm, nodes, drop, cache, stories)
        input_bits, weight_bits, length = found.input_bits, found.weight_bits, found.length
    check_size(table_bytes(input_bits, weight_bits, length), limit)
    shared = ProductTable.of(input_bits, weight_bits, length, layout)
    return replace_matrices(
        lm, nodes, lambda node: ProductTableLinear.of(shared, *weight_and_bias(node))
    )


# Online ------------------------------------------------------------------------------------------


@part
class ProductTableLinear(Part):
    """x @ w + b with both quantized to few bits, by reads from the shared table."""

    table: "ProductTable"
    codes: np.ndarray  # (groups, out) weight codes
    scale: np.ndarray  # (out,) ws
    b: np.ndarray | None = None

    @classmethod
    def of(cls, shared: "ProductTable", w, b) -> "ProductTableLinear":
        """From w (in, out) and a bias (out,) or None."""
        wi, ws = quantize_weights(w, shared.weight_bits)
        codes = pack(wi.T, shared.weight_bits, shared.length).T  # (groups, out)
        smallest = np.min_scalar_type((1 << shared.weight_bits * shared.length) - 1)
        return cls(shared, np.ascontiguousarray(codes.astype(smallest)), ws.astype(w.dtype), b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        t, cw = self.table, self.codes[:, columns]
        rows = as_rows(x, x.shape[-1])  # (n, in)
        xi, xs = quantize_inputs(rows, t.input_bits)
        cx = pack(xi, t.input_bits, t.length)  # (n, groups)
        acc = t.sums(cx, cw)  # (n, out)
        reads = len(rows) * cw.size
        count_reads(rows.size + 2 * acc.size, reads, cw.nbytes + reads * t.entries.itemsize)
        return dequantize(acc, xs, self.scale[columns], self.b, columns, x)


def quantize_inputs(rows, bits: int):
    """Rows (n, in) as integers (n, in) and scales (n,). A row with NaN or Inf has no code: it
    becomes zeros with a scale of NaN or Inf, which make its outputs NaN."""
    xi, xs = quantize_symmetric(rows, bits)
    xi[~np.isfinite(xs)] = 0
    return xi, xs


def dequantize(acc, xs, ws, b, columns, x):
    """Sums (n, out) times the scales xs (n,) and ws (out,), plus these columns of b, in the type
    and with the leading axes of x."""
    y = acc.astype(x.dtype) * (xs[:, None] * ws)
    if b is not None:
        y += b[columns]
    return y.reshape(*x.shape[:-1], len(ws))


# Offline: codes ----------------------------------------------------------------------------------


def quantize_weights(w, bits: int):
    """w (in, out) as integers (in, out) and a scale (out,) for each column, in float64."""
    wi, ws = quantize_symmetric(np.asarray(w, np.float64).T, bits)
    return wi.T, ws


def pack(integers, bits: int, length: int):
    """Integers (n, in) as codes (n, groups), ``length`` at a time: the first in the low bits, each
    stored as ``value + 2^(bits-1)``, which is not negative. The last group is padded with the value
    0 (the digit 0 would mean the most negative value)."""
    n, inputs = integers.shape
    digits = np.full((n, groups(inputs, length) * length), 1 << bits - 1, np.intp)
    digits[:, :inputs] += integers.astype(np.intp)
    digits = digits.reshape(n, -1, length)
    codes = digits[..., 0].copy()
    for j in range(1, length):
        codes += digits[..., j] << bits * j
    return codes


def unpack(bits: int, length: int):
    """The integers that each code stands for: (2^(bits * length), length)."""
    codes = np.arange(1 << bits * length)[:, None]
    return (codes >> bits * np.arange(length)) % (1 << bits) - (1 << bits - 1)


def groups(inputs: int, length: int) -> int:
    """The number of groups of ``length`` that hold all inputs."""
    return -(-inputs // length)


# Offline: the table ------------------------------------------------------------------------------


@part
class ProductTable(Part):
    """The dot product of every input code with every weight code."""

    # (input codes, weight codes); horizontal: transposed. table(): computed, so not a weight
    entries: np.ndarray = table()
    input_bits: int = 0
    weight_bits: int = 0
    length: int = 0
    layout: str = "vertical"

    @classmethod
    def of(cls, input_bits: int, weight_bits: int, length: int, layout: str) -> "ProductTable":
        x = unpack(input_bits, length).astype(np.float32)
        w = unpack(weight_bits, length).astype(np.float32)
        largest = largest_entry(input_bits, weight_bits, length)
        first, second = (x, w) if layout == "vertical" else (w, x)
        entries = np.empty((len(first), len(second)), entry_type(input_bits, weight_bits, length))
        for i in range(0, len(first), 1024):  # float32 is exact for integers this small
            entries[i : i + 1024] = (first[i : i + 1024] @ second.T).clip(-largest, largest)
        return cls(entries, input_bits, weight_bits, length, layout)

    def sums(self, cx, cw):
        """acc (n, out) of input codes cx (n, groups) and weight codes cw (groups, out): exact."""
        # Vertical: the input code selects the row and the weight code the column; horizontal: the
        # other way round. sum_entries adds the two: flat[row * width + column], summed over g.
        flat, width = self.entries.reshape(-1), self.entries.shape[1]
        if self.layout == "vertical":
            return sum_entries(flat, cx * width, cw, np.int32)
        return sum_entries(flat, cx, cw.astype(np.intp) * width, np.int32)


def largest_entry(input_bits: int, weight_bits: int, length: int) -> int:
    """The largest dot product that is ever read. Symmetric quantization never produces the integer
    -2^(bits-1), so entries beyond this one are clipped to fit a smaller type."""
    return length * ((1 << input_bits - 1) - 1) * ((1 << weight_bits - 1) - 1)


def entry_type(input_bits: int, weight_bits: int, length: int) -> np.dtype:
    """The smallest integer type for the entries."""
    return np.min_scalar_type(-largest_entry(input_bits, weight_bits, length) - 1)


def table_bytes(input_bits: int, weight_bits: int, length: int) -> int:
    size = entry_type(input_bits, weight_bits, length).itemsize
    return size << length * (input_bits + weight_bits)


def check_size(size: int, limit: float) -> None:
    """Refuse a table of more than ``limit`` MiB."""
    if size > limit * 2**20:
        raise MinitxError(
            f"lut_product: the table would take {size / 2**20:,.1f} MiB and limit is {limit:g}; "
            "use fewer bits, a smaller length or a higher limit."
        )


# Notes:
#
# - On ``stories`` (minitx sweep lut-product preset=default,aggressive --stories 20): loss above
#   dense +0.0001 and +0.0384, argmax agrees at 96 % and 83 %; memory 0.35x (of which the table is
#   0.02x) and 0.23x, speed 0.12x and 0.18x. Both take 0.12x of the multiply-adds.
# - SmolLM2-135M-Instruct (not shipped) has inputs of very different size, which share one scale per
#   token: on a text it loses 0.07 nats per token at 8 bits for both, 0.85 with 4-bit weights, and
#   6.3 if inputs have 4 bits too.
# - One scale per token, not per batch: with one per batch, a token's outputs would depend on
#   the other tokens, and one outlier would spoil them all.
# - What "vertical" and "horizontal" mean in memory is our guess. Both give exactly the same sums.
# - Why not put the weights into the table? table[g, cx, o] = dot(the integers of code cx, the float
#   weights of group g and output o) needs no weight codes and no rounding of weights, and reads
#   whole rows. But it takes 2^(length * input_bits) / length entries a weight, 128 at 4 bits and
#   pairs: 720 MiB of float32 instead of 6 for ``stories``, and even at one byte an entry 288 MiB
#   instead of 9 (float32) for one 768 x 3072 matrix. It ran at 0.3x of dense, so it is no technique
#   here.
# - Table sizes at (input_bits, weight_bits, length): (4, 4, 1) 256 B; (3, 4, 2) 16 KiB; (4, 4, 2)
#   and (2, 2, 4) 64 KiB; (8, 8, 1) 128 KiB; (3, 3, 3) 256 KiB; (4, 4, 3) 32 MiB. The two with
#   entries beyond 127 take 16 bits an entry.
