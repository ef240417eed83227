"""The charts of all families: a scatter plot of letters in the terminal, and curves in a PNG."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_letters
from textwrap import fill

from minitx.checkpoints.common import atomic_write
from minitx.lab.layout import COLUMNS
from minitx.lab.sweep import HEIGHT, WIDTH, check_picture, scale

Series = dict[str, list[tuple[float, float]]]  # points (x, y) by the name of their method


def chart(series: Series, below: str, least: float | None = None) -> str:
    """A scatter plot of letters, one for each method; where points coincide, the first method's is
    shown. least: y on a logarithmic scale that begins there, for smaller values too."""
    points = [(letter(i), *xy) for i, name in enumerate(series) for xy in series[name]]
    xs, ys = [p[1] for p in points], [p[2] for p in points]
    if least is not None:
        ys = [max(y, least) for y in ys]
    heights = ys if least is None else list(map(math.log, ys))
    x, y = scale(xs, WIDTH), scale(heights, HEIGHT)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for (mark, at_x, _), height in reversed(list(zip(points, heights))):
        grid[HEIGHT - 1 - y(height)][x(at_x)] = mark
    labels = [f"{max(ys):.3g}", *[""] * (HEIGHT - 2), f"{min(ys):.3g}"]
    lines = [f"{label:>6} |{''.join(row)}" for label, row in zip(labels, grid)]
    ends = f"{min(xs):.3g}", f"{max(xs):.3g} {below}"
    lines.append(f"{'':7}+{'-' * WIDTH}")
    lines.append(f"{'':8}{ends[0]}{ends[1]:>{WIDTH - len(ends[0])}}")
    names = ", ".join(f"{letter(i)} {name}" for i, name in enumerate(series))
    return "\n".join([*map(str.rstrip, lines), fill(names, COLUMNS)])


def letter(number: int) -> str:
    return ascii_letters[number % len(ascii_letters)]


@contextmanager
def drawing(path, title: str, panels: int) -> Iterator[list]:
    """Axes side by side, written as a PNG file at the end; needs the ``plot`` extra."""
    pyplot = check_picture(path)
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, 5))
    yield list(axes)
    figure.suptitle(title)
    figure.tight_layout()
    with atomic_write(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def draw(axes, series: Series, x: str, y: str, dashed=()) -> None:
    """One curve for each method, dashed for baselines."""
    for number, (method, points) in enumerate(series.items()):
        look = style(method, dashed, number)
        axes.plot(*zip(*sorted(points)), look, label=method)
    axes.set(xlabel=x, ylabel=y)


MARKERS = "os^Dv"  # another one when the ten colors begin again


def style(method: str, dashed, number: int = 0) -> str:
    return MARKERS[number // 10 % len(MARKERS)] + ("--" if method in dashed else "-")
