"""The matrices of a model's blocks, from its shape (shape.py): what cost formulas sum over."""

from dataclasses import dataclass
from typing import NamedTuple

from minitx.lab.shape import Shape


class Matrix(NamedTuple):
    """One kind of weight matrix (inputs, outputs), and how many of them the model has."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def weights(self) -> int:
        """Weights in one of them."""
        return self.inputs * self.outputs


def block_matrices(s: Shape) -> list[Matrix]:
    """The matrices of attention, then of the FFN (each expert counted); no biases, no norms."""
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
    """Weights of the embedding, the head and learned positions."""
    return s.width * (s.vocab_size * (1 if s.tied else 2) + s.positions)


def notes(s: Shape) -> list[str]:
    """Caveats for sums over these matrices."""
    found = [*s.notes, "norms and biases are left out"]
    if s.experts > 1:
        found.append(
            "all experts are counted; a router selects a few, so a token takes fewer multiply-adds "
            "than given here"
        )
    return found


@dataclass(frozen=True)
class ExampleTable:
    """The first rows of the tables in Graef's papers."""

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
        """Weights of the embedding, the head and learned positions."""
        return embedding_weights(self.shape)

    @property
    def total_weights(self) -> int:
        block = self.qp_weights + self.kv_weights + self.ffn_weights
        return self.shape.layers * block + self.embedding_weights
