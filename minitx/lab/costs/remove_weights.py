"""``minitx cost remove-weights``: what a skipless model of any size would be without Q and P.

Formulas: arXiv 2404.12362, example table. Counted are numbers, not bytes; biases and norms are left
out. The models of the paper's table have residual adds and norms: what is counted is a skipless
model of their sizes.
"""

from dataclasses import asdict, dataclass

from minitx.lab.block_matrices import ExampleTable
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class RemoveWeightsCost(ExampleTable):
    @property
    def embedding_weights(self) -> int:
        """Input and output, which are two tables afterwards even if they were one."""
        s = self.shape
        return s.width * (2 * s.vocab_size + s.positions)

    @property
    def removed(self) -> int:
        """As the paper counts: 2 L d^2, of parallel blocks too."""
        return self.shape.layers * self.qp_weights

    @property
    def removed_exactly(self) -> int:
        """What the same function can do without: half of it in parallel blocks."""
        return self.removed // 2 if self.shape.parallel else self.removed

    @property
    def left(self) -> int:
        return self.total_weights - self.removed

    @property
    def saving(self) -> float:
        return self.removed / self.total_weights

    @property
    def speedup(self) -> float:
        """The most that one sequence can gain where reading weights takes all the time."""
        return self.total_weights / self.left

    def notes(self) -> list[str]:
        s = self.shape
        found = [*s.notes, "counted is a skipless model of these sizes, without residual adds"]
        if s.parallel:
            found.append(
                "the paper counts Q and P of parallel blocks; only one matrix of each can go "
                "without changing what is computed"
            )
        if s.tied:
            found.append("the tied head becomes a table of its own, which is counted before too")
        if s.heads * s.head_width != s.width:
            found.append("W_Q is not square and has no inverse: removing it would not be exact")
        if s.experts > 1:
            found.append("P would have to go into every expert and into the router")
        return found

    def as_dict(self) -> dict:
        names = ("qp_weights", "kv_weights", "ffn_weights", "embedding_weights", "total_weights")
        names += ("removed", "removed_exactly", "left", "saving", "speedup")
        found = {"technique": "remove_weights", "shape": asdict(self.shape)}
        return found | {name: getattr(self, name) for name in names} | {"notes": self.notes()}

    def __str__(self) -> str:
        rows = [
            ["weights", "numbers"],
            ["Q and P of a block", f"{self.qp_weights:,}"],
            ["K and V of a block", f"{self.kv_weights:,}"],
            ["FFN of a block", f"{self.ffn_weights:,}"],
            ["embeddings, in and out", f"{self.embedding_weights:,}"],
            ["all", f"{self.total_weights:,}"],
            ["without Q and P", f"{self.left:,}"],
            ["saving", f"{self.saving:.0%}"],
            ["possible speedup, one sequence", f"{self.speedup:.2f}x"],
            ["removed without changing the function", f"{self.removed_exactly:,}"],
        ]
        return "\n".join([*self.shape.heading(self.notes()), table(rows)])


def cost(shape: Shape) -> RemoveWeightsCost:
    return RemoveWeightsCost(shape)
