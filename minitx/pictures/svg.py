"""A self-contained SVG picture: shapes and text at given places, written as one string.

No library is needed to write one, and every browser, and GitHub's README view, shows it.

    picture = Svg(200, 60, "one circle")
    picture.circle(30, 30, 10, fill="#2a6fdb", note="appears when the mouse is over it")
    picture.text(50, 34, "a circle")
    picture.write("circle.svg")

x grows to the right and y downwards, both in pixels. Colors are those of CSS.
"""

import textwrap
from html import escape
from pathlib import Path

from minitx.checkpoints.common import atomic_write

FONT = "ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace"
FONT_SIZE = 12
INK, PAPER, FAINT = "#222222", "#ffffff", "#d8d8d8"
# The colors of Okabe and Ito (2008), which people with color blindness can tell apart.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b5b95", "#444444")


class Svg:
    """A picture of ``width`` x ``height`` pixels. title: what a screen reader says of it."""

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title = width, height, title
        self.elements: list[str] = []

    def rect(self, x, y, width, height, fill=INK, note: str = "", **more) -> None:
        self.element("rect", note, x=x, y=y, width=width, height=height, fill=fill, **more)

    def circle(self, x, y, radius, fill=INK, note: str = "", **more) -> None:
        self.element("circle", note, cx=x, cy=y, r=radius, fill=fill, **more)

    def line(self, x1, y1, x2, y2, stroke=INK, width=1.0, **more) -> None:
        more = {"stroke_width": width} | more
        self.element("line", "", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, **more)

    def path(self, points, stroke=INK, width=1.5, note: str = "", **more) -> None:
        """A line through points [(x, y), ...]."""
        there = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
        more = {"fill": "none", "stroke_width": width} | more
        self.element("polyline", note, points=there, stroke=stroke, **more)

    def text(
        self, x, y, text: str, size=FONT_SIZE, anchor="start", fill=INK, halo=False, **more
    ) -> None:
        """Text whose baseline is at y; anchor: which part of it is at x, start, middle or end.
        halo: lines behind it stop short of its letters."""
        if halo:  # the same text, wider and in the color of the paper
            self.text(x, y, text, size, anchor, PAPER, stroke=PAPER, stroke_width=3, **more)
        space = {"xml:space": "preserve"} if text != text.strip() else {}
        more = {"font_size": size, "text_anchor": anchor, "fill": fill} | more | space
        self.elements.append(f"<text{_attributes(x=x, y=y, **more)}>{escape(text)}</text>")

    def paragraph(self, x, y, text: str, room: float, size=FONT_SIZE, **more) -> float:
        """Text in lines of at most ``room`` pixels; returns the baseline of the last one."""
        for i, line in enumerate(textwrap.wrap(text, max(int(room / text_width("x", size)), 1))):
            y += 1.4 * size * (i > 0)
            self.text(x, y, line, size=size, **more)
        return y

    def element(self, name: str, note: str = "", **attributes) -> None:
        """Any other element. note: shown when the mouse is over it."""
        inside = f"<title>{escape(note)}</title>" if note else ""
        self.elements.append(f"<{name}{_attributes(**attributes)}>{inside}</{name}>")

    def __str__(self) -> str:
        w, h = _number(self.width), _number(self.height)
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{w}" height="{h}" '
            f'viewBox="0 0 {w} {h}" role="img" font-family="{FONT}">'
        )
        paper = f'<rect width="{w}" height="{h}" fill="{PAPER}"></rect>'
        lines = [head, f"<title>{escape(self.title)}</title>", paper, *self.elements, "</svg>"]
        return "\n".join(lines) + "\n"

    def write(self, path) -> None:
        """Write the file, whole or not at all."""
        with atomic_write(Path(path)) as file:
            file.write(str(self).encode())


def text_width(text: str, size=FONT_SIZE) -> float:
    """The width of text in pixels: every character of the monospace font is 0.6 of its size."""
    return 0.602 * size * len(text)


def _attributes(**values) -> str:
    words = ((name.replace("_", "-"), value) for name, value in values.items() if value is not None)
    return "".join(f' {name}="{escape(_number(value))}"' for name, value in words)


def _number(value) -> str:
    """Two digits are enough for a place in a picture, and keep the file small."""
    return value if isinstance(value, str) else f"{round(float(value), 2):g}"
