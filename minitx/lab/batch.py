"""``minitx batch``: speed and multiply-adds of batches whose prompts differ in length.

The dense model pads them to the longest, and runs each sequence until all have ended. It takes
turns with the changed model, and with itself on one prompt after another, at several mean lengths.
Completions differ in length as prompts do: a sequence ends after a planned number of tokens,
whatever it says. A ratio is the median over the rounds. Time is CPU time; with one BLAS thread
(OPENBLAS_NUM_THREADS=1) on an idle machine that equals wall time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np

from minitx import ops, progress
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.lab.bench import elapsed, spread
from minitx.lab.compare import forget
from minitx.lab.first_token import endless_texts
from minitx.lab.layout import table
from minitx.ledger import counting

LEVELS = (0.25, 0.5, 0.6, 0.9, 1.0)  # mean length over the longest


@dataclass(frozen=True)
class BatchPlan:
    """size: prompts in a batch; longest: tokens of the longest prompt; new: tokens of the longest
    completion."""

    size: int = 16
    longest: int = 256
    new: int = 64
    rounds: int = 3


@dataclass(frozen=True)
class Phase:
    """Prefill or decoding. Speeds are relative to the padded batch of the dense model, each with
    median, lowest and highest."""

    multiply_adds: float  # relative to dense
    speed: dict[str, float]
    one_by_one: dict[str, float]  # of the dense model without batches
    dense_seconds: float


@dataclass(frozen=True)
class Level:
    mean: float  # of the prompts' lengths, over the longest
    prefill: Phase
    decoding: Phase


@dataclass(frozen=True)
class Batches:
    techniques: str
    plan: BatchPlan
    levels: tuple[Level, ...]

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        heads = [f"{phase}: {what}" for phase in ("prefill", "decoding") for what in COLUMNS]
        rows = [["mean / longest", *heads]]
        for level in self.levels:
            row = [f"{level.mean:.2f}"]
            for phase in (level.prefill, level.decoding):
                speeds = (phase.speed["median"], phase.one_by_one["median"])
                row += [f"{x:.2f}x" for x in (phase.multiply_adds, *speeds)]
            rows.append(row)
        plan = self.plan
        return (
            f"{self.techniques or 'no technique'}: batches of {plan.size} prompts, the longest of "
            f"{plan.longest} tokens, and up to {plan.new} new tokens. Relative to the padded "
            f"batch of the dense model; one by one: the dense model without batches.\n\n"
            f"{table(rows)}"
        )


COLUMNS = ("multiply-adds", "speed", "one by one")


def batches(dense, changed, techniques: str, plan: BatchPlan = BatchPlan(), bar=True) -> Batches:
    """Compare two LMs that share a vocabulary. MinitxError if the plan does not fit the context."""
    context = dense.model.config.context
    if plan.new < 2 or plan.longest + plan.new > context:
        raise MinitxError(
            f"batch: new must be >= 2, and longest and new together at most the context of "
            f"{context}; got {plan.longest} and {plan.new}."
        )
    with progress.bar(len(LEVELS) * plan.rounds, "batch", unit="round", shown=bar) as shown:
        levels = tuple(measure(dense, changed, plan, level, shown.update) for level in LEVELS)
    return Batches(techniques, plan, levels)


def measure(dense, changed, plan: BatchPlan, level: float, tick: Callable) -> Level:
    lengths = unequal(plan.size, plan.longest, level)
    ends = unequal(plan.size, plan.new, level)[::-1]  # the longest prompt is not the last to end
    texts = endless_texts(dense)
    prompts = [read(texts, n) for n in lengths]
    ways = (
        lambda: timed(together(dense, prompts, ends)),
        lambda: timed(together(changed, prompts, ends)),
        lambda: one_by_one(dense, prompts, ends),
    )
    work = [work_of(lm, prompts, ends) for lm in (dense, changed)]
    seconds = []  # of each round: (way, phase)
    for _ in range(plan.rounds):
        forget(changed)
        seconds.append([way() for way in ways])
        tick()
    phases = []
    for phase in (0, 1):
        padded, packed, alone = zip(*([way[phase] for way in turn] for turn in seconds))
        speeds = [spread([a / b for a, b in zip(padded, other)]) for other in (packed, alone)]
        phases.append(Phase(work[1][phase] / work[0][phase], *speeds, median(padded)))
    return Level(sum(lengths) / max(lengths) / plan.size, *phases)


def unequal(count: int, longest: int, level: float) -> list[int]:
    """``count`` lengths from 1 to ``longest``, in ascending order, with a mean of about ``level *
    longest``."""
    u = (np.arange(count) + 0.5) / count  # evenly spaced; u^p has the mean 1 / (p + 1)
    lengths = np.maximum(np.rint(longest * u ** (1 / level - 1)).astype(int), 1).tolist()
    return [*lengths[:-1], longest]


def read(texts, n: int) -> list[int]:
    ids: list[int] = []
    while len(ids) < n:
        ids += next(texts)
    return ids[:n]


class EndsAfter(Sampler):
    """Greedy decoding, except that the text ends after exactly ``count`` tokens."""

    def __init__(self, count: int, eos: Sequence[int]):
        super().__init__(temperature=1.0)  # at 0 a loop may choose by itself
        self.left, self.eos = count, list(eos)

    def __call__(self, logits: np.ndarray) -> int:
        self.left -= 1
        if self.left <= 0 and self.eos:
            return self.eos[0]
        logits = logits.copy()
        logits[self.eos] = -np.inf
        return ops.argmax_token(logits)


def together(lm, prompts, ends: Sequence[int]) -> Iterator[list[int]]:
    """The steps of one batch, until all sequences have ended."""
    choosers = [EndsAfter(n, lm.model.config.eos) for n in ends]
    return lm.decode.batch(lm.model, prompts, choosers, max(ends))


def one_by_one(lm, prompts, ends: Sequence[int]) -> tuple[float, float]:
    """``timed`` of one prompt after another, as ``lm.tokens`` runs them."""
    loops = [
        lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), n)
        for prompt, n in zip(prompts, ends)
    ]
    prefill, decoding = zip(*map(timed, loops))
    return sum(prefill), sum(decoding)


def timed(steps: Iterator) -> tuple[float, float]:
    """CPU seconds of prefill, up to the first step, and of decoding."""
    began = time.process_time()
    next(steps)
    first = elapsed(time.process_time, began)
    began = time.process_time()
    for _ in steps:
        pass
    return first, elapsed(time.process_time, began)


def work_of(lm, prompts, ends: Sequence[int]) -> tuple[int, int]:
    """Multiply-adds of prefill and of decoding."""
    with counting(lm) as counts:
        steps = together(lm, prompts, ends)
        next(steps)
        first = counts.total().multiply_adds
        for _ in steps:
            pass
    return first, counts.total().multiply_adds - first
