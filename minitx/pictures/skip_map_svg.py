"""The skip map (skip_map.py) as an SVG picture, 800 pixels wide.

A cell has two halves: the upper one is the block's attention, the lower one its FFN. What ran in
part is paler. When the mouse is over a token, the picture says in words what each block did.
"""

from itertools import groupby

from minitx.pictures.cells import Cells
from minitx.pictures.rounds import ACCEPTED, marks, rounds_sentence, was_speculative
from minitx.pictures.skip_map import STATES, Cell, SkipMap, name_of
from minitx.pictures.svg import FONT_SIZE, Svg, text_width
from minitx.pictures.token_columns import Column, lines

WIDTH, MARGIN = 800, 12
ROOM = WIDTH - 2 * MARGIN
LETTER = text_width("x")  # every character of the font is as wide
ROW, CELL = 14, 12  # from one row to the next; the height of a cell
ATTENTION, FFN = "#1b4f8f", "#6ba8e0"
LATER_ATTENTION, LATER_FFN = "#6b3fa0", "#b79ad8"
CACHED, NOTHING = "#2a9d74", "#ededed"
GUESSED, SAMPLED, WRONG = "#009e73", "#9a9a9a", "#d55e00"


def as_svg(found: SkipMap) -> Svg:
    labels = {model: name_of(model) for model in found.cells}
    last = {model: len(rows) - 1 for model, rows in found.cells.items()}
    named = [f"{labels[model]} {last[model]}" for model in labels] + ["rejected"] * 2
    left = MARGIN + max(map(text_width, named)) + 10
    text = list(lines(found.columns, int((WIDTH - left - MARGIN) / LETTER)))
    legend = legend_of(found)
    rounds = was_speculative(found.work.rounds)
    rows = sum(map(len, found.cells.values())) + (8 * (len(found.cells) - 1)) / ROW
    rows += rounds + bool(found.rejected)
    line = 20 + rows * ROW + 16
    picture = Svg(WIDTH, 0, f"Skip map: {found.title}")
    y = picture.paragraph(MARGIN, 22, found.title, ROOM, size=14, font_weight="bold") + 22
    for i, entries in enumerate(legend):
        draw_legend(picture, MARGIN, y + 20 * i, entries)
    y += 20 * len(legend) - 4
    for i, columns in enumerate(text):
        draw_line(picture, found, columns, left, y + line * i)
    y += line * len(text) + 6
    if rounds:
        words = rounds_sentence(found.work.rounds)
        y = picture.paragraph(MARGIN, y, words, ROOM, fill="#555555") + 18
    y = picture.paragraph(MARGIN, y, found.sentence, ROOM, fill="#555555")
    picture.height = y + MARGIN
    return picture


def draw_line(picture: Svg, found: SkipMap, columns: list[Column], left: float, y: float) -> None:
    """A line of text, and below it a row of cells for each block."""
    x, top, cells = left, y, Cells()
    places = []  # of the columns: where their cells begin, and how wide they are
    for column in columns:
        at, letters = x + LETTER * column.gap, column.width - column.gap
        places.append((column, at, LETTER * letters - 1))
        weight = "bold" if column.position < found.prompt else None
        text = dict(font_weight=weight, textLength=LETTER * letters)
        picture.text(at, y + FONT_SIZE, column.text.lstrip() or column.text, **text)
        x += LETTER * column.width
    y += 20
    if was_speculative(found.work.rounds):
        label(picture, left, y, "rounds")
        mark = marks(found.work.rounds)
        for column, x, wide in places:
            if kind := mark.get(column.position):
                cells.add(x, y + 4, wide, 5, GUESSED if kind == ACCEPTED else SAMPLED)
        y += ROW
    for i, (model, rows) in enumerate(found.cells.items()):
        y += 8 * (i > 0)
        for block, row in enumerate(rows):
            label(picture, left, y, f"{name_of(model)} {block}")
            for column, x, wide in places:
                draw_cell(cells, row[column.position], x, y, wide)
            y += ROW
    cells.draw(picture)
    if found.rejected:
        label(picture, left, y, "rejected", WRONG)
        for column, x, wide in places:
            if wrong := found.rejected.get(column.position):
                picture.text(x + wide / 2, y + 10, str(len(wrong)), 11, "middle", WRONG)
        y += ROW
    for column, x, wide in places:
        hover = dict(fill="none", pointer_events="all", note=in_words(found, column))
        picture.rect(x, top, wide, y - top, **hover)


def label(picture: Svg, left: float, y: float, text: str, fill: str = "#555555") -> None:
    picture.text(left - 8, y + 10, text, size=11, anchor="end", fill=fill)


def draw_cell(cells: Cells, cell: Cell, x, y, wide) -> None:
    if cell.state == "none":
        return
    half, later = CELL / 2, cell.state == "later"
    opacity = 0.2 + 0.7 * min(cell.share, 1) if cell.state == "part" else 1.0
    cells.add(x, y, wide, CELL, NOTHING)
    if cell.state in ("ran", "part", "later", "no ffn"):
        cells.add(x, y, wide, half, LATER_ATTENTION if later else ATTENTION, opacity)
    elif cell.spent.kv:
        cells.add(x, y, wide, 3, CACHED)
    if cell.state in ("ran", "part", "later", "no attention"):
        cells.add(x, y + half, wide, half, LATER_FFN if later else FFN, opacity)


def in_words(found: SkipMap, column: Column) -> str:
    """What happened to a token, a line for each run of blocks that did the same."""
    lines = [f"token {column.position}: {column.text}"]
    for n, r in enumerate(found.work.rounds, 1):
        i = column.position - r.first
        if was_speculative(found.work.rounds) and 0 <= i < len(r.ids):
            kind = "an accepted guess" if i < r.proposed else "a token sampled from the logits"
            lines.append(f"round {n}: {kind}")
    for model, rows in found.cells.items():
        said = [(block, meaning(row[column.position])) for block, row in enumerate(rows)]
        for what, run in groupby(said, key=lambda pair: pair[1]):
            blocks = [block for block, _ in run]
            which = f"{blocks[0]}-{blocks[-1]}" if len(blocks) > 1 else f"{blocks[0]}"
            lines.append(f"{name_of(model)} {which}: {what}")
    if wrong := found.rejected.get(column.position):
        lines.append("rejected here: " + "|".join(found.texts[id] for id in wrong))
    return "\n".join(lines)


def meaning(cell: Cell) -> str:
    what = "ran in part" if cell.state == "part" else STATES[cell.state][1]
    if cell.state == "none" or not cell.dense.total:
        return what
    return f"{what} ({cell.share:.0%} of the dense multiply-adds)"


# The legend ---------------------------------------------------------------------------------------


def legend_of(found: SkipMap) -> list[list[tuple]]:
    """Lines of entries (draw, text). draw: the colors of the upper and of the lower half."""
    states = found.states
    ran = any(s in states for s in ("ran", "part", "no ffn", "no attention"))
    entries: list[tuple] = [((ATTENTION, 0.5), (FFN, 0.5), "attention and FFN ran")] * ran
    if "part" in states:
        entries.append(((ATTENTION, 0.5), (FFN, 0.5), "paler: in part"))
    if "later" in states:
        entries.append(((LATER_ATTENTION, 0.5), (LATER_FFN, 0.5), "ran in a later step"))
    if "no ffn" in states:
        entries.append(((ATTENTION, 0.5), (NOTHING, 0.5), "FFN skipped"))
    if "no attention" in states:
        entries.append(((NOTHING, 0.5), (FFN, 0.5), "attention skipped"))
    if "kv" in states:
        entries.append(((CACHED, 0.25), (NOTHING, 0.75), "only keys and values cached"))
    if "skipped" in states:
        entries.append(((NOTHING, 0.5), (NOTHING, 0.5), "not run"))
    if was_speculative(found.work.rounds):
        entries.append(((GUESSED, 0.5), None, "accepted guess"))
        entries.append(((SAMPLED, 0.5), None, "sampled from the logits"))
    packed: list[list[tuple]] = [[]]
    for entry in entries:
        if sum(map(entry_width, [*packed[-1], entry])) > ROOM:
            packed.append([])
        packed[-1].append(entry)
    return packed


def entry_width(entry: tuple) -> float:
    return 22 + text_width(entry[2]) + 20


def draw_legend(picture: Svg, x: float, y: float, entries: list[tuple]) -> None:
    for entry in entries:
        upper, lower, text = entry
        opacity = {"fill_opacity": 0.5} if text.startswith("paler") else {}
        high = CELL * upper[1]
        if lower is None:
            picture.rect(x, y - 6, 16, 5, upper[0])
        else:
            picture.rect(x, y - 10, 16, high, upper[0], **opacity)
            picture.rect(x, y - 10 + high, 16, CELL * lower[1], lower[0], **opacity)
        picture.text(x + 22, y, text)
        x += entry_width(entry)
