"""Stacked bars of characters, for the terminal: one character for each part.

dense          1.00x  ########==============----
+ early-exit   0.69x  ######=========----
"""

from collections.abc import Mapping, Sequence

CHARACTERS = "#=-+o*%:@x"  # of the parts, in order
WIDTH = 50  # characters of the longest bar


def stacked(
    rows: Sequence[tuple[str, Mapping[str, float]]],
    width: int = WIDTH,
    parts: Sequence[str] | None = None,
) -> str:
    """A bar for each (label, {part: amount}), with its length relative to the first one's total;
    then a line that names the parts. Amounts must not be negative. parts: those of several charts,
    so that a part has the same character in each."""
    own = dict.fromkeys(part for _, amounts in rows for part in amounts)
    parts = list(own if parts is None else parts)
    totals = [sum(amounts.values()) for _, amounts in rows]
    longest = max(max(totals), 1e-30)
    wide = max(len(label) for label, _ in rows)
    lines = []
    for (label, amounts), total in zip(rows, totals):
        lengths = cells([amounts.get(part, 0) / longest * width for part in parts])
        bar = "".join(character(parts.index(p)) * n for p, n in zip(parts, lengths))
        ratio = f"{total / totals[0]:.2f}x" if totals[0] else "-"
        lines.append(f"{label:{wide}}  {ratio:>6}  {bar}".rstrip())
    names = ", ".join(f"{character(i)} {part}" for i, part in enumerate(parts) if part in own)
    return "\n".join([*lines, f"({names})"])


def character(number: int) -> str:
    return CHARACTERS[number % len(CHARACTERS)]


def cells(lengths: Sequence[float]) -> list[int]:
    """Lengths rounded so that every piece ends as near as possible to where it should: the sum of
    the first n is that of the exact ones, rounded."""
    found, end, exact = [], 0, 0.0
    for length in lengths:
        exact += length
        found.append(round(exact) - end)
        end = round(exact)
    return found
