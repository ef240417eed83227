"""What a teacher hands out: a workbook with the chosen exercises, no solutions, and a sheet that
says how to work with it."""

import re
from pathlib import Path

from minitx.checkpoints.common import need_new_folder
from minitx.errors import MinitxError
from minitx.learn.exercise import Exercise, exercises, find_exercise
from minitx.learn.workbook import start, write

SHEET = """\
# Exercises

{table}

**Before the first one.** Install minitx, as your teacher says. `minitx learn` then lists the
exercises, if you run it in this folder.

**How to work.** Open a file in an editor and read the text at its top. Work the example out by
hand. Then replace the `raise NotImplementedError` by your code. NumPy is all you need; do not
import minitx, unless the text allows it. Check your answer, as often as you like, in one of three
ways:

    minitx learn {first:<2}            or with --watch: checks again whenever you save
    python {stem}.py
    python -m pytest -k {ex}

The checker runs your code on small examples and says what is wrong; many mistakes have a name.
`minitx learn hint {first}` gives a hint, and a second one if you ask again. When an exercise is
solved, your code runs inside a small language model and writes a story.

**Hand in** this folder with your files. They are checked again, with other numbers.
"""


def hand_out(folder, chosen: tuple[Exercise, ...]) -> None:
    """Write a handout into a new folder. MinitxError if there is one already."""
    folder = Path(folder)
    need_new_folder(folder)
    start(folder, chosen, remembered=False)
    rows = ["| no. | exercise | file | minutes | difficulty |", "| --- | --- | --- | --- | --- |"]
    for e in chosen:
        rows.append(f"| {e.number} | {e.title} | `{e.stem}.py` | {e.minutes} | {e.difficulty} |")
    first = chosen[0]
    names = dict(first=first.number, stem=first.stem, ex=first.stem.partition("_")[0])
    write(folder / "README.md", SHEET.format(table="\n".join(rows), **names))


def chosen_exercises(words: str | None) -> tuple[Exercise, ...]:
    """The exercises that ``--only`` names: "1-6,12,speculative". None: all."""
    if words is None:
        return exercises()
    wanted = []
    for word in filter(None, map(str.strip, words.split(","))):
        ends = re.fullmatch(r"(\d+) *- *(\d+)", word)
        if ends:
            first, last = find_exercise(ends[1]), find_exercise(ends[2])
            if first.number > last.number:
                raise MinitxError(f"{word} is empty; the smaller number comes first.")
            wanted += [e for e in exercises() if first.number <= e.number <= last.number]
        else:
            wanted.append(find_exercise(word))
    if not wanted:
        raise MinitxError("--only names no exercise; expected numbers such as 1-6,12.")
    return tuple(e for e in exercises() if e in wanted)
