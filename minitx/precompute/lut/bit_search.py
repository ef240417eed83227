"""The fewest bits with which a model is still accurate enough, then the longest vectors whose table
still fits: the two stages of LUTIN's search.

That there are two stages, that they start at 8 and 8 bits and that the activations' bits go down
first is the paper's; when to stop is not known of it and was chosen here.
"""

from collections.abc import Callable
from dataclasses import dataclass

from minitx.errors import MinitxError
from minitx.precompute.lut.product_table import table_bytes

START, LEAST = 8, 2  # bits


@dataclass(frozen=True)
class Search:
    """What was found, and all that was tried on the way."""

    ba: int
    bw: int
    d: int
    least: float  # the accuracy that had to be kept
    cache: int  # bytes that the table might take
    tried: tuple[tuple[int, int, float], ...]  # ba, bw, accuracy, in the order of trying

    def __str__(self) -> str:
        lines = [f"accuracy to keep: {self.least:.4f}"]
        for ba, bw, accuracy in self.tried:
            word = "kept" if accuracy >= self.least else "too low"
            lines.append(f"ba={ba} bw={bw}  {accuracy:.4f}  {word}")
        for d in range(1, self.d + 2):
            size = table_bytes(self.ba, self.bw, d)
            word = "fits" if size <= self.cache else f"more than {self.cache:,}"
            lines.append(f"d={d}  table of {size:,} bytes  {word}")
        return "\n".join([*lines, f"found: ba={self.ba} bw={self.bw} d={self.d}"])


def two_stages(accuracy: Callable[[int, int], float], least: float, cache: int) -> Search:
    """Search with ``accuracy(ba, bw)``, which does not depend on d since the table is exact.

    MinitxError if 8 and 8 bits are not accurate enough, or if not even d = 1 fits the cache.
    """
    tried = []

    def enough(ba: int, bw: int) -> bool:
        tried.append((ba, bw, accuracy(ba, bw)))
        return tried[-1][2] >= least

    ba = bw = START
    if not enough(ba, bw):
        raise MinitxError(
            f"lut: at 8 and 8 bits the accuracy is {tried[-1][2]:.4f} and {least:.4f} is to be "
            "kept; allow a larger drop."
        )
    while ba > LEAST and enough(ba - 1, bw):
        ba -= 1
    while bw > LEAST and enough(ba, bw - 1):
        bw -= 1
    d = 0
    while table_bytes(ba, bw, d + 1) <= cache:
        d += 1
    if not d:
        raise MinitxError(
            f"lut: a table for {ba} and {bw} bits takes {table_bytes(ba, bw, 1):,} bytes, and "
            f"cache is {cache:,}; allow more bytes or a larger drop."
        )
    return Search(ba, bw, d, least, cache, tuple(tried))
