"""``minitx cost fuse-projections``: calls and readings that one product for several saves.

Plain counting, of no one paper: no weight and no multiply-add of a product goes; what goes is calls
of a product, readings of its input, and multiplications of scores by 1 / sqrt(d).
"""

import math
from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class FuseProjectionsCost:
    """One model, ``tokens`` at a time, each seeing ``keys`` keys at most."""

    shape: Shape
    tokens: int
    keys: int

    @property
    def qkv(self) -> tuple[int, int]:
        """W_qkv (in, out)."""
        return self.shape.width, self.shape.qkv_width

    @property
    def gate_up(self) -> tuple[int, int] | None:
        """W_gu (in, out) of one expert, if there is a gate."""
        s = self.shape
        return (s.width, 2 * s.hidden) if s.ffn_matrices == 3 else None

    @property
    def products(self) -> tuple[int, int]:
        """Products with weights in a block, before and after; with experts: if all of them ran."""
        s = self.shape
        fused = 2 if self.gate_up else s.ffn_matrices
        return 4 + s.ffn_matrices * s.experts, 2 + fused * s.experts

    @property
    def inputs_read(self) -> tuple[int, int]:
        """Numbers of the stream that the fused products of a block read for a token, before and
        after."""
        s = self.shape
        ffn = (s.ffn_matrices - 1) * s.experts
        return (3 + ffn) * s.width, (1 + (s.experts if self.gate_up else ffn)) * s.width

    @property
    def scalings(self) -> int:
        """Multiplications of scores by 1 / sqrt(d) that go, in all blocks."""
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
            ["a block", "before", "after"],
            ["products with weights", *map(str, self.products)],
            ["numbers that they read, a token", *(f"{n:,}" for n in self.inputs_read)],
        ]
        fused = f"W_qkv is {d_in:,} x {d_out:,}"
        if self.gate_up:
            fused += f", W_gu is {self.gate_up[0]:,} x {self.gate_up[1]:,}"
        lines = [*s.heading(s.notes), table(rows), ""]
        lines += [
            f"{fused}: no weight less, and no multiply-add.",
            f"{self.tokens:,} tokens that see {self.keys:,} keys: {self.scalings:,} scores are not "
            f"scaled. sqrt({s.head_width}) {'is' if self.bitwise else 'is not'} a power of two, so "
            f"scaling the queries instead {'rounds nothing' if self.bitwise else 'may round'}.",
        ]
        return "\n".join(lines)


def cost(shape: Shape, *, tokens: int = 1, keys: int = 1024) -> FuseProjectionsCost:
    if tokens < 1 or keys < 1:
        raise MinitxError(
            f"cost fuse_projections needs at least 1 token and 1 key, not {tokens} and {keys}."
        )
    return FuseProjectionsCost(shape, tokens, keys)
