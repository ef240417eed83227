"""``minitx cost prune``: what zeros save in different storage formats, for any model.

Plain sums, from no paper. Counted are the matrices, and the multiply-adds of a token in all of them
and the head (not those of attention scores, which depend on how many tokens are cached).
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated

from minitx.lab.block_matrices import block_weights, embedding_weights, notes
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.shared.share import share_of
from minitx.technique import at_least

BYTES = 4  # of a float32, and of an index of CSR


@dataclass(frozen=True)
class PruneCost:
    """Bytes and multiply-adds of a model of which the share ``sparsity`` of weights is zero."""

    shape: Shape
    sparsity: float
    embeddings: bool  # embedding and head are pruned too

    @property
    def weights(self) -> int:
        return block_weights(self.shape) + embedding_weights(self.shape)

    @property
    def pruned(self) -> int:
        """Weights of the matrices that are pruned, zeros included."""
        return self.weights if self.embeddings else block_weights(self.shape)

    @property
    def multiply_adds(self) -> int:
        """Per token, in every format but smaller arrays."""
        return block_weights(self.shape) + self.shape.width * self.shape.vocab_size

    def with_bytes(self, each: float) -> float:
        """Bytes of the model if a weight of a pruned matrix takes ``each`` bytes on average."""
        return self.pruned * each + (self.weights - self.pruned) * BYTES

    @property
    def dense_bytes(self) -> int:
        return self.weights * BYTES

    @property
    def packed_bytes(self) -> float:
        """Nonzero values and a bitmask (--pack-zeros)."""
        return self.with_bytes((1 - self.sparsity) * BYTES + 1 / 8)

    @property
    def two_four_bytes(self) -> float:
        """Of each 4 weights two values and two 2-bit indices: always half zeros."""
        return self.with_bytes((2 * BYTES + 2 * 2 / 8) / 4)

    @property
    def csr_bytes(self) -> float:
        """Nonzero values, each with an int32 column; the few row pointers are not counted."""
        return self.with_bytes((1 - self.sparsity) * 2 * BYTES)

    @property
    def structured(self) -> Shape:
        """The model without that share of neurons and of key/value heads with their query heads."""
        s = self.shape
        kv_heads = s.kv_heads - min(share_of(s.kv_heads, self.sparsity), s.kv_heads - 1)
        hidden = s.hidden - min(share_of(s.hidden, self.sparsity), s.hidden - 1)
        heads = kv_heads * (s.heads // s.kv_heads)
        return replace(s, hidden=hidden, heads=heads, kv_heads=kv_heads)

    @property
    def structured_bytes(self) -> int:
        return (block_weights(self.structured) + embedding_weights(self.shape)) * BYTES

    @property
    def structured_multiply_adds(self) -> int:
        return block_weights(self.structured) + self.shape.width * self.shape.vocab_size

    def rows(self) -> list[tuple[str, float, int]]:
        """(format, bytes, multiply-adds per token)."""
        work = self.multiply_adds
        return [
            ("dense", self.dense_bytes, work),
            ("zeros in dense arrays", self.dense_bytes, work),
            ("nonzero values and a bitmask", self.packed_bytes, work),
            ("2:4 with 2-bit indices", self.two_four_bytes, work),
            ("CSR with int32 columns", self.csr_bytes, work),
            (
                "smaller arrays (prune-structure)",
                self.structured_bytes,
                self.structured_multiply_adds,
            ),
        ]

    def as_dict(self) -> dict:
        found = {"technique": "prune", "shape": asdict(self.shape), "sparsity": self.sparsity}
        names = ("weights", "pruned", "dense_bytes", "packed_bytes", "two_four_bytes", "csr_bytes")
        names += ("structured_bytes", "multiply_adds", "structured_multiply_adds")
        return found | {name: getattr(self, name) for name in names} | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["", "MB", "of dense", "multiply-adds per token"]]
        for name, size, work in self.rows():
            share = f"{size / self.dense_bytes:.2f}x"
            rows.append([name, f"{size / 1e6:,.2f}", share, f"{work:,}"])
        where = "the blocks and the embeddings" if self.embeddings else "the blocks"
        lines = [
            *self.shape.heading(notes(self.shape)),
            f"{self.sparsity:.0%} of the {self.pruned:,} weights in the matrices of {where}:",
            table(rows),
            "",
            "A zero is multiplied like any other number unless a sparse kernel skips it, and NumPy "
            "has none: only smaller arrays take fewer multiply-adds. 2:4 is always half zeros.",
        ]
        return "\n".join(lines)


def cost(
    shape: Shape,
    *,
    sparsity: Annotated[float, "share of the weights that are zero", at_least(0, below=1)] = 0.5,
    embeddings: Annotated[
        bool, "embedding and head are pruned too, as in some published size tables"
    ] = False,
) -> PruneCost:
    return PruneCost(shape, sparsity, embeddings)
