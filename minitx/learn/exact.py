"""The exact distribution of what a random algorithm returns, without drawing a single number.

    >>> def two_coins(rng):
    ...     return int(rng.random() < 0.5) + int(rng.random() < 0.5)
    >>> dict(exact_distribution(two_coins))
    {2: 0.25, 1: 0.5, 0: 0.25}

The algorithm runs once for each way in which its draws can end. Instead of a
``np.random.Generator`` it gets an ``ExactGenerator``, which takes the next way at each draw and
keeps the probability of all of them together. So an error of any size is seen, and never by bad
luck.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from minitx.errors import MinitxError, abbreviate

NEGLIGIBLE = 1e-12  # an outcome with a smaller probability is due to rounding
ROUNDING = 1e-8  # how far probabilities may be from a sum of 1, as in NumPy
MOST_DRAWS, MOST_RUNS = 100, 2_000  # of an algorithm that ends

ALLOWED = "Use rng.random(), compared with a number, or rng.choice(n, p=...)."
OTHER_NUMBERS = "Use no other random numbers than those of rng."


class NotEnumerable(MinitxError):
    """The algorithm did something of which the outcomes cannot be enumerated."""


class NotProbabilities(MinitxError):  # a ValueError, as NumPy raises it
    """Probabilities that are negative, NaN, or of the wrong shape."""


class NotNormalized(NotProbabilities):
    """Probabilities that do not sum to 1."""


def exact_distribution(run: Callable[["ExactGenerator"], object]) -> dict:
    """{result: probability} of ``run(rng)``, over every outcome of its draws. Results must be
    hashable: return a tuple instead of a list. NotEnumerable if there are too many outcomes, or if
    ``run`` uses other random numbers than those of ``rng``."""
    found: dict = defaultdict(float)
    script: list[int] = []
    for _ in range(MOST_RUNS):
        rng = ExactGenerator(script)
        found[run(rng)] += rng.probability
        script = next_script(rng.taken)
        if not script:
            if abs(sum(found.values()) - 1) > 1e-6:
                raise NotEnumerable(OTHER_NUMBERS)
            return dict(found)
    raise NotEnumerable(f"There are more than {MOST_RUNS:,} outcomes; is there an endless loop?")


def next_script(taken: Sequence[tuple[int, int]]) -> list[int]:
    """The ways to take in the next run: the last draw that has another outcome takes it. Empty
    when all runs are done. taken: (which outcome, of how many) for each draw of the last run."""
    taken = list(taken)
    while taken and taken[-1][0] + 1 == taken[-1][1]:
        taken.pop()  # that draw has no further outcome
    if not taken:
        return []
    return [*(which for which, _ in taken[:-1]), taken[-1][0] + 1]


class ExactGenerator:
    """Stands in for a ``np.random.Generator``. The draws take the outcomes in ``script``, and after
    its end the first one that is possible."""

    def __init__(self, script: Sequence[int] = ()):
        self.script = script
        self.taken: list[tuple[int, int]] = []  # (which outcome, of how many) for each draw
        self.probability = 1.0  # of these outcomes

    def random(self, size: int | None = None):
        """A number that is uniform in [0, 1), or an array of them."""
        if size is None:
            return Uniform(Unknown(self))
        return np.array([Uniform(Unknown(self)) for _ in range(operator.index(size))], object)

    def choice(self, a, size=None, replace=True, p=None):
        """One of the integers below ``a``, or one of the items of a sequence."""
        if size is not None:
            raise NotEnumerable("rng.choice draws one at a time here; leave size out.")
        items = np.asarray(a) if np.ndim(a) else None
        n = operator.index(a) if items is None else len(items)
        p = np.full(n, 1 / n) if p is None else checked(p, n)
        i = self.outcome(p)
        return np.int64(i) if items is None else items[i]

    def outcome(self, p: Sequence[float]) -> int:
        """Which of len(p) outcomes with these probabilities happens in this run."""
        possible = [i for i, share in enumerate(p) if share > NEGLIGIBLE]
        if len(possible) == 1:
            return possible[0]
        step = len(self.taken)
        if step == MOST_DRAWS:
            raise NotEnumerable(
                f"There are more than {MOST_DRAWS} draws; is there an endless loop?"
            )
        which = self.script[step] if step < len(self.script) else 0
        if which >= len(possible):
            raise NotEnumerable(OTHER_NUMBERS)
        self.taken.append((which, len(possible)))
        self.probability *= float(p[possible[which]])
        return possible[which]

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        raise NotEnumerable(f"rng.{name} is not available. {ALLOWED}")


def checked(p, n: int) -> np.ndarray:
    """Probabilities that NumPy would accept, too."""
    p = np.asarray(p, np.float64)
    if p.shape != (n,):
        raise NotProbabilities(f"rng.choice({n}, p=...) needs {n} probabilities, got {p.shape}.")
    if not (p >= 0).all():
        what = "NaN" if np.isnan(p).any() else "negative"
        raise NotProbabilities(f"rng.choice got probabilities that are {what}: {shortly(p)}.")
    if abs(p.sum() - 1) > ROUNDING:
        raise NotNormalized(
            f"rng.choice got probabilities that do not sum to 1 but to {p.sum():.4g}: {shortly(p)}."
        )
    return p


def shortly(p: np.ndarray) -> str:
    shown = ", ".join(f"{value:.4g}" for value in p[:6])
    return f"[{shown}{', ...' if len(p) > 6 else ''}]"


# A number that is not drawn until it has to be ---------------------------------------------------


class Unknown:
    """A number of which only an interval is known, in which it is uniform. A comparison divides the
    interval at the bound, and goes on in one of the two pieces."""

    def __init__(self, rng: ExactGenerator):
        self.rng, self.low, self.high = rng, 0.0, 1.0

    def is_below(self, bound: float) -> bool:
        cut = min(max(bound, self.low), self.high)
        below = (cut - self.low) / (self.high - self.low)
        if self.rng.outcome((below, 1 - below)) == 0:
            self.high = cut
            return True
        self.low = cut
        return False


class Uniform:
    """scale * u + shift of an unknown u in [0, 1): what ``rng.random()`` returns, with the scale 1
    and the shift 0. It can be compared with numbers, multiplied, divided, added and subtracted."""

    def __init__(self, u: Unknown, scale: float = 1.0, shift: float = 0.0):
        self.u, self.scale, self.shift = u, scale, shift

    def below(self, bound) -> bool:
        cut = (number(bound) - self.shift) / self.scale
        if cut != cut:
            return False  # no number is below NaN, nor above it
        return self.u.is_below(cut) == (self.scale > 0)

    def above(self, bound) -> bool:
        return number(bound) == number(bound) and not self.below(bound)  # not NaN

    def equal(self, bound) -> bool:
        return number(bound) is None  # never: that has the probability 0

    def __lt__(self, other):
        return other is not self and each(self.below, other)  # (np.searchsorted asks u < u)

    def __gt__(self, other):
        return other is not self and each(self.above, other)

    def __eq__(self, other):
        return each(self.equal, other)

    def __ne__(self, other):
        return each(lambda bound: not self.equal(bound), other)

    __le__, __ge__, __hash__ = __lt__, __gt__, None

    def __mul__(self, other):
        factor = number(other)
        return Uniform(self.u, self.scale * factor, self.shift * factor) if factor else 0.0

    def __add__(self, other):
        return Uniform(self.u, self.scale, self.shift + number(other))

    def __truediv__(self, other):
        return self * (1 / number(other))

    def __sub__(self, other):
        return self + -number(other)

    def __rsub__(self, other):
        return self * -1.0 + other

    __rmul__, __radd__ = __mul__, __add__

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        """What a NumPy number or array on the left does with it: ``np.float64(0.5) < u``."""
        known = OPERATORS.get(ufunc.__name__)
        if known is None or method != "__call__" or options:
            raise NotEnumerable(
                f"np.{ufunc.__name__} cannot be applied to the result of rng.random(). {ALLOWED}"
            )
        pairs = np.broadcast(*(np.asarray(x, object) for x in inputs))
        results = [known(plain(a), plain(b)) for a, b in pairs]
        return np.array(results).reshape(pairs.shape) if pairs.shape else results[0]

    def refuse(self, *_):
        raise NotEnumerable(f"The result of rng.random() was used as a number. {ALLOWED}")

    __float__ = __int__ = __bool__ = __index__ = __round__ = refuse
    __pow__ = __rpow__ = __rtruediv__ = __floordiv__ = __mod__ = refuse


OPERATORS = {
    "less": operator.lt,
    "less_equal": operator.le,
    "greater": operator.gt,
    "greater_equal": operator.ge,
    "equal": operator.eq,
    "not_equal": operator.ne,
    "multiply": operator.mul,
    "add": operator.add,
    "subtract": operator.sub,
    "divide": operator.truediv,
}


def plain(value):
    """A NumPy number as one of Python's, which leaves comparisons to the ``Uniform``."""
    return value.item() if isinstance(value, np.generic) else value


def number(value) -> float:
    if isinstance(value, Uniform):
        raise NotEnumerable(f"There are two results of rng.random() in one expression. {ALLOWED}")
    if np.ndim(value) or np.asarray(value).dtype.kind not in "biuf":
        what = abbreviate(value)
        raise NotEnumerable(f"The result of rng.random() was combined with {what}. {ALLOWED}")
    return float(value)


def each(compare: Callable, other):
    """The comparison with a number, or with each number of an array."""
    if np.ndim(other) == 0:
        return compare(other)
    return np.array([compare(bound) for bound in np.ravel(other)]).reshape(np.shape(other))
