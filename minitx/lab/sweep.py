"""``minitx sweep``: one technique at several settings, as a trade-off of cost against quality.

    minitx sweep ffn-skip threshold=0.9,0.95,0.99

Each setting is compared with the dense model (compare.py). The table has one row per setting. In
the chart, x is the multiply-adds relative to the dense model (memory, if no setting saves any) and
y is the loss above the dense model: lower left is better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from minitx import progress
from minitx.checkpoints.common import atomic_write, need_writable_file
from minitx.errors import MinitxError, abbreviate
from minitx.lab.compare import Comparison, Workload, compare_with, measure_dense, to_read
from minitx.lab.evaluate import percent, table
from minitx.technique import Technique, apply, as_words

WIDTH, HEIGHT = 60, 15  # characters of the chart


@dataclass(frozen=True)
class Point:
    """One setting and its comparison."""

    options: dict
    comparison: Comparison

    @property
    def label(self) -> str:
        return as_words(self.options)

    @property
    def cost(self) -> float:
        """Multiply-adds per token, relative to the dense model."""
        return self.comparison.multiply_adds

    @property
    def added_loss(self) -> float:
        """Loss above the dense model, in nats per token (of stories: of ordinary text)."""
        return self.comparison.reading.added_loss


MOST_SETTINGS = 1000


def settings(technique: Technique, words: Sequence[str]) -> list[dict]:
    """All combinations of values like ``threshold=0.9,0.95`` or ``preset=default,paper``;
    MinitxError for bad ones."""
    names, values = [], []
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not text:
            raise MinitxError(f"Expected option=value or option=value,value, got {word!r}.")
        found = [technique.parse([f"{name}={one}"]) for one in text.split(",")]
        for options in found:
            technique.checked(options)
        names.append(next(iter(found[0])))
        values.append([options[names[-1]] for options in found])
    if len(set(names)) < len(names):
        raise MinitxError("An option is given twice; give it once, with all of its values.")
    if (count := math.prod(map(len, values))) > MOST_SETTINGS:
        raise MinitxError(f"Expected at most {MOST_SETTINGS} combinations of values, got {count}.")
    return [dict(zip(names, chosen)) for chosen in product(*values)]


def sweep(
    dense,
    technique: Technique,
    chosen: Sequence[dict],
    plan: Workload,
    grade="full",
    bar: bool = True,
) -> list[Point]:
    """One point per setting, on an LM without other techniques. The dense model is measured
    once."""
    material = to_read(dense, plan, grade)
    each = len(material.texts) + len(material.prompts(plan.prompts))
    total = each * (1 + len(chosen)) + plan.rounds * len(chosen)
    points = []
    with progress.bar(total, f"sweep {technique.flag}", unit="run", shown=bar) as shown:
        known = measure_dense(dense, material, plan.prompts, shown.update)
        for options in chosen:
            changed = apply(dense, {technique.name: options})
            run = technique.flag, plan.rounds, shown.update
            points.append(Point(options, compare_with(known, changed, *run)))
    return points


def as_dict(points: Sequence[Point]) -> list[dict]:
    return [
        {"options": p.options, "loss_above_dense": p.added_loss} | p.comparison.as_dict()
        for p in points
    ]


# Text and pictures -------------------------------------------------------------------------------


def as_text(points: Sequence[Point]) -> str:
    return f"{as_table(points)}\n\n{chart(points)}"


def axis(points: Sequence[Point]) -> tuple[str, list[float]]:
    """The name of the x axis, and each setting's value on it."""
    if all(p.cost == 1 for p in points):
        return "memory", [p.comparison.memory for p in points]
    return "multiply-adds", [p.cost for p in points]


def as_table(points: Sequence[Point]) -> str:
    reading = points[0].comparison.reading
    answers = reading.dense.accuracies()
    heading = ["setting", "multiply-adds", "memory", "cache", "loss above dense", "argmax agrees"]
    rows = [[*heading, *answers, "speed"]]
    dense = answers.values()
    rows.append(["dense", "1.000x", "1.000x", "1.000x", "0.0000", "100.0 %", *dense, "1.00x"])
    for p in points:
        r = p.comparison.reading
        accuracies = r.changed.accuracies().values()
        same, speed = percent(r.agreement), f"{p.comparison.generation.speed[0]:.2f}x"
        sizes = [f"{x:.3f}x" for x in (p.cost, p.comparison.memory, p.comparison.cache)]
        rows.append([p.label, *sizes, f"{p.added_loss:+.4f}", same, *accuracies, speed])
    return table(rows)


def chart(points: Sequence[Point]) -> str:
    """A text chart: letters for the settings, D for the dense model. If points overlap, the last
    one shows."""
    what, costs = axis(points)
    marks = [("D", 1.0, 0.0)]
    marks += [(letter(i), cost, p.added_loss) for i, (p, cost) in enumerate(zip(points, costs))]
    x, y = scale([m[1] for m in marks], WIDTH), scale([m[2] for m in marks], HEIGHT)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for mark, cost, harm in marks:
        grid[HEIGHT - 1 - y(harm)][x(cost)] = mark
    top, low = max(m[2] for m in marks), min(m[2] for m in marks)
    left, right = min(m[1] for m in marks), max(m[1] for m in marks)
    lines = ["".join(row) for row in grid]
    lines[0] = f"{top:+8.4f} |{lines[0]}"
    lines[-1] = f"{low:+8.4f} |{lines[-1]}"
    lines[1:-1] = [f"{'':8} |{line}" for line in lines[1:-1]]
    lines.append(f"{'':9}+{'-' * WIDTH}")
    ends = f"{left:.3f}x", f"{right:.3f}x {what}"
    lines.append(f"{'':10}{ends[0]}{ends[1]:>{max(WIDTH - len(ends[0]), len(ends[1]) + 1)}}")
    lines.append("y: loss above dense.  D dense, " + key(points))
    return "\n".join(line.rstrip() for line in lines)


def key(points: Sequence[Point]) -> str:
    return ", ".join(f"{letter(i)} {p.label or 'defaults'}" for i, p in enumerate(points))


def letter(number: int) -> str:
    return "abcdefghijklmnopqrstuvwxyz"[number % 26]


def scale(values: Sequence[float], size: int):
    """A function from a value to its cell 0 .. size - 1."""
    low, high = min(values), max(values)
    wide = high - low or 1.0
    return lambda value: round((value - low) / wide * (size - 1))


def picture(points: Sequence[Point], name: str, path) -> None:
    """The chart as a PNG file; needs the ``plot`` extra."""
    pyplot = check_picture(path)
    figure, axes = pyplot.subplots(figsize=(7, 5))
    what, costs = axis(points)
    axes.plot(costs, [p.added_loss for p in points], "o-")
    axes.plot([1], [0], "ks")
    axes.annotate("dense", (1, 0), textcoords="offset points", xytext=(5, 5))
    for p, cost in zip(points, costs):
        axes.annotate(p.label, (cost, p.added_loss), textcoords="offset points", xytext=(5, 5))
    axes.set_xlabel(f"{what}, relative to dense")
    axes.set_ylabel("loss above dense (nats per token)")
    axes.set_title(name)
    figure.tight_layout()
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150)
    pyplot.close(figure)


def check_picture(path):
    """pyplot, if a picture can be drawn and written to ``path``; MinitxError if not. Called before
    the measurements, which may take minutes."""
    pyplot, path = need_pyplot(), Path(path)
    if path.suffix.lower() != ".png":
        raise MinitxError(
            f"A picture is written as PNG; expected a file name that ends in .png, got "
            f"{abbreviate(str(path))}."
        )
    need_writable_file(path)
    return pyplot


def need_pyplot():
    """matplotlib's pyplot (the ``plot`` extra), set up to write files."""
    try:
        import matplotlib
    except ImportError:
        raise MinitxError(
            "A picture needs matplotlib; install it with: pip install matplotlib"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
