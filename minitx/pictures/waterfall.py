"""A cost waterfall as SVG: a bar for each step, stacked by part, and what each step took away.

steps = [("dense", {"ffn": 6, "attn": 4}), ("+ early-exit", {"ffn": 4, "attn": 3})]
draw([("multiply-adds", steps)], "what each flag saves").write("waterfall.svg")
"""

from collections.abc import Mapping, Sequence

from minitx.pictures.svg import COLORS, FAINT, INK, Svg, text_width

Steps = Sequence[tuple[str, Mapping[str, float]]]  # a label, and amounts by part

BAR, GAP = 20, 12  # pixels: a bar's height, and between two
LENGTH = 420  # of the longest bar
TOP, HEAD, LEGEND = 56, 30, 26  # above the first panel; its heading; the legend below


def draw(panels: Sequence[tuple[str, Steps]], title: str) -> Svg:
    """Panels (what is counted, steps) one below the other. The bars of a panel share a scale."""
    parts = list(dict.fromkeys(p for _, steps in panels for _, each in steps for p in each))
    labels = [label for _, steps in panels for label, _ in steps]
    left = 24 + max(map(text_width, labels))
    words = max(text_width(total_words(1, 1)), 150)
    legend = sum(text_width(part) + 34 for part in parts)
    width = max(left + LENGTH + words, text_width(title, 15) + 24, legend + 24)
    height = TOP + LEGEND + sum(HEAD + len(steps) * (BAR + GAP) for _, steps in panels)
    picture = Svg(width, height, title)
    picture.text(12, 24, title, 15, font_weight="bold")
    y = TOP - 8.0
    for what, steps in panels:
        picture.text(12, y + 12, what, font_weight="bold")
        draw_steps(picture, steps, parts, left, y + HEAD - 8)
        y += HEAD + len(steps) * (BAR + GAP)
    x = 12.0
    for number, part in enumerate(parts):
        picture.rect(x, height - 22, 12, 12, color(number))
        picture.text(x + 17, height - 12, part)
        x += text_width(part) + 34
    return picture


def draw_steps(picture: Svg, steps: Steps, parts: Sequence[str], left: float, top: float) -> None:
    totals = [sum(each.values()) for _, each in steps]
    scale = LENGTH / max(max(totals), 1e-30)
    for number, ((label, each), total) in enumerate(zip(steps, totals)):
        y, x = top + number * (BAR + GAP), left
        picture.text(left - 8, y + 14, label, anchor="end")
        for part in parts:
            amount = each.get(part, 0)
            if amount:
                share = f"{100 * amount / total:.0f} % of {label}"
                note = f"{part}: {in_short(amount)} ({share})"
                picture.rect(x, y, amount * scale, BAR, color(parts.index(part)), note)
            x += amount * scale
        before = totals[number - 1] if number else total
        if before > total:  # what this step took away
            picture.rect(x, y, (before - total) * scale, BAR, "none", stroke=INK,
                         stroke_width=0.8, stroke_dasharray="3 3")  # fmt: skip
        if number + 1 < len(steps):
            end = left + total * scale
            picture.line(end, y + BAR, end, y + BAR + GAP, FAINT, 1)
        end = left + max(total, before) * scale
        picture.text(end + 8, y + 14, total_words(total, totals[0]))


def total_words(total: float, first: float) -> str:
    ratio = f" ({total / first:.2f}x)" if first else ""
    return f"{in_short(total)}{ratio}"


def in_short(amount: float) -> str:
    """2713685 as 2.71 M"""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size:
            amount /= size
            digits = 2 if amount < 10 else 1 if amount < 100 else 0
            return f"{amount:.{digits}f} {letter}"
    return f"{amount:.3g}"


def color(number: int) -> str:
    return COLORS[number % len(COLORS)]
