"""``minitx cost merge-embeddings``: numbers in one table of sums instead of two tables.

Plain algebra: (V, context, D) instead of (V, D) and (context, D).
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.layout import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class MergeEmbeddingsCost:
    shape: Shape

    @property
    def separate(self) -> int:
        s = self.shape
        return (s.vocab_size + s.positions) * s.width

    @property
    def merged(self) -> int:
        """The table of sums, and the head's table if it was tied."""
        s = self.shape
        sums = s.vocab_size * s.positions * s.width
        return sums + (s.vocab_size * s.width if s.tied else 0)

    @property
    def factor(self) -> float:
        return self.merged / self.separate

    @property
    def saved(self) -> int:
        """Additions and reads of numbers saved per token: D of each."""
        return self.shape.width

    def as_dict(self) -> dict:
        names = ("separate", "merged", "factor", "saved")
        found = {"technique": "merge_embeddings", "shape": asdict(self.shape)}
        found |= {name: getattr(self, name) for name in names}
        return found | {"notes": list(self.shape.notes)}

    def __str__(self) -> str:
        rows = [["tables", "numbers", "in float32"]]
        for name, numbers in (("separate", self.separate), ("merged", self.merged)):
            rows.append([name, f"{numbers:,}", f"{4 * numbers / 1e6:,.1f} MB"])
        return "\n".join(
            [
                *self.shape.heading(self.shape.notes),
                table(rows),
                "",
                f"{self.factor:,.1f} times the memory saves {self.saved:,} additions and the "
                f"read of {self.saved:,} numbers per token.",
            ]
        )


def cost(shape: Shape) -> MergeEmbeddingsCost:
    if not shape.positions:
        raise MinitxError(
            "cost merge_embeddings: this model adds no learned positions to its embedding; there "
            "is nothing to merge."
        )
    return MergeEmbeddingsCost(shape)
