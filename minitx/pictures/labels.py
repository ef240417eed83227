"""Labels beside points that cover neither each other nor a point.

Greedy: each label takes the first free place around its point, near ones before far ones. A label
that finds none goes to a list at the right of the frame. One that is not close to its point gets a
leader line to it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minitx.pictures.svg import FONT_SIZE, text_width

DISTANCES = (5, 12, 22, 34, 48, 64, 82, 102)  # pixels from the point to the label's box
ANGLES = (0, 180, 270, 90, 315, 45, 225, 135)  # degrees clockwise: right first, then left, above
BETWEEN = (22, 202, 338, 158, 292, 68, 248, 112)  # further ones, for far labels
LINE = 1.25  # height of a line of text, in font sizes
GAP = 5  # pixels between labels on a line
LIST_GAP = 18  # pixels between the frame and the list beside it


@dataclass(frozen=True)
class Box:
    left: float
    top: float
    right: float
    bottom: float

    def wider(self, x: float, y: float = 0.0) -> "Box":
        """By so many pixels at each side."""
        return Box(self.left - x, self.top - y, self.right + x, self.bottom + y)

    def meets(self, other: "Box") -> bool:
        """Do they share more than an edge?"""
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: "Box") -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place in the box that is nearest to (x, y)."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


@dataclass(frozen=True)
class Label:
    text: str
    box: Box
    x: float  # of its point
    y: float
    listed: bool  # beside the frame

    @property
    def leader(self) -> list[tuple[float, float]]:
        """From the point to the box; nothing if they are close."""
        end = self.box.nearest(self.x, self.y)
        return [(self.x, self.y), end] if math.dist((self.x, self.y), end) > DISTANCES[1] else []


def place(
    wanted: Sequence[tuple[float, float, str]],
    points: Sequence[tuple[float, float]],
    frame: Box,
    radius: float = 4.0,
    size: float = FONT_SIZE,
    lines: Sequence[Box] = (),
) -> list[Label]:
    """A label for each wanted (x, y, text), in pixels; points: all that may not be covered, each
    with this radius; lines: what else may not be."""
    taken = [Box(x - radius, y - radius, x + radius, y + radius) for x, y in points] + [*lines]
    placed, listed = [], []
    for x, y, text in wanted:
        free = (
            box
            for box in around(x, y, text_width(text, size), LINE * size, radius)
            if box.within(frame) and not any(box.meets(other) for other in taken)
        )
        box = next(free, None)
        if box is None:
            listed.append((x, y, text))
        else:
            taken.append(box.wider(GAP))
            placed.append(Label(text, box, x, y, False))
    return placed + beside(listed, frame, size)


def around(x, y, width: float, height: float, radius: float) -> Iterator[Box]:
    """Boxes around a point, from the nearest to the farthest."""
    for distance in DISTANCES:
        for angle in ANGLES + BETWEEN * (distance > 20):
            right, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            away = radius + distance
            # The box's side, or its corner, that faces the point is at this distance from it.
            left = x + right * away + (right - 1) / 2 * width
            top = y + down * away + (down - 1) / 2 * height
            yield Box(left, top, left + width, top + height)


def beside(listed: Sequence[tuple[float, float, str]], frame: Box, size: float) -> list[Label]:
    """A list at the right of the frame, in the order of the points from top to bottom, each label
    as near to the height of its point as there is room; full columns continue in another."""
    height = LINE * size
    room = max(int((frame.bottom - frame.top) // height), 1)
    listed = sorted(listed, key=lambda one: (one[1], one[0]))
    found, left = [], frame.right + LIST_GAP
    for start in range(0, len(listed), room):
        column = listed[start : start + room]
        tops, free = [], frame.top
        for number, (_, y, _) in enumerate(column):
            left_over = len(column) - number  # lines that must still fit below
            top = min(max(y - height / 2, free), frame.bottom - left_over * height)
            tops.append(top)
            free = top + height
        for (x, y, text), top in zip(column, tops):
            box = Box(left, top, left + text_width(text, size), top + height)
            found.append(Label(text, box, x, y, True))
        left = max(label.box.right for label in found) + size
    return found
