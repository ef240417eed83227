"""Keys and values kept in 8 or 4 bits."""

from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Cache
from minitx.shared.packing import pack_rows, unpack_rows
from minitx.shared.symmetric import quantize_symmetric
from minitx.state import Layer
from minitx.technique import swap, technique
from minitx.tree import Part, float_type, part


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
    dtype = float_type(lm.model).name
    return swap(lm, Cache, lambda cache: FewBitCache(bits, group, dtype))


@part
class FewBitCache(Part):
    """Keys and values of all tokens so far, rounded when they come and floats when they are read.

    A head's row in the cache is bytes: its codes, then its scales as their own bytes.
    """

    bits: int
    group: int | None  # G; None: the whole head
    dtype: str  # of the numbers that come and go

    def store(self, k, v, layer: Layer):
        layer.store(self.rounded(k), self.rounded(v))

    def read(self, layer: Layer):
        kept = layer.rows()  # bytes (..., K, S, d bits / 8 + scales)
        ledger.count(cache_bytes=lambda: sum(a.nbytes for a in kept))
        return tuple(map(self.floats, kept))

    def rounded(self, x):
        """x (..., K, T, d) -> bytes (..., K, T, d bits / 8 + scales), as uint8."""
        if not x.shape[-1]:  # keys alone, which give the values too
            return x
        by_group = x.reshape(*x.shape[:-1], -1, self.group or x.shape[-1])  # (..., d / G, G)
        codes, scales = quantize_symmetric(by_group, self.bits)
        codes = codes.astype(np.int8).reshape(x.shape)
        codes = codes.view(np.uint8) if self.bits == 8 else pack_rows(codes)
        return np.concatenate([codes, scales.view(np.uint8)], axis=-1)

    def floats(self, kept):
        """Bytes as ``rounded`` gives them -> numbers (..., K, S, d)."""
        if not kept.shape[-1]:
            return kept
        width = self.code_bytes(kept.shape[-1])
        codes = kept[..., :width]
        codes = codes.view(np.int8) if self.bits == 8 else unpack_rows(codes)
        x = codes.astype(self.dtype).reshape(*kept.shape[:-1], -1, self.group or codes.shape[-1])
        x *= kept[..., width:].view(self.dtype)[..., None]
        return x.reshape(*kept.shape[:-1], -1)

    def code_bytes(self, total: int) -> int:
        """How many of a row's bytes are codes; the others are one scale for each group."""
        scale = np.dtype(self.dtype).itemsize
        if self.group is None:
            return total - scale
        codes = self.group * self.bits // 8  # bytes of one group's
        return total * codes // (codes + scale)
