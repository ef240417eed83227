"""A quantized KV cache: keys and values are stored as int8 or 4-bit integers with scales.

The card, the cache (online), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Cache
from minitx.shared.int4 import pack_int4, unpack_int4
from minitx.shared.shapes_seen import cached_widths
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Layer
from minitx.technique import at_least, swap, technique
from minitx.tree import Part, float_type, part


@technique(
    level="attention",
    exact=False,
    neutral={"bits": 32},
    demo={"group_size": 4},
    presets={"aggressive": {"bits": 4}},
)
def quantize_cache(
    lm,
    *,
    bits: Annotated[Literal[8, 4, 32], "bits per cached number; 32 changes nothing"] = 8,
    group_size: Annotated[
        int | None,
        "numbers that share a scale, a divisor of the head width; None: a whole head",
        at_least(1),
    ] = None,
):
    """Quantize the KV cache to int8 or int4 with a scale per token and head.

    Paper:     none alone: common practice. Rounding is that of llama2.c's "Q8_0" (Karpathy, 2023),
               which quantizes weights and leaves the cache alone.
    Fidelity:  ours throughout.
    Kind:      approximate: each number is off by up to half a scale.
    Idea:      The cache grows with every token, the weights do not: quantize what grows.
    Offline:   nothing: keys and values are not known yet.
    Online:    store: for a new token, each head's key k (after RoPE) and value v, d numbers each,
               in groups of g = group_size (v as k):
                 scale = max|k| / q,  q = 127 or 7 (4 bits);    code = rint(k / scale)
               codes (4-bit ones two to a byte) and scales are cached instead of k and v.
               read: k = scale * code, for all S cached tokens of the layer; then attention
    Saves:     memory: 2 K (d*bits/8 + 4 d/g) bytes per token and layer instead of 8 K d, with K
               key/value heads. No multiply-adds.
    In NumPy:  slower: all S tokens are dequantized again for each new token, in every layer, which
               takes longer than attention itself. Use it where the cache of long contexts or large
               batches does not fit in memory.
    Not for:   a cache that another technique stores in its own way.
    Proof:     tests/precompute/test_quantize_cache.py;
               literal version: tests/precompute/literal_quantize_cache.py
    Tutorial:  tutorials/08_fewer_bits.py
    """
    if bits == 32:
        return lm
    check_group_size(group_size, bits, cached_widths(lm.model))
    dtype = float_type(lm.model).name
    return swap(lm, Cache, lambda cache: QuantizedCache(bits, group_size, dtype))


def check_group_size(group_size: int | None, bits: int, widths: set[int]) -> None:
    """Refuse groups that do not divide the widths of cached keys and values: the head width,
    unless another technique caches something else."""
    for width in sorted(widths - {0}):
        g = group_size or width
        if width % g or (bits == 4 and g % 2):
            even = "even and " if bits == 4 else ""
            raise MinitxError(
                f"quantize_cache: group_size must be {even}a divisor of the head width {width}; "
                f"got {group_size}."
            )


# Online ------------------------------------------------------------------------------------------


@part
class QuantizedCache(Part):
    """Quantizes keys and values when they are stored and dequantizes them when they are read.

    The cache row of a token and head is bytes: its codes, followed by the bytes of its scales.
    """

    bits: int
    group_size: int | None  # None: the whole head
    dtype: str  # of the keys and values that are stored and read

    def store(self, k, v, layer: Layer):
        layer.store(self.quantized(k), self.quantized(v))

    def read(self, layer: Layer):
        rows = layer.rows()  # bytes (..., K, S, d*bits/8 + bytes of scales)
        ledger.count(cache_bytes=lambda: sum(a.nbytes for a in rows))
        return tuple(map(self.dequantized, rows))

    def quantized(self, x):
        """x (..., K, T, d) -> bytes (..., K, T, d*bits/8 + bytes of scales), as uint8."""
        if not x.shape[-1]:  # values have width 0 with slim_attention, which caches keys alone
            return x
        x = np.ascontiguousarray(x)  # a product may be a transpose, whose rows have no bytes apart
        groups = x.reshape(*x.shape[:-1], -1, self.group_size or x.shape[-1])  # (..., d / g, g)
        codes, scales = quantize_symmetric(groups, self.bits)
        codes = codes.astype(np.int8).reshape(x.shape)
        codes = codes.view(np.uint8) if self.bits == 8 else pack_int4(codes)
        return np.concatenate([codes, scales.view(np.uint8)], axis=-1)

    def dequantized(self, rows):
        """Bytes as ``quantized`` gives them -> numbers (..., K, S, d)."""
        if not rows.shape[-1]:
            return rows
        end = self.code_bytes(rows.shape[-1])
        codes, scales = rows[..., :end], rows[..., end:].view(self.dtype)  # (..., d / g) scales
        codes = codes.view(np.int8) if self.bits == 8 else unpack_int4(codes)
        x = codes.astype(self.dtype).reshape(*scales.shape, -1)  # (..., d / g, g)
        x *= scales[..., None]
        return x.reshape(*rows.shape[:-1], -1)

    def code_bytes(self, total: int) -> int:
        """How many of the ``total`` bytes of a row are codes. A row has d/g groups, each with
        g*bits/8 bytes of codes and one scale."""
        scale = np.dtype(self.dtype).itemsize
        if self.group_size is None:
            return total - scale
        codes = self.group_size * self.bits // 8  # of one group
        return total * codes // (codes + scale)


# Notes:
#
# - New tokens are quantized before any query reads them. So in a prompt too every query sees
#   quantized keys, its own included, and a prompt read at once, in chunks or token by token gives
#   the same.
# - The ledger counts reading the codes, on top of the float keys and values that attention reads.
#   The floats of one layer at a time are in memory beside the cache.
# - With 4 bits the group size is even, two codes to a byte.
# - Figures on stories (minitx sweep quantize-cache bits=8,4 --stories 60; one BLAS thread):
#   8 bits: cache 0.28x, loss -0.0001 nats per token, speed 0.64x; 4 bits: 0.16x, +0.0010, 0.53x.
#   SmolLM2-135M-Instruct (not shipped) loses on a text, in nats per token, nothing (-0.002) at 8
#   bits and 0.37 at 4 (preset=aggressive).
