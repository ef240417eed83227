"""``minitx cost prune``: what zeros save, by the way in which they are kept, for any model.

Plain sums, of no one paper. Counted are the matrices; multiply-adds are those of a token with all
of them (the head too, scores not, since those depend on how many tokens there are).
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from minitx.errors import MinitxError
from minitx.lab.block_matrices import block_weights, embedding_weights, notes
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape
from minitx.shared.share import share_of

BYTES = 4  # of a float32, and of an index of CSR


@dataclass(frozen=True)
class PruneCost:
    """Bytes and multiply-adds of a model with the share ``sparsity`` of zeros."""

    shape: Shape
    sparsity: float
    embeddings: bool  # are they pruned too?

    @property
    def weights(self) -> int:
        return block_weights(self.shape) + embedding_weights(self.shape)

    @property
    def pruned(self) -> int:
        """Weights of the matrices in which zeros are put."""
        return self.weights if self.embeddings else block_weights(self.shape)

    @property
    def multiply_adds(self) -> int:
        """For a token, in every storage with the zeros in place."""
        return block_weights(self.shape) + self.shape.width * self.shape.vocab_size

    def with_bytes(self, each: float) -> float:
        """Bytes of the model if a weight of a pruned matrix takes so many on average."""
        return self.pruned * each + (self.weights - self.pruned) * BYTES

    @property
    def dense_bytes(self) -> int:
        return self.weights * BYTES

    @property
    def packed_bytes(self) -> float:
        """What is left, and a bit for each place (--pack-zeros)."""
        return self.with_bytes((1 - self.sparsity) * BYTES + 1 / 8)

    @property
    def two_four_bytes(self) -> float:
        """Two values of each run of 4, and their positions in 2 bits each: half of it zeros."""
        return self.with_bytes((2 * BYTES + 2 * 2 / 8) / 4)

    @property
    def csr_bytes(self) -> float:
        """What is left, and the column of each as int32; the few pointers to rows are left out."""
        return self.with_bytes((1 - self.sparsity) * 2 * BYTES)

    @property
    def cut(self) -> Shape:
        """The model without that share of neurons, and of heads that share a key/value head."""
        s = self.shape
        kv_heads = s.kv_heads - min(share_of(s.kv_heads, self.sparsity), s.kv_heads - 1)
        hidden = s.hidden - min(share_of(s.hidden, self.sparsity), s.hidden - 1)
        heads = kv_heads * (s.heads // s.kv_heads)
        return replace(s, hidden=hidden, heads=heads, kv_heads=kv_heads)

    @property
    def cut_bytes(self) -> int:
        return (block_weights(self.cut) + embedding_weights(self.shape)) * BYTES

    @property
    def cut_multiply_adds(self) -> int:
        return block_weights(self.cut) + self.shape.width * self.shape.vocab_size

    def rows(self) -> list[tuple[str, float, int]]:
        """(way of leaving weights out, bytes, multiply-adds a token)."""
        work = self.multiply_adds
        return [
            ("dense", self.dense_bytes, work),
            ("zeros in dense arrays", self.dense_bytes, work),
            ("what is left, and a bit for each place", self.packed_bytes, work),
            ("2:4, with positions of 2 bits", self.two_four_bytes, work),
            ("CSR with int32 columns", self.csr_bytes, work),
            ("whole neurons and heads instead", self.cut_bytes, self.cut_multiply_adds),
        ]

    def as_dict(self) -> dict:
        found = {"technique": "prune", "shape": asdict(self.shape), "sparsity": self.sparsity}
        names = ("weights", "pruned", "dense_bytes", "packed_bytes", "two_four_bytes", "csr_bytes")
        names += ("cut_bytes", "multiply_adds", "cut_multiply_adds")
        return found | {name: getattr(self, name) for name in names} | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["", "MB", "of dense", "multiply-adds a token"]]
        for name, size, work in self.rows():
            share = f"{size / self.dense_bytes:.2f}x"
            rows.append([name, f"{size / 1e6:,.2f}", share, f"{work:,}"])
        where = "the blocks and the embeddings" if self.embeddings else "the blocks"
        lines = [
            *self.shape.heading(notes(self.shape)),
            f"{self.sparsity:.0%} of the {self.pruned:,} weights in the matrices of {where}:",
            table(rows),
            "",
            "A zero is multiplied like any other number unless a kernel leaves it out, which NumPy "
            "has none to do: only smaller arrays take fewer multiply-adds. 2:4 is always half.",
        ]
        return "\n".join(lines)


def cost(
    shape: Shape, *, sparsity: float = 0.5, where: Literal["blocks", "all"] = "blocks"
) -> PruneCost:
    """where: "all" takes the embeddings for pruned too, as tables in print often do."""
    if not 0 <= sparsity < 1:
        raise MinitxError(
            f"cost prune needs a sparsity of at least 0 and below 1, not {sparsity:g}."
        )
    return PruneCost(shape, sparsity, where == "all")
