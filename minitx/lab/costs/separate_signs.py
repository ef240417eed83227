"""``minitx cost separate-signs``: bits of weights and of sums without signs.

Plain algebra, of no one paper. Weights of B bits with their sign have magnitudes of B - 1 bits, and
each stands in one of the two matrices. Sums of magnitudes only rise: unsigned accumulators.
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape

INPUT = 2**7 - 1  # the largest magnitude of inputs of 8 bits, sign included


@dataclass(frozen=True)
class SeparateSignsCost:
    """The blocks' matrices with weights of ``bits`` bits and inputs of 8, both with their sign."""

    shape: Shape
    bits: int

    def accumulator(self, m: Matrix) -> int:
        """Bits of an unsigned accumulator that holds every sum of one sign, for any weights."""
        return (m.inputs * INPUT * (2 ** (self.bits - 1) - 1)).bit_length()

    @property
    def together(self) -> int:
        """Bytes of one matrix with signs."""
        return -(-block_weights(self.shape) * self.bits // 8)

    @property
    def apart(self) -> int:
        """Bytes of two without, zeros kept."""
        return -(-block_weights(self.shape) * 2 * (self.bits - 1) // 8)

    @property
    def multiply_adds(self) -> dict[str, int]:
        """Of a token: with signs (and apart, zeros left out), apart with zeros, and that for inputs
        that are separated too."""
        n = block_weights(self.shape)
        return {"together": n, "zeros": 2 * n, "zeros and inputs": 4 * n}

    def as_dict(self) -> dict:
        rows = [m._asdict() | {"accumulator": self.accumulator(m)} for m in self.matrices]
        found = {"technique": "separate_signs", "shape": asdict(self.shape), "bits": self.bits}
        found |= {"matrices": rows, "together": self.together, "apart": self.apart}
        return found | {"multiply_adds": self.multiply_adds, "notes": notes(self.shape)}

    @property
    def matrices(self) -> list[Matrix]:
        return block_matrices(self.shape)

    def __str__(self) -> str:
        sums = [["matrix", "inputs", "bits, with sign", "bits of each, without"]]
        for m in self.matrices:
            bits = self.accumulator(m)
            sums.append([m.name, f"{m.inputs:,}", str(bits + 1), str(bits)])
        work = [["a token, zeros multiplied too", "multiply-adds"]]
        names = ("one matrix with signs", "two without", "two, inputs separated too")
        work += [[name, f"{n:,}"] for name, n in zip(names, self.multiply_adds.values())]
        return "\n".join(
            [
                *self.shape.heading(notes(self.shape)),
                table(sums),
                "",
                table(work),
                "",
                f"One matrix of {self.bits} bits takes {self.together:,} bytes, two of "
                f"{self.bits - 1} take {self.apart:,}.",
            ]
        )


def cost(shape: Shape, *, bits: int = 8) -> SeparateSignsCost:
    if not 2 <= bits <= 32:
        raise MinitxError(f"cost separate_signs needs weights of 2 to 32 bits, not {bits}.")
    return SeparateSignsCost(shape, bits)
