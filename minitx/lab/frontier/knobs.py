"""What a family compares: methods, each with one knob, and how a knob is tuned to a share.

A method is a technique with fixed options, or a baseline. Its knob is the option that makes it do
more or less; ``tune`` searches for the value at which the wanted share of keys, or of
multiply-adds, is left.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from minitx.errors import MinitxError, abbreviate, one_of
from minitx.technique import apply, as_words
from minitx.tree import Part
from minitx.values import as_number

TOLERANCE = 0.02  # of the share, relative: the search ends when it is that close
STEPS = 12  # at most, in a search
STAIRS = 5  # so many values that change nothing: the share has steps, and none is closer
TINY = 1e-3  # a share of which the logarithm can be taken
EDGE = 0.02  # the search stays this far, as a part of their distance, from the nearest two values


@dataclass(frozen=True)
class Knob:
    """The option that decides how much is kept, with its range. "start=end": two options that
    get the same value.

    high: a number, or a function of the model's config (the number of its layers, say).
    integer: the option takes integers. keys: it is a number of keys that each query keeps (or all,
    if it sees fewer). The search for a share starts at ``start * share``, or at ``start / share``
    for a falling knob; without a start, in proportion to the range.
    """

    name: str
    low: float
    high: float | Callable
    keys: bool = False
    start: float | None = None
    falling: bool = False  # a larger value keeps less
    scale: str = "log"  # or "linear": how the search divides the range
    integer: bool = False

    def within(self, config) -> "Knob":
        """The knob with a number as its upper end, for a model of this config."""
        return replace(self, high=self.high(config)) if callable(self.high) else self

    def value(self, position: float) -> float | int:
        """The value at a position from 0 to 1 of the range: an integer, or else rounded to four
        digits (on a linear scale to four decimals)."""
        if self.scale == "linear":
            x = self.low + (self.high - self.low) * position
            return round(x) if self.is_integer else round(x, 4)
        x = self.low * (self.high / self.low) ** position
        return round(x) if self.is_integer else float(f"{x:.4g}")

    def position(self, value: float) -> float:
        if self.scale == "linear":
            found = (value - self.low) / (self.high - self.low or 1)
        else:
            found = math.log(value / self.low) / (math.log(self.high / self.low) or 1)
        return min(max(found, 0.0), 1.0)

    def options(self, value: float) -> dict:
        return dict.fromkeys(self.name.split("="), value)

    @property
    def is_integer(self) -> bool:
        return self.integer or self.keys

    def guess(self, share: float) -> float:
        """A value that may leave about this share."""
        if self.start is None:
            return self.value(1 - share if self.falling else share)
        return self.start / share if self.falling else self.start * share

    @property
    def step(self) -> float:
        """How far to go, in positions, while no value is known on the other side of the share:
        to twice or half the value, or through a quarter of a linear range."""
        if self.scale == "linear":
            return 0.25
        return math.log(2) / (math.log(self.high / self.low) or 1)


def rising(name: str, low: float, high: float = 1.0) -> Knob:
    """The larger, the more is executed."""
    return Knob(name, low, high, scale="linear")


def falling(name: str, high, low: float = 0.0) -> Knob:
    """The larger, the less is executed."""
    return Knob(name, low, high, falling=True, scale="linear")


AT_RANDOM = {"choose": "random"}  # the options that make a technique its own random baseline


@dataclass(frozen=True)
class Method:
    """A technique with fixed options, or a baseline; only its knob is left to be set.

    knob: None for one that is only shown at these options. options: or a function of the model's
    config that returns them. technique: its name, if the method has another. make(lm, value): for a
    baseline that is no technique. random: the options that make the technique its own random
    baseline, and random_knob, if that has another. seeds: of a random baseline, which is a mean
    over them.
    """

    name: str
    knob: Knob | None
    options: dict | Callable = field(default_factory=dict)
    technique: str | None = None
    make: Callable | None = None
    random: dict | None = None
    random_knob: Knob | None = None
    seeds: tuple[int, ...] = ()

    @property
    def wanted(self) -> str:
        """The name of the technique."""
        return self.technique or self.name

    def apply(self, lm: Part, value: float | None) -> Part:
        """The LM with this method at this value of its knob."""
        if self.make is not None:
            return self.make(lm, value)
        chosen = {} if self.knob is None else self.knob.options(value)
        return apply(lm, {self.wanted: self.options | chosen})

    def within(self, config) -> "Method":
        """The method with its options, and the range of its knob, for a model of this config."""
        options = self.options(config) if callable(self.options) else self.options
        knob = self.knob and self.knob.within(config)
        return replace(self, knob=knob, options=options)

    def random_form(self) -> "Method":
        """Its own random baseline. Its options must be known (``within``)."""
        return Method(
            f"{self.name} random",
            self.random_knob or self.knob,
            self.options | self.random,
            self.wanted,
        )

    def by_seed(self) -> list["Method"]:
        """The method with each of its seeds; itself if it has none."""
        forms = [replace(self, options=self.options | {"seed": seed}) for seed in self.seeds]
        return forms or [self]

    def at(self, value: float, share: float, S: int) -> float:
        """The value with which one query that sees S keys keeps this share of them. Only a number
        of keys has to grow with S."""
        return max(1, round(share * S)) if self.knob.keys else value

    def setting(self, *values: float | None) -> str:
        """The knob at this value (of several: from the smallest to the largest), as its option."""
        if self.knob is None:
            return as_words(self.options)
        ends = dict.fromkeys((min(values), max(values)))
        return f"{self.knob.name}={'..'.join(f'{x:g}' for x in ends)}"


def chosen_methods(table: Sequence[Method], wanted: Sequence[str] | None = None) -> list[Method]:
    """The methods of these names in the order of the table; all by default. The name of a technique
    stands for all its methods."""
    known = {key(method.name): method for method in table}
    if wanted is None:
        return list(table)
    found: set[str] = set()
    for name in wanted:
        matching = {k for k, method in known.items() if key(name) in (k, key(method.wanted))}
        if not matching:
            raise MinitxError(f"There is no method {abbreviate(name)}; {one_of(key(name), known)}")
        found |= matching
    return [known[name] for name in known if name in found]


def key(name: str) -> str:
    """A method's name as one word, as ``--methods`` takes it."""
    return name.replace("-", "_").replace(" ", "_")


def tune(
    knob: Knob,
    share: float,
    guess: float,
    measure: Callable[[float], float],
    known: dict,
    tolerance: float | None = None,
    most: float = math.inf,
) -> tuple[float | int, float]:
    """(value, share left there) for the value whose share comes closest to the wanted one.

    guess: the first value to try. measure(value): the share that is left. known {value: share}:
    what is measured already, for other shares too; it is added to. The search interpolates between
    the nearest values that leave too little and too much. tolerance: how close is close enough.
    most: the largest share that is good enough; if the knob does not reach it, or the share itself,
    the closest value is returned.
    """
    tolerance = TOLERANCE * share if tolerance is None else tolerance
    value = knob.value(knob.position(guess))
    repeated = 0  # values between two others that leave as much as one of them
    for _ in range(STEPS):
        if value is None or any(abs(left - share) <= tolerance for left in known.values()):
            break
        if value not in known:
            between = known and min(known.values()) < share <= max(known.values())
            left = measure(value)
            repeated += bool(between) and left in known.values()
            known[value] = left
        if repeated == STAIRS:
            break
        value = next_value(knob, share, known)
    fitting = {value: left for value, left in known.items() if left <= most} or known
    return min(fitting.items(), key=lambda found: abs(found[1] - share))


def next_value(knob: Knob, share: float, known: dict) -> float | None:
    """What to measure next, given {value: share} of what was measured; None if the end of the range
    is, or if there is nothing in between."""
    found = [(max(left, TINY), knob.position(value)) for value, left in known.items()]
    sign = -1 if knob.falling else 1
    found.sort(key=lambda point: (point[0], sign * point[1]))  # what leaves less, first
    below = next((point for point in reversed(found) if point[0] < share), None)
    above = next((point for point in found if point[0] >= share), None)
    if below and above:
        part = math.log(share / below[0]) / math.log(above[0] / below[0])
        part = min(max(part, EDGE), 1 - EDGE)
        if knob.scale == "linear" and len(known) % 3 == 0:
            part = 0.5  # now and then bisect: interpolation creeps where the curve is bent
        value = knob.value(below[1] + part * (above[1] - below[1]))
        if knob.is_integer:
            low, high = sorted(knob.value(point[1]) for point in (below, above))
            value = min(max(value, low + 1), high - 1)
    else:
        up = (above is None) != knob.falling  # raise the value, or lower it
        nearest = found[0][0] if above else found[-1][0]
        positions = [position for left, position in found if left == nearest]
        step = knob.step * 2 ** (len(positions) - 1)  # further, if the last step changed nothing
        far = min(max(positions) + step, 1.0) if up else max(min(positions) - step, 0.0)
        value = knob.value(far)
        if knob.is_integer and value in known and 0 < far < 1:  # a step of less than one
            value = min(max(value + (1 if up else -1), knob.low), knob.high)
    return None if value in known else value


def check_shares(shares, what: str) -> None:
    """MinitxError if these are not shares above 0 and below 1. what: of what."""
    if not isinstance(shares, Sequence) or isinstance(shares, str) or not shares:
        raise MinitxError(
            f"Expected one or more shares of {what}, such as 1/4; got {abbreviate(shares)}."
        )
    for share in shares:
        if not is_share(share):
            raise MinitxError(
                f"The share of {what} must be a number above 0 and below 1; got "
                f"{abbreviate(share)}."
            )


def is_share(value) -> bool:
    try:
        return 0 < as_number(value, float) < 1
    except ValueError:
        return False
