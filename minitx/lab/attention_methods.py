"""The methods that ``minitx compare-attention`` compares, and how each is tuned to keep a share.

Each method has one knob: the option that makes it keep more keys or fewer. Its other options are
fixed in the table ``METHODS``. ``tune`` searches for the value at which the wanted share is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minitx.errors import MinitxError, abbreviate, one_of
from minitx.lab.attention_baselines import BASELINES, baseline
from minitx.technique import apply
from minitx.tree import Part

TOLERANCE = 0.02  # of the share, relative: the search ends when it is that close
STEPS = 10  # at most, in a search


@dataclass(frozen=True)
class Knob:
    """The option that decides how many keys are kept, with its range.

    keys: the value is a number of keys that each query keeps (or all, if it sees fewer). Otherwise
    the search for a share starts at ``start * share``, or at ``start / share`` for a falling knob.
    """

    name: str
    low: float
    high: float
    keys: bool = False
    start: float = 1.0
    falling: bool = False  # a larger value keeps fewer keys

    def value(self, position: float) -> float | int:
        """The value at a position from 0 to 1 of the logarithmic range: an integer for keys, or
        else rounded to four digits."""
        x = self.low * (self.high / self.low) ** position
        return round(x) if self.keys else float(f"{x:.4g}")

    def position(self, value: float) -> float:
        found = math.log(value / self.low) / math.log(self.high / self.low)
        return min(max(found, 0.0), 1.0)

    def guess(self, share: float, T: int) -> float:
        """A value that should keep about this share of all keys that T tokens see."""
        if self.keys:
            r = np.arange(1, T + 1)  # the first r queries see no more keys than r
            kept = (r * T - r * (r - 1) / 2) / (T * (T + 1) / 2)
            return float(r[abs(kept - share).argmin()])
        return self.start / share if self.falling else self.start * share


@dataclass(frozen=True)
class Method:
    """A technique with fixed options, or a baseline; only its knob is left to be set."""

    name: str
    knob: Knob
    options: dict = field(default_factory=dict)

    def apply(self, lm: Part, value: float) -> Part:
        """The LM with this method at this value of its knob."""
        if self.name in BASELINES:
            return baseline(lm, self.name, value)
        return apply(lm, {self.name: self.options | {self.knob.name: value}})

    def at(self, value: float, share: float, S: int) -> float:
        """The value with which one query that sees S keys keeps this share of them. Only a number
        of keys has to grow with S."""
        return max(1, round(share * S)) if self.knob.keys else value


def keys(name: str) -> Knob:
    return Knob(name, 1, 4096, keys=True)


METHODS = (
    Method("oracle", keys("r")),
    # a3's greedy search alone: its second filter comes after the scores. With few iterations about
    # as many keys stay.
    Method("a3", Knob("iterations", 1 / 256, 8.0, start=1.2), {"threshold": 0.0}),
    Method("elsa", Knob("p", 1 / 64, 64.0, start=0.25, falling=True), {"min_visible": 1}),
    Method("dota", keys("keep")),
    Method("predictive_attention", Knob("share", 0.001, 1.0), {"threshold": 0.0, "min_keys": 1}),
    Method("sparse_memory", keys("keep")),
    Method("window", keys("r")),
    Method("random", keys("r")),
)


def chosen_methods(wanted: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names in the order of the table; all by default."""
    known = {method.name: method for method in METHODS}
    wanted = list(known) if wanted is None else [name.replace("-", "_") for name in wanted]
    for name in wanted:
        if name not in known:
            raise MinitxError(f"There is no method {abbreviate(name)}; {one_of(name, known)}")
    return [known[name] for name in known if name in wanted]


def tune(
    knob: Knob, share: float, T: int, measure: Callable[[float], float], known: dict
) -> tuple[float | int, float]:
    """(value, share kept there) for the value whose share comes closest to the wanted one.

    measure(value): the share of keys that is kept. known {value: share}: what is measured already,
    for other shares too; it is added to. The search starts at the knob's guess and interpolates
    between the nearest values that keep too few and too many. If the share is out of reach, the
    closest one is returned.
    """
    position = knob.position(knob.guess(share, T))
    for step in range(STEPS):
        value = knob.value(position)
        if value not in known:
            known[value] = measure(value)
        elif step:
            break  # at an end of the range, or no integer is left in between
        if abs(known[value] - share) <= TOLERANCE * share:
            break
        position = next_position(knob, share, known)
    return min(known.items(), key=lambda found: abs(found[1] - share))


def next_position(knob: Knob, share: float, known: dict) -> float:
    """Where to measure next, given {value: share} of what was measured."""
    found = [(math.log(kept), knob.position(value)) for value, kept in known.items() if kept]
    wanted = math.log(share)
    below = max((point for point in found if point[0] < wanted), default=None)
    above = min((point for point in found if point[0] >= wanted), default=None)
    if below and above:
        part = (wanted - below[0]) / (above[0] - below[0])
        return below[1] + part * (above[1] - below[1])
    up = (above is None) != knob.falling  # raise the value, or lower it
    positions = [position for _, position in found] or [0.0]
    double = math.log(2) / math.log(knob.high / knob.low)  # twice or half the value
    return min(max(positions) + double, 1.0) if up else max(min(positions) - double, 0.0)
