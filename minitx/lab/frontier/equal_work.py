"""Techniques at the same executed share of multiply-adds: ``minitx frontier structure``.

Each method is tuned (knobs.py) until the model, reading calibration stories (of a text: its first
window), executes the wanted share of the dense model's multiply-adds. Everything that the ledger
counts is in it, the head and the method's own work (routers, scores) too. A technique that decides
step by step reads as generation would run it, and so does the dense model that it is measured by.

Then it reads evaluation stories (or the rest of the text) and generates, as ``minitx compare`` does
(compare.py). An integer knob, such as a number of layers, reaches only some shares: taken is the
closest one that is at most ``OVER`` above the wanted share. Every row says what was executed on the
texts that it was measured on.

Each method runs in a process of its own (own_process.py): trouble costs its own rows only.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice

import numpy as np

from minitx import progress
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.compare import Comparison, Dense, compare_with, counted, measure_dense
from minitx.lab.compare_all import calibration_line
from minitx.lab.evaluate import Encoded, chains, encode, hops_name, story_end
from minitx.lab.frontier.families import Family
from minitx.lab.frontier.knobs import Method, check_shares, chosen_methods, tune
from minitx.lab.own_process import Lost, in_own_process, reason_of
from minitx.lab.reading import (
    PROMPT,
    TOKENS,
    WINDOW,
    Material,
    TextReport,
    hidden_as_generated,
    logits_of,
    stories_to_read,
    text_to_read,
)
from minitx.technique import decides
from minitx.text import Text, as_text, first_ids
from minitx.training.stories import stories
from minitx.values import need_count

CLOSE = 0.005  # of all multiply-adds: a search ends when it is that close to the wanted share
OVER = 0.02  # above the wanted share: the closest that is at most that much above is good enough
STOPPED = "stopped before it was measured."


@dataclass(frozen=True)
class Plan:
    """What is measured, and on how much."""

    shares: tuple[float, ...] = (0.9, 0.75, 0.5)
    methods: tuple[str, ...] | None = None  # None: all
    random: bool = False  # also each technique's own random baseline
    stories: int = 40
    chains: int = 0  # of stories instead, each as long as the context
    text: str | Text | None = None  # to read instead of stories, ``tokens`` of it
    tokens: int = TOKENS
    grade: str = "full"
    tuning: int = 8  # calibration stories that the methods are tuned on
    prompts: int = 4  # to continue
    rounds: int = 3  # of timing
    time_limit: float = 300.0  # seconds for one method


@dataclass(frozen=True)
class Figures:
    """What was measured of a method, relative to the dense model."""

    executed: float  # share of multiply-adds while reading, head included
    tuned: float  # the same on the texts that it was tuned on
    added_loss: float  # nats per token
    divergence: float  # KL(dense || changed), nats per token
    agreement: float  # of the argmax
    accuracy: dict[str, float]  # of answers by hops; of a text nothing
    multiply_adds: float  # per new token when generating
    weight_bytes: float  # read per new token
    cache_bytes: float  # of keys and values, read per new token
    cache: float  # of keys and values, held per token
    memory: float  # of all arrays
    speed: float  # of generating
    additions: float = 0.0  # per new token, to the dense model's multiply-adds: of table entries

    @classmethod
    def of(cls, c: Comparison, executed: float, tuned: float) -> "Figures":
        r = c.reading
        return cls(
            executed,
            tuned,
            r.added_loss,
            r.divergence,
            r.agreement,
            accuracy_of(r.changed),
            c.relative("multiply_adds"),
            c.relative("weight_bytes"),
            c.relative("cache_bytes"),
            c.cache,
            c.memory,
            c.generation.speed[0],
            additions(c),
        )

    @classmethod
    def mean(cls, found: Sequence["Figures"]) -> "Figures":
        """Of several seeds."""
        means = {f.name: [getattr(one, f.name) for one in found] for f in fields(cls)}
        accuracy = means.pop("accuracy")
        hops = {name: mean(one[name] for one in accuracy) for name in accuracy[0]}
        return cls(accuracy=hops, **{name: mean(values) for name, values in means.items()})


@dataclass(frozen=True)
class Row:
    """A method at one share; ``share`` is None for one without a knob, at settings of its own."""

    method: str
    share: float | None
    setting: str = ""
    figures: Figures | None = None  # None: the reason says why
    reason: str = ""
    lowest: float | None = None  # the least share that it executes, if that is too much
    losses: tuple[float, float] | None = None  # the lowest and highest added loss of several seeds
    seconds: float = 0.0  # of tuning and measuring
    notes: tuple[str, ...] = ()

    @classmethod
    def read(cls, found: dict) -> "Row":
        """The row from its ``asdict``, as JSON has it."""
        figures = found["figures"] and Figures(**found["figures"])
        losses = found["losses"] and tuple(found["losses"])
        return cls(**found | dict(figures=figures, losses=losses, notes=tuple(found["notes"])))


@dataclass(frozen=True)
class Frontier:
    """All methods of a family on one model."""

    family: str
    model: str
    plan: Plan
    measured: str  # on what
    tuning: str  # on what
    calibrated: str  # what the techniques calibrate on
    dense: dict[str, str]  # columns of its report
    accuracy: dict[str, float]  # of its answers by hops
    tokens_per_second: float
    rows: list[Row] = field(default_factory=list)

    @property
    def stopped(self) -> bool:
        return any(row.reason == STOPPED for row in self.rows)

    def as_dict(self) -> dict:
        text = None if self.plan.text is None else as_text(self.plan.text).name
        return asdict(replace(self, plan=replace(self.plan, text=text)))

    def __str__(self) -> str:
        from minitx.lab.frontier.work_report import as_text

        return as_text(self)

    def picture(self, path) -> None:
        from minitx.lab.frontier.work_report import picture

        picture(self, path)


def additions(c: Comparison) -> float:
    """Additions of table entries, which replace multiply-adds, over those of the dense model."""
    changed = sum((entry.additions for entry in c.generation.changed.values()), 0)
    return changed / max(sum(entry.multiply_adds for entry in c.generation.dense.values()), 1)


def compare_work(dense, family: Family, plan: Plan, bar: bool = True) -> Frontier:
    """Compare the methods of a family in an LM without techniques. MinitxError for a plan that does
    not fit."""
    check(plan)
    methods = methods_of(family, plan, dense.model.config)
    jobs = [(method, share) for method in methods for share in shares_of(method, plan)]
    material, tuning, tuned_on = to_read(dense, plan)
    known = measure_dense(dense, material, plan.prompts, lambda: None)
    measuring = Measuring(known, plan, tuning)
    rows: list[Row] = []
    with progress.bar(len(jobs), family.name, unit="row", shown=bar) as shown:
        try:
            for method in methods:
                shown.set_description(method.name)
                for row in measuring.rows_or_reasons(method):
                    rows.append(row)
                    shown.update()
        except KeyboardInterrupt:
            rows += [Row(m.name, share, reason=STOPPED) for m, share in jobs[len(rows) :]]
    return Frontier(
        family.name,
        dense.name,
        plan,
        material.name,
        tuned_on,
        calibration_line(dense),
        known.report.columns(),
        accuracy_of(known.report),
        known.tokens_per_second,
        rows,
    )


def methods_of(family: Family, plan: Plan, config) -> list[Method]:
    """The methods that are wanted, each followed by its own random baseline if those are, too."""
    found = []
    for method in chosen_methods(family.methods, plan.methods):
        fitted = method.within(config)
        found.append(fitted)
        if plan.random and method.random is not None:
            found.append(fitted.random_form().within(config))
    return found


def shares_of(method: Method, plan: Plan) -> Sequence[float | None]:
    return (None,) if method.knob is None else plan.shares


def accuracy_of(report) -> dict[str, float]:
    if isinstance(report, TextReport):
        return {}
    return {hops_name(hops): share for hops, share in report.by_hops.items()}


def mean(values) -> float:
    return float(np.mean(list(values)))


# What is read ------------------------------------------------------------------------------------


def check(plan: Plan) -> None:
    check_shares(plan.shares, "multiply-adds")
    for name in ("stories", "tokens", "tuning", "prompts", "rounds"):
        need_count(getattr(plan, name), name)


def to_read(dense, plan: Plan) -> tuple[Material, list[Encoded], str]:
    """What to measure on, texts to tune on, and what these are."""
    if plan.text is None:
        dense.need_tokenizer()
        material = stories_to_read(dense, plan.stories, plan.grade, plan.chains)
        end, context = story_end(dense), dense.model.config.context
        if plan.chains:
            endless = chains(dense.tokenizer, "calibration", plan.grade, context, end)
            return material, list(islice(endless, 1)), "a chain of calibration stories"
        found = list(islice(stories("calibration", plan.grade, TUNING_SEED), plan.tuning))
        texts = encode(dense.tokenizer, found, end=end)
        return material, texts, f"{len(texts)} calibration stories"
    text, window = as_text(plan.text), min(WINDOW, dense.model.config.context)
    size = len(first_ids(dense, text, window + plan.tokens))
    if size < LEAST:
        raise MinitxError(
            f"{text.name} has {size} tokens; expected at least {LEAST}: methods are tuned on the "
            "first third of a short text and measured on the rest."
        )
    first = min(window, size // 3)
    tuning = text_to_read(dense, text, first).texts
    material = text_to_read(dense, text, plan.tokens, skipped=first)
    return material, tuning, f"the {first} tokens before them"


TUNING_SEED = 1  # other calibration stories than those that the techniques calibrate on
LEAST = 12  # tokens of a text


# Work --------------------------------------------------------------------------------------------


def work_of(lm, texts: Sequence[Encoded], way: str | None = None) -> int:
    """Multiply-adds of reading the texts, with the logits of every token. way: as a model that
    ``decides`` this way."""
    total = 0
    for text in texts:
        hidden, work = counted(lm, hidden_as_generated, text.ids[:-1], way)
        _, head = counted(lm, logits_of, hidden)
        total += work.multiply_adds + head.multiply_adds
    return total


def dense_work(dense, texts: Sequence[Encoded], way: str) -> int:
    """``work_of`` for a dense model. In steps, a token that sees S tokens takes a + b S
    multiply-adds, so it is enough to count the first two."""
    if way != "step":
        return work_of(dense, texts, way)
    state = dense.model.new_state()
    hidden, one = counted(dense, lambda lm: lm.model.hidden(np.array([0]), state))
    _, two = counted(dense, lambda lm: lm.model.hidden(np.array([0]), state))
    _, head = counted(dense, logits_of, hidden)
    b = two.multiply_adds - one.multiply_adds
    a = one.multiply_adds - b
    total = 0
    for text in texts:
        T = len(text.ids) - 1
        prompt = min(PROMPT, T)
        _, first = counted(dense, lambda lm, n=prompt: lm.model.hidden(np.zeros(n, int)))
        S = np.arange(prompt + 1, T + 1)  # tokens that each of the others sees
        total += first.multiply_adds + int((a + b * S).sum()) + T * head.multiply_adds
    return total


# Measuring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measuring:
    """What all methods share."""

    known: Dense
    plan: Plan
    tuning: list[Encoded]

    def rows_or_reasons(self, method: Method) -> Iterator[Row]:
        """The rows of a method, measured in a process of its own; if that is lost, why."""
        left = list(shares_of(method, self.plan))
        try:
            for found in in_own_process(partial(self.tasks, method), self.plan.time_limit):
                del left[0]
                yield Row.read(found)
        except Lost as error:
            for share in left:
                yield Row(method.name, share, reason=str(error))

    def tasks(self, method: Method) -> Iterator[dict]:
        for row in self.rows(method):
            yield asdict(row)

    def rows(self, method: Method) -> Iterator[Row]:
        """A row for each share: figures, or why there are none."""
        searches = [Search(self, form) for form in method.by_seed()]
        for share in shares_of(method, self.plan):
            began = time.monotonic()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", MinitxWarning)
                try:
                    row = self.row(method, searches, share)
                except Exception as error:
                    row = Row(method.name, share, reason=reason_of(error))
            notes = (str(w.message) for w in caught if issubclass(w.category, MinitxWarning))
            seconds = time.monotonic() - began
            yield replace(row, seconds=seconds, notes=tuple(dict.fromkeys(notes)))

    def row(self, method: Method, searches: Sequence["Search"], share: float | None) -> Row:
        found, settings = [], []
        for search in searches:
            value, tuned = search.find(share)
            setting = search.method.setting(value)
            if share is not None and tuned > share + OVER:
                reason = f"not reached: {setting} still executes {tuned:.2f}."
                return Row(method.name, share, setting, reason=reason, lowest=tuned)
            found.append(self.figures(search.lm(value), tuned, 1 if found else self.plan.rounds))
            settings.append(setting)
        setting, losses = settings[0], None
        if len(found) > 1:
            setting = searches[0].method.setting(*(s.found[share] for s in searches))
            losses = min(f.added_loss for f in found), max(f.added_loss for f in found)
        return Row(method.name, share, setting, Figures.mean(found), losses=losses)

    def figures(self, lm, tuned: float, rounds: int) -> Figures:
        c = compare_with(self.known, lm, "", rounds, lambda: None)
        dense = dense_work(self.known.lm, self.known.material.texts, decides(lm.model))
        return Figures.of(c, c.reading.work.multiply_adds / dense, tuned)


KEPT = 3  # models: each may be as large as the dense one


class Search:
    """The values of one method's knob that were tried."""

    def __init__(self, measuring: Measuring, method: Method):
        self.measuring, self.method = measuring, method
        self.made: dict = {}  # the latest LMs by the value of the knob: some calibrate for a while
        self.executed: dict = {}  # share of the multiply-adds by value
        self.found: dict = {}  # value by wanted share

    def lm(self, value):
        if value not in self.made:
            if len(self.made) == KEPT:
                del self.made[next(iter(self.made))]
            self.made[value] = self.method.apply(self.measuring.known.lm, value)
        return self.made[value]

    def find(self, share: float | None) -> tuple[float | None, float]:
        """The value of the knob for this share, and the share that it executes."""
        knob = self.method.knob
        if knob is None:
            value = None
            executed = self.measure(None)
        else:
            known = self.executed, CLOSE, share + OVER
            value, executed = tune(knob, share, knob.guess(share), self.measure, *known)
        self.found[share] = value
        return value, executed

    def measure(self, value) -> float:
        lm, texts = self.lm(value), self.measuring.tuning
        dense = dense_work(self.measuring.known.lm, texts, decides(lm.model))
        return work_of(lm, texts) / dense
