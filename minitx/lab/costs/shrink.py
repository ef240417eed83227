"""``minitx cost shrink``: what MatShrink leaves out, for a model of any size.

Formulas: the draft "MatShrink" (see precompute/shrink.py) and its table 1. Counted are numbers, not
bytes; the kept orders of columns, and biases, are left out. The paper's caption speaks of a share
"of V plus O", but its printed percentages are shares of one matrix, d_k / d: both are given here,
and that of all four matrices.
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class ShrinkCost:
    """One model; ``unrotated``: columns r of a head's queries and keys (0: these stay)."""

    shape: Shape
    unrotated: int = 0

    @property
    def attentions(self) -> int:
        """How many there are: one a layer, and behind an encoder two a layer of the decoder."""
        s = self.shape
        return s.encoder_layers + 2 * s.layers if s.encoder_layers else s.layers

    @property
    def matrix(self) -> int:
        """Numbers of one matrix, W_O (or W_Q) of one attention: D x (H d)."""
        return self.shape.width * self.shape.heads * self.shape.head_width

    @property
    def kv_matrix(self) -> int:
        """Numbers of W_V (or W_K), which is smaller where query heads share them."""
        return self.shape.width * self.shape.kv_heads * self.shape.head_width

    @property
    def saved_vo(self) -> int:
        """Weights of one attention that are kept no more, and multiply-adds of a token: K d^2."""
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
        """The share that the paper prints: d_k / d where no heads are shared."""
        return self.saved_vo / self.matrix

    @property
    def of_v_and_o(self) -> float:
        return self.saved_vo / (self.matrix + self.kv_matrix)

    @property
    def of_attention(self) -> float:
        """Of W_Q, W_K, W_V and W_O, with what queries and keys save."""
        return (self.saved_vo + self.saved_qk) / (2 * (self.matrix + self.kv_matrix))

    def notes(self) -> list[str]:
        found = list(self.shape.notes)
        if self.shape.kv_heads < self.shape.heads:
            found.append("one head in each group gains an identity; its other heads stay whole")
        if not self.unrotated:
            found.append(
                "queries and keys are left alone; unrotated=R counts R columns of each head too, "
                "which no rotation may touch"
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
            ["W_O (or W_Q)", f"{self.matrix:,}"],
            ["W_V (or W_K)", f"{self.kv_matrix:,}"],
            ["saved in V and O", f"{self.saved_vo:,}"],
            ["saved in Q and K", f"{self.saved_qk:,}"],
            ["V and O: of one matrix (as printed in the paper)", f"{self.of_one_matrix:.1%}"],
            ["V and O: of both", f"{self.of_v_and_o:.1%}"],
            ["all that is saved, of Q, K, V and O", f"{self.of_attention:.1%}"],
        ]
        lines = [*self.shape.heading(self.notes()), table(rows), ""]
        lines += [f"{self.attentions} attentions keep {self.saved:,} numbers less; each is also a"]
        lines += ["multiply-add less for every token that passes."]
        return "\n".join(lines)


def cost(shape: Shape, *, unrotated: int = 0) -> ShrinkCost:
    """unrotated: columns of each head of queries and keys that no rotation touches."""
    if not 0 <= unrotated <= shape.head_width:
        raise MinitxError(
            f"cost shrink: unrotated is {unrotated}; needed is a number of a head's columns, 0 to "
            f"{shape.head_width}."
        )
    if shape.head_width > shape.width:
        raise MinitxError("cost shrink: heads wider than the stream hold no block to shrink.")
    return ShrinkCost(shape, unrotated)


ENCODERS = True
