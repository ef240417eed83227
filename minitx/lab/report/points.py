"""The points of a report, what they cost and what they lose, and the Pareto charts drawn of them.

A point is *on the Pareto front* if no other one costs less and loses less. Losses up to ``LEAST``
count as equal: they are noise.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from minitx.checkpoints.common import atomic_write, read_json
from minitx.errors import MinitxError
from minitx.lab.frontier.equal_work import Figures
from minitx.lab.frontier.families import family_of
from minitx.lab.report.measure import DEFAULTS
from minitx.lab.report.results import MOST_BYTES, Results, read_results
from minitx.pictures.scatter import Curve, Panel, Point, draw
from minitx.pictures.svg import INK, Svg
from minitx.technique import Technique, find, names, techniques

LEAST, MOST = 0.001, 3.0  # nats per token: smaller and larger losses are drawn there
MOST_COST = 1.5  # relative to dense: larger ones are drawn there
COSTS = {
    "operations": "multiply-adds",
    "bytes": "bytes read",
    "time": "time",
}  # a point's cost, and what a chart calls it
ABOUT = {
    "operations": "multiply-adds per new token, relative to dense (a table's additions included)",
    "bytes": "bytes of weights and KV cache read per new token, relative to dense",
    "time": "time per new token, relative to dense",
}
PALE = "#a8a8a8"  # of baselines
GROUPS = {  # by the levels of their techniques
    "weights": ("pruning", "weights", "matrices"),
    "attention": ("scores", "attention"),
    "feed-forward": ("ffn",),
    "layers, tokens": ("block", "stack"),
    "head, decoding": ("head", "decode", "answer"),
}
WELL_KNOWN = (  # named in the chart, on the front or not
    "quantize", "prune", "early_exit", "layer_skip", "elsa", "a3", "teal", "ffn_skip",
    "lut_product", "mixture_of_depths", "token_prune", "speculative",
)  # fmt: skip
ANSWERS = (
    "it is approximate, but changes the decoding loop and not what the model predicts for a given "
    "text, so it has no loss to compare; minitx frontier decoding says how texts change."
)
NOT_MEASURED = "not measured."


@dataclass(frozen=True)
class Cost:
    """A method at one setting: its costs relative to the dense model, and its loss above it."""

    technique: str
    method: str
    family: str
    setting: str
    baseline: bool
    operations: float  # multiply-adds, and additions of table entries, per new token
    bytes: float  # of weights and KV cache, read per new token
    time: float  # per new token
    loss: float  # nats per token

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()


DENSE = Cost("", "dense", "", "", True, 1.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Points:
    """All points of a report: what its charts need, small enough to be committed."""

    model: str
    measured: str
    points: list[Cost]
    without: dict[str, str]  # why techniques have no point, by name

    def as_dict(self) -> dict:
        return {
            "model": self.model,
            "measured": self.measured,
            "points": [rounded(asdict(p)) for p in self.points],
            "without": self.without,
        }

    def write(self, path) -> None:
        """As JSON, one point on a line."""
        found = self.as_dict()
        lines = ",\n".join(f"  {json.dumps(p)}" for p in found.pop("points"))
        text = json.dumps(found, indent=1)
        with atomic_write(Path(path)) as file:
            file.write(f'{{\n "points": [\n{lines}\n ],\n{text[2:]}\n'.encode())


def rounded(found: dict) -> dict:
    """Four digits are enough for a chart."""
    return {
        name: float(f"{value:.4g}") if isinstance(value, float) else value
        for name, value in found.items()
    }


def read_points(path) -> Points:
    """The points in a file of results, or of points."""
    found = read_json(path, MOST_BYTES)
    if "points" not in found:
        return points_of(read_results(path))
    try:
        points = [Cost(**p) for p in found["points"]]
        numbers = [f.name for f in fields(Cost) if f.type in (float, "float")]
        if not all(isinstance(getattr(p, name), int | float) for p in points for name in numbers):
            raise TypeError("a number is expected")
        return Points(str(found["model"]), str(found["measured"]), points, dict(found["without"]))
    except (KeyError, TypeError, ValueError) as error:
        raise MinitxError(
            f"{path} is damaged ({type(error).__name__}); write it again with minitx report "
            "--points."
        ) from None


# From the results ---------------------------------------------------------------------------------


def points_of(results: Results) -> Points:
    found, reasons = [], {}
    for family, row in results.rows():
        technique = technique_of(family, row.method)
        baseline = is_baseline(family, row.method)
        if row.figures is None:
            if not baseline:
                reasons.setdefault(technique, row.reason)
        elif has_no_loss(technique):
            reasons[technique] = ANSWERS
        else:
            costs = costs_of(row.figures, results.about)
            about = technique, row.method, family, row.setting, baseline
            found.append(Cost(*about, **costs, loss=row.figures.added_loss))
    for name in names():
        reasons.setdefault(name, NOT_MEASURED)
    shown = {p.technique for p in found if not p.baseline}
    without = {name: reasons[name] for name in names() if name not in shown}
    return Points(results.about["model"], results.about["measured"], found, without)


def costs_of(f: Figures, about: dict) -> dict[str, float]:
    weights, cache = about["per_token"]["weight_bytes"], about["per_token"]["cache_bytes"]
    read = f.weight_bytes * weights + f.cache_bytes * cache
    return {
        "operations": f.multiply_adds + f.additions,
        "bytes": read / max(weights + cache, 1),
        "time": 1 / f.speed,
    }


def technique_of(family: str, method: str) -> str:
    """The technique of a family's method (of a technique's own random baseline, too)."""
    if family == DEFAULTS:
        return method
    known = {m.name: m.wanted for m in family_of(family).methods}
    return known.get(method) or known[method.removesuffix(" random")]


def is_baseline(family: str, method: str) -> bool:
    if family == DEFAULTS:
        return False
    return method in family_of(family).baselines or method.endswith(" random")


def has_no_loss(name: str) -> bool:
    technique = find(name)
    return technique.level in ("decode", "answer") and not technique.exact


# The Pareto front ---------------------------------------------------------------------------------


def front(points: Sequence[Cost], cost: str) -> list[Cost]:
    """The points that no other one beats, from the cheapest to the one that loses least."""
    ordered = sorted([*points, DENSE], key=lambda p: (getattr(p, cost), p.loss))
    found: list[Cost] = []
    for p in ordered:
        if not p.baseline or p is DENSE:
            if not found or max(p.loss, LEAST) < max(found[-1].loss, LEAST):
                found.append(p)
    return found


# Charts -------------------------------------------------------------------------------------------


def pareto(found: Points, cost: str = "operations", **size) -> Svg:
    """One chart, of one cost."""
    title = f"{found.model}: loss against {COSTS[cost]}, {found.measured}"
    return draw([panel(found.points, cost)], title, **{"width": 570, "height": 440} | size)


def panel(points: Sequence[Cost], cost: str) -> Panel:
    best = front(points, cost)
    named = labels(points, best)
    curves = [
        Curve("Pareto front", staircase(best, cost), line=True, color=INK, shape="none"),
    ]
    for number, (name, levels) in enumerate(GROUPS.items()):
        own = [p for p in points if not p.baseline and find(p.technique).level in levels]
        shape = ("circle", "square", "diamond", "triangle", "circle")[number]
        curves.append(Curve(name, [marked(p, cost, named, p in best) for p in own], shape=shape))
    for name, shape, at_random in (("random baselines", "square", True),
                                   ("static baselines", "circle", False)):  # fmt: skip
        own = [p for p in points if p.baseline and ("random" in p.method) == at_random]
        curves.append(Curve(name, [marked(p, cost, named) for p in own], False, False, PALE, shape))
    dense = [Point(1.0, 0.0, "dense", "the dense model", first=True)]
    curves.append(Curve("dense", dense, color=INK, shape="diamond"))
    return Panel(
        curves,
        ABOUT[cost],
        "loss above dense (nats per token)",
        log_y=True,
        least=LEAST,
        most=MOST,
        most_x=MOST_COST,
    )


def marked(p: Cost, cost: str, named: dict[int, str], first: bool = False) -> Point:
    note = f"{p.name}: {getattr(p, cost):.3f}x {COSTS[cost]}, loss {p.loss:+.4f}"
    return Point(getattr(p, cost), p.loss, named.get(id(p), ""), note, first)


def labels(points: Sequence[Cost], best: Sequence[Cost]) -> dict[int, str]:
    """What to write beside points, by their id: the names on the front, once each, and those of
    well-known techniques."""
    found: dict[str, Cost] = {}
    for p in [*best, *points]:
        if p.technique and not p.baseline and (p in best or p.technique in WELL_KNOWN):
            found.setdefault(p.technique, p)
    return {id(p): find(name).flag[2:] for name, p in found.items()}


def staircase(best: Sequence[Cost], cost: str) -> list[Point]:
    found: list[Point] = []
    for p in best:
        if found:
            found.append(Point(getattr(p, cost), found[-1].y))
        found.append(Point(getattr(p, cost), p.loss))
    return found


def by_technique(results: Results) -> Iterator[tuple[Technique, list]]:
    """Each technique with its (family, row)s, baselines aside."""
    rows = results.rows()
    for technique in techniques():
        own = [
            (family, row)
            for family, row in rows
            if technique_of(family, row.method) == technique.name
            and not is_baseline(family, row.method)
        ]
        yield technique, own
