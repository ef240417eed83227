"""``minitx cost kv-share``: what cross-layer attention saves, for a model of any size.

Plain sums, as skip/kv_share.py shares: of each group of neighbouring layers only the first computes
and caches keys and values.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least


@dataclass(frozen=True)
class KVShareCost:
    shape: Shape
    size: int
    group: int
    tokens: int

    @property
    def followers(self) -> int:
        """Layers that read the keys and values of another."""
        return self.size - -(-self.size // self.group)

    @property
    def numbers(self) -> int:
        """Cached per token by a layer that caches: keys and values."""
        return 2 * self.shape.kv_heads * self.shape.head_width

    @property
    def dense(self) -> int:
        """Cached bytes per token, in float16."""
        return 2 * self.shape.layers * self.numbers

    @property
    def shared(self) -> int:
        return self.dense - 2 * self.followers * self.numbers

    @property
    def weights(self) -> int:
        """Weights of W_k and W_v that are left out; as many multiply-adds per token."""
        return self.followers * self.shape.width * self.numbers

    def as_dict(self) -> dict:
        names = ("size", "group", "tokens", "followers", "dense", "shared", "weights")
        found = {"technique": "kv_share", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"share": self.shared / self.dense, "notes": list(self.shape.notes)}

    def __str__(self) -> str:
        rows = [["cache (float16)", "bytes a token", f"{self.tokens:,} tokens", "of dense"]]
        sharing = f"{self.size} of {self.shape.layers} layers in groups of {self.group}"
        for name, size in (("dense", self.dense), (sharing, self.shared)):
            mb = f"{size * self.tokens / 1e6:,.1f} MB"
            rows.append([name, f"{size:,}", mb, f"{size / self.dense:.2f}x"])
        saved = f"Left out: {self.weights:,} weights, and as many multiply-adds per token."
        return "\n".join([*self.shape.heading(self.shape.notes), table(rows), "", saved])


def cost(
    shape: Shape,
    *,
    size: Annotated[
        int | None, "neighbouring layers that are divided into groups; None: all", at_least(1)
    ] = None,
    group: Annotated[int, "layers of a group", at_least(1)] = 2,
    tokens: Annotated[int | None, "of the text; default: the model's context", at_least(1)] = None,
) -> KVShareCost:
    size = shape.layers if size is None else min(size, shape.layers)
    tokens = (shape.context or 1) if tokens is None else tokens
    return KVShareCost(shape, size, group, tokens)
