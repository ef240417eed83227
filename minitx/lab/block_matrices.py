"""The matrices of a model's blocks, as a shape (shape.py) has them: what cost formulas sum over."""

from dataclasses import dataclass
from typing import NamedTuple

from minitx.lab.shape import Shape


class Matrix(NamedTuple):
    """One kind of matrix of a block: W (inputs, outputs), of which the model has so many."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def weights(self) -> int:
        """Numbers in one of them."""
        return self.inputs * self.outputs


def block_matrices(s: Shape) -> list[Matrix]:
    """Those of attention, then those of the FFN, experts one by one; no biases, no norms."""
    inner, kv, ffns = s.heads * s.head_width, s.kv_heads * s.head_width, s.layers * s.experts
    return [
        Matrix("W_q", s.width, inner, s.layers),
        Matrix("W_k, W_v", s.width, kv, 2 * s.layers),
        Matrix("W_o", inner, s.width, s.layers),
        Matrix("W_gate, W_up" if s.ffn_matrices == 3 else "W_up", s.width, s.hidden,
               (s.ffn_matrices - 1) * ffns),
        Matrix("W_down", s.hidden, s.width, ffns),
    ]  # fmt: skip


def block_weights(s: Shape) -> int:
    return sum(m.weights * m.count for m in block_matrices(s))


def embedding_weights(s: Shape) -> int:
    """Input and output; learned positions too."""
    return s.width * (s.vocab_size * (1 if s.tied else 2) + s.positions)


def notes(s: Shape) -> list[str]:
    """What a reader of sums over these matrices should know."""
    found = [*s.notes, "norms and biases are left out"]
    if s.experts > 1:
        found.append(
            "all experts are counted as run; a router chooses a few, so a token takes fewer "
            "multiply-adds than are given here"
        )
    return found


@dataclass(frozen=True)
class ExampleTable:
    """The rows that the tables of Graef's papers begin with."""

    shape: Shape

    @property
    def qp_weights(self) -> int:
        """W_Q and the output projection (the papers' P) of one block."""
        s = self.shape
        return 2 * s.width * s.heads * s.head_width

    @property
    def kv_weights(self) -> int:
        s = self.shape
        return 2 * s.width * s.kv_heads * s.head_width

    @property
    def ffn_weights(self) -> int:
        """All experts of one block."""
        s = self.shape
        return s.ffn_matrices * s.width * s.hidden * s.experts

    @property
    def embedding_weights(self) -> int:
        """Input and output; learned positions too."""
        return embedding_weights(self.shape)

    @property
    def total_weights(self) -> int:
        block = self.qp_weights + self.kv_weights + self.ffn_weights
        return self.shape.layers * block + self.embedding_weights
