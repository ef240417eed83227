"""The charts of all families: a scatter plot of letters in the terminal, and curves as SVG or
PNG."""

from collections.abc import Sequence

from minitx.pictures.scatter import Curve, Point
from minitx.pictures.terminal import marks_of, plot

Series = dict[str, list[tuple[float, float]]]  # points (x, y) by the name of their method


def chart(series: Series, below: str, least: float | None = None) -> str:
    """A scatter plot of letters, one for each method; points that coincide are listed below it.
    least: y on a logarithmic scale that begins there, for smaller values too."""
    return plot(marks_of(series), below, least=least)


def curves(series: Series, dashed: Sequence[str] = (), line: bool = True) -> list[Curve]:
    """One curve for each method, dashed for baselines; line: its points are joined."""
    found = []
    for name, points in series.items():
        marked = [Point(x, y, note=f"{name}: {x:.3g}, {y:.4g}") for x, y in sorted(points)]
        found.append(Curve(name, marked, line, line and name in dashed))
    return found
