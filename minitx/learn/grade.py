"""Grade a class: one folder per student, every exercise in a process of its own, with limits.

The cases are drawn with another seed than those of the student's own check, so an answer that was
fitted to them fails. Answers that import minitx, which contains the solutions, are reported.
"""

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from minitx import progress
from minitx.checkpoints.common import atomic_write
from minitx.errors import MinitxError, one_line
from minitx.lab.layout import COLUMNS, fit, table
from minitx.learn.answer import imports_minitx, read_source
from minitx.learn.apart import end_running, judge_apart
from minitx.learn.exercise import Exercise
from minitx.learn.holes import student_file
from minitx.learn.verdict import Verdict
from minitx.pictures.scatter import Curve, Panel, Point, draw
from minitx.pictures.svg import INK, Svg

SEED = 1  # a student's own check uses 0
DEEPEST = 3  # folders below a student's folder that are searched: an unpacked archive adds some
LONGEST_NAME = 32  # in the table; JSON and CSV have all of it
MISSING = Verdict("missing", "There is no such file.")


@dataclass(frozen=True)
class Graded:
    """One answer of one student."""

    student: str
    exercise: Exercise
    verdict: Verdict
    imports_minitx: bool = False

    def as_dict(self) -> dict:
        found = {"student": self.student, "exercise": self.exercise.stem}
        return found | self.verdict.as_dict() | {"imports_minitx": self.imports_minitx}


def grade(
    folder,
    chosen: Sequence[Exercise],
    seed: int = SEED,
    seconds: float | None = None,
    megabytes: float = 4096.0,
) -> "Grades":
    """Judge all answers in ``folder``, which has one folder per student. MinitxError if it has
    none. seconds, megabytes: the limits of each answer; None: the exercise's own."""
    students = students_in(Path(folder))
    work = [(student, exercise) for student in students for exercise in chosen]

    def judged(item) -> Graded:
        student, exercise = item
        return grade_one(student, exercise, seed, seconds, megabytes)

    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # threads wait for processes
        try:
            results = pool.map(judged, work)
            for graded in progress.bar(results, "grade", unit="answer", total=len(work)):
                found.append(graded)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            end_running()
            raise
    return Grades([name_of(student) for student in students], tuple(chosen), found)


def students_in(folder: Path) -> list[Path]:
    try:
        students = sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] not in "._")
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be read ({error.strerror or error}).") from None
    if not students:
        raise MinitxError(
            f"{folder} has no folders; expected one per student, each with files such as "
            "ex03_attention.py."
        )
    return students


def grade_one(student: Path, exercise: Exercise, seed, seconds, megabytes) -> Graded:
    files = files_of(student, f"{exercise.stem}.py")
    if len(files) != 1:
        several = "There are several: " + ", ".join(str(f.relative_to(student)) for f in files)
        verdict = Verdict("missing", f"{several}.") if files else MISSING
        return Graded(name_of(student), exercise, verdict)
    source, trouble = read_source(files[0])
    if trouble is None and source == student_file(exercise):
        trouble = Verdict("not written", "The file is as it was handed out.")
    if trouble is None:
        limits = dict(seconds=seconds, megabytes=megabytes)
        trouble, _ = judge_apart(exercise, files[0], seed, **limits, shown=False)
    suspicious = imports_minitx(source) and not exercise.uses_minitx
    return Graded(name_of(student), exercise, trouble, suspicious)


def name_of(student: Path) -> str:
    """The folder's name as it can be printed: line breaks, escape sequences, and what is no UTF-8
    are escaped."""
    return one_line(student.name)


def files_of(student: Path, name: str) -> list[Path]:
    """The files of this name in a student's folder and the folders below it; no links, which may
    lead to somebody else's work."""
    found, level = [], [student]
    for _ in range(DEEPEST):
        found = [
            f for f in (folder / name for folder in level) if f.is_file() and not f.is_symlink()
        ]
        if found:
            break
        level = [below for folder in level for below in folders_in(folder)]
    return found


def folders_in(folder: Path) -> list[Path]:
    try:
        inside = sorted(folder.iterdir())
    except OSError:
        return []
    return [p for p in inside if p.is_dir() and not p.is_symlink() and p.name[0] not in "._"]


# Results -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grades:
    """The verdicts on all students' answers."""

    students: list[str]
    exercises: tuple[Exercise, ...]
    graded: list[Graded]

    def points(self, student: str) -> int:
        return sum(g.verdict.passed for g in self.graded if g.student == student)

    def of(self, student: str) -> dict[str, Graded]:
        return {g.exercise.stem: g for g in self.graded if g.student == student}

    def mistakes(self) -> list[tuple[Exercise, str, int]]:
        """(exercise, sentence, how many students) for each named mistake: by exercise, and the
        most frequent ones first."""
        counts = Counter((g.exercise, m) for g in self.graded for m in g.verdict.mistakes)
        rows = [(exercise, sentence, n) for (exercise, sentence), n in counts.items()]
        return sorted(rows, key=lambda row: (row[0].number, -row[2], row[1]))

    def ranking(self) -> list[Graded]:
        """The answers to open exercises that hold the limits: fewest multiply-adds first."""
        ranked = [g for g in self.graded if g.verdict.passed and g.verdict.figures]
        return sorted(ranked, key=lambda g: g.verdict.figures["multiply_adds"])

    def as_dict(self) -> dict:
        students = [{"student": name, "points": self.points(name)} for name in self.students]
        mistakes = [
            {"exercise": exercise.stem, "mistake": sentence, "students": count}
            for exercise, sentence, count in self.mistakes()
        ]
        answers = [g.as_dict() for g in self.graded]
        return {"students": students, "answers": answers, "mistakes": mistakes}

    def csv(self) -> str:
        """One row per student: the points, the kind of each verdict, and which answers import
        minitx."""
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        stems = [exercise.stem for exercise in self.exercises]
        rows.writerow(["student", "points", "of", *stems, "imports minitx"])
        for student in self.students:
            of = self.of(student)
            kinds = [of[stem].verdict.kind for stem in stems]
            suspicious = " ".join(stem for stem in stems if of[stem].imports_minitx)
            name = harmless(student)
            rows.writerow([name, self.points(student), len(stems), *kinds, suspicious])
        return text.getvalue()

    def write_csv(self, path) -> None:
        with atomic_write(Path(path)) as file:
            file.write(self.csv().encode())

    def chart(self) -> Svg:
        """The class's Pareto chart of the open exercise: loss against multiply-adds, and the best
        of them joined."""
        points = []
        for g in self.graded:
            if (f := g.verdict.figures) is not None:
                failed = "" if g.verdict.passed else " (beyond the limits)"
                points.append(Point(f["multiply_adds"], f["loss"], g.student + failed, g.student))
        if not points:
            raise MinitxError("No answer to an open exercise has figures, so there is no chart.")
        front = [p for p in points if not any(better(other, p) for other in points)]
        front.sort(key=lambda point: point.x)
        curves = [
            Curve("the class", points, listed=False),
            Curve("front", [Point(p.x, p.y) for p in front], line=True, shape="none", listed=False),
            Curve("dense", [Point(1.0, 0.0, "dense")], color=INK, listed=False),
        ]
        x = "multiply-adds per token, relative to dense"
        panel = Panel(curves, x, "loss above dense, nats per token")
        return draw([panel], "The budget", width=560, legend=False)

    def __str__(self) -> str:
        parts = [self.table(), self.histogram()]
        suspicious = [g for g in self.graded if g.imports_minitx]
        if suspicious:
            lines = [f"  {g.student}: {g.exercise.stem}" for g in suspicious]
            parts.append(
                "\n".join(["These answers import minitx, which has the solutions:", *lines])
            )
        if self.ranking():
            parts.append(self.ranks())
        return "\n\n".join(parts)

    def table(self) -> str:
        """A row per student, a column per exercise, a sign per verdict."""
        names = {name: shortened(name) for name in self.students}
        width = max(map(len, ["student", *names.values()])) + 2
        numbers = "".join(f"{exercise.number:>3}" for exercise in self.exercises)
        lines = [f"{'student':{width}}points{numbers}"]
        for student in self.students:
            of = self.of(student)
            signs = "".join(f"{SIGNS[of[e.stem].verdict.kind]:>3}" for e in self.exercises)
            lines.append(f"{names[student]:{width}}{self.points(student):>6}{signs}")
        lines.append(fit(", ".join(f"{sign} {kind}" for kind, sign in SIGNS.items())))
        return "\n".join(lines)

    def histogram(self) -> str:
        """How often each named mistake occurs in the class."""
        rows = self.mistakes()
        if not rows:
            return "None of the mistakes that the checker knows by name."
        lines, before = ["Mistakes of the class:"], None
        for exercise, sentence, count in rows:
            if exercise is not before:
                lines.append(f"{exercise.number} {exercise.title}")
                before = exercise
            bar = "#" * min(count, 40)
            lines.append(fit(f"  {count:>4} {bar} {sentence}", COLUMNS, hanging=7))
        return "\n".join(lines)

    def ranks(self) -> str:
        rows = [["rank, student", "multiply-adds", "loss", "2 hops"]]
        for rank, g in enumerate(self.ranking(), 1):
            f = g.verdict.figures
            cells = [f"{f['multiply_adds']:.3f}x", f"{f['loss']:+.4f}", f"{f['two_hops']:+.1f}"]
            rows.append([f"{rank} {g.student}", *cells])
        return f"The budget, by multiply-adds:\n{table(rows)}"


def better(other: Point, point: Point) -> bool:
    """Does the other one cost less and lose less (or one of these, and the other equally)?"""
    no_worse = other.x <= point.x and other.y <= point.y
    return no_worse and (other.x < point.x or other.y < point.y)


SIGNS = {
    "passed": "+",
    "mistake": "m",
    "wrong": "w",
    "form": "f",
    "error": "e",
    "limit": "l",
    "not written": ".",
    "missing": "-",
}


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def harmless(name: str) -> str:
    """A name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in "=+-@\t\r" else name
