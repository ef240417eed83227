"""``minitx compare --all``: every technique that fits a model, each at its defaults, in one table.

The dense model is measured once. Each technique then runs in a process of its own (where the system
can fork), so that one that fails, takes too long or needs too much memory costs its own row only.
Ctrl-C keeps the rows so far.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import fill

from minitx import progress
from minitx.errors import MinitxWarning
from minitx.lab import own_process
from minitx.lab.compare import Comparison, Dense, Workload, compare_with, measure_dense, to_read
from minitx.lab.evaluate import percent, table
from minitx.lab.own_process import Lost, reason_of
from minitx.technique import Technique, apply, techniques

TIME_LIMIT = 300.0  # seconds for one technique
WORK = Workload(stories=40, prompts=2, rounds=2)
STOPPED = "stopped before it was measured."
WIDTH = 100  # columns of the terminal


@dataclass(frozen=True)
class Row:
    """One technique at its defaults: its figures relative to the dense model, or why there are
    none."""

    flag: str
    seconds: float  # offline work and measuring
    reason: str = ""  # it does not fit the model, or it failed
    multiply_adds: float = 0.0  # per new token
    weight_bytes: float = 0.0  # read per new token
    cache_bytes: float = 0.0  # of keys and values, read per new token
    memory: float = 0.0  # of all arrays
    added_loss: float = 0.0  # nats per token
    divergence: float = 0.0  # KL(dense || changed), nats per token
    agreement: float = 0.0  # of the argmax
    speed: float = 0.0
    calibrated: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, flag: str, seconds: float, c: Comparison, notes: Sequence[str]) -> "Row":
        return cls(
            flag,
            seconds,
            "",
            c.relative("multiply_adds"),
            c.relative("weight_bytes"),
            c.relative("cache_bytes"),
            c.memory,
            c.reading.added_loss,
            c.reading.divergence,
            c.reading.agreement,
            c.generation.speed[0],
            c.calibrated,
            tuple(notes),
        )

    def cells(self) -> list[str]:
        sizes = self.multiply_adds, self.weight_bytes, self.cache_bytes, self.memory
        return [
            self.flag,
            *(f"{x:.2f}x" for x in sizes),
            f"{self.added_loss:+.4f}",
            f"{self.divergence:.2g}",
            percent(self.agreement),
            f"{self.speed:.2f}x",
        ]


@dataclass(frozen=True)
class Overview:
    """All techniques on one model."""

    model: str
    measured: str  # on what
    calibrated: str
    dense: dict[str, str]  # columns of its report
    tokens_per_second: float
    rows: list[Row]

    @property
    def stopped(self) -> bool:
        return any(row.reason == STOPPED for row in self.rows)

    def as_dict(self) -> dict:
        return asdict(self)

    def __str__(self) -> str:
        heading = ["technique", "mult-adds", "weights", "cache", "memory", "loss", "KL"]
        rows = [[*heading, "agrees", "speed"]]
        rows += [row.cells() for row in self.rows if not row.reason]
        dense = ", ".join(f"{name} {value}" for name, value in self.dense.items())
        about = (
            f"{self.model or 'The model'} on {self.measured}. Dense: {dense}; "
            f"{self.tokens_per_second:,.0f} tokens/s. {self.calibrated}"
        )
        below = (
            "Relative to dense: mult-adds, and bytes of weights and KV cache read, per new token; "
            "memory of all arrays; speed of generating. loss: nats per token above dense. KL: "
            "KL(dense || changed), nats per token. agrees: the argmax."
        )
        lines = [fill(about, WIDTH), "", table(rows), "", fill(below, WIDTH)]
        left_out = [row for row in self.rows if row.reason]
        if left_out:
            lines += ["", "Without figures:"]
        for row in left_out:
            lines.append(fill(f"{row.flag}: {row.reason}", WIDTH, subsequent_indent="    "))
        return "\n".join(lines)


def compare_all(
    dense,
    plan: Workload = WORK,
    grade="full",
    bar: bool = True,
    time_limit: float = TIME_LIMIT,
    chosen: Sequence[Technique] | None = None,
) -> Overview:
    """Every technique (or those chosen) on an LM without techniques, each at its defaults.
    time_limit: seconds after which a technique is given up."""
    chosen = techniques() if chosen is None else chosen
    material = to_read(dense, plan, grade)
    known = measure_dense(dense, material, plan.prompts, lambda: None)
    rows = []
    with progress.bar(len(chosen), "compare", unit="technique", shown=bar) as shown:
        try:
            for technique in chosen:
                shown.set_description(technique.name.replace("_", " "))
                rows.append(in_own_process(known, technique, plan.rounds, time_limit))
                shown.update()
        except KeyboardInterrupt:
            rows += [Row(t.flag, 0.0, STOPPED) for t in chosen[len(rows) :]]
    return Overview(
        dense.name,
        material.name,
        calibration_line(dense),
        known.report.columns(),
        known.tokens_per_second,
        rows,
    )


def calibration_line(dense) -> str:
    if dense.calibration is None:
        return "Techniques that calibrate do so on stories."
    return f"Techniques that calibrate do so on {dense.calibration.name}."


def measure_row(known: Dense, technique: Technique, rounds: int) -> Row:
    """The row of one technique: its figures, or why there are none."""
    began, flag = time.monotonic(), technique.flag
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MinitxWarning)
        try:
            changed = apply(known.lm, {technique.name: {}})
            found = compare_with(known, changed, flag, rounds, lambda: None)
        except Exception as error:
            return Row(flag, time.monotonic() - began, reason_of(error))
    notes = [str(w.message) for w in caught if issubclass(w.category, MinitxWarning)]
    return Row.of(flag, time.monotonic() - began, found, notes)


def in_own_process(known: Dense, technique: Technique, rounds: int, time_limit: float) -> Row:
    """``measure_row`` in a process of its own, given up after ``time_limit`` seconds."""
    began = time.monotonic()

    def task():
        yield asdict(measure_row(known, technique, rounds))

    try:
        (found,) = own_process.in_own_process(task, time_limit)
    except Lost as error:
        return Row(technique.flag, time.monotonic() - began, str(error))
    return Row(**{name: as_field(value) for name, value in found.items()})


def as_field(value):
    return tuple(value) if isinstance(value, list) else value
