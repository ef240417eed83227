"""The two stages of LUTIN's search: the fewest bits that are accurate enough, then the longest
codes whose table still fits the cache.

The paper's: the two stages, the start at 8 and 8 bits, and that the inputs' bits are lowered first.
Its stopping rule is not known; ours: stop before the share of correctly predicted next tokens (the
accuracy) falls by more than ``drop``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.precompute.lut_product import (
    dequantize,
    quantize_inputs,
    quantize_weights,
    table_bytes,
)
from minitx.progress import bar
from minitx.shared.table_lookup import as_rows, count_reads, replace_matrices, weight_and_bias
from minitx.tree import Part, part

START, FEWEST = 8, 2  # bits


@dataclass(frozen=True)
class Search:
    """What was found, and everything that was tried on the way."""

    input_bits: int
    weight_bits: int
    length: int
    floor: float  # the accuracy to keep
    cache: int  # bytes that the table has to fit in
    tried: tuple[tuple[int, int, float], ...]  # (input bits, weight bits, accuracy) in order

    @property
    def options(self) -> str:
        return f"input_bits={self.input_bits} weight_bits={self.weight_bits} length={self.length}"

    def __str__(self) -> str:
        lines = [f"accuracy to keep: {self.floor:.4f}"]
        for input_bits, weight_bits, accuracy in self.tried:
            word = "kept" if accuracy >= self.floor else "too low"
            lines.append(
                f"input_bits={input_bits} weight_bits={weight_bits}  {accuracy:.4f}  {word}"
            )
        for length in range(1, self.length + 2):
            size = table_bytes(self.input_bits, self.weight_bits, length)
            word = "fits" if size <= self.cache else f"more than {self.cache:,}"
            lines.append(f"length={length}  table of {size:,} bytes  {word}")
        return "\n".join([*lines, f"found: {self.options}"])


def find_bits(lm, nodes: list[Part], drop: float, cache: int, stories: int) -> Search:
    """Both stages for these matrices, with the accuracy on calibration stories."""
    texts = calibration_ids("lut_product", lm, stories, "give the bits without search")

    def accuracy(input_bits: int, weight_bits: int) -> float:
        def make(node: Part) -> Part:
            return IntegerLinear.of(*weight_and_bias(node), input_bits, weight_bits)

        label = f"lut product: {input_bits} and {weight_bits} bits"
        return next_token_accuracy(replace_matrices(lm, nodes, make), texts, label)

    return two_stages(accuracy, next_token_accuracy(lm, texts) - drop, cache)


def two_stages(accuracy: Callable[[int, int], float], floor: float, cache: int) -> Search:
    """Search with ``accuracy(input_bits, weight_bits)``. The accuracy does not depend on the
    length: the table is exact at every length.

    MinitxError if 8 and 8 bits are not accurate enough, or if not even length 1 fits the cache.
    """
    tried = []

    def enough(input_bits: int, weight_bits: int) -> bool:
        tried.append((input_bits, weight_bits, accuracy(input_bits, weight_bits)))
        return tried[-1][2] >= floor

    input_bits = weight_bits = START
    if not enough(input_bits, weight_bits):
        raise MinitxError(
            f"lut_product: at 8 and 8 bits the accuracy is {tried[-1][2]:.4f}, below the "
            f"{floor:.4f} to keep; allow a larger drop."
        )
    while input_bits > FEWEST and enough(input_bits - 1, weight_bits):
        input_bits -= 1
    while weight_bits > FEWEST and enough(input_bits, weight_bits - 1):
        weight_bits -= 1
    length = 0
    while table_bytes(input_bits, weight_bits, length + 1) <= cache:
        length += 1
    if not length:
        raise MinitxError(
            f"lut_product: a table for {input_bits} and {weight_bits} bits takes "
            f"{table_bytes(input_bits, weight_bits, 1):,} bytes, and cache is {cache:,}; allow "
            "more bytes or a larger drop."
        )
    return Search(input_bits, weight_bits, length, floor, cache, tuple(tried))


def next_token_accuracy(lm, texts: list[list[int]], label: str = "lut product: dense") -> float:
    """The share of positions at which the argmax of the logits is the actual next token."""
    shown = bar(texts, label, unit="text", delay=1.0)
    right = [lm.logits(ids[:-1]).argmax(-1) == ids[1:] for ids in shown]
    return float(np.concatenate(right).mean())


@part
class IntegerLinear(Part):
    """Gives exactly the outputs of ``ProductTableLinear``, at any length, but faster: by an integer
    matrix product."""

    w: np.ndarray  # (in, out) integers in float64, which holds all their sums exactly
    scale: np.ndarray  # (out,)
    input_bits: int
    b: np.ndarray | None = None

    @classmethod
    def of(cls, w, b, input_bits: int, weight_bits: int) -> "IntegerLinear":
        wi, ws = quantize_weights(w, weight_bits)
        return cls(wi, ws.astype(w.dtype), input_bits, b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        rows = as_rows(x, x.shape[-1])
        xi, xs = quantize_inputs(rows, self.input_bits)
        w = self.w[:, columns]
        acc = xi.astype(np.float64) @ w
        count_reads(rows.size * acc.shape[1], 0, w.nbytes)
        return dequantize(acc, xs, self.scale[columns], self.b, columns, x)
