"""``minitx cost separate-magnitudes``: bits per weight when a few weights of each output stay in
float32.

An output with ``in`` inputs and k large weights (32 bits each, and a row number of i bits) takes

    in * bits + 32 + k (32 + i)      32 for its scale; all of them large: 32 in

Plain rounding with a scale for each group of inputs takes ``in * bits + 32 in / group``: as much
for

    group = 32 in / (32 + k (32 + i))
"""

from dataclasses import asdict, dataclass
from typing import Annotated

from minitx.lab.block_matrices import Matrix, block_matrices, block_weights, notes
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.precompute.separate_magnitudes import outliers
from minitx.technique import between


@dataclass(frozen=True)
class SeparateMagnitudesCost:
    """The blocks' matrices, a share of each output's weights in float, the rest in few bits."""

    shape: Shape
    bits: int
    share: float

    def extra(self, m: Matrix) -> int:
        """Bits of an output beside its codes: a scale, the large weights and their rows. If all
        weights are large, the matrix stays in float32, without codes."""
        row = 8 if m.inputs <= 1 << 8 else 16 if m.inputs <= 1 << 16 else 32
        large = outliers(m.inputs, self.share)
        return (32 - self.bits) * m.inputs if large == m.inputs else 32 + large * (32 + row)

    def per_weight(self, m: Matrix) -> float:
        return self.bits + self.extra(m) / m.inputs

    def group(self, m: Matrix) -> float:
        """Inputs that share a scale when plain rounding takes as much memory."""
        return 32 * m.inputs / self.extra(m)

    @property
    def bytes(self) -> dict[str, int]:
        """Of all these matrices: float32, plain rounding with a scale per output, and this."""
        plain = sum(m.outputs * m.count * (m.inputs * self.bits + 32) for m in self.matrices)
        separated = sum(
            m.outputs * m.count * (m.inputs * self.bits + self.extra(m)) for m in self.matrices
        )
        whole = 4 * block_weights(self.shape)
        return {"float32": whole, "plain": -(-plain // 8), "separated": -(-separated // 8)}

    @property
    def matrices(self) -> list[Matrix]:
        return block_matrices(self.shape)

    def as_dict(self) -> dict:
        rows = [
            m._asdict()
            | {"outliers": outliers(m.inputs, self.share), "per_weight": self.per_weight(m)}
            | {"group": self.group(m)}
            for m in self.matrices
        ]
        found = {"technique": "separate_magnitudes", "shape": asdict(self.shape)}
        found |= {"bits": self.bits, "share": self.share, "matrices": rows, "bytes": self.bytes}
        return found | {"notes": notes(self.shape)}

    def __str__(self) -> str:
        rows = [["matrix", "in float, per output", "bits per weight", "as plain groups of"]]
        for m in self.matrices:
            numbers = f"{self.per_weight(m):.2f}", f"{self.group(m):.0f}"
            rows.append([m.name, f"{outliers(m.inputs, self.share):,} of {m.inputs:,}", *numbers])
        memory = [["bytes", "total"], *([n, f"{b:,}"] for n, b in self.bytes.items())]
        heading = self.shape.heading(notes(self.shape))
        return "\n".join([*heading, table(rows), "", table(memory)])


def cost(
    shape: Shape,
    *,
    bits: Annotated[int, "bits of a quantized weight", between(2, 8)] = 4,
    share: Annotated[
        float, "share of each output's weights that stays in float", between(0, 1)
    ] = 0.01,
) -> SeparateMagnitudesCost:
    return SeparateMagnitudesCost(shape, bits, share)
