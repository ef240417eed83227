"""The search of loop perforation: which share of each loop is skipped.

First every loop is perforated alone, at a few rates, and the error of the program's output is
measured. Then rates are combined greedily. A loop is a matrix, and the error is the KL divergence
of the next token's distribution from the dense model's.
"""

from collections.abc import Callable

import numpy as np

from minitx.calibration import remembered
from minitx.model import Linear, Stack, Transformer
from minitx.ops import softmax
from minitx.progress import bar
from minitx.technique import need
from minitx.tree import Part, rebuild, walk

RATES = (0.25, 0.5, 0.75)  # tried for each matrix
TRIAL = 2  # calibration texts on which the error is measured


def searched_rates(
    lm, wanted: dict[int, Linear], rate: float, texts, make: Callable, settings: tuple
) -> list[float]:
    """The rate of each wanted matrix, so that ``rate`` of their multiply-adds is skipped.
    make(linear, rate): the perforated matrix, which the texts and the settings determine."""

    def measure():
        return errors_alone(lm.model, wanted, texts[:TRIAL], make)

    return combine(remembered("perforate", lm, texts, settings, measure), sizes_of(wanted), rate)


def random_rates(wanted: dict[int, Linear], rate: float, seed: int) -> list[float]:
    """The baseline of the search: the same with random numbers for errors."""
    errors = np.random.default_rng(seed).random((len(wanted), len(RATES)))
    return combine(errors.tolist(), sizes_of(wanted), rate)


def sizes_of(wanted: dict[int, Linear]) -> list[int]:
    return [linear.w.size for linear in wanted.values()]


# Each matrix alone -------------------------------------------------------------------------------


def errors_alone(model, wanted: dict[int, Linear], texts, make: Callable) -> list[tuple]:
    """For each matrix, the KL divergence at each of ``RATES`` if only this matrix is perforated."""
    need(model, Transformer)
    need(model.stack, Stack)
    trials, found = [Trial(model, ids) for ids in texts], []
    for key in bar(wanted, "perforate: search", unit="matrix", delay=1.0):
        block = first_block_of(key, model.stack.blocks)
        changed = (replaced(model, key, make(wanted[key], rate)) for rate in RATES)
        errors = ([trial.errors(one, block) for trial in trials] for one in changed)
        found.append(tuple(float(np.concatenate(error).mean()) for error in errors))
    return found


class Trial:
    """A text that the dense model has read: the inputs of its blocks, and its output."""

    def __init__(self, model, ids):
        self.ids, self.inputs = ids, []
        state = model.new_state(remember=False)
        x = model.embed(np.array(ids), state.take(len(ids)).lookup)
        for index in range(len(model.stack.blocks)):
            self.inputs.append(x)
            x = self.run(model, index, index + 1)
        logits = model.head(model.norm(x))
        self.p = softmax(logits.astype(np.float64))
        self.entropy = cross_entropy(self.p, logits)

    def run(self, model, first: int, last: int):
        """Blocks first .. last - 1, from what the dense model's earlier blocks made of the text."""
        state = model.new_state(remember=False)
        state.take(len(self.ids))
        with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
            return model.stack.run(self.inputs[first], state, first, last)

    def errors(self, model, first: int):
        """(T,) KL(dense || model) in nats for each token; the model differs from the dense one from
        block ``first`` on."""
        x = self.run(model, first, len(self.inputs))
        return cross_entropy(self.p, model.head(model.norm(x))) - self.entropy


def first_block_of(key: int, blocks) -> int:
    return next(i for i, block in enumerate(blocks) if any(id(p) == key for _, p in walk(block)))


def replaced(model, key: int, new: Part):
    """The model with another part instead of the matrix with this id."""
    return rebuild(model, lambda node: new if id(node) == key else None)


def cross_entropy(p, logits):
    """-sum of p log softmax(logits), in nats, (T,): p and logits (T, V)."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    score = np.vecdot(p, z)
    return np.log(np.exp(z, out=z).sum(-1)) - score


# Together ----------------------------------------------------------------------------------------


def combine(alone: list, sizes: list[int], rate: float) -> list[float]:
    """The rate of each matrix: 0, or one of ``RATES``. alone[m][n]: the error if only matrix m is
    perforated, at RATES[n]. sizes[m]: its multiply-adds per token.

    In each step raise the rate of one matrix: the one whose error grows least per multiply-add
    saved, among the steps after which at most ``rate`` of all multiply-adds is skipped."""
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
