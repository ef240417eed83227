"""A weight matrix before and after techniques (weights.py) as an SVG picture of three charts."""

import numpy as np

from minitx.pictures.cells import Cells
from minitx.pictures.svg import FAINT, Svg
from minitx.pictures.weights import Matrix, Weights

WIDTH = 800
CHART = 210  # pixels high
BEFORE, AFTER, ZERO = "#9a9a9a", "#0072b2", "#d55e00"
BINS = 61
SMALL = 10


def as_svg(found: Weights) -> Svg:
    picture = Svg(WIDTH, 0, f"Weights: {found.title}")
    y = picture.paragraph(12, 22, found.title, WIDTH - 24, size=14, font_weight="bold") + 22
    shape = " x ".join(f"{n:,}" for n in found.before.w.shape)
    picture.text(12, y, f"{found.part} ({shape})")
    x = 400.0
    for name in found.both:
        picture.rect(x, y - 8, 16, 8, BEFORE if name == "before" else AFTER)
        picture.text(x + 22, y, name)
        x += 100
    top = y + 40
    picture.height = top + CHART + 24
    if not any(m.zeros.any() for m in found.both.values()):
        draw_histogram(picture, found, 12, top, 380)
        draw_spectrum(picture, found, 420, top, 368)
        return picture
    draw_histogram(picture, found, 12, top, 270)
    draw_zeros(picture, found.after or found.before, 306, top, 200)
    draw_spectrum(picture, found, 536, top, 252)
    return picture


def heading(picture: Svg, x: float, top: float, text: str) -> None:
    picture.text(x, top - 10, text, size=12, fill="#555555")


def draw_histogram(picture: Svg, found: Weights, x: float, top: float, wide: float) -> None:
    heading(picture, x, top, "weights (without zeros)")
    base = top + CHART
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


def draw_zeros(picture: Svg, m: Matrix, x: float, top: float, side: float) -> None:
    """The matrix in patches; the redder, the more of a patch is zero."""
    heading(picture, x, top, f"zeros: {m.zeros.mean():.1%}")
    shares = m.zero_share(50, 50)
    rows, columns = shares.shape
    across, down = side / columns, min(side, CHART) / rows
    cells = Cells()
    picture.rect(x, top, side, down * rows, "#f6f6f6", stroke=FAINT)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if share:
                cells.add(x + j * across, top + i * down, across, down, ZERO, share)
    cells.draw(picture)
    picture.text(x, top + CHART + 14, "inputs downwards, outputs across", SMALL, fill="#555555")


def draw_spectrum(picture: Svg, found: Weights, x: float, top: float, wide: float) -> None:
    heading(picture, x, top, "singular values")
    base, first = top + CHART, found.before.singular_values[0] or 1.0
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
        picture.text(x + wide, top + 10 + 16 * line, text, SMALL, "end", fill)
