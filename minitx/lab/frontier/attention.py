"""``minitx frontier attention``: methods that select keys, compared at the same share of kept keys.

Each method (attention_methods.py) is tuned (knobs.py) to keep the wanted share of all pairs of a
query and a key that it sees, on chains of calibration stories. Then the model with the method in
every block reads chains of evaluation stories, all but the last token in one pass, to measure

- answers and losses, as ``minitx evaluate`` does (on --text FILE: losses of its tokens; its first
  window is for tuning, the next ones are measured);
- attention mass (attention_mass.py): how much of the exact softmax lies on the kept keys, and how
  much would lie on as many of the best keys; means over all queries, heads and blocks;
- cost: what attention to the last token, at the end of the context, takes by the ledger. The
  method's own work is included, the projections are not: they are the dense model's.

Latency at growing contexts is in attention_timing.py, what is printed in attention_report.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import islice

import numpy as np

from minitx import progress
from minitx.calibration import STORIES
from minitx.errors import MinitxError
from minitx.lab.evaluate import Encoded, Report, Tally, chains, report, story_end
from minitx.lab.frontier.attention_mass import KeyTotals, with_measured_selectors
from minitx.lab.frontier.attention_methods import METHODS, first_guess
from minitx.lab.frontier.attention_timing import CONTEXTS, Speed, crossover, measure_speeds
from minitx.lab.frontier.knobs import Method, check_shares, chosen_methods, tune
from minitx.lab.reading import (
    WINDOW,
    TextReport,
    logits_of,
    pieces,
    text_chains,
    warn_if_stories_are_unknown,
)
from minitx.ledger import Entry, Ledger, counting
from minitx.model import Attend
from minitx.text import Text, as_text, count_bytes
from minitx.tree import walk
from minitx.values import need_count


@dataclass(frozen=True)
class Grid:
    """What is measured, and on how much."""

    shares: tuple[float, ...] = (1 / 2, 1 / 4, 1 / 8)
    methods: tuple[str, ...] | None = None  # None: all
    chains: int = 8
    calibration: int = 1  # chains for tuning the methods
    tokens: int | None = None  # in each chain; None: the context (of a text: at most 512)
    grade: str = "full"
    text: str | Text | None = None  # to read instead of stories
    contexts: tuple[int, ...] = CONTEXTS
    rounds: int = 15  # of timing


@dataclass(frozen=True)
class Quality:
    """A model on chains: its answers, its attention mass, and what attention costs per token."""

    report: Report | TextReport
    kept: float  # share of the pairs of a query and a key that it sees
    mass: float  # share of the exact attention that lies on the kept keys
    best: float  # share on as many of each query's best keys
    cost: Entry  # of attention without projections, for one token at the end of the context

    @property
    def accuracy(self) -> float:
        """Of the answers in stories; of all tokens of a text."""
        return self.report.accuracy

    def as_dict(self) -> dict:
        return asdict(self) | {"report": self.report.as_dict(), "accuracy": self.accuracy}


@dataclass(frozen=True)
class Point:
    """One method at one share."""

    method: str
    share: float  # wanted
    setting: str  # of the knob: "M=0.5"
    calibrated: float  # share kept on the calibration chains
    quality: Quality
    speeds: tuple[Speed, ...]  # one for each context

    @property
    def crossover(self) -> int | None:
        return crossover(self.speeds)

    def as_dict(self, dense: Quality) -> dict:
        cost, full = self.quality.cost, dense.cost
        found = asdict(replace(self, quality=None, speeds=()))
        return (
            found
            | self.quality.as_dict()
            | {
                "multiply_adds_to_dense": cost.multiply_adds / full.multiply_adds,
                "bytes_to_dense": bytes_read(cost) / bytes_read(full),
                "speeds": [speed.as_dict() for speed in self.speeds],
                "crossover": self.crossover,
            }
        )


@dataclass(frozen=True)
class AttentionComparison:
    model: str
    plan: Grid
    shape: dict[str, int]  # heads, kv_heads, head_width
    dense: Quality
    points: list[Point]

    @property
    def text_name(self) -> str | None:
        """None: stories."""
        return None if self.plan.text is None else as_text(self.plan.text).name

    def as_dict(self) -> dict:
        from minitx.lab.frontier.attention_published import PUBLISHED

        return {
            "model": self.model,
            "plan": asdict(replace(self.plan, text=self.text_name)),
            "shape": self.shape,
            "dense": self.dense.as_dict(),
            "points": [point.as_dict(self.dense) for point in self.points],
            "published": [asdict(row) for row in PUBLISHED],
        }

    def __str__(self) -> str:
        from minitx.lab.frontier.attention_report import as_text

        return as_text(self)

    def picture(self, path) -> None:
        from minitx.lab.frontier.attention_report import picture

        picture(self, path)


def compare_attention(dense, plan: Grid = Grid(), bar: bool = True) -> AttentionComparison:
    """Compare the methods in an LM without techniques. MinitxError for a plan that does not fit the
    model, and for a model without a tokenizer."""
    plan = checked(dense, plan)
    methods = chosen_methods(METHODS, plan.methods)
    calibration, evaluation, make_report = to_read(dense, plan)
    plan = replace(plan, chains=len(evaluation), calibration=len(calibration))
    steps = len(methods) * len(plan.shares)
    total = (steps + 1) * plan.chains + steps + len(plan.contexts)
    with progress.bar(total, "dense", shown=bar) as shown:
        quality = measure(dense, dense, evaluation, make_report, shown.update)
        if plan.text is None:
            warn_if_stories_are_unknown(STORIES, quality.report)
        apply, settings, points = cached_apply(dense), {}, []
        for method in methods:
            shown.set_description(method.name)
            known: dict[float, float] = {}  # what is measured for one share may help another
            for share in plan.shares:
                value, reached = calibrate(apply, method, share, calibration, known)
                shown.update()
                lm = apply(method, value)
                found = measure(dense, lm, evaluation, make_report, shown.update)
                settings[method.name, share] = method, value
                points.append(Point(method.name, share, method.setting(value), reached, found, ()))
        shown.set_description("time")
        texts = [chain.ids[:-1] for chain in evaluation]
        timed = settings, texts, plan.contexts, plan.rounds
        speeds = measure_speeds(dense, apply, *timed, shown.update)
    points = [replace(p, speeds=tuple(speeds[p.method, p.share])) for p in points]
    c = dense.model.config
    shape = {"heads": c.heads, "kv_heads": c.kv_heads, "head_width": c.head_width}
    return AttentionComparison(dense.name, plan, shape, quality, points)


def to_read(dense, plan: Grid):
    """Chains to tune the methods on, chains to measure them on, and a function from the sums over
    the latter to their report."""
    if plan.text is not None:
        split = plan.tokens, plan.calibration, plan.chains
        calibration, evaluation = text_chains(dense, plan.text, *split)
        size = sum(count_bytes(dense, chain.ids[1:]) for chain in evaluation)
        return calibration, evaluation, partial(TextReport.of, size=size)
    end = story_end(dense)

    def read(split: str, count: int) -> list[Encoded]:
        endless = chains(dense.tokenizer, split, plan.grade, plan.tokens, end)
        return list(islice(endless, count))

    return read("calibration", plan.calibration), read("evaluation", plan.chains), report


def checked(dense, plan: Grid) -> Grid:
    """The plan with its number of tokens filled in; MinitxError if it does not fit the model."""
    if dense.tokenizer is None:
        raise MinitxError(
            "frontier attention reads text and this model has no tokenizer; load it with "
            "tokenizer=PATH."
        )
    context = dense.model.config.context
    usual = context if plan.text is None else min(context, WINDOW)
    tokens = usual if plan.tokens is None else need_count(plan.tokens, "tokens")
    if not 2 <= tokens <= context:
        raise MinitxError(f"tokens must be 2 to the model's context {context}; got {tokens}.")
    for name in ("chains", "calibration", "rounds"):
        need_count(getattr(plan, name), name)
    check_shares(plan.shares, "keys")
    return replace(plan, tokens=tokens)


# Measuring ---------------------------------------------------------------------------------------


def cached_apply(dense):
    """``apply(method, value)``: the LM with the method at this value of its knob. Each is made only
    once, since some methods calibrate on stories."""
    made: dict = {}

    def apply(method: Method, value: float):
        key = method.name, value
        if key not in made:
            made[key] = method.apply(dense, value)
        return made[key]

    return apply


def calibrate(
    apply, method: Method, share: float, calibration: Sequence[Encoded], known: dict
) -> tuple[float, float]:
    """The value of the method's knob for this share, and the share that it keeps."""

    def measure(value: float) -> float:
        totals = KeyTotals()
        lm = with_measured_selectors(apply(method, value), totals, mass=False)
        for chain in calibration:
            lm.model.hidden(chain.ids[:-1])
        add_dense(totals, lm, calibration)
        return totals.kept / totals.seen

    guess = first_guess(method.knob, share, len(calibration[0].kinds))
    return tune(method.knob, share, guess, measure, known)


def measure(dense, lm, read: Sequence[Encoded], make_report, tick) -> Quality:
    """One chain after another, since not every method takes batches."""
    keys, answers, cost = KeyTotals(), Tally.empty(), Entry()
    if lm is not dense:
        lm = with_measured_selectors(lm, keys)
    for chain in read:
        ids, targets, kinds = chain.ids[:-1], np.array(chain.ids[1:]), np.array(chain.kinds)
        state = lm.model.new_state()
        hidden = lm.model.hidden(ids[:-1], state)
        with counting(lm) as counts:
            last = lm.model.hidden(ids[-1:], state)
        cost += without_projections(dense, counts)
        answers.floor += chain.nats
        hidden = np.concatenate([hidden, last])
        for some in pieces(len(hidden), dense.model.config.vocab_size):
            answers.add(logits_of(lm, hidden[some]), targets[some], kinds[some])
        tick()
    add_dense(keys, dense, read)
    shares = keys.kept / keys.seen, keys.mass / keys.rows, keys.best / keys.rows
    return Quality(make_report(answers), *shares, cost.divided(len(read)))


def add_dense(totals: KeyTotals, lm, read: Sequence[Encoded]) -> None:
    c = lm.model.config
    totals.add_dense(len(read[0].kinds), len(read) * c.layers * c.heads)


# Costs -------------------------------------------------------------------------------------------

ATTENTION = "blocks.attn"  # the ledger's name for attention with its projections


def without_projections(dense, counts: Ledger) -> Entry:
    """The cost of attention for one token, less that of the projections, which no method changes.
    Everything that a method does for attention is included."""
    spent, own = counts.by_group()[ATTENTION], projections(dense)
    return Entry(
        spent.multiply_adds - own.multiply_adds,
        spent.weight_bytes - own.weight_bytes,
        spent.cache_bytes,
    )


@lru_cache(maxsize=1)
def projections(dense) -> Entry:
    """The cost of the dense model's attention for one token, less that of scores and values."""
    with counting(dense) as counts:
        dense.model.hidden([0])
    inner = [path for path, node in walk(dense) if type(node) is Attend]
    attend = sum((counts.total(path) for path in inner), Entry())
    spent = counts.by_group()[ATTENTION]
    return Entry(
        spent.multiply_adds - attend.multiply_adds, spent.weight_bytes - attend.weight_bytes
    )


def bytes_read(cost: Entry) -> int:
    return cost.weight_bytes + cost.cache_bytes
