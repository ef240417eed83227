"""``minitx cost quantize``: bytes of a quantized model, for any model.

Plain sums, from no paper: integer codes, and a scale (and a zero point, if asymmetric) for each
group, as precompute/quantize stores them. Norms, biases and learned positions stay float32.
The KV cache is not counted: see quantize_cache.
"""

from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from minitx.lab.block_matrices import block_matrices, block_weights
from minitx.lab.layout import table
from minitx.lab.shape import Shape
from minitx.precompute.quantize import equal_groups
from minitx.technique import at_least


def bytes_per_weight(bits: int, group_size: int, half_scales=False, symmetric=True) -> float:
    """Of a matrix whose inputs the group size divides."""
    return bits / 8 + ((2 if half_scales else 4) + (0 if symmetric else 1)) / group_size


@dataclass(frozen=True)
class QuantizeCost:
    """Bytes of a model with the options of the technique."""

    shape: Shape
    bits: int
    group_size: int | None
    symmetric: bool
    embeddings: bool
    half_scales: bool

    def matrix_bytes(self, inputs: int, outputs: int) -> int:
        """Of one matrix: codes of its groups, padded to one size, with scales and zero points."""
        if self.bits == 32:
            return 4 * inputs * outputs
        n, g = equal_groups(inputs, self.group_size, self.bits)
        extra = (2 if self.half_scales else 4) + (0 if self.symmetric else 1)
        return outputs * n * (g * self.bits // 8 + extra)

    @property
    def tables(self) -> int:
        """Embedding and head, which may be the same."""
        return 1 if self.shape.tied else 2

    @property
    def vocabulary_weights(self) -> int:
        return self.tables * self.shape.vocab_size * self.shape.width

    @property
    def small_weights(self) -> int:
        """Norms, biases and learned positions: counted as in llama if the FFN has a gate, as in
        GPT-2 otherwise."""
        s = self.shape
        norms = (2 * s.layers + 1) * s.width
        found = s.positions * s.width + norms
        if s.ffn_matrices == 3:
            return found
        outputs = sum(m.outputs * m.count for m in block_matrices(s))
        return found + norms + outputs  # a LayerNorm has a bias too

    @property
    def matrix_weights(self) -> int:
        """Blocks, embedding and head alone, which is what published size tables usually count."""
        return block_weights(self.shape) + self.vocabulary_weights

    @property
    def weights(self) -> int:
        return self.matrix_weights + self.small_weights

    @property
    def nominal_bytes(self) -> float:
        """Of all matrices if the group size divided their inputs, as in published size tables."""
        if self.bits == 32:
            return 4.0 * self.matrix_weights
        group_size = self.group_size or self.shape.width
        each = bytes_per_weight(self.bits, group_size, self.half_scales, self.symmetric)
        return each * self.matrix_weights

    @property
    def block_bytes(self) -> int:
        matrices = block_matrices(self.shape)
        return sum(self.matrix_bytes(m.inputs, m.outputs) * m.count for m in matrices)

    @property
    def vocabulary_bytes(self) -> int:
        if not self.embeddings:
            return 4 * self.vocabulary_weights
        return self.tables * self.matrix_bytes(self.shape.width, self.shape.vocab_size)

    @property
    def file_bytes(self) -> int:
        """On disk; and in memory with run=stream, cast or integers."""
        return self.block_bytes + self.vocabulary_bytes + 4 * self.small_weights

    @property
    def loaded_bytes(self) -> int:
        """In memory with run=load: codes and dequantized weights. An embedding that is not the head
        is still dequantized row by row."""
        if self.bits == 32:
            return self.file_bytes
        head = self.shape.vocab_size * self.shape.width if self.embeddings else 0
        return self.file_bytes + 4 * (block_weights(self.shape) + head)

    def notes(self) -> list[str]:
        kind = "llama" if self.shape.ffn_matrices == 3 else "GPT-2"
        found = [*self.shape.notes, f"norms and biases are counted as in {kind}"]
        if self.shape.tied and self.embeddings:
            found.append("the tied head is the embedding: quantized and counted once")
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
    bits: Annotated[Literal[8, 4, 32], "bits per weight"] = 8,
    group_size: Annotated[
        int | None, "inputs that share a scale, at most; None: all inputs of an output", at_least(2)
    ] = 64,
    symmetric: Annotated[bool, "no zero points"] = True,
    embeddings: Annotated[bool, "embedding and head are quantized too"] = True,
    half_scales: Annotated[bool, "float16 scales"] = False,
) -> QuantizeCost:
    return QuantizeCost(shape, bits, group_size, symmetric, embeddings, half_scales)


def as_text(c: QuantizeCost) -> str:
    dense = 4 * c.weights
    rows = [["", "bytes", "of float32"]]
    for name, found in (
        ("float32", dense),
        ("float16", dense // 2),
        ("nominal, matrices alone", round(c.nominal_bytes)),
        ("file, and memory with run=stream", c.file_bytes),
        ("memory with run=load", c.loaded_bytes),
    ):
        rows.append([name, f"{found:,}", f"{found / dense:.3f}x"])
    size = f"at most {c.group_size}" if c.group_size else "a whole row"
    how = "not quantized" if c.bits == 32 else f"{c.bits} bits, groups of {size}"
    lines = [c.shape.describe(), "", f"{c.weights:,} weights; {how}.", "", table(rows), ""]
    return "\n".join(lines + [f"Note: {note}." for note in c.notes()])
