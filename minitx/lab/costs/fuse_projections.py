"""``minitx cost fuse-projections``: calls and reads saved by one product instead of several.

Plain counting. No weight and no multiply-add of a product is saved; calls, reads of the input and
multiplications of scores by 1 / sqrt(d) are.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least


@dataclass(frozen=True)
class FuseProjectionsCost:
    """One model that runs ``tokens`` at a time, each of which attends to up to ``keys`` keys."""

    shape: Shape
    tokens: int
    keys: int

    @property
    def qkv(self) -> tuple[int, int]:
        """W_qkv (in, out)."""
        return self.shape.width, self.shape.qkv_width

    @property
    def gate_up(self) -> tuple[int, int] | None:
        """W_gu (in, out) of one expert; None without a gate."""
        s = self.shape
        return (s.width, 2 * s.hidden) if s.ffn_matrices == 3 else None

    @property
    def products(self) -> tuple[int, int]:
        """Products with weights per block, before and after; with experts: if all of them ran."""
        s = self.shape
        fused = 2 if self.gate_up else s.ffn_matrices
        return 4 + s.ffn_matrices * s.experts, 2 + fused * s.experts

    @property
    def inputs_read(self) -> tuple[int, int]:
        """Input numbers that the fused products of a block read per token, before and after."""
        s = self.shape
        ffn = (s.ffn_matrices - 1) * s.experts
        return (3 + ffn) * s.width, (1 + (s.experts if self.gate_up else ffn)) * s.width

    @property
    def scalings(self) -> int:
        """Multiplications of scores by 1 / sqrt(d) saved, in all blocks."""
        s = self.shape
        return s.layers * s.heads * self.tokens * self.keys

    @property
    def bitwise(self) -> bool:
        """Is 1 / sqrt(d) a power of two, so that scaling the queries rounds nothing?"""
        root = math.isqrt(self.shape.head_width)
        return root * root == self.shape.head_width and root & (root - 1) == 0

    def as_dict(self) -> dict:
        names = ("tokens", "keys", "qkv", "gate_up", "products", "inputs_read", "scalings")
        found = {"technique": "fuse_projections", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"bitwise": self.bitwise, "notes": list(self.shape.notes)}

    def __str__(self) -> str:
        s, (d_in, d_out) = self.shape, self.qkv
        rows = [
            ["per block", "before", "after"],
            ["products with weights", *map(str, self.products)],
            ["input numbers read per token", *(f"{n:,}" for n in self.inputs_read)],
        ]
        fused = f"W_qkv is {d_in:,} x {d_out:,}"
        if self.gate_up:
            fused += f", W_gu is {self.gate_up[0]:,} x {self.gate_up[1]:,}"
        lines = [*s.heading(s.notes), table(rows), ""]
        lines += [
            f"{fused}: no weights and no multiply-adds saved.",
            f"{self.tokens:,} tokens that attend to {self.keys:,} keys: {self.scalings:,} "
            f"multiplications of scores saved. sqrt({s.head_width}) "
            f"{'is' if self.bitwise else 'is not'} a power of two, so scaling the queries instead "
            f"{'rounds nothing' if self.bitwise else 'may round'}.",
        ]
        return "\n".join(lines)


def cost(
    shape: Shape,
    *,
    tokens: Annotated[int, "tokens that run at once", at_least(1)] = 1,
    keys: Annotated[int, "keys that each of them attends to", at_least(1)] = 1024,
) -> FuseProjectionsCost:
    return FuseProjectionsCost(shape, tokens, keys)
