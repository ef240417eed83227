"""The work of a lookup-table technique on a model's matrices: what ``minitx cost lut-...`` shares.

For one token and all matrices of the blocks, without the head. Quantizing an input and multiplying
by a scale count as one multiplication each; packing codes by shifts, and the additions of a
distance, do not. Bytes are those of packed codes; NumPy stores a code in one, two or four bytes.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from minitx.lab.block_matrices import block_matrices, notes
from minitx.lab.layout import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class Work:
    """What one way to multiply takes for one token."""

    multiplications: int = 0
    additions: int = 0
    reads: int = 0
    table_bytes: int = 0  # of tables that stay in memory
    weight_bytes: int = 0  # of weights, or of the codes of weights
    computed: int = 0  # table entries computed for each token

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(asdict(self).values(), asdict(other).values())
        return Work(*(a + b for a, b in pairs))

    def __mul__(self, times: int) -> "Work":
        return Work(*(times * a for a in asdict(self).values()))


def dense(inputs: int, outputs: int) -> Work:
    """A product with a float32 matrix (inputs, outputs)."""
    weights = inputs * outputs
    return Work(weights, weights, weight_bytes=4 * weights)


def over_blocks(shape: Shape, work: Callable[[int, int], Work]) -> Work:
    """The sum of ``work(inputs, outputs)`` over the matrices of all blocks."""
    return sum((work(m.inputs, m.outputs) * m.count for m in block_matrices(shape)), Work())


def packed_bytes(bits: int) -> int:
    return -(-bits // 8)


@dataclass(frozen=True)
class LookupCost:
    """The report for one technique on one model."""

    technique: str
    shape: Shape
    options: dict
    work: Work
    remarks: tuple[str, ...]

    @property
    def dense(self) -> Work:
        return over_blocks(self.shape, dense)

    def notes(self) -> list[str]:
        return [*notes(self.shape), *self.remarks]

    def as_dict(self) -> dict:
        found = {"technique": self.technique, "shape": asdict(self.shape), "options": self.options}
        found |= {"dense": asdict(self.dense), "work": asdict(self.work)}
        return found | {"notes": self.notes()}

    def __str__(self) -> str:
        rows = [["one token", "multiplications", "additions", "reads", "tables", "weights, codes"]]
        for name, w in (("dense", self.dense), (self.technique.replace("_", "-"), self.work)):
            numbers = w.multiplications, w.additions, w.reads, w.table_bytes, w.weight_bytes
            rows.append([name, *(f"{n:,}" for n in numbers)])
        return "\n".join([*self.shape.heading(self.notes()), table(rows)])
