"""Quantized weights: int8 or 4-bit integers with a scale for each group of inputs.

Here: the card, the algorithm (scale, round, dequantize), and how a matrix is stored. Beside it:
products.py multiplies by a quantized matrix, awq.py rescales inputs before rounding.
"""

from collections.abc import Callable
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Head, Linear, TiedHead, TokenEmbedding
from minitx.precompute.quantize.awq import best_channel_scales
from minitx.precompute.quantize.products import (
    QuantizedEmbedding,
    QuantizedHead,
    quantized_linear,
)
from minitx.shared import int4
from minitx.shared.block_by_block import block_by_block
from minitx.shared.linears import linears
from minitx.shared.observed_inputs import Moments
from minitx.technique import at_least, swap, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=False,
    neutral={"bits": 32},
    after=("low_rank", "perforate", "lut_product", "lut_centroid", "lut_bit_serial"),
    presets={"aggressive": {"bits": 4}},
)
def quantize(
    lm,
    *,
    bits: Annotated[Literal[8, 4, 32], "bits per weight; 32 changes nothing"] = 8,
    group_size: Annotated[
        int | None, "inputs that share a scale, at most; None: all inputs of an output", at_least(2)
    ] = 64,
    symmetric: Annotated[bool, "no zero points; false: a zero point for each group"] = True,
    embeddings: Annotated[
        bool, "quantize the embedding and the head too; a tied head is the embedding"
    ] = False,
    run: Annotated[
        Literal["stream", "cast", "load", "integers"], "how products are computed; see Online"
    ] = "stream",
    half_scales: Annotated[bool, "store scales as float16"] = False,
    awq: Annotated[bool, "activation-aware scaling (AWQ) before rounding"] = False,
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) for awq",
        at_least(1, limit=1000),
    ] = 16,
):
    """Quantize weights to int8 or int4 with per-group scales.

    Paper:     round-to-nearest is common practice; groups and run=integers are those of llama2.c's
               "Q8_0" (Karpathy, 2023). awq: Lin et al., "AWQ: Activation-aware Weight
               Quantization", 2023, arXiv 2306.00978.
    Fidelity:  the authors' code (llama2.c, AWQ). Ours: groups of equal size where group_size does
               not divide the inputs; AWQ's c is judged matrix by matrix (Notes of awq.py).
    Kind:      approximate: each weight is off by up to half a scale.
    Idea:      Weights of one group are of similar size: an integer times the group's scale is close
               to each of them.
    Offline:   for each output and each group of g <= group_size consecutive inputs:
               symmetric:   scale = max|w| / q,  q = 127 or 7;    code = rint(w / scale)
               asymmetric:  scale = (high - low) / (2^bits - 1),  low = min(w, 0), high = max(w, 0)
                            zero point = rint(-low / scale),  code = rint(w / scale) + zero point,
                            both then shifted by -2^(bits-1)
               awq: multiply row i of W by c_i before rounding, divide x_i by c_i online;
                    c = mean|x|^ratio, at least 1e-4, normalized by sqrt(max c * min c); ratio: of
                    0, 0.05 .. 0.95 the one with the least output error on calibration stories
    Online:    y = x w,  w = scale (code - zero point), in one of four ways:
               stream    dequantize a tile (the groups that fit in the cache), multiply, discard it
               cast      the same, the whole matrix being one tile
               load      dequantize once, at the first use; then the dense product
               integers  quantize x to int8 too, symmetric, a scale s_x for each group (W8A8):
                         y = sum over groups: scale s_x (sum(code_x code) - zero point sum(code_x))
    Saves:     memory: bits/8 + 4/g bytes per weight instead of 4 (half_scales: 2/g; asymmetric:
               1/g more), also read for each product; load keeps float32 too. No multiply-adds.
    In NumPy:  never faster than float32, since NumPy has no fast product of small integers. load
               takes the dense model's time; the others take longer, above all for single tokens.
    Not for:   run=integers with groups above 1,040 inputs (asymmetric 518; 4 bits 18,872, 8,806):
               sums may pass 2^24, where float32 rounds. Matrices that another technique stores.
    Proof:     tests/precompute/test_quantize.py;
               literal version: tests/precompute/literal_quantize.py
    Tutorial:  tutorials/08_fewer_bits.py
    """
    if bits == 32:
        return lm

    def quantized(w, channel_scales=None) -> QuantizedMatrix:
        return quantize_matrix(w, bits, group_size, symmetric, half_scales, channel_scales)

    def change(linear: Linear, moments=None) -> Part:
        scales = None if moments is None else best_channel_scales(linear.w, moments, quantized)
        return quantized_linear(quantized(linear.w, scales), linear.b, run)

    if awq:
        linears(lm.model, "all")  # refuses a model that has none
        texts = calibration_ids("quantize", lm, stories, "leave awq out")

        def change_block(block, seen):
            return swap(block, Linear, lambda w: change(w, seen[id(w)]), optional=True)

        options = dict(label="quantize awq", after_changes=False)
        lm = block_by_block(lm, texts, Moments, change_block, **options)
    lm = swap(lm, Linear, change, optional=awq)
    return quantize_embeddings(lm, quantized, run) if embeddings else lm


# The algorithm -----------------------------------------------------------------------------------
# w (n, g, out): for each output n groups of g inputs. Each function gives the codes (n, g, out),
# the scales (n, out), rounded to ``scale_type`` first, and the zero points (n, out).


def quantize_groups_symmetric(w, bits: int, scale_type=np.float64):
    """The weight of largest magnitude gets the code q or -q, q = 127 or 7; no zero points."""
    q = 2 ** (bits - 1) - 1
    scales = as_scales(abs(w).max(1) / q, scale_type)
    codes = np.rint(w / scales[:, None]).clip(-q, q)
    return codes, scales, None


def quantize_groups_asymmetric(w, bits: int, scale_type=np.float64):
    """The range from the smallest to the largest weight, widened to contain 0, gets all 2^bits
    codes. They start at -2^(bits-1) instead of 0, so that int8 holds them."""
    low, high = np.minimum(w.min(1), 0), np.maximum(w.max(1), 0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales = as_scales((high - low) / (2**bits - 1), scale_type)
    zero_points = (np.rint(-low / scales) + least).clip(least, most)
    codes = (np.rint(w / scales[:, None]) + zero_points[:, None]).clip(least, most)
    return codes, scales, zero_points.astype(np.int8)


def dequantize(codes, scales, zero_points):
    """codes (n, g, ...), scales and zero points (n, ...) -> weights (n, g, ...)."""
    if zero_points is not None:
        codes = codes - zero_points[:, None]
    return codes * scales[:, None]


def as_scales(scales, scale_type):
    """Scales in their type; 1 for a group of zeros, where 0 / 0 would give NaN."""
    with np.errstate(over="ignore"):
        scales = scales.astype(scale_type)
    if not np.isfinite(scales).all():
        raise MinitxError(
            f"quantize: scales do not fit {np.dtype(scale_type)}, because weights are too large or "
            "not finite; use half_scales=false."
        )
    scales[scales == 0] = 1
    return scales


# A quantized matrix ------------------------------------------------------------------------------


@part
class QuantizedMatrix(Part):
    """A matrix (in, out) as codes, scales and zero points: n groups of g inputs for each output."""

    # int8 (n, g, out); with 4 bits uint8 (n, g / 2, out), a byte for inputs 2i and 2i + 1
    codes: np.ndarray
    scales: np.ndarray  # (n, out), float32 or float16
    zero_points: np.ndarray | None  # int8 (n, out); None if symmetric
    channel_scales: np.ndarray | None  # (in,) AWQ: the weights were multiplied by these
    inputs: int
    bits: int
    float_type: str  # what it is dequantized to: float16 is for storing scales, not for computing

    @property
    def group_size(self) -> int:
        """g"""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def width(self) -> int:
        """out"""
        return self.codes.shape[2]

    @property
    def stored_bytes(self) -> int:
        arrays = (self.codes, self.scales, self.zero_points, self.channel_scales)
        return sum(a.nbytes for a in arrays if a is not None)

    def codes_of(self, groups: slice, dtype):
        """The codes of these groups as floats (groups, g, out)."""
        return unpacked(self.codes[groups], self.bits, dtype)

    def dequantized(self):
        """The matrix (in, out) in floats."""
        codes = self.codes_of(slice(None), self.float_type)
        w = dequantize(codes, self.scales, self.zero_points)  # codes are in float_type
        w = w.reshape(-1, self.width)[: self.inputs]
        return w if self.channel_scales is None else w / self.channel_scales[:, None]

    def columns(self, ids):
        """The embeddings of these tokens, (..., D): columns of the (D, V) matrix, dequantized. An
        embedding has no channel scales."""
        codes = unpacked(self.codes[..., ids], self.bits, self.float_type)  # (n, g, ...)
        zero_points = None if self.zero_points is None else self.zero_points[:, ids]
        w = dequantize(codes, self.scales[:, ids], zero_points)
        w = w.reshape(-1, *np.shape(ids))[: self.inputs]
        return np.ascontiguousarray(np.moveaxis(w, 0, -1))

    def grouped(self, x):
        """The rows of x (..., in) by groups: (rows, n, g), divided by the channel scales. A last
        group with fewer inputs is padded with zeros."""
        rows = x.reshape(-1, self.inputs)
        if self.channel_scales is not None:
            rows = rows / self.channel_scales
        n, g = len(self.codes), self.group_size
        if n * g > self.inputs:
            padded = np.zeros((len(rows), n * g), x.dtype)
            padded[:, : self.inputs] = rows
            rows = padded
        return rows.reshape(-1, n, g)


def unpacked(codes, bits: int, dtype):
    """Codes as they are stored, (n, g, ...) or (n, g / 2, ...) -> floats (n, g, ...)."""
    if bits == 8:
        return codes.astype(dtype)
    n, half, *rest = codes.shape
    w = np.empty((n, 2 * half, *rest), dtype)
    w[:, 0::2], w[:, 1::2] = int4.low_nibble(codes), int4.high_nibble(codes)
    return w


# Offline -----------------------------------------------------------------------------------------


def quantize_matrix(
    w,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    half_scales: bool = False,
    channel_scales=None,
) -> QuantizedMatrix:
    """The matrix w (in, out), each input's weights multiplied by its channel scale first if there
    are any. Computed in float64; scales are stored in the type of w, or as float16."""
    inputs, outputs = w.shape
    n, g = equal_groups(inputs, group_size, bits)
    groups = np.zeros((n * g, outputs))
    groups[:inputs] = w if channel_scales is None else w * channel_scales[:, None]
    groups = groups.reshape(n, g, outputs)
    method = quantize_groups_symmetric if symmetric else quantize_groups_asymmetric
    codes, scales, zero_points = method(groups, bits, np.float16 if half_scales else w.dtype)
    codes = codes.astype(np.int8)
    if bits == 4:
        codes = int4.join_nibbles(codes[:, 0::2], codes[:, 1::2])
    if channel_scales is not None:
        channel_scales = channel_scales.astype(w.dtype)
    return QuantizedMatrix(codes, scales, zero_points, channel_scales, inputs, bits, w.dtype.name)


def equal_groups(inputs: int, group_size: int | None, bits: int) -> tuple[int, int]:
    """(n, g): as few groups as possible, all of g <= group_size inputs. 352 inputs in groups of at
    most 64 make 6 groups of 59; with 4 bits, two to a byte, g is even: 6 groups of 60."""
    if group_size and bits == 4:
        group_size -= group_size % 2  # the largest even g that is allowed
    n = -(-inputs // (group_size or inputs))
    g = -(-inputs // n)
    return n, g + g % 2 if bits == 4 else g


def quantize_embeddings(lm, quantized: Callable, run: str):
    """Quantize the embedding and the head, tables (D, V) in groups along D. A table that both share
    is quantized once."""
    done: dict[int, tuple] = {}

    def table(w) -> QuantizedMatrix:
        if id(w) not in done:
            done[id(w)] = w, quantized(w.T)
        return done[id(w)][1]

    def head(matrix: QuantizedMatrix, b=None) -> QuantizedHead:
        return QuantizedHead(quantized_linear(matrix, b, run))

    lm = swap(lm, TokenEmbedding, lambda e: QuantizedEmbedding(table(e.w)), optional=True)
    lm = swap(lm, TiedHead, lambda h: head(table(h.w)), optional=True)
    return swap(lm, Head, lambda h: head(quantized(h.w), h.b), optional=True)


# Notes:
#
# - Norms, biases and learned positions stay float32.
# - Where group_size divides the inputs, groups, codes and scales are those of llama2.c's Q8_0.
#   Elsewhere its groups run on from one output into the next, and its product then uses the full
#   groups of a row alone: e.g. 128 of 172 inputs in groups of 64 (read in its code, not tried).
# - half_scales: the codes are chosen after the scale is rounded to float16.
# - Asymmetric ranges contain 0. Otherwise the code for 0 could lie outside the range, and clipping
#   it would move all other weights of the group.
# - Figures on stories (minitx sweep quantize bits=8,4 run=stream,cast,load,integers --stories 60;
#   one BLAS thread). Memory is that of all arrays, the float32 embedding included; loss is above
#   dense, in nats per token; speed that of generating text:
#
#       bits  run            memory   loss      speed
#       8     stream, cast   0.34x    +0.0000   0.6x
#       8     load           1.24x    +0.0000   1.0x
#       8     integers       0.34x    +0.0001   0.45x
#       4     stream, cast   0.23x    +0.0058   0.45x
#       4     load           1.13x    +0.0058   1.0x
#       4     integers       0.23x    +0.0058   0.3x
#
#   SmolLM2-135M-Instruct (not shipped) loses on a text, in nats per token: 0.006 at 8 bits and 0.47
#   at 4 (preset=aggressive).
#
#   Most of the extra time goes into converting codes to floats. cast is as fast as stream while the
#   matrices fit in the CPU's cache. For a prompt of 200 tokens both take about the dense time,
#   since a tile is dequantized once for all of them.
