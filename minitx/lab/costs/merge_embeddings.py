"""``minitx cost merge-embeddings``: one table of sums in the place of two, in numbers.

Plain algebra: (V, context, D) in the place of (V, D) and (context, D).
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class MergeEmbeddingsCost:
    shape: Shape

    @property
    def apart(self) -> int:
        s = self.shape
        return (s.vocab_size + s.positions) * s.width

    @property
    def merged(self) -> int:
        """The table of sums, and the head's own table if it was that of the tokens."""
        s = self.shape
        sums = s.vocab_size * s.positions * s.width
        return sums + (s.vocab_size * s.width if s.tied else 0)

    @property
    def factor(self) -> float:
        return self.merged / self.apart

    @property
    def saved(self) -> int:
        """Additions, and numbers that are read, less for each token: D of each."""
        return self.shape.width

    def as_dict(self) -> dict:
        names = ("apart", "merged", "factor", "saved")
        found = {"technique": "merge_embeddings", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"notes": list(self.shape.notes)}

    def __str__(self) -> str:
        rows = [["tables", "numbers", "in float32"]]
        for name, numbers in (("apart", self.apart), ("merged", self.merged)):
            rows.append([name, f"{numbers:,}", f"{4 * numbers / 1e6:,.1f} MB"])
        return "\n".join(
            [
                *self.shape.heading(self.shape.notes),
                table(rows),
                "",
                f"{self.factor:,.1f} times the memory, for {self.saved:,} additions and "
                f"{self.saved:,} numbers read less for each token.",
            ]
        )


def cost(shape: Shape) -> MergeEmbeddingsCost:
    if not shape.positions:
        raise MinitxError(
            "cost merge_embeddings: this model adds no learned positions to its embedding, so "
            "nothing can be merged."
        )
    return MergeEmbeddingsCost(shape)
