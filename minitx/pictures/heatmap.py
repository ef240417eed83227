"""A heat map of shares: shades and numbers in the terminal, colored cells as SVG.

heat = Heat("right answers", ["1 of 2", "2 of 2"], ["1 hop", "2 hops"], [[0.4, 0.1], [1, 0.7]])
print(heat)
heat.draw().write("heat.svg")
"""

from collections.abc import Sequence
from dataclasses import dataclass

from minitx.lab.layout import table
from minitx.pictures.svg import INK, PAPER, Svg, text_width

SHADES = " ░▒▓█"  # from 0 to 1
CELL, HEIGHT = 64, 24  # pixels
LEFT, TOP = 12, 70  # of the first row's label
LOW, HIGH = (255, 255, 255), (0, 90, 160)  # the colors of 0 and 1


@dataclass(frozen=True)
class Heat:
    """values: shares from 0 to 1 by row and column."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    corner: str = ""  # what the rows are

    def __str__(self) -> str:
        lines = [[self.corner, *self.columns]]
        lines += [[name, *map(cell, values)] for name, values in zip(self.rows, self.values)]
        return f"{self.title}:\n{table(lines)}"

    def draw(self) -> Svg:
        """The picture by itself."""
        picture = Svg(0, 0, self.title)
        self.paint(picture, 0)
        return picture

    def paint(self, picture: Svg, top: float) -> None:
        """Draw it into a picture that has room for it from there, or grows."""
        left = LEFT + max(map(text_width, [*self.rows, self.corner])) + 12
        wide = max([CELL, *(text_width(name) + 12 for name in self.columns)])
        right = max(left + wide * len(self.columns), text_width(self.title, 15)) + 24
        picture.width = max(picture.width, right)
        picture.height = max(picture.height, top + TOP + HEIGHT * len(self.rows) + 16)
        picture.text(LEFT, top + 24, self.title, 15, font_weight="bold")
        picture.text(left - 12, top + TOP - 10, self.corner, anchor="end")
        for column, name in enumerate(self.columns):
            picture.text(left + (column + 0.5) * wide, top + TOP - 10, name, anchor="middle")
        for row, (name, values) in enumerate(zip(self.rows, self.values)):
            y = top + TOP + row * HEIGHT
            picture.text(left - 12, y + 16, name, anchor="end")
            for column, value in enumerate(values):
                x, note = left + column * wide, f"{name}, {self.columns[column]}: {value:.3f}"
                picture.rect(x, y, wide - 2, HEIGHT - 2, color(value), note, stroke="#d0d0d0")
                ink = PAPER if value > 0.55 else INK
                picture.text(x + wide / 2 - 1, y + 15, number(value), fill=ink, anchor="middle")


def cell(value: float) -> str:
    """Two shaded characters and per cent."""
    shade = SHADES[round(value * (len(SHADES) - 1))]
    return f"{2 * shade} {number(value):>3}"


def number(value: float) -> str:
    return f"{100 * value:.0f}"


def color(value: float) -> str:
    """Between the two ends."""
    share = min(max(value, 0.0), 1.0)
    mixed = (round(a + (b - a) * share) for a, b in zip(LOW, HIGH))
    return "#" + "".join(f"{c:02x}" for c in mixed)
