"""Learn then Test: a setting whose risk is below a bound, with a stated confidence.

Angelopoulos, Bates, Candes, Jordan and Lei, 2021, arXiv 2110.01052, as CALM (Schuster et al., 2022,
arXiv 2207.07061) uses it to choose a threshold. Every setting of a list that was written down
beforehand has the null hypothesis "the mean loss is above delta"; they are tested from the safest
one on, and the first that cannot be rejected ends it. Then the chosen one has a mean loss of at
most delta in all but a share epsilon of all draws of the texts. That holds over texts like those it
was calibrated on, for their mean, and not for each of them.

Not here: losses against reference texts (CALM's risk consistency), and other ways to test several
settings at once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minitx.errors import MinitxError
from minitx.technique import apply, find


def hoeffding_bentkus(risk: float, n: int, delta: float) -> float:
    """A p-value for "the mean loss is above delta", where n independent losses, all from 0 to 1,
    have the mean ``risk``: the smaller of Hoeffding's bound and Bentkus's,

    exp(-n h1(min(risk, delta), delta))  and  e P[Bin(n, delta) <= ceil(n risk)],

    with h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)). Above delta it is 1.
    """
    if not (0 <= risk <= 1 and 0 < delta < 1 and n >= 1):
        raise MinitxError(
            f"A mean loss of {risk:g} over {n} texts and a bound of {delta:g} cannot be tested; "
            "the loss must be from 0 to 1, the bound between 0 and 1, and there must be a text."
        )
    if risk >= delta:
        return 1.0
    hoeffding = math.exp(-n * h1(risk, delta))
    successes = math.ceil(n * risk - 1e-9)  # a hair less: 100 * 0.07 = 7.000000000000001 means 7
    return min(hoeffding, math.e * binomial_tail(successes, n, delta))


def h1(a: float, b: float) -> float:
    """The divergence of a coin that falls heads with chance a from one with chance b, in nats."""
    first = a * math.log(a / b) if a else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def binomial_tail(k: int, n: int, p: float) -> float:
    """P[Bin(n, p) <= k], by its terms: for a p between 0 and 1."""
    ways = math.lgamma(n + 1)
    logs = (
        ways - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(min(k, n) + 1)
    )  # fmt: skip
    return min(math.fsum(map(math.exp, logs)), 1.0)


def fixed_sequence(p_values: Iterable[float], epsilon: float) -> int:
    """How many of the hypotheses, in their fixed order, are rejected: those before the first whose
    p-value is above epsilon. Going on behind that one would lose the guarantee, so no later p-value
    is asked for."""
    rejected = 0
    for p in p_values:
        if not p <= epsilon:
            break
        rejected += 1
    return rejected


@dataclass(frozen=True)
class Calibrated:
    """What was found: the technique's options, and each value that was tested with the mean loss
    and the p-value found. The last of them is the one that failed, unless all passed."""

    options: dict
    tested: tuple[tuple[float, float, float], ...]


def calibrate(
    lm,
    texts: Sequence,
    delta: float,
    epsilon: float = 0.05,
    grid: Sequence[float] = tuple(i / 20 for i in range(19, 0, -1)),
    technique: str = "early_exit",
    option: str = "threshold",
    **options,
) -> Calibrated:
    """Options of a technique with which its mean loss is at most ``delta``, with probability at
    least 1 - ``epsilon`` over the draw of the texts; its neutral ones if none of the grid is safe.

    The loss of a text is the share of its tokens after which the greedy choice is another than the
    dense model's (CALM's textual consistency): no labels are needed. texts: lists of ids, or
    strings, drawn independently, and none of those that trained anything or that the grid was
    chosen on. grid: values of the ``option`` from the safest on, which for a threshold is the
    largest. options: the technique's others. MinitxError for no texts, a delta or epsilon that is
    not between 0 and 1, or a technique without a neutral setting.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise MinitxError(f"{name} is {value:g}; a number between 0 and 1 is needed.")
    if not len(texts):
        raise MinitxError("There are no texts to calibrate on; give some.")
    neutral = find(technique).neutral
    if neutral is None:
        raise MinitxError(f"{technique} has no setting that changes nothing to fall back on.")
    encoded = [lm.encode(text) for text in texts]
    expected = [lm.logits(ids).argmax(-1) for ids in encoded]
    tested: list[tuple[float, float, float]] = []

    def p_values():
        for value in grid:
            changed = apply(lm, {technique: options | {option: value}})
            risk = float(np.mean([loss(changed, *pair) for pair in zip(encoded, expected)]))
            tested.append((value, risk, hoeffding_bentkus(risk, len(encoded), delta)))
            yield tested[-1][-1]

    safe = fixed_sequence(p_values(), epsilon)
    chosen = options | ({option: tested[safe - 1][0]} if safe else neutral)
    return Calibrated(chosen, tuple(tested))


def loss(lm, ids: Sequence[int], expected) -> float:
    """The share of the ids (T,) after which the most likely token is not the ``expected`` (T,)."""
    return float((lm.logits(ids).argmax(-1) != expected).mean())
