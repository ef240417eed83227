"""A teacher grades a class: limits hold, other seeds are used, mistakes are counted."""

import csv
import io
import json
import time

import pytest

from minitx.errors import MinitxError
from minitx.learn import apart
from minitx.learn import grade as grading
from minitx.learn.apart import judge_apart
from minitx.learn.exercise import find_exercise
from minitx.learn.grade import Graded, Grades, files_of, harmless
from minitx.learn.handout import chosen_exercises, hand_out
from minitx.learn.holes import solution_text, student_file
from minitx.learn.verdict import Verdict

FIRST, THIRD = find_exercise(1), find_exercise(3)
RIGHT = "import numpy as np\n\n\n" + solution_text(FIRST) + "\n"

# An answer that writes a verdict on itself into the folder in which it runs.
FORGED = """
import json, os
verdict = {"kind": "passed", "message": "Right.", "mistakes": [], "figures": None}
open("verdict.json", "w").write(json.dumps({"token": "", "verdict": verdict, "shown": ""}))
os._exit(0)
"""


def test_handout_has_no_solution_and_says_how_to_begin(tmp_path):
    hand_out(tmp_path / "out", (FIRST, THIRD))
    files = {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}
    assert files["ex03_attention.py"] == student_file(THIRD)
    assert not any("swapaxes(1, 2) / np" in text for text in files.values())
    assert "minitx learn 1" in files["README.md"] and "| 3 | " in files["README.md"]
    assert "ex02" not in " ".join(files)


def test_class_is_graded_one_folder_per_student(tmp_path):
    answers = {
        "anna": RIGHT,
        "ben": RIGHT.replace(".mean(", ".sum("),
        "cleo": RIGHT.replace("import numpy as np", "import numpy as np\nfrom minitx import ops"),
        "dora": student_file(FIRST),
        "emil": "import os\nos._exit(0)\n",
        "evil": FORGED,
        "finn": "while True:\n    pass\n",
    }
    for name, text in answers.items():
        folder = tmp_path / name / ("unpacked" if name == "ben" else "")
        folder.mkdir(parents=True)
        (folder / "ex01_rms_norm.py").write_text(text)
    (tmp_path / "gwen").mkdir()
    found = grading.grade(tmp_path, (FIRST,), seed=7, seconds=0.5)
    kinds = {g.student: g.verdict.kind for g in found.graded}
    assert kinds == {
        "anna": "passed",
        "ben": "mistake",
        "cleo": "passed",
        "dora": "not written",
        "emil": "error",
        "evil": "error",
        "finn": "limit",
        "gwen": "missing",
    }
    assert [g.student for g in found.graded if g.imports_minitx] == ["cleo"]
    assert [(e.number, n) for e, _, n in found.mistakes()] == [(1, 1)]
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [(r["student"], r["points"]) for r in rows][:2] == [("anna", "1"), ("ben", "0")]
    assert json.loads(json.dumps(found.as_dict()))["mistakes"][0]["students"] == 1
    assert "take their mean" in str(found) and "cleo: ex01_rms_norm" in str(found)


def test_open_exercise_may_import_minitx(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "judge_apart", lambda *_, **limits: (Verdict("wrong", "No."), ""))
    (tmp_path / "anna").mkdir()
    for name in ("ex01_rms_norm.py", "ex18_budget.py"):
        (tmp_path / "anna" / name).write_text("from minitx import technique\n")
    found = grading.grade(tmp_path, (FIRST, find_exercise(18)))
    assert [g.exercise.number for g in found.graded if g.imports_minitx] == [1]


def test_grading_uses_the_seed_that_is_given(tmp_path, monkeypatch):
    """An answer that knows the public cases by heart fails with another seed."""
    seeds = []

    def judge(exercise, path, seed, **limits):
        seeds.append(seed)
        return Verdict("passed", "Right."), ""

    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "ex01_rms_norm.py").write_text(RIGHT)
    monkeypatch.setattr(grading, "judge_apart", judge)
    grading.grade(tmp_path, (FIRST,), seed=7)
    assert seeds == [7]


def test_interrupted_grading_ends_the_processes_at_once(tmp_path, monkeypatch):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "ex01_rms_norm.py").write_text("while True:\n    pass\n")

    def press_ctrl_c(results, *args, **kwargs):
        while not apart.RUNNING:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(grading.progress, "bar", press_ctrl_c)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        grading.grade(tmp_path, (FIRST,), seconds=60)
    assert time.monotonic() - begun < 30, "it waited for an endless loop"
    assert not apart.RUNNING


def test_grading_changes_no_submission(tmp_path):
    path = tmp_path / "anna" / "ex01_rms_norm.py"
    path.parent.mkdir()
    path.write_text(f"{RIGHT}\nimport os\nos.remove(__file__)\n")
    found = grading.grade(tmp_path, (FIRST,))
    assert found.graded[0].verdict.passed and path.exists()


def test_student_s_name_is_printed_on_one_line(tmp_path):
    for name in ("new\nline", "red \x1b[31m", "x" * 200):
        (tmp_path / name).mkdir()
    found = grading.grade(tmp_path, (FIRST,))
    assert len(str(found).splitlines()) == 7 and "\x1b" not in str(found) + found.csv()
    assert max(map(len, str(found).splitlines())) <= 100


def test_memory_limit_ends_an_answer(tmp_path):
    path = tmp_path / "ex01_rms_norm.py"
    path.write_text(
        "import numpy as np\nx = np.ones(10**9)\n\n\ndef rms_norm(x, gain, eps):\n    pass\n"
    )
    verdict, _ = judge_apart(FIRST, path, megabytes=1500, shown=False)
    assert verdict.kind == "limit" and "memory" in verdict.message


def test_class_histogram_counts_students_per_mistake():
    sentence = FIRST.mistakes[0].sentence
    one = Verdict("mistake", sentence, (sentence,))
    graded = [Graded(name, FIRST, one) for name in ("anna", "ben", "cleo")]
    text = Grades(["anna", "ben", "cleo"], (FIRST,), graded).histogram()
    assert f"3 ### {sentence[:30]}" in text


def test_open_exercises_are_ranked_by_multiply_adds():
    def answer(name, multiply_adds, passed=True):
        figures = {"multiply_adds": multiply_adds, "loss": 0.004, "two_hops": -0.5}
        return Graded(name, THIRD, Verdict("passed" if passed else "wrong", "", (), figures))

    graded = [answer("anna", 0.7), answer("ben", 0.5), answer("cleo", 0.2, passed=False)]
    found = Grades(["anna", "ben", "cleo"], (THIRD,), graded)
    assert [g.student for g in found.ranking()] == ["ben", "anna"]
    assert "1 ben" in found.ranks() and "0.500x" in found.ranks()
    chart = str(found.chart())
    assert "cleo (beyond the limits)" in chart and "anna" in chart
    with pytest.raises(MinitxError, match="no chart"):
        Grades(["anna"], (FIRST,), [Graded("anna", FIRST, Verdict("passed", ""))]).chart()


def test_limits_are_those_of_the_exercise_unless_given(tmp_path, monkeypatch):
    """And the project may import minitx, which others may not."""
    limits = []

    def judge(exercise, path, seed, seconds, **more):
        limits.append(seconds)
        return Verdict("passed", "Right."), ""

    project = find_exercise(18)
    (tmp_path / "anna").mkdir()
    for exercise in (FIRST, project):
        (tmp_path / "anna" / f"{exercise.stem}.py").write_text("import minitx\n")
    monkeypatch.setattr(grading, "judge_apart", judge)
    monkeypatch.setattr(grading.os, "cpu_count", lambda: 1)
    found = grading.grade(tmp_path, (FIRST, project))
    assert limits == [None, None], "None: the exercise's own"
    assert [g.exercise.number for g in found.graded if g.imports_minitx] == [1]


def test_links_to_the_work_of_others_are_not_followed(tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "ex01_rms_norm.py").write_text(RIGHT)
    (tmp_path / "ben").mkdir()
    (tmp_path / "ben" / "ex01_rms_norm.py").symlink_to(tmp_path / "anna" / "ex01_rms_norm.py")
    (tmp_path / "ben" / "more").symlink_to(tmp_path / "anna")
    assert files_of(tmp_path / "ben", "ex01_rms_norm.py") == []


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@sum"])
def test_name_of_a_student_is_no_formula(name):
    assert harmless(name) == f"'{name}" and harmless("anna") == "anna"


def test_chosen_exercises_are_numbers_and_ranges():
    numbers = [e.number for e in chosen_exercises("3,1-3,rms_norm") if e.number != 2]
    assert numbers == [1, 3]
