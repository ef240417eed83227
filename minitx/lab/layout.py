"""Tables and paragraphs that fit a terminal of 100 columns."""

import re
import textwrap

COLUMNS = 100
GAP = "  "  # between the columns of a table


def table(rows: list[list[str]], columns: int = COLUMNS) -> str:
    """Rows of words as aligned columns: the first left-aligned, the others right-aligned.

    If that is wider than ``columns``, the headings (the first row) are broken into several lines;
    if that is not enough, a long name in the first column stands on a line above its figures.
    """
    heading, *body = rows
    widths = [max(map(len, column)) for column in zip(*rows)]
    if _total(widths) > columns and body:
        below = [max(map(len, column)) for column in zip(*body)]
        widths = [max(w, _longest_part(name)) for w, name in zip(below, heading)]
    if _total(widths) > columns:
        widths[0] = max(widths[0] - (_total(widths) - columns), 0)
    lines = [_line(words, widths) for words in _broken(heading, widths)]
    for name, *figures in body:
        if len(name) > widths[0]:
            lines.append(fit(name, columns))
            name = ""
        lines.append(_line([name, *figures], widths))
    return "\n".join(lines)


def _line(words: list[str], widths: list[int]) -> str:
    name, *figures = (
        word.rjust(w) if i else word.ljust(w) for i, (word, w) in enumerate(zip(words, widths))
    )
    return GAP.join([name, *figures]).rstrip()


def _broken(heading: list[str], widths: list[int]) -> list[list[str]]:
    """The lines of a heading, whose words are broken to fit; short ones stand at the bottom."""
    cells = [textwrap.wrap(word, max(w, 1)) or [""] for word, w in zip(heading, widths)]
    height = max(map(len, cells))
    return [list(words) for words in zip(*([""] * (height - len(c)) + c for c in cells))]


def _longest_part(heading: str) -> int:
    """The least width of a heading, which may be broken after a hyphen too."""
    return max(map(len, re.split(r"\s+|(?<=-)", heading)))


def _total(widths: list[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def fit(text: str, columns: int = COLUMNS, hanging: int | None = None) -> str:
    """The text with its longer lines broken between words. hanging: by how many columns the second
    and later lines of each are indented; default: as the first."""
    return "\n".join(_fit_line(line, columns, hanging) for line in text.split("\n"))


def _fit_line(line: str, columns: int, hanging: int | None) -> str:
    if len(line) <= columns:
        return line
    later = re.match(" *", line)[0] if hanging is None else " " * hanging
    options = dict(break_long_words=False, break_on_hyphens=False)
    return textwrap.fill(line, columns, subsequent_indent=later, **options)
