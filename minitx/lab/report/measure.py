"""Measure every technique on one model: at its defaults, and as a method of ``minitx frontier``.

All methods read the same texts and continue the same prompts, in processes of their own
(frontier/equal_work.py), so their losses and costs compare. Sparse attention at the same share of
keys, and ways to decode, have measurements of their own (frontier/attention.py, decoding.py).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import minitx
from minitx import progress
from minitx.digest import digest, source_digest
from minitx.errors import MinitxError, abbreviate, did_you_mean, one_of
from minitx.lab.compare import Dense, measure_dense
from minitx.lab.compare_all import calibration_line
from minitx.lab.frontier import equal_work
from minitx.lab.frontier.equal_work import Measuring, accuracy_of, methods_of, to_read
from minitx.lab.frontier.families import FAMILIES, family_of
from minitx.lab.frontier.knobs import Method, check_shares, key
from minitx.lab.own_process import reason_of
from minitx.lab.report.results import Results, started
from minitx.ledger import Entry
from minitx.second_model import SMALL
from minitx.technique import techniques
from minitx.text import Text, as_text

DEFAULTS = "defaults"  # the family of all techniques, each at its default options
NAMES = (DEFAULTS, *(family.name for family in FAMILIES))


@dataclass(frozen=True)
class Plan:
    """What is measured, and on how much. families: None for all of ``NAMES``. methods: only these
    (and techniques of these names); None: all."""

    stories: int = 40
    text: str | Text | None = None  # to read instead of stories, ``tokens`` of it
    tokens: int = 2048
    grade: str = "full"
    shares: tuple[float, ...] = (0.9, 0.75, 0.5)
    tuning: int = 4
    prompts: int = 4
    rounds: int = 3
    quick: bool = False  # attention and decoding: one share, few chains and prompts
    small: str = SMALL
    time_limit: float = 300.0  # seconds for one method
    families: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None

    @classmethod
    def quickly(cls, **changes) -> "Plan":
        """A small plan: noisy figures, in a few minutes on a small model."""
        few = dict(stories=8, tokens=512, shares=(0.75,), tuning=2, prompts=1, rounds=1, quick=True)
        return cls(**few | changes)

    def work(self) -> equal_work.Plan:
        """The part of the plan that most families share."""
        names = ("stories", "text", "tokens", "grade", "shares", "tuning", "prompts", "rounds")
        shared = {name: getattr(self, name) for name in names}
        return equal_work.Plan(**shared, time_limit=self.time_limit)


def measure(
    dense, plan: Plan = Plan(), path=None, restart: bool = False, bar: bool = True
) -> Results:
    """The results of an LM without techniques: those that the JSON file at ``path`` holds already,
    and what is missing. Ctrl-C keeps what there is, as ``about["stopped"]`` says.

    MinitxError for a plan that does not fit the model, or a file with results of something else."""
    check(plan)
    jobs = Jobs.of(dense, plan)
    path = None if path is None else Path(path)
    results = started(path, jobs.made_of(), jobs.about(), restart)
    waiting = [job for job in jobs.all() if not job.done(results)]
    results.about["stopped"] = False
    with progress.bar(len(waiting), "report", unit="method", shown=bar) as shown:
        try:
            for job in waiting:
                shown.set_description(f"{job.family}: {job.name}" if job.name else job.family)
                job.run(results)
                results.keep()
                shown.update()
        except KeyboardInterrupt:
            results.about["stopped"] = True
    results.keep()
    return results


def check(plan: Plan) -> None:
    check_shares(plan.shares, "multiply-adds")
    equal_work.check(plan.work())
    for name in plan.families or ():
        if name not in NAMES:
            raise MinitxError(f"There is no family {abbreviate(name)}; {one_of(name, NAMES)}")
    known = [Method(technique.name, None) for technique in techniques()]
    known += [method for family in FAMILIES for method in family.methods]
    for name in plan.methods or ():
        if not any(is_called(method, name) for method in known):
            hint = did_you_mean(key(name), [key(method.name) for method in known])
            raise MinitxError(f"There is no technique or method {abbreviate(name)}; {hint}")


def is_called(method: Method, name: str) -> bool:
    """Is it the method's name, or that of its technique?"""
    return key(name) in (key(method.name), key(method.wanted))


@dataclass(frozen=True)
class Job:
    """One method of a family, or a whole family at once (name ""), and how it is measured."""

    family: str
    name: str
    run: Callable[[Results], None]
    methods: tuple[str, ...] | None = None  # of a whole family; None: all

    def done(self, results: Results) -> bool:
        if self.name:
            return self.name in results.work.get(self.family, {})
        if self.family not in results.others:
            return self.family in results.refused
        before = results.others[self.family]["plan"]["methods"]
        return before is None or (self.methods is not None and {*self.methods} <= {*before})


@dataclass(frozen=True)
class Jobs:
    """All that is to be measured of a model."""

    dense: object
    plan: Plan
    known: Dense
    measuring: Measuring
    tuned_on: str

    @classmethod
    def of(cls, dense, plan: Plan) -> "Jobs":
        work = plan.work()
        material, tuning, tuned_on = to_read(dense, work)
        known = measure_dense(dense, material, work.prompts, lambda: None)
        return cls(dense, plan, known, Measuring(known, work, tuning), tuned_on)

    def all(self) -> Iterator[Job]:
        wanted = NAMES if self.plan.families is None else self.plan.families
        for family in NAMES:
            if family not in wanted:
                continue
            for method in self.methods(family):
                yield Job(family, method.name, partial(self.rows_of, family, method))
            if family != DEFAULTS and family_of(family).equal != "multiply-adds":
                if chosen := self.chosen(family_of(family).methods):
                    names = None if self.plan.methods is None else tuple(m.name for m in chosen)
                    yield Job(family, "", partial(self.whole, family, names), names)

    def methods(self, family: str) -> Sequence[Method]:
        """The methods that are measured one by one."""
        if family == DEFAULTS:
            return self.chosen([Method(technique.name, None) for technique in techniques()])
        if family_of(family).equal != "multiply-adds":
            return []
        fitted = methods_of(family_of(family), self.plan.work(), self.dense.model.config)
        return self.chosen(fitted)

    def chosen(self, methods: Sequence[Method]) -> list[Method]:
        """Those that the plan names."""
        wanted = self.plan.methods
        if wanted is None:
            return list(methods)
        return [m for m in methods if any(is_called(m, name) for name in wanted)]

    def rows_of(self, family: str, method: Method, results: Results) -> None:
        rows = list(self.measuring.rows_or_reasons(method))
        results.work.setdefault(family, {})[method.name] = rows

    def whole(self, family: str, names: tuple[str, ...] | None, results: Results) -> None:
        plan = self.plan
        text = {"text": plan.text, "grade": plan.grade, "methods": names}
        if family == "attention":
            grid = dict(shares=(1 / 4,), chains=1, contexts=(256, 1024), rounds=3)
            options = grid if plan.quick else dict(chains=4 if plan.text is None else 2)
        else:
            few = dict(prompts=2, new=32, rounds=1)
            options = dict(small=plan.small) | (few if plan.quick else {})
        try:
            found = family_of(family).compare(self.dense, False, **text, **options)
        except Exception as error:
            results.refused[family] = reason_of(error)
            return
        if getattr(found, "stopped", False):
            raise KeyboardInterrupt
        results.others[family] = json.loads(json.dumps(found.as_dict()))

    def about(self) -> dict:
        """What the page says first."""
        known = self.known
        spent = sum((e for e in known.counts.by_group().values()), Entry())
        tokens = sum(map(len, known.continuations)) or 1
        config = self.dense.model.config
        return {
            "model": self.dense.name or "the model",
            "measured": known.material.name,
            "tuning": self.tuned_on,
            "calibrated": calibration_line(self.dense),
            "dense": known.report.columns(),
            "accuracy": accuracy_of(known.report),
            "tokens_per_second": known.tokens_per_second,
            "per_token": asdict(spent.divided(tokens)),
            "memory": known.size.weights,
            "cache": known.size.cache,
            "shape": f"{config.layers} layers of width {config.width}, {config.heads} heads, "
            f"context {config.context}",
        }

    def made_of(self) -> dict:
        """Results can be mixed only if all of this is the same."""
        plan, lm = self.plan, self.dense
        read = hashlib.sha256()
        for text in [*self.known.material.texts, *self.measuring.tuning]:
            read.update(json.dumps(list(map(int, text.ids))).encode())
        if plan.text is not None:
            read.update(as_text(plan.text).content.encode("utf-8", "replace"))
        calibration = "stories"
        if lm.calibration is not None:
            ids = [list(map(int, ids)) for ids in lm.calibration.ids(lm, 16)]
            calibration = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
        names = ("shares", "prompts", "rounds", "quick", "small", "grade")
        return {
            "model": lm.name,
            "weights": digest(lm.model).hex()[:16],
            "version": minitx.__version__,
            "source code": source_digest().hex()[:16],
            "text": read.hexdigest()[:16],
            "calibration": calibration,
        } | {name: getattr(plan, name) for name in names}
