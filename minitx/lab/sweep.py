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

from minitx import progress
from minitx.errors import MinitxError
from minitx.lab.compare import Comparison, Workload, compare_with, measure_dense, to_read
from minitx.lab.evaluate import heat_of, percent, table
from minitx.pictures import scatter
from minitx.pictures.heatmap import Heat
from minitx.pictures.output import write_picture
from minitx.pictures.scatter import Curve, Panel, draw
from minitx.pictures.svg import INK
from minitx.pictures.terminal import Mark, letter, plot
from minitx.technique import Technique, apply, as_words


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
    parts = [as_table(points), chart(points), *filter(None, [heat(points)])]
    return "\n\n".join(map(str, parts))


def heat(points: Sequence[Point]) -> Heat | None:
    """Right answers by setting and hops; None for a text, which has no answers."""
    reports = [points[0].comparison.reading.dense, *(p.comparison.reading.changed for p in points)]
    return heat_of("setting", ["dense", *(p.label or "defaults" for p in points)], reports)


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
    """A text chart: letters for the settings, D for the dense model; what coincides is listed."""
    what, costs = axis(points)
    marks = [Mark(letter(i), p.label or "defaults", cost, p.added_loss)
             for i, (p, cost) in enumerate(zip(points, costs))]  # fmt: skip
    marks.append(Mark("D", "dense", 1.0, 0.0))
    words = "{:.3f}x".format, "{:+.4f}".format
    return plot(marks, what, "y: loss above dense.  ", None, *words)


def picture(points: Sequence[Point], name: str, path) -> None:
    """The chart, and the map of right answers below it, as an SVG or PNG file (output.py)."""
    drawn = draw([panel(points)], name, legend=False)
    if found := heat(points):
        found.paint(drawn, drawn.height)
    write_picture(drawn, path)


def panel(points: Sequence[Point]) -> Panel:
    what, costs = axis(points)
    marked = []
    for p, cost in zip(points, costs):
        label, note = p.label or "defaults", f"{cost:.3f}x {what}, loss {p.added_loss:+.4f}"
        marked.append(scatter.Point(cost, p.added_loss, label, f"{label}: {note}"))
    dense = Curve("dense", [scatter.Point(1.0, 0.0, "dense")], color=INK, shape="diamond")
    return Panel(
        [Curve("settings", marked, line=True), dense],
        f"{what}, relative to dense",
        "loss above dense (nats per token)",
        level=0.0,
    )
