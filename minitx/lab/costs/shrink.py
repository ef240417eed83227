"""``minitx cost shrink``: what MatShrink saves, for a model of any size.

Formulas: the draft "MatShrink" (see precompute/shrink.py) and its table 1. They count numbers, not
bytes, without biases and the stored orders of columns. The paper's caption speaks of a share "of V
plus O", but its printed percentages are shares of one matrix, d / D: both are given here, and that
of all four matrices.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import at_least


@dataclass(frozen=True)
class ShrinkCost:
    """One model; ``unrotated``: columns of a head's queries and keys to shrink, r; 0: none."""

    shape: Shape
    unrotated: int = 0

    @property
    def attentions(self) -> int:
        """How many: one per layer; with an encoder, two per layer of the decoder."""
        s = self.shape
        return s.encoder_layers + 2 * s.layers if s.encoder_layers else s.layers

    @property
    def matrix(self) -> int:
        """Numbers in W_o (or W_q) of one attention: D x (H d)."""
        return self.shape.width * self.shape.heads * self.shape.head_width

    @property
    def kv_matrix(self) -> int:
        """Numbers in W_v (or W_k), which is smaller if query heads share it."""
        return self.shape.width * self.shape.kv_heads * self.shape.head_width

    @property
    def saved_vo(self) -> int:
        """Weights saved in one attention, and multiply-adds per token: K d^2."""
        return self.shape.kv_heads * self.shape.head_width**2

    @property
    def saved_qk(self) -> int:
        return self.shape.kv_heads * self.unrotated**2

    @property
    def saved(self) -> int:
        """In all attentions."""
        return self.attentions * (self.saved_vo + self.saved_qk)

    @property
    def of_one_matrix(self) -> float:
        """The share that the paper prints: d / D if no heads are shared."""
        return self.saved_vo / self.matrix

    @property
    def of_v_and_o(self) -> float:
        return self.saved_vo / (self.matrix + self.kv_matrix)

    @property
    def of_attention(self) -> float:
        """The share of W_q, W_k, W_v and W_o, including savings in queries and keys."""
        return (self.saved_vo + self.saved_qk) / (2 * (self.matrix + self.kv_matrix))

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if self.shape.kv_heads < self.shape.heads:
            found.append("one query head in each group gains an identity; the others stay whole")
        if not self.unrotated:
            found.append(
                "queries and keys are not shrunk; unrotated=NUMBER counts that many columns of "
                "each head, which must not be rotated"
            )
        return found

    def as_dict(self) -> dict:
        names = ("attentions", "matrix", "kv_matrix", "saved_vo", "saved_qk", "saved")
        names += ("of_one_matrix", "of_v_and_o", "of_attention")
        found = {"technique": "shrink", "shape": asdict(self.shape), "unrotated": self.unrotated}
        return found | {name: getattr(self, name) for name in names} | {"notes": self.notes()}

    def __str__(self) -> str:
        rows = [
            ["one attention", "numbers"],
            ["W_o (or W_q)", f"{self.matrix:,}"],
            ["W_v (or W_k)", f"{self.kv_matrix:,}"],
            ["saved in W_v, W_o", f"{self.saved_vo:,}"],
            ["saved in W_q, W_k", f"{self.saved_qk:,}"],
            ["W_v, W_o: share of one matrix (as the paper prints)", f"{self.of_one_matrix:.1%}"],
            ["W_v, W_o: share of both", f"{self.of_v_and_o:.1%}"],
            ["all savings: share of W_q, W_k, W_v, W_o", f"{self.of_attention:.1%}"],
        ]
        lines = [*self.shape.heading(self.notes()), table(rows), ""]
        lines += [
            f"{self.attentions} attentions save {self.saved:,} weights, and as many multiply-adds "
            "per token."
        ]
        return "\n".join(lines)


def cost(
    shape: Shape,
    *,
    unrotated: Annotated[
        int, "columns of each head of queries and keys that are not rotated", at_least(0)
    ] = 0,
) -> ShrinkCost:
    if unrotated > shape.head_width:
        raise MinitxError(
            f"cost shrink: unrotated is {unrotated}; expected 0 to {shape.head_width}, the columns "
            "of a head."
        )
    if shape.head_width > shape.width:
        raise MinitxError("cost shrink: heads wider than the hidden state have no block to shrink.")
    return ShrinkCost(shape, unrotated)


ENCODERS = True
