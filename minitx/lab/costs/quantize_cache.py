"""``minitx cost quantize-cache``: bytes of a quantized KV cache, for a model of any size.

Plain sums, as precompute/quantize_cache.py stores it: for each token, layer and key/value head a
key and a value of d numbers, and a float32 scale for each group of them. With an encoder, the keys
and values of cross-attention are cached in the same way.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least

ENCODERS = True


@dataclass(frozen=True)
class QuantizeCacheCost:
    shape: Shape
    bits: int
    group_size: int
    tokens: int

    @property
    def vectors(self) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.shape.layers * self.shape.kv_heads

    @property
    def float32(self) -> int:
        """Bytes per token."""
        return 4 * self.vectors * self.shape.head_width

    @property
    def quantized(self) -> int:
        """Bytes per token: codes and scales."""
        d = self.shape.head_width
        return self.vectors * (d * self.bits // 8 + 4 * d // self.group_size)

    @property
    def positions(self) -> int:
        """Cached tokens: of the text, and of what the encoder has read."""
        return self.tokens + self.shape.source

    def as_dict(self) -> dict:
        names = ("bits", "group_size", "tokens", "positions", "float32", "quantized")
        found = {"technique": "quantize_cache", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"share": self.quantized / self.float32, "notes": list(self.shape.notes)}

    def __str__(self) -> str:
        rows = [["cache", "bytes a token", f"{self.positions:,} tokens", "of float32"]]
        quantized = f"{self.bits} bits, groups of {self.group_size}"
        for name, size in (("float32", self.float32), ("float16", self.float32 // 2),
                           (quantized, self.quantized)):  # fmt: skip
            share = f"{size / self.float32:.2f}x"
            rows.append([name, f"{size:,}", f"{size * self.positions / 1e6:,.1f} MB", share])
        return "\n".join([*self.shape.heading(self.shape.notes), table(rows)])


def cost(
    shape: Shape,
    *,
    bits: Annotated[Literal[8, 4], "bits per cached number"] = 8,
    group_size: Annotated[
        int | None, "numbers that share a scale; None: a whole head", at_least(1)
    ] = None,
    tokens: Annotated[int | None, "of the text; default: the model's context", at_least(1)] = None,
) -> QuantizeCacheCost:
    d = shape.head_width
    group_size = d if group_size is None else group_size
    tokens = (shape.context or 1) if tokens is None else tokens
    if d % group_size or (bits == 4 and group_size % 2):
        even = "even and " if bits == 4 else ""
        raise MinitxError(
            f"cost quantize_cache: group_size must be {even}a divisor of the head width {d}; got "
            f"{group_size}."
        )
    return QuantizeCacheCost(shape, bits, group_size, tokens)
