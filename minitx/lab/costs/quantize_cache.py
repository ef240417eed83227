"""``minitx cost quantize-cache``: bytes of the cache of a model of any size, in few bits.

Plain counting, as precompute/quantize_cache.py keeps it: for each token, layer and key/value head a
key and a value of d numbers, and a float32 scale for every G of them. With an encoder, what the
decoder looks up in it is kept alike.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape

ENCODERS = True


@dataclass(frozen=True)
class QuantizeCacheCost:
    shape: Shape
    bits: int
    group: int  # G
    tokens: int

    @property
    def heads(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.shape.layers * self.shape.kv_heads

    @property
    def float32(self) -> int:
        """Bytes a token."""
        return 4 * self.heads * self.shape.head_width

    @property
    def kept(self) -> int:
        """Bytes a token: codes and scales."""
        d = self.shape.head_width
        return self.heads * (d * self.bits // 8 + 4 * d // self.group)

    @property
    def positions(self) -> int:
        """Tokens that are kept: of the text, and of what the encoder has read."""
        return self.tokens + self.shape.source

    def as_dict(self) -> dict:
        names = ("bits", "group", "tokens", "positions", "float32", "kept")
        found = {"technique": "quantize_cache", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"share": self.kept / self.float32, "notes": list(self.shape.notes)}

    def __str__(self) -> str:
        rows = [["cache", "bytes a token", f"{self.positions:,} tokens", "of float32"]]
        kept = f"{self.bits} bits, a scale for {self.group}"
        for name, size in (("float32", self.float32), ("float16", self.float32 // 2),
                           (kept, self.kept)):  # fmt: skip
            share = f"{size / self.float32:.2f}x"
            rows.append([name, f"{size:,}", f"{size * self.positions / 1e6:,.1f} MB", share])
        return "\n".join([*self.shape.heading(self.shape.notes), table(rows)])


def cost(
    shape: Shape, *, bits: Literal[8, 4] = 8, group: int | None = None, tokens: int | None = None
) -> QuantizeCacheCost:
    """tokens: of the text; the model's context, if not given."""
    group = shape.head_width if group is None else group
    tokens = (shape.context or 1) if tokens is None else tokens
    if group < 1 or shape.head_width % group or (bits == 4 and group % 2):
        raise MinitxError(
            f"cost quantize_cache: group is {group}; it must divide the heads' width "
            f"{shape.head_width}, and be even with 4 bits."
        )
    if tokens < 1:
        raise MinitxError(f"cost quantize_cache: tokens is {tokens}; it must be at least 1.")
    return QuantizeCacheCost(shape, bits, group, tokens)
