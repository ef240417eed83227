"""Guards against rot, for every exercise: the hole is noticed, the solution passes and does what
the version in loops and the library do, and every mistake gets its own name and no other.

They look at the masters in minitx/learn, never at a student's folder.
"""

import doctest
import re
from functools import cache
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest

from minitx.learn.answer import imports_minitx, read_answer
from minitx.learn.check import draw_cases, judge, outcomes
from minitx.learn.exercise import exercises
from minitx.learn.holes import solution_text, student_file
from minitx.learn.in_model import run
from minitx.learn.outcomes import Raised, same
from minitx.technique import apply

ALL = exercises()
NAMED = [e for e in ALL if e.mistakes and e.flawed is not None]  # judged by comparing results
EACH = [(e, mistake) for e in NAMED for mistake in e.mistakes]


def names(value):
    return getattr(value, "stem", None) or "-".join(f"{k}={v}" for k, v in value.flags.items())


each_exercise = pytest.mark.parametrize("e", ALL, ids=names)


def test_exercises_are_numbered_from_1():
    assert [e.number for e in ALL] == list(range(1, len(ALL) + 1))


@each_exercise
def test_file_of_a_student_is_a_hole_that_is_noticed(e, tmp_path):
    text = student_file(e)
    path = tmp_path / f"{e.stem}.py"
    path.write_text(text, "utf-8")
    answer, trouble = read_answer(e, path)
    assert trouble is None, "the fresh file cannot be run"
    assert judge(e, answer).kind == "not written"
    assert not imports_minitx(text), "the fresh file would be reported for its imports"


@each_exercise
def test_file_of_a_student_contains_no_line_of_the_solution(e):
    fresh = {line.strip() for line in student_file(e).splitlines()}
    bodies = body_lines(solution_text(e)) - body_lines(student_file(e), until_hole=True)
    assert bodies, "the solution has no line of its own"
    assert not bodies & fresh, "the solution is given away"


def body_lines(code: str, until_hole=False) -> set[str]:
    """The lines of code that say something: no signature, docstring, comment or lone bracket."""
    code = re.sub(r'""".*?"""', "", code, flags=re.S)
    lines = {line.split("  #")[0].strip() for line in code.splitlines()}
    own = {
        line for line in lines if len(line) > 6 and not re.match(r"(def|class|#|@|raise)\b", line)
    }
    return {line for line in own if "(" in line or "=" in line or "return" in line} - {
        "import numpy as np"
    }


@each_exercise
def test_solution_passes(e):
    for seed in (0, 7):  # that of the student's check, and one for grading
        verdict = judge(e, e.solution, seed)
        assert verdict.passed, verdict.message


@pytest.mark.parametrize("e", [e for e in ALL if hasattr(e.module, "in_loops")], ids=names)
def test_solution_equals_the_version_in_loops(e):
    loops = e.module.in_loops
    if not isinstance(loops, SimpleNamespace):
        loops = SimpleNamespace(**{e.names[0]: loops})
    cases = draw_cases(e, seed=1)
    for found, expected in zip(outcomes(e, e.solution, cases), outcomes(e, loops, cases)):
        assert not isinstance(expected, Raised), f"the loops raise {expected}"
        assert same(found, expected), "the solution and the version in loops differ"


@each_exercise
def test_worked_example_holds(e):
    example = doctest.DocTestParser().get_doctest(e.text, vars(e.module).copy(), e.stem, None, 0)
    assert example.examples or e.difficulty == "open", "there is no worked example"
    said = []
    failures, _ = doctest.DocTestRunner().run(example, out=said.append)
    assert failures == 0, "the worked example is wrong:\n" + "".join(said)


@each_exercise
def test_exercise_says_everything_that_a_student_is_told(e):
    assert re.match(rf"Exercise {e.number}: .+ \({e.minutes} minutes\)\n\n", e.text), e.text[:80]
    assert f"Exercise {e.number}: {e.title} (" in e.text
    assert len(e.hints) == 2 and all(len(hint) > 40 for hint in e.hints)
    assert len(e.hints[1]) > 60 and e.hints[0] != e.hints[1]
    assert e.difficulty in ("easy", "medium", "hard", "open")
    assert e.saves.endswith((".", ".)"))
    assert max(map(len, student_file(e).splitlines())) <= 100
    for mistake in e.mistakes:
        assert mistake.sentence.endswith("."), mistake.sentence
        assert len(mistake.sentence) <= 240
    sentences = [mistake.sentence for mistake in e.mistakes]
    assert len(set(sentences)) == len(sentences), "two mistakes have the same sentence"


@each_exercise
def test_library_file_that_is_named_exists(e):
    from minitx.lab.reference import CHECKOUT

    for path in re.findall(r"minitx/[\w/]+\.py", e.library):
        assert (CHECKOUT / path).is_file(), path
    for path, name in re.findall(r"(minitx/[\w/]+\.py): (\w+)", e.library):
        assert re.search(rf"(def|class) {name}\b|^{name}\b", (CHECKOUT / path).read_text(), re.M)


# Mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("e", NAMED, ids=names)
def test_flawed_version_without_a_flag_is_right(e):
    verdict = judge(e, e.twin())
    assert verdict.passed, verdict.message


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("e, mistake", EACH, ids=names)
def test_mistake_is_named_by_its_own_sentence(e, mistake, seed):
    verdict = judge(e, e.twin(**mistake.flags), seed)
    assert verdict.kind == "mistake", f"{verdict.kind}: {verdict.message}"
    assert verdict.mistakes == (mistake.sentence,)


@pytest.mark.parametrize("e", NAMED, ids=names)
def test_no_two_mistakes_agree_on_all_cases(e):
    cases = draw_cases(e, seed=0)
    with np.errstate(all="ignore"):
        found = [outcomes(e, e.twin(**mistake.flags), cases) for mistake in e.mistakes]
    for (a, one), (b, other) in combinations(zip(e.mistakes, found), 2):
        alike = all(same(x, y) for x, y in zip(one, other))
        assert not alike, f"cannot be told apart: {a.sentence} / {b.sentence}"


@pytest.mark.parametrize("e", NAMED, ids=names)
def test_two_mistakes_at_once_are_named(e):
    """A pair may look like one of the two, if the other no longer shows; it is never right, and
    nearly always both are named."""
    pairs = both = 0
    for a, b in combinations(e.mistakes, 2):
        if set(a.flags) & set(b.flags):
            continue
        verdict = judge(e, e.twin(**a.flags, **b.flags))
        assert not verdict.passed, f"two mistakes pass as right: {a.sentence} {b.sentence}"
        pairs += 1
        both += set(verdict.mistakes) == {a.sentence, b.sentence}
    assert both >= 0.5 * pairs, f"only {both} of {pairs} pairs are named"


# In the model ------------------------------------------------------------------------------------

IN_MODEL = [e for e in ALL if e.into_model is not None]


@pytest.fixture(scope="module")
def dense():
    """dense(name): a shipped model, loaded once."""
    import minitx

    return cache(minitx.load)


@pytest.fixture(scope="module")
def library_text(dense):
    """text(model, techniques): what minitx's own code writes, each once."""
    known = {}

    def text(model, techniques):
        key = model, repr(techniques)
        if key not in known:
            lm = dense(model)
            known[key] = run(apply(lm, techniques) if techniques else lm).text
        return known[key]

    return text


@pytest.mark.parametrize("e", IN_MODEL, ids=names)
def test_solution_in_the_model_writes_the_same_text(e, dense, library_text):
    found = run(e.into_model(dense(e.model), e.solution))
    assert found.text == library_text(e.model, e.same_as)


@pytest.mark.parametrize("e", [e for e in ALL if e.into_model is None], ids=names)
def test_solution_without_a_model_shows_something(e):
    assert e.show is not None and len(e.show(e.solution)) > 40
