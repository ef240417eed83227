"""Work on an exercise: check the student's file, say what is wrong, keep the progress."""

import os
import time
from pathlib import Path

from minitx.errors import MinitxError
from minitx.lab.layout import fit
from minitx.learn.answer import read_answer
from minitx.learn.apart import judge_apart
from minitx.learn.check import judge
from minitx.learn.exercise import Exercise, exercises, find_exercise
from minitx.learn.in_model import demonstration
from minitx.learn.verdict import Verdict
from minitx.learn.workbook import Progress, is_workbook

PAUSE = 0.3  # seconds between two looks at a watched file


def check(folder: Path, exercise: Exercise) -> bool:
    """Check an exercise of a workbook in a process of its own, print the verdict, note the
    progress, and return whether it passed."""
    verdict, shown = judge_apart(exercise, folder / f"{exercise.stem}.py")
    print(told(exercise, verdict, shown, folder), flush=True)
    note(folder, exercise, verdict)  # last: on a full disk, the verdict is told all the same
    return verdict.passed


def check_here(path) -> bool:
    """The same in this process, for ``python ex03_attention.py``: prints and breakpoints in the
    student's code work."""
    path = Path(os.path.abspath(path))
    exercise = find_exercise(path.stem)
    answer, trouble = read_answer(exercise, path)
    verdict = trouble or judge(exercise, answer)
    shown = demonstration(exercise, answer) if verdict.passed else ""
    print(told(exercise, verdict, shown, path.parent))
    if is_workbook(path.parent):
        note(path.parent, exercise, verdict)
    return verdict.passed


def verdict_on(path) -> Verdict:
    """The verdict on a file, in this process: for pytest."""
    exercise = find_exercise(Path(path).stem)
    answer, trouble = read_answer(exercise, path)
    return trouble or judge(exercise, answer)


def names_in(folder) -> list[str]:
    """The exercises of which there is a file in a folder."""
    return [e.stem for e in exercises() if (Path(folder) / f"{e.stem}.py").exists()]


def watch(folder: Path, exercise: Exercise) -> bool:
    """Check the exercise each time its file is saved, until it is solved or Ctrl-C is pressed.
    It never goes on to the next exercise by itself."""
    path, seen = folder / f"{exercise.stem}.py", None
    try:
        while True:
            now = version_of(path)
            if now != seen:
                seen = now
                print(time.strftime("\n%H:%M:%S"), flush=True)
                if check(folder, exercise):
                    return True
                print(
                    f"\nWatching {path.name}; save it to check again, Ctrl-C to stop.", flush=True
                )
            time.sleep(PAUSE)
    except KeyboardInterrupt:
        print()
        return Progress(folder).state(exercise) == "solved"


def version_of(path: Path) -> tuple | None:
    """Changes whenever the file is saved; None while there is no file (editors replace it)."""
    try:
        found = path.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino
    except OSError:
        return None


def note(folder: Path, exercise: Exercise, verdict: Verdict) -> None:
    progress = Progress(folder)
    progress.note(exercise, verdict)
    progress.write()


def told(exercise: Exercise, verdict: Verdict, shown: str, folder: Path) -> str:
    """The verdict as the student reads it, and what to do next in this workbook."""
    n, words = exercise.number, HEADINGS.get(verdict.kind, "not yet")
    lines = [f"Exercise {n}, {exercise.title}: {words}."]
    if verdict.passed:
        lines += ["", *shown.splitlines(), "", next_step(exercise, folder)]
    else:
        lines += verdict.message.splitlines()
        if not (folder / f"{exercise.stem}.py").exists():
            lines.append(f"(minitx learn start {folder} writes the files that are not there.)")
        elif verdict.kind != "not written":
            lines.append(f"(minitx learn hint {n} gives a hint.)")
        else:
            lines.append(f"Open {exercise.stem}.py, read its text, and fill in the hole.")
    return "\n".join(map(fit, lines))


HEADINGS = {"passed": "solved", "not written": "not written yet", "limit": "stopped"}


def next_step(exercise: Exercise, folder: Path) -> str:
    here = names_in(folder)
    later = [e for e in exercises() if e.number > exercise.number and e.stem in here]
    after = f"; the next exercise is minitx learn {later[0].number}" if later else ""
    return f"minitx learn solution {exercise.number} shows our version{after}."


def hint(folder: Path, exercise: Exercise) -> str:
    """The first hint, then also the second one when asked again."""
    progress = Progress(folder)
    entry = progress.of(exercise)
    entry["hints"] = min(entry.get("hints", 0) + 1, len(exercise.hints))
    progress.write()
    lines = [f"Hint {i}: {text}" for i, text in enumerate(exercise.hints[: entry["hints"]], 1)]
    if entry["hints"] < len(exercise.hints):
        lines.append(f"(minitx learn hint {exercise.number} once more says more.)")
    return "\n".join(map(fit, lines))


def solution(folder: Path, exercise: Exercise, give_up: bool) -> str:
    """The solution's source, once the exercise is solved or given up. MinitxError before that."""
    from minitx.learn.holes import solution_text

    progress = Progress(folder)
    if progress.state(exercise) not in ("solved", "given up"):
        if not give_up:
            raise MinitxError(
                f"Exercise {exercise.number} is not solved yet; minitx learn hint "
                f"{exercise.number} gives a hint, and minitx learn solution {exercise.number} "
                "--give-up shows the solution anyway."
            )
        progress.of(exercise)["state"] = "given up"
        progress.write()
    return solution_text(exercise)
