"""``minitx cost order-products``: what orders take in memory, and the bits that sums may need.

A sum of n products of signed numbers of B and b bits, both symmetric around 0, is at most
n (2^(B - 1) - 1) (2^(b - 1) - 1): an accumulator of 1 + log2(that + 1) bits, rounded up, is enough
in any order and for any weights. With weights at hand their own sum of magnitudes stands for
n (2^(B - 1) - 1), which takes fewer bits (the bound by the l1 norm of A2Q, Colbert et al., 2023,
arXiv 2308.13504).
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape


@dataclass(frozen=True)
class OrderProductsCost:
    """Orders for every output of the blocks' matrices."""

    shape: Shape
    bits: int  # of a weight
    input_bits: int

    def index_bits(self, m: Matrix) -> int:
        """Bits that hold a row number."""
        return max(1, (m.inputs - 1).bit_length())

    def index_bytes(self, m: Matrix) -> int:
        """Bytes of the smallest type that holds one: what is kept here."""
        return next(size for size in (1, 2, 4, 8) if self.index_bits(m) <= 8 * size)

    def accumulator(self, m: Matrix) -> int:
        """Bits that hold every running sum, in whatever order."""
        return 1 + largest_sum(m.inputs, self.bits, self.input_bits).bit_length()

    @property
    def orders(self) -> int:
        """Bytes of all orders, one for each output."""
        return sum(m.weights * m.count * self.index_bytes(m) for m in block_matrices(self.shape))

    @property
    def packed(self) -> int:
        """The same with no bit to spare, in bytes."""
        bits = sum(m.weights * m.count * self.index_bits(m) for m in block_matrices(self.shape))
        return -(-bits // 8)

    @property
    def shared(self) -> int:
        """Bytes of one order for all outputs of each matrix."""
        return sum(m.inputs * m.count * self.index_bytes(m) for m in block_matrices(self.shape))

    @property
    def weights(self) -> int:
        """Bytes of the weights themselves, at so many bits."""
        return -(-block_weights(self.shape) * self.bits // 8)

    def as_dict(self) -> dict:
        rows = [
            m._asdict()
            | {"index_bits": self.index_bits(m), "index_bytes": self.index_bytes(m)}
            | {"accumulator": self.accumulator(m)}
            for m in block_matrices(self.shape)
        ]
        found = {"technique": "order_products", "shape": asdict(self.shape), "bits": self.bits}
        found |= {"input_bits": self.input_bits, "matrices": rows}
        found |= {n: getattr(self, n) for n in ("orders", "packed", "shared", "weights")}
        return found | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["matrix", "inputs", "bits of a row number", "bits of any sum"]]
        for m in block_matrices(self.shape):
            numbers = m.inputs, self.index_bits(m), self.accumulator(m)
            rows.append([m.name, *(f"{n:,}" for n in numbers)])
        memory = [
            ["bytes", "numbers"],
            [f"weights of {self.bits} bits", f"{self.weights:,}"],
            ["an order for each output", f"{self.orders:,}"],
            ["with no bit to spare", f"{self.packed:,}"],
            ["an order for each matrix", f"{self.shared:,}"],
        ]
        lines = [self.shape.describe(), *(f"Note: {n}." for n in notes(self.shape)), ""]
        lines += [table(rows), "", table(memory), ""]
        lines.append(
            f"An order for each output takes {self.orders / self.weights:.2f} times what the "
            "weights take. No multiply-add is saved by it."
        )
        return "\n".join(lines)


def largest_sum(inputs: int, bits: int, input_bits: int) -> int:
    """The largest magnitude of a sum of so many products of signed numbers, symmetric around 0."""
    return inputs * (2 ** (bits - 1) - 1) * (2 ** (input_bits - 1) - 1)


def cost(shape: Shape, *, bits: int = 8, input_bits: int = 8) -> OrderProductsCost:
    if not (2 <= bits <= 32 and 2 <= input_bits <= 32):
        raise MinitxError(
            f"cost order_products needs weights and inputs of 2 to 32 bits, not {bits} and "
            f"{input_bits}."
        )
    return OrderProductsCost(shape, bits, input_bits)
