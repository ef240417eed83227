"""A weight matrix before and after techniques (weights.py) as an SVG picture of three charts."""

import numpy as np

from minitx.pictures.cells import Cells
from minitx.pictures.svg import FAINT, Svg
from minitx.pictures.weights import Matrix, Weights

WIDTH, HEIGHT, TOP = 800, 316, 84
CHART = 210  # pixels high
BEFORE, AFTER, ZERO = "#9a9a9a", "#0072b2", "#d55e00"
BINS = 61
SMALL = 10


def as_svg(found: Weights) -> Svg:
    picture = Svg(WIDTH, HEIGHT, f"Weights: {found.title}")
    picture.text(12, 22, found.title, size=14, font_weight="bold")
    shape = " x ".join(f"{n:,}" for n in found.before.w.shape)
    picture.text(12, 44, f"{found.part} ({shape})")
    x = 400.0
    for name in found.both:
        picture.rect(x, 36, 16, 8, BEFORE if name == "before" else AFTER)
        picture.text(x + 22, 44, name)
        x += 100
    if not any(m.zeros.any() for m in found.both.values()):
        draw_histogram(picture, found, 12, 380)
        draw_spectrum(picture, found, 420, 368)
        return picture
    draw_histogram(picture, found, 12, 270)
    draw_zeros(picture, found.after or found.before, 306, 200)
    draw_spectrum(picture, found, 536, 252)
    return picture


def heading(picture: Svg, x: float, text: str) -> None:
    picture.text(x, TOP - 10, text, size=12, fill="#555555")


def draw_histogram(picture: Svg, found: Weights, x: float, wide: float) -> None:
    heading(picture, x, "weights (without zeros)")
    base = TOP + CHART
    counts = {name: m.histogram(found.most, BINS) for name, m in found.both.items()}
    longest = max(c.max() for c in counts.values()) or 1.0
    step = wide / BINS
    cells = Cells()
    for i, count in enumerate(counts["before"]):
        high = CHART * count / longest
        cells.add(x + i * step, base - high, step, high, BEFORE if len(counts) == 1 else "#cccccc")
    cells.draw(picture)
    if "after" in counts:
        heights = base - CHART * counts["after"] / longest
        points = [(x, base)]
        for i, y in enumerate(heights):
            points += [(x + i * step, y), (x + (i + 1) * step, y)]
        picture.path([*points, (x + wide, base)], stroke=AFTER)
    picture.line(x, base, x + wide, base, stroke="#555555")
    for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
        label = f"{(2 * share - 1) * found.most:.2g}"
        picture.text(x + share * wide, base + 14, label, SMALL, anchor, "#555555")


def draw_zeros(picture: Svg, m: Matrix, x: float, side: float) -> None:
    """The matrix in patches; the redder, the more of a patch is zero."""
    heading(picture, x, f"zeros: {m.zeros.mean():.1%}")
    shares = m.zero_share(50, 50)
    rows, columns = shares.shape
    across, down = side / columns, min(side, CHART) / rows
    cells = Cells()
    picture.rect(x, TOP, side, down * rows, "#f6f6f6", stroke=FAINT)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share:
                cells.add(x + j * across, TOP + i * down, across, down, ZERO, share)
    cells.draw(picture)
    picture.text(x, TOP + CHART + 14, "inputs downwards, outputs across", SMALL, fill="#555555")


def draw_spectrum(picture: Svg, found: Weights, x: float, wide: float) -> None:
    heading(picture, x, "singular values")
    base, first = TOP + CHART, found.before.singular_values[0] or 1.0
    n = len(found.before.singular_values)
    for name, m in found.both.items():
        values = np.minimum(m.singular_values[:n] / first, 1.0)
        chosen = np.unique(np.linspace(0, len(values) - 1, 120).astype(int))
        points = [(x + wide * i / max(n - 1, 1), base - CHART * values[i]) for i in chosen]
        picture.path(points, stroke=BEFORE if name == "before" else AFTER, width=2)
    picture.line(x, base, x + wide, base, stroke="#555555")
    for i, anchor in ((1, "start"), (n, "end")):
        picture.text(x + wide * (i > 1), base + 14, str(i), SMALL, anchor, "#555555")
    for line, (name, m) in enumerate(found.both.items()):
        text = f"{name}: rank {m.rank():,} holds 99% of the energy"
        fill = "#666666" if name == "before" else AFTER
        picture.text(x + wide, TOP + 10 + 16 * line, text, SMALL, "end", fill)
