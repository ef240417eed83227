"""The search of loop perforation: how much of each loop is skipped.

First every loop is perforated alone, at a few rates, and the error of the program's output is
measured. Then rates are combined greedily. A loop is a matrix, and the error is the KL divergence
of the next token's distribution from the dense model's.
"""

from collections.abc import Callable

import numpy as np

from minitx.calibration import remembered
from minitx.model import Linear
from minitx.progress import bar
from minitx.tree import rebuild

RATES = (0.25, 0.5, 0.75)  # tried for each matrix


def searched_rates(
    lm, wanted: dict[int, Linear], rate: float, texts, make: Callable, settings: tuple
) -> list[float]:
    """The rate of each wanted matrix, so that ``rate`` of their multiply-adds is skipped. Errors
    are measured on the first text. make(linear, rate): the perforated matrix, which the texts and
    the settings determine."""

    def measure():
        return errors_alone(lm, wanted, texts[0], make)

    return combine(remembered("perforate", lm, texts, settings, measure), sizes_of(wanted), rate)


def random_rates(wanted: dict[int, Linear], rate: float, seed: int) -> list[float]:
    """The baseline of the search: the same with random numbers for errors."""
    errors = np.random.default_rng(seed).random((len(wanted), len(RATES)))
    return combine(errors.tolist(), sizes_of(wanted), rate)


def sizes_of(wanted: dict[int, Linear]) -> list[int]:
    return [linear.w.size for linear in wanted.values()]


def errors_alone(lm, wanted: dict[int, Linear], ids, make: Callable) -> list[tuple]:
    """For each matrix, the KL divergence at each of ``RATES`` if only this matrix is perforated."""
    dense, found = log_softmax(lm.logits(ids)), []
    for key in bar(wanted, "perforate: search", unit="matrix", delay=1.0):
        candidates = [replaced(lm.model, key, make(wanted[key], rate)) for rate in RATES]
        found.append(tuple(divergence(dense, log_softmax(model(ids))) for model in candidates))
    return found


def replaced(model, key: int, new):
    """The model with another part instead of the matrix with this id."""
    return rebuild(model, lambda node: new if id(node) == key else None)


def combine(alone: list[tuple], sizes: list[int], rate: float) -> list[float]:
    """The rate of each matrix: 0, or one of ``RATES``. alone[m][n]: the error if only matrix m is
    perforated, at RATES[n]. sizes[m]: its multiply-adds per token.

    Again and again, raise the rate of one matrix: where the error grows least per multiply-add that
    is saved, among the steps after which at most ``rate`` of all multiply-adds is skipped."""
    budget = rate * sum(sizes) * (1 + 1e-9)
    rates, errors, saved = [0.0] * len(sizes), [0.0] * len(sizes), 0.0
    while True:
        steps = []
        for m, size in enumerate(sizes):
            for new, error in zip(RATES, alone[m], strict=True):
                more = (new - rates[m]) * size
                if more > 0 and saved + more <= budget:
                    steps.append(((error - errors[m]) / more, m, new, error, more))
        if not steps:
            return rates
        _, m, rates[m], errors[m], more = min(steps)
        saved += more


def log_softmax(logits):
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(dense, changed) -> float:
    """KL(dense || changed) in nats per token, of log-probabilities (T, V)."""
    return float((np.exp(dense) * (dense - changed)).sum(-1).mean())
