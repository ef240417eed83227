"""Learn then Test: choose a threshold whose error stays below a bound, with a stated confidence.

Angelopoulos, Bates, Candes, Jordan and Lei, 2021, arXiv 2110.01052, as CALM (Schuster et al., 2022,
arXiv 2207.07061) uses it for early exit. For each setting on a fixed grid, test the null hypothesis
"the mean loss is above delta" on calibration texts, from the safest setting on, and stop at the
first that cannot be rejected. The mean loss of the last rejected one is at most delta, except for a
share epsilon of all draws of the calibration texts:

    P(mean loss <= delta) >= 1 - epsilon

The guarantee is for texts drawn like the calibration texts, and for their mean, not for each text.
The grid must be fixed before the losses are seen. Not here: losses against reference texts (CALM's
risk consistency), and other procedures for testing several settings.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minitx.errors import MinitxError
from minitx.technique import apply, find


def hoeffding_bentkus(risk: float, n: int, delta: float) -> float:
    """A p-value for the null hypothesis "the mean loss is above delta", where n independent losses
    in [0, 1] have the mean ``risk``: the smaller of Hoeffding's bound and Bentkus's bound,

        exp(-n h1(min(risk, delta), delta))  and  e * P[Bin(n, delta) <= ceil(n risk)]

    with h1(a, b) = a ln(a / b) + (1 - a) ln((1 - a) / (1 - b)). It is 1 if risk >= delta.
    """
    if not (0 <= risk <= 1 and 0 < delta < 1 and n >= 1):
        raise MinitxError(
            "The p-value needs a mean loss in [0, 1], a bound between 0 and 1 and at least one "
            f"text; got a mean loss of {risk:g}, a bound of {delta:g} and {n} texts."
        )
    if risk >= delta:
        return 1.0
    hoeffding = math.exp(-n * h1(risk, delta))
    successes = math.ceil(n * risk - 1e-9)  # 1e-9: 100 * 0.07 = 7.000000000000001 should give 7
    return min(hoeffding, math.e * binomial_tail(successes, n, delta))


def h1(a: float, b: float) -> float:
    """KL divergence, in nats, of a Bernoulli variable with mean a from one with mean b."""
    first = a * math.log(a / b) if a else 0.0
    return first + ((1 - a) * math.log((1 - a) / (1 - b)) if a < 1 else 0.0)


def binomial_tail(k: int, n: int, p: float) -> float:
    """P[Bin(n, p) <= k] for 0 < p < 1, the sum of its terms."""
    ways = math.lgamma(n + 1)
    logs = (
        ways - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        + i * math.log(p) + (n - i) * math.log1p(-p)
        for i in range(min(k, n) + 1)
    )  # fmt: skip
    return min(math.fsum(map(math.exp, logs)), 1.0)


def fixed_sequence(p_values: Iterable[float], epsilon: float) -> int:
    """Fixed-sequence testing: how many hypotheses are rejected, in their order. The first p-value
    above epsilon ends it: testing on after that would lose the guarantee, so no later p-value is
    computed."""
    rejected = 0
    for p in p_values:
        if not p <= epsilon:
            break
        rejected += 1
    return rejected


@dataclass(frozen=True)
class Calibrated:
    """The options found, and for each value tested (value, mean loss, p-value). The last value
    tested is the one that failed, unless all passed."""

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
    """Options of a technique for which P(mean loss <= delta) >= 1 - epsilon, over the draw of the
    texts; its neutral options if no value of the grid is safe.

    The loss of a text is the share of its tokens after which the greedy prediction differs from the
    dense model's (CALM's textual consistency), so no labels are needed.

    texts: lists of ids, or strings, drawn independently; none that the model or the technique was
    trained on, or that the grid was chosen on. grid: values of ``option``, the safest first (for a
    threshold, the largest). options: the other options of the technique.
    """
    for name, value in (("delta", delta), ("epsilon", epsilon)):
        if not 0 < value < 1:
            raise MinitxError(f"{name} must be between 0 and 1; got {value:g}.")
    if not len(texts):
        raise MinitxError("Expected at least one text to calibrate on; got none.")
    neutral = find(technique).neutral
    if neutral is None:
        raise MinitxError(
            f"{technique} has no neutral setting to fall back on; calibrate another technique."
        )
    encoded = [lm.encode(text) for text in texts]
    dense = [lm.logits(ids).argmax(-1) for ids in encoded]
    tested: list[tuple[float, float, float]] = []

    def p_values():
        for value in grid:
            changed = apply(lm, {technique: options | {option: value}})
            risk = float(np.mean([loss(changed, *pair) for pair in zip(encoded, dense)]))
            tested.append((value, risk, hoeffding_bentkus(risk, len(encoded), delta)))
            yield tested[-1][-1]

    safe = fixed_sequence(p_values(), epsilon)
    found = options | ({option: tested[safe - 1][0]} if safe else neutral)
    return Calibrated(found, tuple(tested))


def loss(lm, ids: Sequence[int], expected) -> float:
    """The share of the ids (T,) after which the argmax token is not the ``expected`` one (T,)."""
    return float((lm.logits(ids).argmax(-1) != expected).mean())
