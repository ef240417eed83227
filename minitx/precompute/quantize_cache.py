"""Keys and values kept in 8 or 4 bits."""

from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.keys.few_bits import few_bits
from minitx.matrices.packing import pack_rows, unpack_rows
from minitx.model import Cache
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, part


@technique(level="attention", exact=False, neutral={"bits": 32})
def quantize_cache(lm, *, bits: Literal[8, 4, 32] = 8, group: int | None = None):
    """Keep each token's keys and values as whole numbers of 8 or 4 bits, with a scale for a head.

    Paper: no single one; rounding to the nearest is llama2.c's "Q8_0" (Karpathy, 2023), which
        quantises weights and leaves the cache alone. That the cache is what grows, and what is
        done here to it, is common practice.
    Kind: approximate: each number is off by up to half a scale.
    Skips or precomputes: 3 of 4 bytes of the cache (7 of 8), but for scales. No work.
    Offline: nothing: keys and values are not known yet.
    Online: for each new token and head, and each G of its d columns (group; None: all d), keys as
        rotated: s = max|k| / q with q = 127 or 7, code = rint(k / s). The codes (of 4 bits two to a
        byte) and the bytes of the scales lie in the cache in the place of k; values alike. When a
        block is run, all keys and values so far become floats again, s code, for that block alone.
        Every token's own are among them: in a prompt that is read at once, too, nobody sees what
        was not rounded, so chunks and single tokens give the same.
    Saves: 2 K (d bits / 8 + 4 d / G) bytes a token and layer in the place of 8 K d. No product.
        In NumPy it loses time: all S tokens are turned into floats for each new one, in every
        layer, which takes longer than attention itself; the ledger counts reading the codes, on
        top of the floats that attention reads as before. It is for memory: long contexts, large
        batches. The floats of one layer at a time are there beside it.
    Neutral: bits = 32: everything stays as it is.
    Not for: heads whose width G does not divide; with 4 bits, an odd G. A cache that another
        technique keeps in its own way.
    """
    if bits == 32:
        return lm
    d = lm.model.config.head_width
    G = d if group is None else group
    if G < 1 or d % G or (bits == 4 and G % 2):
        even = "even and " if bits == 4 else ""
        raise MinitxError(
            f"quantize_cache: group is {group}; it must be {even}a divisor of the heads' width {d}."
        )
    return swap(lm, Cache, lambda cache: FewBitCache(bits, group))


@part
class FewBitCache(Part):
    """Keys and values of all tokens so far, rounded when they come and floats when they are read.

    A head's row in the cache is bytes: its codes, then its scales as their own bytes.
    """

    bits: int
    group: int | None  # G; None: as many as come

    def __call__(self, k, v, layer: Layer):
        kept = layer.extend(self.rounded(k), self.rounded(v))  # (..., K, S, bytes)
        ledger.count(cache_bytes=kept[0].nbytes + kept[1].nbytes)
        return tuple(self.floats(a, like) for a, like in zip(kept, (k, v)))

    def rounded(self, x):
        """x (..., K, T, d) -> bytes (..., K, T, d bits / 8 + scales), as uint8."""
        if not x.shape[-1]:  # there may be keys alone, which give the values too
            return x
        by_group = x.reshape(*x.shape[:-1], -1, self.group or x.shape[-1])  # (..., d / G, G)
        codes, scales = few_bits(by_group, self.bits)
        codes = codes.astype(np.int8).reshape(x.shape)
        codes = codes.view(np.uint8) if self.bits == 8 else pack_rows(codes)
        return np.concatenate([codes, scales.view(np.uint8)], axis=-1)

    def floats(self, kept, like):
        """Bytes as ``rounded`` gives them -> numbers (..., K, S, d) as wide as ``like``, and in its
        type."""
        width = like.shape[-1] * self.bits // 8
        if not width:
            return kept
        codes = kept[..., :width]
        codes = codes.view(np.int8) if self.bits == 8 else unpack_rows(codes)
        x = codes.astype(like.dtype).reshape(*kept.shape[:-1], -1, self.group or like.shape[-1])
        x *= kept[..., width:].view(like.dtype)[..., None]
        return x.reshape(*kept.shape[:-1], -1)
