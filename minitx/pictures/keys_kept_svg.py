"""The keys that queries keep (keys_kept.py) as an SVG picture.

Blue: a kept key, the darker, the more attention the dense model gives to it. Red: a key left out,
the darker, the more attention is missed. The bars on the right add that up for each query.
"""

from minitx.pictures.cells import Cells
from minitx.pictures.keys_kept import KeysKept
from minitx.pictures.svg import Svg, text_width

MARGIN, SIDE, GAP = 12, 11, 1  # SIDE: of a cell
BAR = 110  # pixels of a query that misses everything
KEPT, LEFT_OUT, FAINT, NOT_RUN = "#0072b2", "#d55e00", "#e4eef6", "#f2f2f2"
SMALL = 9  # of the text beside rows and columns


def as_svg(found: KeysKept) -> Svg:
    names = [column.text.strip() or column.text for column in found.columns]
    T, longest = len(names), max(text_width(name, SMALL) for name in names)
    left = MARGIN + longest + 6
    right = left + T * SIDE
    width = max(right + BAR + 40 + MARGIN, 560)
    picture = Svg(width, 0, f"Keys kept: {found.title}")
    room = width - 2 * MARGIN
    y = picture.paragraph(MARGIN, 22, found.title, room, size=13, font_weight="bold")
    draw_legend(picture, y + 22)
    top = y + 62 + 0.75 * longest
    for j, name in enumerate(names):
        x = left + j * SIDE + 8
        turned = f"rotate(-50 {x:.4g} {top - 5:.4g})"
        picture.text(x, top - 5, name, size=SMALL, fill="#555555", transform=turned)
    picture.text(right + 12, top - 5, "attention missed", size=SMALL, fill=LEFT_OUT)
    cells = Cells()
    for i in range(T):
        draw_query(cells, found, i, left, top + i * SIDE)
    cells.draw(picture)
    for i, name in enumerate(names):
        y = top + i * SIDE
        picture.text(left - 5, y + 9, name, size=SMALL, anchor="end", fill="#555555")
        if found.ran[i]:
            missed = float(found.missed[i])
            picture.rect(right + 12, y + 2, BAR * missed, SIDE - 4, LEFT_OUT)
            if missed >= 0.005:
                x = right + 16 + BAR * missed
                picture.text(x, y + 9, f"{missed:.0%}", size=SMALL, fill="#555555")
        hover = dict(fill="none", pointer_events="all", note=in_words(found, i, names))
        picture.rect(left, y, right - left + BAR, SIDE, **hover)
    y = picture.paragraph(MARGIN, top + T * SIDE + 24, found.sentence, room, fill="#555555")
    picture.height = y + MARGIN
    return picture


def draw_query(cells: Cells, found: KeysKept, i: int, left: float, y: float) -> None:
    """A row of squares. Opacity is the square root of the weight, so that small ones show."""
    side = SIDE - GAP
    for j in range(i + 1):
        x, p = left + j * SIDE, float(found.dense[i, j])
        if not found.ran[i]:
            cells.add(x, y, side, side, NOT_RUN)
            continue
        kept = bool(found.kept[i, j])
        if kept:
            cells.add(x, y, side, side, FAINT)
        if (opacity := round(p**0.5, 1)) > 0:
            cells.add(x, y, side, side, KEPT if kept else LEFT_OUT, min(opacity, 1.0))


def in_words(found: KeysKept, i: int, names: list[str]) -> str:
    """What a query keeps, and the keys that it misses most."""
    if not found.ran[i]:
        return f"{names[i]}: not run in this layer"
    lines = [
        f"{names[i]}: keeps {found.counts[i]} of {i + 1} keys, misses {found.missed[i]:.1%} of the "
        "attention"
    ]
    out = found.dense[i] * ~found.kept[i]
    for j in out.argsort()[::-1][:3]:
        if out[j] >= 0.005:
            lines.append(f"  {out[j]:.1%} on {names[j]} (token {j})")
    return "\n".join(lines)


def draw_legend(picture: Svg, y: float) -> None:
    x: float = MARGIN
    for fill, text in ((KEPT, "key kept"), (LEFT_OUT, "key left out")):
        for n, p in enumerate((0.02, 0.2, 0.7)):
            base = FAINT if fill == KEPT else "#ffffff"
            picture.rect(x + n * SIDE, y - 9, SIDE - GAP, SIDE - GAP, base)
            more = {"fill_opacity": p**0.5}
            picture.rect(x + n * SIDE, y - 9, SIDE - GAP, SIDE - GAP, fill, **more)
        picture.text(x + 3 * SIDE + 5, y, text)
        x += 3 * SIDE + text_width(text) + 30
    picture.text(x, y, "(darker: more dense attention)", fill="#555555")
