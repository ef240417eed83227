"""Scatter plots and curves as SVG: panels side by side, one legend, labels that never overlap.

    curves = [Curve("elsa", [Point(0.5, 0.02, "p=1"), Point(0.3, 0.1, "p=2")])]
    picture = draw([Panel(curves, "keys kept", "loss above dense")], "elsa on stories")
    picture.write("elsa.svg")

A point's label is drawn beside it, its note appears under the mouse. labels.py says where labels
go.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minitx.pictures.labels import LINE, Box, Label, place
from minitx.pictures.svg import COLORS, FAINT, FONT_SIZE, INK, PAPER, Svg, text_width

WIDTH, HEIGHT = 420, 330  # of a panel's frame, in pixels
LEFT, RIGHT, TOP, BOTTOM = 66, 26, 54, 50  # around it
RADIUS = 4.0  # of a point
SHAPES = ("circle", "square", "diamond", "triangle")  # the next one when the colors begin again
GRAY = "#767676"


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str = ""  # drawn beside it
    note: str = ""  # appears when the mouse is over it
    first: bool = False  # its label finds a place before those of others


@dataclass(frozen=True)
class Curve:
    """Points of one method. line: they are joined, in the order given. color, shape: None for the
    next ones; shape "none": only the line. listed: it has an entry in the legend."""

    name: str
    points: Sequence[Point]
    line: bool = False
    dashed: bool = False
    color: str | None = None
    shape: str | None = None
    listed: bool = True


@dataclass(frozen=True)
class Panel:
    """least, most: values of y beyond them are drawn there, at the edge; most_x: larger values of
    x, likewise. level: a value of y that a dotted line marks (the dense model's). ticks: (value,
    label) on the x axis instead of round numbers."""

    curves: Sequence[Curve]
    x: str
    y: str
    log_x: bool = False
    log_y: bool = False
    least: float | None = None
    most: float | None = None
    most_x: float | None = None
    level: float | None = None
    title: str = ""
    ticks: Sequence[tuple[float, str]] = ()


def draw(panels: Sequence[Panel], title: str, width=WIDTH, height=HEIGHT, legend=True) -> Svg:
    """The picture. width, height: of each panel's frame."""
    laid_out = []
    left = 0.0
    for panel in panels:
        frame = Box(left + LEFT, TOP, left + LEFT + width, TOP + height)
        one = Layout(panel, frame)
        laid_out.append(one)
        left = one.right + RIGHT
    names = legend_of(panels) if legend else []
    beside = max((text_width(name) for name, *_ in names), default=-40) + 40
    lines = 3 + len(names)
    total = max(left + beside, text_width(title, 15) + 24)
    picture = Svg(total, max(TOP + height + BOTTOM, TOP + lines * LINE * FONT_SIZE), title)
    picture.text(12, 24, title, 15, font_weight="bold")
    for one in laid_out:
        one.draw(picture)
    for number, (name, look) in enumerate(names):
        y = TOP + 10 + number * LINE * FONT_SIZE
        if look.line or look.dashed:
            dashes = "5 3" if look.dashed else None
            picture.line(left, y, left + 22, y, look.color, 1.5, stroke_dasharray=dashes)
        mark(picture, left + 11, y, look)
        picture.text(left + 30, y + 4, name)
    return picture


# How curves look ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    color: str
    shape: str
    line: bool
    dashed: bool


def looks(curves: Sequence[Curve]) -> list[Look]:
    """Another color for each curve, and another shape when the colors begin again."""
    found, number = [], 0
    for curve in curves:
        color = curve.color or COLORS[number % len(COLORS)]
        shape = curve.shape or SHAPES[number // len(COLORS) % len(SHAPES)]
        number += curve.color is None
        found.append(Look(color, shape, curve.line, curve.dashed))
    return found


def legend_of(panels: Sequence[Panel]) -> list[tuple[str, Look]]:
    """One entry for each name, of all panels together."""
    found: dict[str, Look] = {}
    for panel in panels:
        for curve, look in zip(panel.curves, looks(panel.curves)):
            if curve.listed and curve.points:
                found.setdefault(curve.name, look)
    return list(found.items())


def mark(picture: Svg, x, y, look: Look, note: str = "") -> None:
    r = RADIUS
    if look.shape == "circle":
        picture.circle(x, y, r, look.color, note, stroke=PAPER, stroke_width=0.8)
    elif look.shape == "square":
        side = 2 * r - 1
        picture.rect(x - side / 2, y - side / 2, side, side, look.color, note, stroke=PAPER,
                     stroke_width=0.8)  # fmt: skip
    elif look.shape in ("diamond", "triangle"):
        corners = {
            "diamond": [(x, y - r - 1), (x + r + 1, y), (x, y + r + 1), (x - r - 1, y)],
            "triangle": [(x, y - r), (x + r, y + r), (x - r, y + r)],
        }[look.shape]
        picture.path([*corners, corners[0]], PAPER, 0.8, note, fill=look.color)


# A panel ------------------------------------------------------------------------------------------


class Layout:
    """A panel in its frame: where its points, ticks and labels are, in pixels."""

    def __init__(self, panel: Panel, frame: Box):
        self.panel, self.frame = panel, frame
        points = [p for curve in panel.curves for p in curve.points]
        xs = [self.clipped_x(p.x) for p in points] + [value for value, _ in panel.ticks]
        ys = [self.clipped(p.y) for p in points]
        ys += [self.clipped(v) for v in (panel.level, panel.least) if v is not None]
        margin = 0.05
        self.across = Axis(xs, frame.left, frame.right, panel.log_x, margin)
        self.up = Axis(ys, frame.bottom, frame.top, panel.log_y, margin)
        self.places = [[self.place(p) for p in curve.points] for curve in panel.curves]
        marked = [
            place
            for curve, places in zip(panel.curves, self.places)
            for place in places
            if curve.shape != "none"
        ]
        labelled = [  # the last curve's first: they are drawn on top
            (p, place)
            for curve, places in reversed(list(zip(panel.curves, self.places)))
            for p, place in zip(curve.points, places)
            if p.label
        ]
        labelled.sort(key=lambda one: not one[0].first)
        wanted = [(*place, p.label) for p, place in labelled]
        inner = frame.wider(-2, -2)  # labels do not touch its edge
        self.labels: list[Label] = place(wanted, marked, inner, RADIUS + 1, lines=self.steps())

    def steps(self) -> list[Box]:
        """The pieces of staircases, horizontal or vertical, as thin boxes: no label covers them."""
        found = []
        for curve, places in zip(self.panel.curves, self.places):
            for a, b in zip(places, places[1:]) if curve.shape == "none" else ():
                (left, right), (top, bottom) = (sorted(pair) for pair in zip(a, b))
                if right - left < 1 or bottom - top < 1:
                    found.append(Box(left, top, right, bottom).wider(1, 1))
        return found

    def clipped(self, y: float) -> float:
        low = -math.inf if self.panel.least is None else self.panel.least
        high = math.inf if self.panel.most is None else self.panel.most
        return min(max(y, low), high)

    def clipped_x(self, x: float) -> float:
        return x if self.panel.most_x is None else min(x, self.panel.most_x)

    def place(self, p: Point) -> tuple[float, float]:
        return self.across(self.clipped_x(p.x)), self.up(self.clipped(p.y))

    @property
    def right(self) -> float:
        """Of the frame, of the words above it, or of the list of labels beside it."""
        words = self.frame.left + text_width(self.panel.title or self.panel.y)
        return max([self.frame.right, words, *(label.box.right for label in self.labels)])

    def draw(self, picture: Svg) -> None:
        self.draw_frame(picture)
        drawn = list(zip(self.panel.curves, self.places, looks(self.panel.curves)))
        for _, places, look in drawn:
            if look.line and len(places) > 1:
                dashes = "5 3" if look.dashed else None
                picture.path(places, look.color, 1.5, stroke_dasharray=dashes)
        for label in self.labels:
            if leader := label.leader:
                picture.path(leader, GRAY, 0.6)
        for curve, places, look in drawn:
            for p, (x, y) in zip(curve.points, places):
                mark(picture, x, y, look, p.note or p.label)
        for label in self.labels:
            baseline = label.box.bottom - 0.3 * FONT_SIZE
            picture.text(label.box.left, baseline, label.text, halo=True)

    def draw_frame(self, picture: Svg) -> None:
        f, panel = self.frame, self.panel
        points = [p for curve in panel.curves for p in curve.points]
        at_edge = [
            (panel.most_x, ">=", any(p.x > (panel.most_x or math.inf) for p in points)),
        ]
        for value, words in panel.ticks or with_edges(self.across, at_edge, 44):
            x = self.across(value)
            picture.line(x, f.top, x, f.bottom, FAINT, 0.6)
            picture.text(x, f.bottom + 16, words, 11, "middle")
        at_edge = [
            (panel.least, "<=", panel.least is not None),
            (panel.most, ">=", any(p.y > (panel.most or math.inf) for p in points)),
        ]
        for value, words in with_edges(self.up, at_edge, 14):
            y = self.up(value)
            picture.line(f.left, y, f.right, y, FAINT, 0.6)
            picture.text(f.left - 6, y + 4, words, 11, "end")
        if panel.level is not None:
            y = self.up(self.clipped(panel.level))
            picture.line(f.left, y, f.right, y, INK, 1, stroke_dasharray="2 3")
        width, height = f.right - f.left, f.bottom - f.top
        picture.rect(f.left, f.top, width, height, "none", stroke=GRAY, stroke_width=1)
        picture.text((f.left + f.right) / 2, f.bottom + 38, panel.x, anchor="middle")
        picture.text(f.left, f.top - 8, panel.title or panel.y)


# Axes ---------------------------------------------------------------------------------------------


class Axis:
    """A function from a value to its place between the pixels ``start`` and ``end``."""

    def __init__(self, values: Sequence[float], start: float, end: float, log=False, margin=0.05):
        low, high = (min(values), max(values)) if values else (1.0, 2.0)
        if log and low <= 0:
            raise ValueError("a logarithmic axis needs values above 0")
        self.log, self.start, self.end = log, start, end
        a, b = self.level(low), self.level(high)
        room = (b - a) * margin or abs(a) * margin or 1.0
        self.low, self.high = a - room, b + room

    def level(self, value: float) -> float:
        return math.log10(value) if self.log else float(value)

    def __call__(self, value: float) -> float:
        part = (self.level(value) - self.low) / (self.high - self.low)
        return self.start + part * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values with their labels, from low to high."""
        values = log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high)
        return [(value, f"{value:,.6g}") for value in values]


def with_edges(axis: Axis, edges: Sequence[tuple], room: float) -> list[tuple[float, str]]:
    """The ticks of an axis and those of its edges (value, "<=" or ">=", is it shown): what is
    beyond an edge is drawn at it. Ticks within ``room`` pixels of an edge make way."""
    shown = [(value, f"{sign} {value:,.6g}") for value, sign, there in edges if there]
    ticks = [
        tick
        for tick in axis.ticks()
        if all(abs(axis(tick[0]) - axis(value)) >= room for value, _ in shown)
    ]
    return sorted([*ticks, *shown])


def round_ticks(low: float, high: float, about: int = 7) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of 10 between two values: about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of 10 between 10**low and 10**high; also 2 and 5 times them if these are few; on a
    range without two of those, round values."""
    inside = range(math.floor(low), math.ceil(high) + 1)
    for multiples in ((1,), (1, 2, 5)):
        values = [m * 10.0**power for power in inside for m in multiples]
        values = [float(f"{v:.6g}") for v in values if low <= math.log10(v) <= high]
        if len(values) >= 3:
            return values
    return [v for v in round_ticks(10**low, 10**high) if v > 0] or values
