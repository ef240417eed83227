"""``minitx cost remove-weights``: a skipless model of any size without W_q and W_o.

Formulas: arXiv 2404.12362, example table (paper: Q and P). They count numbers, not bytes, without
biases and norms. The models of the paper's table have residual adds and norms; the figures are
those of skipless models of the same sizes.
"""

from dataclasses import asdict, dataclass

from minitx.lab.block_matrices import ExampleTable
from minitx.lab.layout import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class RemoveWeightsCost(ExampleTable):
    @property
    def embedding_weights(self) -> int:
        """Embedding and head, which are two tables afterwards even if they were one."""
        s = self.shape
        return s.width * (2 * s.vocab_size + s.positions)

    @property
    def removed(self) -> int:
        """As the paper counts: 2 L D^2, also in parallel blocks."""
        return self.shape.layers * self.qp_weights

    @property
    def removed_exactly(self) -> int:
        """What can go without changing the function: half of it in parallel blocks."""
        return self.removed // 2 if self.shape.parallel else self.removed

    @property
    def left(self) -> int:
        return self.total_weights - self.removed

    @property
    def saving(self) -> float:
        return self.removed / self.total_weights

    @property
    def speedup(self) -> float:
        """The bound for one sequence if reading weights takes all the time."""
        return self.total_weights / self.left

    def notes(self) -> list[str]:
        s = self.shape
        found = [*s.notes, "the figures are those of a skipless model of these sizes"]
        if s.parallel:
            found.append(
                "the paper counts W_q and W_o of parallel blocks; only one of them can go without "
                "changing the function"
            )
        if s.tied:
            found.append("the tied head becomes a table of its own; it is counted before, too")
        if s.heads * s.head_width != s.width:
            found.append("W_q is not square and has no inverse: removing it would not be exact")
        if s.experts > 1:
            found.append("W_o would have to be merged into every expert and into the router")
        return found

    def as_dict(self) -> dict:
        names = ("qp_weights", "kv_weights", "ffn_weights", "embedding_weights", "total_weights")
        names += ("removed", "removed_exactly", "left", "saving", "speedup")
        found = {"technique": "remove_weights", "shape": asdict(self.shape)}
        return found | {name: getattr(self, name) for name in names} | {"notes": self.notes()}

    def __str__(self) -> str:
        rows = [
            ["weights", "numbers"],
            ["W_q and W_o of a block", f"{self.qp_weights:,}"],
            ["W_k and W_v of a block", f"{self.kv_weights:,}"],
            ["FFN of a block", f"{self.ffn_weights:,}"],
            ["embedding and head", f"{self.embedding_weights:,}"],
            ["total", f"{self.total_weights:,}"],
            ["without W_q and W_o", f"{self.left:,}"],
            ["saving", f"{self.saving:.0%}"],
            ["possible speedup, one sequence", f"{self.speedup:.2f}x"],
            ["removed without changing the function", f"{self.removed_exactly:,}"],
        ]
        return "\n".join([*self.shape.heading(self.notes()), table(rows)])


def cost(shape: Shape) -> RemoveWeightsCost:
    return RemoveWeightsCost(shape)
