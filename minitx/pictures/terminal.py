"""A scatter plot of characters, for the terminal: one letter for each method.

Where points of several methods share a character, the first one's letter is shown, and a line below
the chart lists them all:

    x=0.75, y=0.013: a random, d teal
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters
from textwrap import fill

WIDTH, HEIGHT = 60, 15  # characters of the chart
COLUMNS = 100  # of the terminal
UNBROKEN = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Mark:
    letter: str
    name: str
    x: float
    y: float


def marks_of(series: Mapping[str, Sequence[tuple[float, float]]]) -> list[Mark]:
    """The points (x, y) of each method as marks: a, b, c ... in the order of the methods."""
    return [Mark(letter(i), name, *p) for i, name in enumerate(series) for p in series[name]]


def letter(number: int) -> str:
    return ascii_letters[number % len(ascii_letters)]


def plot(
    marks: Sequence[Mark],
    below: str,
    about: str = "",
    least: float | None = None,
    x_words: Callable[[float], str] = "{:.3g}".format,
    y_words: Callable[[float], str] = "{:.3g}".format,
    shared: bool = True,
) -> str:
    """The chart; below it the ends of the x axis, then ``about`` and the names of the letters, then
    the marks that share a character. below: what x is. least: y on a logarithmic scale that begins
    there, for smaller values too. x_words, y_words: how values are written. shared: False for no
    list of marks that share a character."""
    heights = [y_level(m.y, least) for m in marks]
    x, y = scale([m.x for m in marks], WIDTH), scale(heights, HEIGHT)
    cells: dict[tuple[int, int], list[Mark]] = {}  # by row, from the top, and column
    for m, height in zip(marks, heights):
        cells.setdefault((HEIGHT - 1 - y(height), x(m.x)), []).append(m)
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for (row, column), here in cells.items():
        grid[row][column] = here[0].letter
    shown = [m.y if least is None else max(m.y, least) for m in marks]
    labels = [y_words(max(shown)), *[""] * (HEIGHT - 2), y_words(min(shown))]
    wide = max(6, *map(len, labels))
    lines = [f"{label:>{wide}} |{''.join(row)}" for label, row in zip(labels, grid)]
    left, right = (x_words(end(m.x for m in marks)) for end in (min, max))
    lines.append(f"{'':{wide + 1}}+{'-' * WIDTH}")
    lines.append(f"{'':{wide + 2}}{ends(left, f'{right} {below}')}")
    names = dict.fromkeys(f"{m.letter} {m.name}" for m in marks)
    lines.append(listed(about, names))
    lines += in_one_place(cells, x_words, y_words) if shared else []
    return "\n".join(line.rstrip() for line in lines)


def in_one_place(cells: dict, x_words, y_words) -> list[str]:
    """A line for each character that several methods share, from left to right: of one on the
    logarithmic scale's lowest line, too."""
    found = []
    for _, here in sorted(cells.items(), key=lambda cell: (cell[0][1], -cell[0][0])):
        names = dict.fromkeys(f"{m.letter} {m.name}" for m in here)
        if len(names) > 1:
            about = f"x={x_words(here[0].x)}, y={y_words(here[0].y)}: "
            found.append(listed(about, names, "    "))
    return ["Overlapping points:", *found] if found else []


def listed(about: str, names: Iterable[str], indent: str = "") -> str:
    """``about`` and the names, broken into lines between names only."""
    joined = ", ".join(name.replace(" ", UNBROKEN) for name in names)
    options = dict(subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return fill(about + joined, COLUMNS, **options).replace(UNBROKEN, " ")


def ends(left: str, right: str) -> str:
    """Two labels at the ends of the x axis, with a space between them whatever their lengths."""
    return f"{left}{right:>{max(WIDTH - len(left), len(right) + 1)}}"


def y_level(y: float, least: float | None) -> float:
    return y if least is None else math.log(max(y, least))


def scale(values: Sequence[float], size: int) -> Callable[[float], int]:
    """A function from a value to its cell 0 .. size - 1."""
    low, high = min(values), max(values)
    wide = high - low or 1.0
    return lambda value: round((value - low) / wide * (size - 1))
