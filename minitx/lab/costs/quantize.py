"""``minitx cost quantize``: bytes of a model in few bits, for any model.

Plain sums, of no one paper: codes of so many bits and a scale (and a zero, if not symmetric) for
each group, as matrices/groups.py keeps them. Norms, biases and learned positions stay in float32.
The cache is not counted: quantize_cache.
"""

from dataclasses import asdict, dataclass
from typing import Literal

from minitx.errors import MinitxError
from minitx.lab.block_matrices import block_matrices, block_weights
from minitx.lab.evaluate import table
from minitx.lab.shape import Shape
from minitx.precompute.quantize.groups import group_size


def bytes_per_weight(bits: int, group: int, half_scales=False, symmetric=True) -> float:
    """Of a matrix whose inputs the group divides."""
    return bits / 8 + ((2 if half_scales else 4) + (0 if symmetric else 1)) / group


@dataclass(frozen=True)
class QuantizeCost:
    """Bytes of a model with the options of the technique."""

    shape: Shape
    bits: int
    group: int | None
    symmetric: bool
    which: str
    half_scales: bool

    def matrix_bytes(self, inputs: int, outputs: int) -> int:
        """Of one matrix: its groups filled up to one size, their scales and zeros."""
        if self.bits == 32:
            return 4 * inputs * outputs
        n, G = group_size(inputs, self.group, self.bits)
        each = (2 if self.half_scales else 4) + (0 if self.symmetric else 1)
        return outputs * n * (G * self.bits // 8 + each)

    @property
    def tables(self) -> int:
        """Embedding and head, which may be the same."""
        return 1 if self.shape.tied else 2

    @property
    def vocabulary_weights(self) -> int:
        return self.tables * self.shape.vocab_size * self.shape.width

    @property
    def small_weights(self) -> int:
        """Norms, biases and learned positions: as llama has them where the FFN has a gate, as GPT-2
        where it has none."""
        s = self.shape
        norms = (2 * s.layers + 1) * s.width
        found = s.positions * s.width + norms
        if s.ffn_matrices == 3:
            return found
        outputs = sum(m.outputs * m.count for m in block_matrices(s))
        return found + norms + outputs  # a LayerNorm has a bias too

    @property
    def matrix_weights(self) -> int:
        """In blocks, embedding and head alone: what tables of sizes usually go by."""
        return block_weights(self.shape) + self.vocabulary_weights

    @property
    def weights(self) -> int:
        return self.matrix_weights + self.small_weights

    @property
    def nominal_bytes(self) -> float:
        """Of all matrices if groups divided their inputs, as such tables have it."""
        if self.bits == 32:
            return 4.0 * self.matrix_weights
        each = bytes_per_weight(
            self.bits, self.group or self.shape.width, self.half_scales, self.symmetric
        )
        return each * self.matrix_weights

    @property
    def block_bytes(self) -> int:
        matrices = block_matrices(self.shape)
        return sum(self.matrix_bytes(m.inputs, m.outputs) * m.count for m in matrices)

    @property
    def vocabulary_bytes(self) -> int:
        if self.which == "blocks":
            return 4 * self.vocabulary_weights
        return self.tables * self.matrix_bytes(self.shape.width, self.shape.vocab_size)

    @property
    def file_bytes(self) -> int:
        """On disk; and in memory with run=stream, cast or integers."""
        return self.block_bytes + self.vocabulary_bytes + 4 * self.small_weights

    @property
    def loaded_bytes(self) -> int:
        """In memory with run=load: codes, and the floats that are made of them. An embedding that
        is no head is looked up row by row as before."""
        if self.bits == 32:
            return self.file_bytes
        head = self.shape.vocab_size * self.shape.width if self.which == "all" else 0
        return self.file_bytes + 4 * (block_weights(self.shape) + head)

    def notes(self) -> list[str]:
        kind = "llama" if self.shape.ffn_matrices == 3 else "GPT-2"
        found = [*self.shape.notes, f"norms and biases are counted as {kind} has them"]
        if self.shape.tied and self.which == "all":
            found.append("the tied head is the embedding: both are in few bits, counted once")
        return found

    def as_dict(self) -> dict:
        names = (
            "matrix_weights",
            "weights",
            "nominal_bytes",
            "block_bytes",
            "vocabulary_bytes",
            "file_bytes",
            "loaded_bytes",
        )
        found = {"technique": "quantize"} | asdict(self)
        found |= {name: getattr(self, name) for name in names}
        return found | {"float32_bytes": 4 * self.weights, "notes": self.notes()}

    def __str__(self) -> str:
        return as_text(self)


def cost(
    shape: Shape,
    *,
    bits: Literal[8, 4, 32] = 8,
    group: int | None = 64,
    symmetric: bool = True,
    which: Literal["blocks", "all"] = "all",
    half_scales: bool = False,
) -> QuantizeCost:
    if group is not None and group < 2:
        raise MinitxError(
            f"cost quantize: group is {group}; it must be at least 2, or None for a whole row."
        )
    return QuantizeCost(shape, bits, group, symmetric, which, half_scales)


def as_text(c: QuantizeCost) -> str:
    whole = 4 * c.weights
    rows = [["", "bytes", "of float32"]]
    for name, found in (
        ("float32", whole),
        ("float16", whole // 2),
        ("nominal, matrices alone", round(c.nominal_bytes)),
        ("file, and memory while streamed", c.file_bytes),
        ("memory with floats made once", c.loaded_bytes),
    ):
        rows.append([name, f"{found:,}", f"{found / whole:.3f}x"])
    how = "as it is" if c.bits == 32 else f"{c.bits} bits, groups of at most {c.group or 'a row'}"
    lines = [c.shape.describe(), "", f"{c.weights:,} weights; {how}.", "", table(rows), ""]
    return "\n".join(lines + [f"Note: {note}." for note in c.notes()])
