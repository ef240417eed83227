"""A quality monitor: run exactly once in n tokens, and adapt how approximate the others may be.

Mittal's survey of approximate computing (ACM Computing Surveys 48(4), 2016) names such a control
loop; this is the simplest one. A sub-layer has several versions, numbered by level, from 0 (exact,
or closest to it) to the most approximate. Every n-th token runs exactly and approximately, and the
relative error of the approximate output decides which version the tokens after it use:

    error > limit        one level lower, closer to exact
    error <= limit / 2   one level higher, up to the most approximate version
    otherwise            the same level

Tokens run in order, and a decision is remembered by its position, so a prompt that is read at once,
in chunks or token by token gives the same result, and ``rewind`` undoes decisions.

Two classes: ``Levels`` remembers the decisions of one sequence and layer, for techniques that have
their own loop over tokens; ``Monitored`` is a part for the "ffn" slot.
"""

from collections.abc import Iterator
from typing import Annotated

import numpy as np

from minitx import ledger
from minitx.shared.coarse import coarse
from minitx.shared.row_by_row import each_sequence
from minitx.state import Layer
from minitx.tree import Part, part
from minitx.values import at_least

# The types of the options monitor and limit, for every technique that has them.
Monitor = Annotated[
    int,
    "quality monitor: every n-th token also runs exactly and adapts the others; 0: none",
    at_least(0),
]
Limit = Annotated[
    float,
    "of the monitor: the largest relative error allowed in a sub-layer's output",
    at_least(0),
]


class Levels:
    """The level in use, from 0 (closest to exact) to ``top``, and its changes, in the order of the
    tokens; kept in ``layer.memory``."""

    def __init__(self, top: int):
        self.top = top
        self.changes: list[tuple[int, int]] = []  # (position, level after it), in order

    @property
    def level(self) -> int:
        return self.changes[-1][1] if self.changes else self.top

    def note(self, position: int, error: float, limit: float) -> None:
        """Adapt the level to the error that was found at this position."""
        level = self.level
        if error > limit:
            level = max(level - 1, 0)
        elif error <= limit / 2:
            level = min(level + 1, self.top)
        ledger.event("quality checks")
        ledger.event("checks above the limit", error > limit)
        if level != self.level:
            self.changes.append((position, level))

    def rewind(self, position: int) -> None:
        while self.changes and self.changes[-1][0] >= position:
            self.changes.pop()


def levels_of(owner, layer: Layer, top: int) -> Levels:
    """The levels of this sequence, which begins with the most approximate one."""
    return layer.memory.recall((owner, Levels), lambda: Levels(top))


def pieces(positions, every: int) -> Iterator[tuple[slice, bool]]:
    """Divide the tokens at these positions (T,) into (slice, False) for tokens that are not
    checked and (slice, True) for single ones that are: every n-th of the text."""
    first = 0
    for i in np.flatnonzero((positions + 1) % every == 0).tolist():
        if i > first:
            yield slice(first, i), False
        yield slice(i, i + 1), True
        first = i + 1
    if first < len(positions):
        yield slice(first, len(positions)), False


def relative_error(found, exact) -> float:
    """|found - exact| / |exact| over all numbers, to 20 bits, so that a comparison does not depend
    on the last bits; 0 where both are 0, Inf where only ``exact`` is, or where ``found`` is not
    finite."""
    if not np.isfinite(found).all():
        return np.inf
    wrong = float(np.linalg.norm(found.astype(np.float64) - exact))
    size = float(np.linalg.norm(exact.astype(np.float64)))
    if size == 0:
        return np.inf if wrong else 0.0
    return float(coarse([wrong / size])[0])


@part
class Monitored(Part):
    """An FFN in several versions, of which the quality monitor selects one for each token."""

    has_history = True  # which version is in use
    one_sequence = True  # each sequence uses its own
    versions: tuple  # from exact to the most approximate; they share their arrays
    every: int  # n
    limit: float

    def __call__(self, x, layer: Layer):
        if x.ndim > 2:
            because = "the quality monitor uses another version for each sequence"
            return each_sequence(self.one, x, layer, because)
        return self.one(x, layer)

    def one(self, x, layer: Layer):
        """x (T, D) of one sequence."""
        levels = levels_of(self, layer, len(self.versions) - 1)
        if len(x) == 1 and (layer.tokens.array[0] + 1) % self.every:  # decoding, not checked
            return self.versions[levels.level](x, layer)
        y, tokens = np.empty_like(x), layer.tokens
        for some, checked in pieces(tokens.array, self.every):
            layer.tokens = tokens.only(some)
            y[some] = (self.check if checked else self.run)(x[some], layer, levels)
        layer.tokens = tokens
        return y

    def run(self, x, layer: Layer, levels: Levels):
        return self.versions[levels.level](x, layer)

    def check(self, x, layer: Layer, levels: Levels):
        """Run one token exactly, and compare with the version in use; at level 0 with level 1, the
        one that would be used next."""
        exact = self.versions[0](x, layer)
        found = self.versions[max(levels.level, 1)](x, layer)
        error = relative_error(found, exact)
        levels.note(int(layer.tokens.array[0]), error, self.limit)
        return exact  # it has been computed, so use it


def monitored(exact: Part, versions, every: int, limit: float) -> Part:
    """``versions``, from the least to the most approximate, under the quality monitor; only the
    last one if ``every`` is 0."""
    if every == 0:
        return versions[-1]
    return Monitored((exact, *versions), every, limit)
