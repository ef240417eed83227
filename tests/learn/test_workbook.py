"""A student at work: the files are written once and never overwritten, progress is kept, hints and
solutions come when they should."""

import json
import sys
import time

import pytest

from minitx.errors import MinitxError
from minitx.learn import check_file
from minitx.learn.apart import judge_apart
from minitx.learn.exercise import exercises, find_exercise
from minitx.learn.holes import solution_text
from minitx.learn.session import hint, note, solution, told
from minitx.learn.verdict import Verdict
from minitx.learn.workbook import Progress, find_workbook, is_workbook, last_used, reset, start

FIRST = find_exercise(1)
PASSED, WRONG = Verdict("passed", "Right."), Verdict("wrong", "All wrong.")
ANSWER = '"""Solved."""\n\nimport numpy as np\n\n\n' + solution_text(FIRST) + "\n"


@pytest.fixture(autouse=True)
def own_memory(tmp_path, monkeypatch):
    """Which workbook was last used is remembered for this test only."""
    monkeypatch.setenv("MINITX_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def book(tmp_path):
    start(tmp_path / "book", (FIRST, find_exercise(3)))
    return tmp_path / "book"


def test_start_writes_each_exercise_and_keeps_what_is_there(tmp_path):
    new = start(tmp_path)
    assert [p.name for p in new][: len(exercises())] == [f"{e.stem}.py" for e in exercises()]
    mine = tmp_path / f"{FIRST.stem}.py"
    mine.write_text("mine")
    new[1].unlink()
    assert start(tmp_path) == [new[1]], "only the missing file is written again"
    assert mine.read_text() == "mine"


def test_reset_keeps_every_version_of_the_student(book):
    path = book / f"{FIRST.stem}.py"
    for text in ("mine", "mine too"):
        path.write_text(text)
        assert reset(book, FIRST).read_text() == text
    assert "not written yet" in path.read_text()
    assert sorted(p.read_text() for p in book.glob("*.old")) == ["mine", "mine too"]


def test_solved_stays_solved_and_attempts_are_counted(book):
    note(book, FIRST, Verdict("not written", "hole"))
    assert Progress(book).state(FIRST) == "", "a hole is no attempt"
    for verdict, state in ((WRONG, "tried"), (PASSED, "solved"), (WRONG, "solved")):
        note(book, FIRST, verdict)
        assert Progress(book).state(FIRST) == state
    assert Progress(book).of(FIRST)["attempts"] == 3


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"exercises": 3}',
        '{"exercises": {"ex01_rms_norm": 3}}',
        '{"exercises": {"ex01_rms_norm": {"hints": -1}}}',
    ],
)
def test_damaged_progress_is_set_aside(book, content, capfd):
    (book / "progress.json").write_text(content)
    assert Progress(book).state(FIRST) == ""
    assert (book / "progress.json.damaged").read_text() == content
    assert is_workbook(book), "a new progress.json begins at once"
    assert "damaged" in capfd.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="its file names are bytes")
def test_workbook_with_a_name_that_is_no_utf8_is_remembered(tmp_path):
    folder = tmp_path / "b\udcffok"
    start(folder, (FIRST,))
    assert last_used() == folder.resolve()


def test_file_that_is_a_link_to_itself_is_named(book):
    path = book / f"{FIRST.stem}.py"
    path.unlink()
    path.symlink_to(path.name)
    verdict, _ = judge_apart(FIRST, path)
    assert verdict.kind == "error" and path.name in verdict.message


def test_answer_with_a_thread_that_goes_on_is_not_waited_for(book):
    path = book / f"{FIRST.stem}.py"
    thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()\n"
    path.write_text(ANSWER + thread)
    begun = time.monotonic()
    assert judge_apart(FIRST, path)[0].passed
    assert time.monotonic() - begun < 30


def test_second_hint_comes_when_asked_again(book):
    first, second, third = (hint(book, FIRST) for _ in range(3))
    assert "Hint 1" in first and "Hint 2" not in first
    assert "Hint 2" in second and third == second


def test_solution_is_shown_after_success_or_after_giving_up(book):
    with pytest.raises(MinitxError, match="not solved yet.*--give-up"):
        solution(book, FIRST, give_up=False)
    assert solution(book, FIRST, give_up=True) == solution_text(FIRST)
    note(book, FIRST, PASSED)
    assert Progress(book).state(FIRST) == "given up", "solving it after that does not count"
    note(book, find_exercise(3), PASSED)
    assert "def attention" in solution(book, find_exercise(3), give_up=False)


def test_verdict_says_what_to_do_next(book):
    assert "minitx learn hint 1" in told(FIRST, WRONG, "", book)
    assert "the next exercise is minitx learn 3" in told(FIRST, PASSED, "a story", book)
    (book / f"{FIRST.stem}.py").unlink()
    assert "minitx learn start" in told(FIRST, WRONG, "", book)


def test_workbook_is_found_here_or_is_the_last_one(book, tmp_path, monkeypatch):
    assert find_workbook() == book, "the last one that was used"
    start(tmp_path / "other")
    assert find_workbook() == tmp_path / "other"
    monkeypatch.chdir(book)
    assert find_workbook() == book, "the current folder comes first"
    with pytest.raises(MinitxError, match="There is no workbook in nowhere"):
        find_workbook("nowhere")


@pytest.mark.parametrize("word", [1, "1", "01", "ex01", "ex01_rms_norm.py", "rms_norm", "RMS norm"])
def test_exercise_is_found_by_any_name(word):
    assert find_exercise(word) is FIRST


@pytest.mark.parametrize("word", ["99", "ex77_nothing", "attentoin", ""])
def test_unknown_exercise_is_refused_in_one_sentence(word):
    with pytest.raises(MinitxError, match="There is no exercise"):
        find_exercise(word)


# The command -------------------------------------------------------------------------------------


def test_command_leads_from_the_start_to_the_solution(run, tmp_path):
    status, out, _ = run("learn")
    assert status == 0 and "minitx learn start" in out and "RMS norm" in out
    status, out, _ = run("learn", "start", "book")
    assert status == 0 and "minitx learn 1" in out
    status, out, _ = run("learn", "1", "--dir", "book")
    assert status == 1 and "not written yet" in out
    (tmp_path / "book" / "ex01_rms_norm.py").write_text(ANSWER)
    status, out, _ = run("learn", "--dir", "book", "1")
    assert status == 0 and "Exercise 1, RMS norm: solved." in out
    status, out, _ = run("learn", "solution", "1", "--dir", "book")
    assert (status, out.strip()) == (0, solution_text(FIRST))
    status, out, _ = run("learn", "--json", "--dir", "book")
    found = json.loads(out)
    assert found["exercises"][0]["state"] == "solved"
    status, out, _ = run("learn", "--dir", "book")
    assert "1 of" in out and "Next: open" in out


@pytest.mark.parametrize("words", [("--dir", "first", "1"), ("1", "--dir", "first")])
def test_folder_on_either_side_of_the_number_is_used(run, tmp_path, words):
    run("learn", "start", "first")
    run("learn", "start", "last used")
    (tmp_path / "first" / "ex01_rms_norm.py").write_text(ANSWER)
    status, out, _ = run("learn", *words)
    assert status == 0 and "solved" in out, "the folder that is named, not the one last used"


@pytest.mark.parametrize(
    "words, said",
    [
        (("learn", "strat"), "did you mean 'start'?"),
        (("learn", "99"), "There is no exercise 99"),
        (("learn", "1", "--dir", "nowhere"), "There is no workbook in nowhere"),
        (("learn", "hint"), "required: exercise"),
        (("learn", "grade", "nowhere"), "cannot be read"),
        (("learn", "grade", "toy"), "has no folders"),
        (("learn", "grade", "toy", "--seed", "-1"), "at least 0"),
        (("learn", "handout", "toy"), "already exists"),
        (("learn", "handout", "new", "--only", "3-1"), "smaller number"),
        (("learn", "start", "toy/config.json"), "cannot be written"),
    ],
)
def test_command_refuses_bad_input_in_one_sentence(run, words, said):
    status, out, err = run(*words)
    assert status == 2 and out == "" and said in err and err.count("\n") == 1


def test_files_of_a_workbook_run_by_themselves_and_under_pytest(book):
    """``python ex01_rms_norm.py`` and ``python -m pytest -k ex01``: the same judge."""
    import subprocess

    from minitx.lab.reference import CHECKOUT

    (book / "ex01_rms_norm.py").write_text(
        ANSWER.replace(".mean(", ".sum(")
        + '\n\nif __name__ == "__main__":\n    from minitx.learn import check_file\n\n'
        "    check_file(__file__)\n"
    )

    def python(*words):
        environment = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(
            [sys.executable, *words], cwd=book, env=environment, capture_output=True, text=True
        )
        return ran.stdout + ran.stderr

    assert "take their mean" in python("ex01_rms_norm.py")
    assert Progress(book).state(FIRST) == "tried"
    out = python("-m", "pytest", "-k", "ex01", "-p", "no:cacheprovider")
    assert "take their mean" in out and "1 failed" in out and "Traceback" not in out


def test_renamed_file_is_refused_in_one_sentence(tmp_path):
    path = tmp_path / "my_rotary.py"
    path.write_text(ANSWER)
    with pytest.raises(SystemExit, match="no exercise 'my_rotary'"):
        check_file(path)


def test_watch_checks_again_when_the_file_is_saved(book, monkeypatch, capfd):
    """The watched file is saved twice: wrong, then right, and then watching ends."""
    from minitx.learn import session

    path = book / f"{FIRST.stem}.py"
    verdicts = []

    def judge_apart(exercise, file):
        verdicts.append(PASSED if "right" in file.read_text() else WRONG)
        return verdicts[-1], "a story"

    versions = iter(["wrong", "wrong too", "right"])
    monkeypatch.setattr(session, "judge_apart", judge_apart)
    monkeypatch.setattr(session.time, "sleep", lambda _: path.write_text(next(versions)))
    assert session.watch(book, FIRST)
    assert verdicts == [WRONG, WRONG, WRONG, PASSED]
    out = capfd.readouterr().out
    assert "Ctrl-C to stop" in out and "solved" in out


def test_teaching_page_has_the_minutes_of_the_exercises_and_commands_that_exist():
    import re

    from minitx.arguments import read_arguments
    from minitx.lab.reference import CHECKOUT
    from minitx.learn.handout import chosen_exercises

    text = (CHECKOUT / "tutorials" / "TEACHING.md").read_text("utf-8")
    labs = re.findall(r"^\| \S.*? \| ([\d, to]+) \| (\d+)\b", text, re.MULTILINE)
    assert len(labs) == 6
    for numbers, minutes in labs:
        chosen = chosen_exercises(numbers.replace(" to ", "-").replace(" ", ""))
        assert sum(exercise.minutes for exercise in chosen) == int(minutes), numbers
    for line in re.findall(r"^ +minitx (learn .*)$|`minitx (learn [^`]+)`", text, re.MULTILINE):
        read_arguments("".join(line).split())
