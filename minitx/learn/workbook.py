"""A workbook: the folder in which a student works, with one file per exercise and the progress.

Files are written from the masters when the workbook is made, so none is part of the repository, and
an update of minitx never meets a student's work. What exists is never overwritten.
"""

import json
import os
import time
from pathlib import Path

from minitx.checkpoints.common import atomic_write, read, unwritable
from minitx.errors import MinitxError
from minitx.learn.exercise import Exercise, exercises
from minitx.learn.holes import student_file
from minitx.learn.verdict import Verdict
from minitx.progress import say
from minitx.shared.answer_store import default_file

PROGRESS = "progress.json"
MOST_BYTES = 2**20  # of progress.json

TESTS = '''"""The exercises as tests: python -m pytest -k ex03"""

from pathlib import Path

import pytest

from minitx.learn.session import names_in, verdict_on

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("name", names_in(FOLDER))
def test_exercise(name):
    verdict = verdict_on(FOLDER / f"{name}.py")
    if not verdict.passed:
        pytest.fail(verdict.message, pytrace=False)
'''
# So that no settings of a folder above are used, and ex17_test_the_test.py is no file of tests.
SETTINGS = "[pytest]\ntestpaths = .\npython_files = test_exercises.py\n"


def start(folder, chosen: tuple[Exercise, ...] | None = None, remembered=True) -> list[Path]:
    """Write the files of a workbook that are not there yet, and return them. chosen: the exercises
    (default: all). remembered: as the workbook last used. MinitxError if the folder cannot be
    written."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    wanted = {f"{exercise.stem}.py": student_file(exercise) for exercise in chosen or exercises()}
    wanted |= {"test_exercises.py": TESTS, "pytest.ini": SETTINGS}
    new = [folder / name for name in wanted if not (folder / name).exists()]
    for path in new:
        write(path, wanted[path.name])
    if not is_workbook(folder):
        Progress(folder).write()
    if remembered:
        remember(folder)
    return new


def reset(folder: Path, exercise: Exercise) -> Path | None:
    """Write an exercise's file anew. The student's own version is kept beside it, under the name
    that is returned (None: there was none)."""
    path = folder / f"{exercise.stem}.py"
    kept = None
    if path.exists():
        kept = next(p for n in range(1, 10**6) if not (p := path.with_suffix(f".{n}.old")).exists())
        os.replace(path, kept)
    write(path, student_file(exercise))
    progress = Progress(folder)
    progress.of(exercise).pop("state", None)
    progress.write()
    return kept


def write(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


# Which workbook ----------------------------------------------------------------------------------


def find_workbook(folder=None, needed=True) -> Path | None:
    """The workbook in ``folder``; by default the current folder if it is one, otherwise the one
    that was last used. If there is none: MinitxError, or None if it is not ``needed``."""
    if folder is not None:
        if not is_workbook(Path(folder)):
            raise MinitxError(
                f"There is no workbook in {folder}; make one with: minitx learn start {folder}"
            )
        return Path(folder)
    if is_workbook(Path.cwd()):
        return Path.cwd()
    last = last_used()
    if last is None or not is_workbook(last):
        if not needed:
            return None
        raise MinitxError(
            "There is no workbook yet; make one with: minitx learn start exercises (any new folder)"
        )
    return last


def is_workbook(folder: Path) -> bool:
    try:
        return (folder / PROGRESS).is_file()
    except (OSError, ValueError):  # a name that is too long, or has a NUL
        return False


def remember(folder: Path) -> None:
    """Note the workbook as the one last used. Not being able to is no reason to stop."""
    try:
        pointer().parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(pointer()) as file:
            file.write(os.fsencode(folder.resolve()) + b"\n")
    except (MinitxError, OSError):
        pass


def last_used() -> Path | None:
    try:
        return Path(os.fsdecode(read(pointer(), MOST_BYTES).rstrip(b"\n")))
    except (MinitxError, OSError):
        return None


def pointer() -> Path:
    return default_file().with_name("workbook")


# Progress ----------------------------------------------------------------------------------------


class Progress:
    """What a student has done, by exercise: state ("tried", "solved" or "given up"), attempts, and
    how many hints were read. Kept in progress.json; a damaged file is set aside."""

    def __init__(self, folder: Path):
        self.path = Path(folder) / PROGRESS
        self.entries: dict[str, dict] = {}
        if not self.path.exists():
            return
        too_large = self.path.stat().st_size > MOST_BYTES  # then we did not write it
        try:
            self.entries = checked(b"" if too_large else read(self.path, MOST_BYTES))
        except MinitxError:  # it cannot be read
            raise
        except (ValueError, TypeError, RecursionError):
            aside = self.path.with_name(f"{PROGRESS}.damaged")
            os.replace(self.path, aside)
            self.write()  # a folder without it is no workbook
            say(
                f"minitx: note: {self.path} was damaged; it is now {aside.name}, and a new one "
                "begins."
            )

    def of(self, exercise: Exercise) -> dict:
        return self.entries.setdefault(exercise.stem, {})

    def state(self, exercise: Exercise) -> str:
        return self.entries.get(exercise.stem, {}).get("state", "")

    def note(self, exercise: Exercise, verdict: Verdict) -> None:
        """Count an attempt; what was solved once stays solved."""
        if verdict.kind == "not written":
            return
        entry = self.of(exercise)
        entry["attempts"] = entry.get("attempts", 0) + 1
        if verdict.passed and entry.get("state") not in ("solved", "given up"):
            entry |= {"state": "solved", "when": time.strftime("%Y-%m-%d %H:%M")}
        entry.setdefault("state", "tried")

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write(self.path, json.dumps({"exercises": self.entries}, indent=1) + "\n")


def checked(content: bytes) -> dict[str, dict]:
    """The entries in progress.json; ValueError if it is not what ``write`` writes."""
    entries = json.loads(content)["exercises"]
    if not isinstance(entries, dict):
        raise ValueError
    for entry in entries.values():
        if not isinstance(entry, dict):
            raise ValueError
        counts = [entry.get(name, 0) for name in ("attempts", "hints")]
        if not all(type(count) is int and 0 <= count < 10**9 for count in counts):
            raise ValueError
        if entry.get("state", "tried") not in ("tried", "solved", "given up"):
            raise ValueError
    return entries
