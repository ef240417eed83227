"""``minitx cost order-products``: memory for orders, and accumulator widths that never overflow.

A sum of n products of a signed b-bit weight and a signed i-bit input, both symmetric around 0, is
at most n (2^(b - 1) - 1) (2^(i - 1) - 1). An accumulator of 1 + log2(that + 1) bits, rounded up, is
enough in any order and for any weights. If the weights are known, the sum of their magnitudes
replaces n (2^(b - 1) - 1), which takes fewer bits (A2Q's bound by the l1 norm, Colbert et al.,
2023, arXiv 2308.13504).
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.technique import between


@dataclass(frozen=True)
class OrderProductsCost:
    """Orders for every matrix of the blocks."""

    shape: Shape
    bits: int  # of a weight
    input_bits: int

    def index_bits(self, m: Matrix) -> int:
        """Bits that hold the index of an input."""
        return max(1, (m.inputs - 1).bit_length())

    def index_bytes(self, m: Matrix) -> int:
        """Bytes of the smallest type that holds one: what minitx stores."""
        return next(size for size in (1, 2, 4, 8) if self.index_bits(m) <= 8 * size)

    def accumulator_bits(self, m: Matrix) -> int:
        """The accumulator width at which no running sum overflows, in any order."""
        return 1 + largest_sum(m.inputs, self.bits, self.input_bits).bit_length()

    @property
    def orders(self) -> int:
        """Bytes of all orders, one for each output."""
        return sum(m.weights * m.count * self.index_bytes(m) for m in block_matrices(self.shape))

    @property
    def packed(self) -> int:
        """The same bit-packed, in bytes."""
        bits = sum(m.weights * m.count * self.index_bits(m) for m in block_matrices(self.shape))
        return -(-bits // 8)

    @property
    def shared(self) -> int:
        """Bytes of one order for each matrix, shared by its outputs."""
        return sum(m.inputs * m.count * self.index_bytes(m) for m in block_matrices(self.shape))

    @property
    def weights(self) -> int:
        """Bytes of the weights, at ``bits`` bits each."""
        return -(-block_weights(self.shape) * self.bits // 8)

    def as_dict(self) -> dict:
        rows = [
            m._asdict()
            | {"index_bits": self.index_bits(m), "index_bytes": self.index_bytes(m)}
            | {"accumulator_bits": self.accumulator_bits(m)}
            for m in block_matrices(self.shape)
        ]
        found = {"technique": "order_products", "shape": asdict(self.shape), "bits": self.bits}
        found |= {"input_bits": self.input_bits, "matrices": rows}
        found |= {n: getattr(self, n) for n in ("orders", "packed", "shared", "weights")}
        return found | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["matrix", "inputs", "bits of an index", "accumulator bits"]]
        for m in block_matrices(self.shape):
            numbers = m.inputs, self.index_bits(m), self.accumulator_bits(m)
            rows.append([m.name, *(f"{n:,}" for n in numbers)])
        memory = [
            ["", "bytes"],
            [f"weights of {self.bits} bits", f"{self.weights:,}"],
            ["an order for each output", f"{self.orders:,}"],
            ["the same, bit-packed", f"{self.packed:,}"],
            ["an order for each matrix", f"{self.shared:,}"],
        ]
        lines = [self.shape.describe(), *(f"Note: {n}." for n in notes(self.shape)), ""]
        lines += [table(rows), "", table(memory), ""]
        lines.append(
            f"An order for each output takes {self.orders / self.weights:.2f} times the memory of "
            "the weights. It saves no multiply-adds."
        )
        return "\n".join(lines)


def largest_sum(inputs: int, bits: int, input_bits: int) -> int:
    """The largest magnitude of a sum of ``inputs`` products of signed, symmetric integers."""
    return inputs * (2 ** (bits - 1) - 1) * (2 ** (input_bits - 1) - 1)


def cost(
    shape: Shape,
    *,
    bits: Annotated[int, "of a weight", between(2, 32)] = 8,
    input_bits: Annotated[int, "of an input", between(2, 32)] = 8,
) -> OrderProductsCost:
    return OrderProductsCost(shape, bits, input_bits)
