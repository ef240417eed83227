"""Judge an answer: run it on a few cases, and if it is wrong, find out which mistake explains it.

The flawed version of an exercise has one flag for each typical mistake. An answer that is wrong but
equals the flawed version with one flag, or with two, on every case has that mistake, or those two.
Otherwise the message says where the first difference is.

Everything runs in float64 and nothing is printed. Random algorithms are judged by their exact
distribution, not by counting draws.
"""

import copy
import inspect
import re
import traceback
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from minitx.differences import describe
from minitx.errors import MinitxError, abbreviate
from minitx.learn.exercise import Case, Exercise, Mistake
from minitx.learn.libraries import contents, restore
from minitx.learn.outcomes import (
    TOLERANCE,
    BadForm,
    Raised,
    as_leaves,
    comparable,
    is_number,
    rows_as_list,
    same,
    same_leaves,
    with_arrays,
)
from minitx.learn.verdict import Verdict

# minitx, NumPy and Python's own library: what raises an error in there is a line of the student's.
LIBRARIES = (
    Path(__file__).resolve().parents[1],
    Path(np.__file__).resolve().parent,
    Path(copy.__file__).resolve().parent,
)
ROUNDS = 2  # how often cases are drawn
NOT_WRITTEN = "not written yet"  # what a hole raises
SHORT = 5  # as many numbers of an argument are shown
LONGEST_ERROR = 160  # characters: NumPy names the two shapes that do not fit at the end


def judge(exercise: Exercise, answer: SimpleNamespace, seed: int = 0) -> Verdict:
    """The verdict on an answer: a namespace with the functions or classes that the student wrote.

    seed: of the cases; another one draws other numbers and shapes."""
    with np.errstate(all="ignore"):  # overflow is found by its result
        before = contents()
        try:
            verdict = judged(exercise, answer, seed)
        except Exception:
            if changed := restore(before):
                return changes_library(changed)
            raise
        changed = restore(before)
        return changes_library(changed) if changed else verdict


def judged(exercise: Exercise, answer: SimpleNamespace, seed: int) -> Verdict:
    if exercise.judge is not None:
        return judged_by_itself(exercise, answer, seed)
    cases, expected = drawn(exercise, seed), right(exercise, seed)
    found = []
    for case, theirs in zip(cases, expected):
        outcome, trouble = attempt(exercise, answer, case)
        if trouble is not None:
            return trouble
        found.append(rows_as_list(outcome, theirs))
    wrong = [i for i in range(len(cases)) if not same(found[i], expected[i])]
    if not wrong:
        return Verdict("passed", "Right.")
    named = name_mistakes(exercise, seed, found)
    if named:
        return named_verdict(named)
    return generic(exercise, cases[wrong[0]], found[wrong[0]], expected[wrong[0]])


def judged_by_itself(exercise: Exercise, answer: SimpleNamespace, seed: int) -> Verdict:
    try:
        return exercise.judge(answer, seed)
    except NotImplementedError as error:
        return hole(error) or verdict_on_error(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return verdict_on_error(error)


@cache
def drawn(exercise: Exercise, seed: int) -> list[Case]:
    """The cases of a seed. Whoever runs an answer on one gives it a copy."""
    return draw_cases(exercise, seed)


def draw_cases(exercise: Exercise, seed: int) -> list[Case]:
    rngs = (np.random.default_rng([exercise.number, seed, k]) for k in range(ROUNDS))
    return [case for rng in rngs for case in exercise.cases(rng)]


# Running an answer -------------------------------------------------------------------------------


def attempt(exercise: Exercise, answer: SimpleNamespace, case: Case):
    """(outcome, None), or (None, verdict) if no comparison is needed: a hole, a changed input."""
    mine = copy.deepcopy(case)
    try:
        with np.errstate():  # what a function sets with np.seterr ends with it
            outcome = exercise.run(answer, mine)
        if inspect.iscoroutine(outcome):
            outcome.close()  # nobody awaits it
        as_leaves(outcome)  # BadForm if that is impossible
    except NotImplementedError as error:
        return Raised(error), hole(error)
    except BadForm as error:
        return None, Verdict("form", str(error))
    except KeyboardInterrupt:  # Ctrl-C
        raise
    except BaseException as error:
        return Raised(error), None
    changed = changed_input(case, mine)
    if changed is not None:
        return None, Verdict(
            "form",
            f"Your code changes its {changed} in place. Whoever calls it still needs the old "
            "values: compute a new array (y = x * a instead of x *= a).",
        )
    return outcome, None


def outcomes(exercise: Exercise, answer: SimpleNamespace, cases: Sequence[Case]) -> list:
    """What an answer of ours does with each case; it may fail, as a student's may."""
    found = []
    for case in cases:
        try:
            found.append(exercise.run(answer, copy.deepcopy(case)))
        except Exception as error:
            found.append(Raised(error))
    return found


def hole(error: BaseException) -> Verdict | None:
    """The verdict on a function that is not written, if that is what was raised."""
    if NOT_WRITTEN not in text_of(error):
        return None
    name = traceback.extract_tb(error.__traceback__)[-1].name
    return Verdict("not written", f"{name} is not written yet.")


def changed_input(before: Case, after: Case) -> str | None:
    """Which argument is another one after the call: "first argument". None: none."""
    for i, (old, new) in enumerate(zip(before, after)):
        for (_, a), (_, b) in zip(as_leaves(old), as_leaves(new)):
            if isinstance(a, np.ndarray) and not np.array_equal(
                a, b, equal_nan=a.dtype.kind == "f"
            ):
                return f"{ORDINALS[i]} argument" if i < len(ORDINALS) else "arguments"
    return None


ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth")


# Naming the mistake ------------------------------------------------------------------------------


def name_mistakes(exercise: Exercise, seed: int, found: Sequence) -> list[Mistake]:
    """The one or two mistakes with which the flawed version does what the answer did in every
    case; none if there are no such mistakes."""
    if all(isinstance(outcome, Raised) for outcome in found):
        return []  # to raise the same exception everywhere is no evidence
    found = [comparable(outcome) for outcome in found]
    for which in suspects(exercise.mistakes):
        if all(same_leaves(mine, flawed(exercise, which, seed, i)) for i, mine in enumerate(found)):
            return [exercise.mistakes[j] for j in which]
    return []


def suspects(mistakes: Sequence[Mistake]) -> Iterator[tuple[int, ...]]:
    """The numbers of each mistake, then of each pair of mistakes that do not set the same flag."""
    yield from ((j,) for j in range(len(mistakes)))
    for a, b in combinations(range(len(mistakes)), 2):
        if not set(mistakes[a].flags) & set(mistakes[b].flags):
            yield a, b


@cache
def right(exercise: Exercise, seed: int) -> list:
    """What the solution does with each case."""
    return outcomes(exercise, exercise.solution, drawn(exercise, seed))


@cache  # a class makes the same mistakes
def flawed(exercise: Exercise, which: tuple[int, ...], seed: int, i: int):
    """What the flawed version with these mistakes does with case i, to be compared."""
    mistakes = [exercise.mistakes[j] for j in which]
    flags = {name: value for mistake in mistakes for name, value in mistake.flags.items()}
    case = drawn(exercise, seed)[i]
    return comparable(outcomes(exercise, exercise.twin(**flags), [case])[0])


def named_verdict(mistakes: Sequence[Mistake]) -> Verdict:
    sentences = tuple(mistake.sentence for mistake in mistakes)
    if len(sentences) == 1:
        return Verdict("mistake", sentences[0], sentences)
    return Verdict("mistake", f"Two mistakes. {sentences[0]} And: {sentences[1]}", sentences)


# Without a name ----------------------------------------------------------------------------------


def generic(exercise: Exercise, case: Case, found, expected) -> Verdict:
    """What is wrong with an outcome, if no known mistake explains it."""
    if isinstance(found, Raised):
        return verdict_on_error(found.error, arguments(exercise, case))
    given = f" The arguments were {arguments(exercise, case)}."
    if found is None and expected is not None:
        return Verdict("form", "Your function returns None; is there a return missing?")
    if exercise.explain is not None:
        return exercise.explain(case, found, expected)
    mine, theirs = as_leaves(found), as_leaves(expected)
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        name, a, b = first_of_other_form(found, expected)
        where = f"in {in_words(name)}" if name else "as the result"
        message = f"Expected {form(b)} {where}, got {form(a)}."
        return Verdict("form", message + given)
    for (name, a), (_, b) in zip(mine, theirs):
        if same(a, b):
            continue
        where = f" in {in_words(name)}" if name else ""
        if not is_number(a) or not is_number(b):
            return Verdict("wrong", f"Expected {form(b)}{where}, got {form(a)}." + given)
        return compare_arrays(exercise, np.asarray(a), np.asarray(b), where, given)
    raise AssertionError("generic is for outcomes that differ")


def first_of_other_form(found, expected, name: str = ""):
    """(name, found, expected) of the first part that does not have the form it should have."""
    if isinstance(found, dict) and isinstance(expected, dict) and [*found] == [*expected]:
        for key in expected:
            inside = first_of_other_form(found[key], expected[key], f"{name}[{key!r}]")
            if inside is not None:
                return inside
        return None
    mine, theirs = ([where for where, _ in as_leaves(x)] for x in (found, expected))
    return None if mine == theirs else (name, found, expected)


def compare_arrays(exercise: Exercise, a, b, where: str, given: str) -> Verdict:
    if a.shape != b.shape:
        message = f"Expected an array of shape {b.shape}{where}, got {a.shape}."
        return Verdict("form", message + given)
    if (a.dtype.kind == "b") != (b.dtype.kind == "b") or a.dtype.kind not in "biuf":
        kind = "booleans" if b.dtype.kind == "b" else "numbers"
        return Verdict("form", f"Expected {kind}{where}, got the dtype {a.dtype}." + given)
    if a.dtype in (np.float16, np.float32):
        message = f"The result{where} is {a.dtype}: the inputs are float64, so keep their dtype."
        return Verdict("form", message)
    axes = exercise.axes if len(exercise.axes) == a.ndim else None
    message = describe(a, b, axes=axes, tolerance=TOLERANCE)
    kind = "form" if np.isnan(a).any() and not np.isnan(b).any() else "wrong"
    return Verdict(kind, f"{message}{where and f' That is{where}.'}" + given)


def in_words(name: str) -> str:
    """A part of a result, in words: ``codes``, ``tokens[0][1]``, ``step 0, result``."""
    words = re.sub(r"\['([^']*)'\]", r", \1", name).removeprefix(", ")
    return words if name.startswith("['") else f"result{words}"


def verdict_on_error(error: BaseException, given: str = "") -> Verdict:
    """The verdict on an exception: what it says, and the student's line that raised it. The
    sentence of a MinitxError is ours, so it is told as it is. given: the arguments, in words."""
    lines = traceback.extract_tb(error.__traceback__)
    own = [line for line in lines if line.line and not is_library(line.filename)]
    at = f" in line {own[-1].lineno}: {own[-1].line}" if own else ""
    given = given and f" The arguments were {given}."
    if isinstance(error, MinitxError):
        return Verdict("error", f"{error}{at and f' That was{at}.'}{given}")
    if isinstance(error, MemoryError):
        return Verdict("limit", f"Your code needs more memory than there is{at}.{given}")
    said = " ".join(ascii(text_of(error)[:LONGEST_ERROR])[1:-1].split())
    what = f"{type(error).__name__}: {said or 'no message'}"
    return Verdict("error", f"Your code raised {what}{at}.{given}")


def text_of(error: BaseException) -> str:
    """str(error), whatever a student's own exception does there."""
    try:
        return str(error)
    except Exception:
        return ""


def changes_library(name: str) -> Verdict:
    """name: what the answer has replaced, such as ``numpy.abs``."""
    return Verdict(
        "error",
        f"Your code replaces {name}, which the checker and everybody else's code need as it is. "
        "Give your own function or value another name.",
    )


def is_library(filename: str) -> bool:
    return any(folder in Path(filename).parents for folder in LIBRARIES)


def arguments(exercise: Exercise, case: Case) -> str:
    """The arguments of a case with their names: x (4, 4), gain (4,), eps = 0.1"""
    called = exercise.observe or getattr(exercise.solution, exercise.names[0])
    names = [*inspect.signature(called).parameters][exercise.observe is not None :]
    return ", ".join(argument(name, value) for name, value in zip(names, case))


def argument(name: str, value) -> str:
    value = with_arrays(value)
    if isinstance(value, np.ndarray) and value.ndim:
        if value.ndim == 1 and value.size <= SHORT:
            return f"{name} = {[number(x) for x in value.tolist()]}"
        return f"{name} {value.shape}"
    if isinstance(value, list) or callable(value) or isinstance(value, SimpleNamespace):
        return f"{name} ({form(value)})"
    return f"{name} = {form(value)}"


def number(x):
    """A float with 4 digits."""
    return float(f"{x:.4g}") if isinstance(x, float) else x


def form(value) -> str:
    """A value in a few words: an array by its shape."""
    value = with_arrays(value)
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}" if value.ndim else str(value)
    if isinstance(value, list):
        return f"{len(value)} values"
    if inspect.iscoroutine(value):
        return "a coroutine (write def instead of async def)"
    if inspect.isgenerator(value):
        return "a generator (was there a yield, or a for in round brackets?)"
    if callable(value):
        return "a function"
    if type(value).__repr__ is object.__repr__:  # which would show an address in memory
        return f"an object of the class {type(value).__name__}"
    return abbreviate(value)
