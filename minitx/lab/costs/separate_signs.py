"""``minitx cost separate-signs``: bits of weights and of accumulators without signs.

Signed weights of ``bits`` bits have magnitudes of bits - 1 bits, each in one of the two matrices.
Sums of magnitudes only rise, so unsigned accumulators hold them.
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import between

INPUT = 2**7 - 1  # the largest magnitude of a signed 8-bit input


@dataclass(frozen=True)
class SeparateSignsCost:
    """The blocks' matrices with signed weights of ``bits`` bits and signed 8-bit inputs."""

    shape: Shape
    bits: int

    def accumulator(self, m: Matrix) -> int:
        """Bits of an unsigned accumulator that no weights and inputs overflow."""
        return (m.inputs * INPUT * (2 ** (self.bits - 1) - 1)).bit_length()

    @property
    def signed_bytes(self) -> int:
        """One signed copy of every matrix."""
        return -(-block_weights(self.shape) * self.bits // 8)

    @property
    def split_bytes(self) -> int:
        """Two unsigned copies of every matrix, zeros stored too."""
        return -(-block_weights(self.shape) * 2 * (self.bits - 1) // 8)

    @property
    def multiply_adds(self) -> dict[str, int]:
        """Per token: signed (and split, if zeros are skipped); split with zeros multiplied; and
        with the inputs split too."""
        n = block_weights(self.shape)
        return {"signed": n, "split": 2 * n, "inputs split too": 4 * n}

    def as_dict(self) -> dict:
        rows = [m._asdict() | {"accumulator": self.accumulator(m)} for m in self.matrices]
        found = {"technique": "separate_signs", "shape": asdict(self.shape), "bits": self.bits}
        found |= {"matrices": rows}
        found |= {"signed_bytes": self.signed_bytes, "split_bytes": self.split_bytes}
        return found | {"multiply_adds": self.multiply_adds, "notes": notes(self.shape)}

    @property
    def matrices(self) -> list[Matrix]:
        return block_matrices(self.shape)

    def __str__(self) -> str:
        sums = [["matrix", "inputs", "signed accumulator, bits", "unsigned, bits"]]
        for m in self.matrices:
            bits = self.accumulator(m)
            sums.append([m.name, f"{m.inputs:,}", str(bits + 1), str(bits)])
        work = [["one token, zeros multiplied too", "multiply-adds"]]
        names = ("one signed matrix", "two unsigned", "two unsigned, inputs split too")
        work += [[name, f"{n:,}"] for name, n in zip(names, self.multiply_adds.values())]
        return "\n".join(
            [
                *self.shape.heading(notes(self.shape)),
                table(sums),
                "",
                table(work),
                "",
                f"Signed {self.bits}-bit matrices take {self.signed_bytes:,} bytes, two unsigned "
                f"{self.bits - 1}-bit copies {self.split_bytes:,}.",
            ]
        )


def cost(
    shape: Shape,
    *,
    bits: Annotated[int, "bits of a weight, sign included", between(2, 32)] = 8,
) -> SeparateSignsCost:
    return SeparateSignsCost(shape, bits)
