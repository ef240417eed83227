"""``minitx cost low-rank``: two factors instead of each matrix, for any model.

Plain sums, from no paper: a matrix (in, out) at rank r has r (in + out) weights, and as many
multiply-adds per token, so the factors are smaller below r = in out / (in + out).
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.block_matrices import (
    Matrix,
    block_matrices,
    block_weights,
    embedding_weights,
    notes,
)
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.shared.share import share_of
from minitx.technique import above, at_least


def break_even(m: Matrix) -> float:
    """The rank at which the factors have as many weights as the matrix."""
    return m.weights / (m.inputs + m.outputs)


@dataclass(frozen=True)
class LowRankCost:
    """Weights of a model whose matrices are factorized, to a rank or a share of their weights."""

    shape: Shape
    rank: int | None
    share: float

    def rank_of(self, m: Matrix) -> int | None:
        """Its rank, None if it stays dense."""
        if self.rank is None and self.share == 1:
            return None
        full = min(m.inputs, m.outputs)
        if self.rank is not None:
            r = min(self.rank, full)
        else:
            r = max(1, share_of(break_even(m), self.share))
        return r if r < break_even(m) else None

    def size(self, m: Matrix) -> int:
        """Weights of one such matrix after factorizing, and multiply-adds per token."""
        r = self.rank_of(m)
        return m.weights if r is None else r * (m.inputs + m.outputs)

    @property
    def before(self) -> int:
        """Weights of the blocks' matrices."""
        return block_weights(self.shape)

    @property
    def after(self) -> int:
        return sum(self.size(m) * m.count for m in block_matrices(self.shape))

    @property
    def total(self) -> tuple[int, int]:
        """Weights with the embeddings, before and after."""
        rest = embedding_weights(self.shape)
        return self.before + rest, self.after + rest

    @property
    def multiply_adds(self) -> tuple[int, int]:
        """Per token, in all matrices and the head, before and after; without attention scores."""
        head = self.shape.width * self.shape.vocab_size
        return self.before + head, self.after + head

    def as_dict(self) -> dict:
        matrices = [
            m._asdict()
            | {"break_even": break_even(m), "rank": self.rank_of(m), "size": self.size(m)}
            for m in block_matrices(self.shape)
        ]
        found = {"technique": "low_rank", "shape": asdict(self.shape), "matrices": matrices}
        for name in ("total", "multiply_adds"):
            found[name] = dict(zip(("before", "after"), getattr(self, name)))
        return found | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["matrix", "in", "out", "count", "smaller below", "rank", "weights", "of dense"]]
        for m in block_matrices(self.shape):
            r = self.rank_of(m)
            sizes = [f"{n:,}" for n in (m.inputs, m.outputs, m.count)]
            rank = ["dense" if r is None else f"{r:,}"]
            weights = [f"{m.weights:,}", f"{self.size(m) / m.weights:.0%}"]
            rows.append([m.name, *sizes, f"{break_even(m):,.1f}", *rank, *weights])
        before, after = self.total
        work, less = self.multiply_adds
        lines = [
            *self.shape.heading(notes(self.shape)),
            table(rows),
            "",
            f"Weights with the embeddings: {after:,} of {before:,} ({after / before:.0%}), in "
            f"float32 {4 * after / 1e6:,.1f} of {4 * before / 1e6:,.1f} MB.",
            f"Multiply-adds per token: {less:,} of {work:,} ({less / work:.0%}).",
        ]
        return "\n".join(lines)


def cost(
    shape: Shape,
    *,
    share: Annotated[
        float, "weights of both factors, at most, as a share of the matrix's", above(0, 1)
    ] = 0.75,
    rank: Annotated[int | None, "rank of every matrix, instead of share", at_least(1)] = None,
) -> LowRankCost:
    return LowRankCost(shape, rank, share)
