"""The methods that compare_attention.py sets side by side, and how each is made to keep a share.

Each method has one knob: an option that makes it keep more or fewer keys. What the others are set
to stands in the table. ``settle`` turns the knob until the wanted share of keys is kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minitx.errors import MinitxError
from minitx.lab.attention_baselines import BASELINES, baseline
from minitx.technique import apply
from minitx.tree import Part

CLOSE = 0.02  # the knob is turned until the share is so near to the wanted one, relative to it
TURNS = 10  # ... but no more often than this


@dataclass(frozen=True)
class Knob:
    """An option with its range. It is turned on a logarithmic scale.

    keys: does a row keep x keys at value x, or all that it sees? Otherwise the search for a share
    begins at ``start`` times the share or, of a falling one, divided by it.
    """

    name: str
    low: float
    high: float
    keys: bool = False
    start: float = 1.0
    falling: bool = False  # the larger, the fewer keys are kept

    def value(self, place: float) -> float | int:
        """The value at a place from 0 to 1 of the range: of four digits, or a whole number."""
        x = self.low * (self.high / self.low) ** place
        return round(x) if self.keys else float(f"{x:.4g}")

    def place(self, value: float) -> float:
        place = math.log(value / self.low) / math.log(self.high / self.low)
        return min(max(place, 0.0), 1.0)

    def guess(self, share: float, T: int) -> float:
        """A value at which about this share of all keys that T tokens see should be kept."""
        if self.keys:
            r = np.arange(1, T + 1)  # the first r rows see no more keys than that
            kept = (r * T - r * (r - 1) / 2) / (T * (T + 1) / 2)
            return float(r[abs(kept - share).argmin()])
        return self.start / share if self.falling else self.start * share


@dataclass(frozen=True)
class Method:
    """A technique at the options given here, or a baseline; only its knob is left to be set."""

    name: str
    knob: Knob
    options: dict = field(default_factory=dict)

    def put(self, lm: Part, value: float) -> Part:
        """The language model with this method at work."""
        if self.name in BASELINES:
            return baseline(lm, self.name, value)
        return apply(lm, {self.name: self.options | {self.knob.name: value}})

    def at(self, value: float, share: float, S: int) -> float:
        """The value with which one query that sees S keys keeps the share of them: only a number
        of keys has to grow with S."""
        return max(1, round(share * S)) if self.knob.keys else value


def keys(name: str) -> Knob:
    return Knob(name, 1, 4096, keys=True)


METHODS = (
    Method("oracle", keys("r")),
    # a3's greedy search alone: its second filter comes after the scores. With few iterations about
    # as many keys stay.
    Method("a3", Knob("iterations", 1 / 256, 8.0, start=1.2), {"threshold": 0.0}),
    Method("elsa", Knob("p", 1 / 64, 64.0, start=0.25, falling=True)),
    Method("dota", keys("kappa")),
    Method("predictive_attention", Knob("rho", 0.001, 1.0), {"tau": 0.0, "r_min": 1}),
    Method("sparse_memory", keys("K")),
    Method("window", keys("r")),
    Method("random", keys("r")),
)


def chosen_methods(wanted: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names in the order of the table; all by default."""
    known = {method.name: method for method in METHODS}
    wanted = list(known) if wanted is None else [name.replace("-", "_") for name in wanted]
    for name in wanted:
        if name not in known:
            raise MinitxError(f"There is no method {name!r}; known: {', '.join(known)}.")
    return [known[name] for name in known if name in wanted]


def settle(
    knob: Knob, share: float, T: int, measure: Callable[[float], float], known: dict
) -> tuple[float | int, float]:
    """The value at which ``measure(value)``, the share of keys kept, comes nearest to ``share``,
    and what it is there.

    From where the knob's rule says on, between the nearest two values that keep too few and too
    many, in proportion. ``known`` {value: share} keeps what was measured, for other shares too. A
    share that is out of reach is not reached: then the nearest one is given.
    """
    place = knob.place(knob.guess(share, T))
    for turn in range(TURNS):
        value = knob.value(place)
        if value not in known:
            known[value] = measure(value)
        elif turn:
            break  # at an end of the range, or no whole number is left between two
        if abs(known[value] - share) <= CLOSE * share:
            break
        place = next_place(knob, share, known)
    return min(known.items(), key=lambda found: abs(found[1] - share))


def next_place(knob: Knob, share: float, known: dict) -> float:
    """Where to look next, given {value: share} of what was looked at."""
    places = [(math.log(kept), knob.place(value)) for value, kept in known.items() if kept]
    wanted = math.log(share)
    below = max((found for found in places if found[0] < wanted), default=None)
    above = min((found for found in places if found[0] >= wanted), default=None)
    if below and above:
        part = (wanted - below[0]) / (above[0] - below[0])
        return below[1] + part * (above[1] - below[1])
    up = (above is None) != knob.falling  # keep more, or fewer
    ends = [place for _, place in places] or [0.0]
    step = math.log(2) / math.log(knob.high / knob.low)  # twice or half the value
    return min(max(ends) + step, 1.0) if up else max(min(ends) - step, 0.0)
