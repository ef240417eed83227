"""Text above cells: each token is a column as wide as its text, and lines are wrapped.

columns = columns_of(tokenizer, ids)
for line in lines(columns, 80): ...        # the columns of one line, at most 80 characters wide
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import combining, east_asian_width

LONGEST = 14  # characters of a token; the middle of a longer one is left out
SHOWN_AS = {"\n": "↵", "\t": "⇥", "\r": "↵"}


@dataclass(frozen=True)
class Column:
    """A token of the text, as it is written above its cells."""

    position: int
    id: int
    text: str  # printable, at least one character

    @property
    def width(self) -> int:
        return width(self.text)

    @property
    def gap(self) -> int:
        """Spaces at its beginning, which stay empty in the cells below, too."""
        inside = self.text.lstrip(" ")
        return len(self.text) - len(inside) if inside else 0


def columns_of(tokenizer, ids: Sequence[int]) -> list[Column]:
    """A column for each token. A character that spans several tokens stands above the last."""
    decoder: Any = tokenizer.decoder(None)
    found = []
    for position, id in enumerate(ids):
        found.append(Column(position, id, shown(decoder.push(id) or name(tokenizer, id))))
    return found


def name(tokenizer, id: int) -> str:
    """Of a token without a text of its own."""
    return {tokenizer.eos: "</s>", tokenizer.bos: "<s>"}.get(id, "")


def shown(piece: str) -> str:
    """The text of a token with every character printable; a part of a character is "~"."""
    text = "".join(SHOWN_AS.get(c, c if c.isprintable() else "?") for c in piece) or "~"
    half = LONGEST // 2
    return text if len(text) <= LONGEST else f"{text[:half]}…{text[1 - half :]}"


def width(text: str) -> int:
    """Columns of the terminal: wide characters (Chinese, say) take two, combining ones none."""
    wide = (2 if east_asian_width(c) in "WF" else 0 if combining(c) else 1 for c in text)
    return max(sum(wide), 1)


def lines(columns: Sequence[Column], room: int) -> Iterator[list[Column]]:
    """The columns in lines of at most ``room`` characters; a line has one column at least."""
    line: list[Column] = []
    for column in columns:
        if line and sum(c.width for c in line) + column.width > room:
            yield line
            line = []
        line.append(column)
    if line:
        yield line
