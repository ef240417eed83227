"""``minitx cost separate-magnitudes``: bits of a weight where a few are kept in full.

An output of n inputs with k weights in full (32 bits each, and a row number of i bits) takes
n bits + 32 + k (32 + i), 32 for its scale. Plain rounding with a scale for each group of G inputs
takes n bits + 32 n / G: as much for G = 32 n / (32 + k (32 + i)).
"""

from dataclasses import asdict, dataclass

from minitx.errors import MinitxError
from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape
from minitx.precompute.separate_magnitudes import kept


@dataclass(frozen=True)
class SeparateMagnitudesCost:
    """The blocks' matrices, a share of their weights in full and the others in few bits."""

    shape: Shape
    bits: int
    share: float

    def extra(self, m: Matrix) -> int:
        """Bits of an output beside its codes: a scale, large weights, and where they stand."""
        row = 8 if m.inputs <= 1 << 8 else 16 if m.inputs <= 1 << 16 else 32
        return 32 + kept(m.inputs, self.share) * (32 + row)

    def per_weight(self, m: Matrix) -> float:
        return self.bits + self.extra(m) / m.inputs

    def group(self, m: Matrix) -> float:
        """Inputs that share a scale, where plain rounding takes as much."""
        return 32 * m.inputs / self.extra(m)

    @property
    def bytes(self) -> dict[str, int]:
        """Of all these matrices: float32, plain rounding with a scale an output, and this."""
        plain = sum(m.outputs * m.count * (m.inputs * self.bits + 32) for m in self.matrices)
        apart = sum(
            m.outputs * m.count * (m.inputs * self.bits + self.extra(m)) for m in self.matrices
        )
        whole = 4 * block_weights(self.shape)
        return {"float32": whole, "plain": -(-plain // 8), "separated": -(-apart // 8)}

    @property
    def matrices(self) -> list[Matrix]:
        return block_matrices(self.shape)

    def as_dict(self) -> dict:
        rows = [
            m._asdict()
            | {"kept": kept(m.inputs, self.share), "per_weight": self.per_weight(m)}
            | {"group": self.group(m)}
            for m in self.matrices
        ]
        found = {"technique": "separate_magnitudes", "shape": asdict(self.shape)}
        found |= {"bits": self.bits, "share": self.share, "matrices": rows, "bytes": self.bytes}
        return found | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["matrix", "in full, an output", "bits a weight", "as plain groups of"]]
        for m in self.matrices:
            numbers = f"{self.per_weight(m):.2f}", f"{self.group(m):.0f}"
            rows.append([m.name, f"{kept(m.inputs, self.share):,} of {m.inputs:,}", *numbers])
        memory = [["bytes", "numbers"], *([n, f"{b:,}"] for n, b in self.bytes.items())]
        heading = self.shape.heading(notes(self.shape))
        return "\n".join([*heading, table(rows), "", table(memory)])


def cost(shape: Shape, *, bits: int = 4, share: float = 0.01) -> SeparateMagnitudesCost:
    if not 2 <= bits <= 8 or not 0 <= share <= 1:
        raise MinitxError(
            "cost separate_magnitudes needs 2 to 8 bits and a share of 0 to 1, not "
            f"{bits} and {share:g}."
        )
    return SeparateMagnitudesCost(shape, bits, share)
