"""What an exercise consists of. Each ``exNN_name.py`` in this folder is a master: it holds one.

A master has, from top to bottom:

- its docstring: the text that the student reads, with the equation, the shapes, and a worked
  example as a doctest;
- ``# given`` ... ``# end of given``: code that the student's file gets unchanged (optional);
- ``# solution`` ... ``# end of solution``: the solution. The student's file gets the signatures
  and docstrings, and a hole instead of each body;
- a version in plain loops, by which the tests judge the solution;
- the flawed version: the same functions with one keyword-only flag for each typical mistake. With
  the defaults they do what the solution does;
- the cases on which answers are compared, and what the answer does in a model;
- ``EXERCISE``, which names all of these.
"""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from types import ModuleType, SimpleNamespace
from typing import Any

from minitx.errors import MinitxError, did_you_mean
from minitx.learn.verdict import Verdict

Case = tuple  # the arguments of one call


@dataclass(frozen=True)
class Mistake:
    """One flag of the flawed version, and the sentence that a student with this mistake reads: what
    is wrong, and what is right."""

    sentence: str
    flags: dict[str, Any]

    def __init__(self, sentence: str, **flags):
        object.__setattr__(self, "sentence", sentence)
        object.__setattr__(self, "flags", flags)


@dataclass(frozen=True, eq=False)  # each is its own
class Exercise:
    """One exercise. ``answer`` below is a namespace with what the student wrote, by name.

    title, minutes, difficulty: for the table. difficulty: "easy", "medium", "hard" or "open".
    names: the functions or classes that the student writes.
    cases: ``cases(rng)`` draws the cases, each a tuple of arguments: float64 arrays, numbers, ...
        Small ones, of several shapes; each mistake must show in at least one.
    observe: ``observe(answer, *case)`` is what is compared: arrays, numbers, booleans, or tuples,
        lists and dicts of them. Default: the result of the only function.
    explain: ``explain(case, found, expected)``, the verdict on a wrong result that no mistake
        explains, for results that say little as arrays. Default: where the first difference is.
    flawed: the flawed version of each name; a single function if there is only one name.
    mistakes: the mistakes that the checker can name.
    hints: two, the second of which says more.
    axes: what the axes of the result are called in messages ("token", "column").
    library: where minitx does the same: "minitx/ops.py: rms_norm".
    into_model: ``into_model(lm, answer)``, a copy of the model in which the answer does the work.
    model: the shipped model that ``into_model`` gets.
    same_as: the techniques whose text the model with the answer must generate.
    saves: one sentence about what the answer is good for; shown when it is solved.
    judge: ``judge(answer, seed)``, for an exercise that is not judged by comparing results.
    show: ``show(answer)``, text to print when it is solved; for an exercise that has no
        ``into_model``.
    seconds: that a check may take.
    uses_minitx: an answer may import minitx.
    """

    title: str
    minutes: int
    difficulty: str
    names: tuple[str, ...]
    hints: tuple[str, str]
    library: str
    saves: str
    cases: Callable[[Any], Sequence[Case]] | None = None
    observe: Callable[..., Any] | None = None
    explain: Callable[[Case, Any, Any], Verdict] | None = None
    flawed: Callable | dict[str, Callable] | None = None
    mistakes: tuple[Mistake, ...] = ()
    axes: tuple[str, ...] = ()
    into_model: Callable[[Any, SimpleNamespace], Any] | None = None
    model: str = "stories"
    same_as: dict = field(default_factory=dict)
    judge: Callable[[SimpleNamespace, int], Verdict] | None = None
    show: Callable[[SimpleNamespace], str] | None = None
    seconds: float = 20.0
    uses_minitx: bool = False
    module: ModuleType | None = None  # the master; set by ``exercises``

    @cached_property
    def stem(self) -> str:
        """``ex03_attention``: the name of the master and of the student's file."""
        return self.module.__name__.rpartition(".")[2]

    @cached_property
    def number(self) -> int:
        return int(re.match(r"ex(\d+)_", self.stem)[1])

    @property
    def text(self) -> str:
        return inspect.cleandoc(self.module.__doc__)

    @cached_property
    def source(self) -> str:
        return inspect.getsource(self.module)

    def run(self, answer: SimpleNamespace, case: Case):
        """What the answer does with one case."""
        if self.observe is not None:
            return self.observe(answer, *case)
        (name,) = self.names
        return getattr(answer, name)(*case)

    @property
    def solution(self) -> SimpleNamespace:
        return SimpleNamespace(**{name: getattr(self.module, name) for name in self.names})

    def twin(self, **flags) -> SimpleNamespace:
        """The flawed version with these flags, as if a student had written it."""
        flawed = self.flawed
        if not isinstance(flawed, dict):
            flawed = {self.names[0]: flawed}
        return SimpleNamespace(**{name: _with_flags(f, flags) for name, f in flawed.items()})


def _with_flags(f: Callable, flags: dict) -> Callable:
    """The function with those of the flags that it has."""
    known = _parameters(f)
    return partial(f, **{name: value for name, value in flags.items() if name in known})


@cache
def _parameters(f: Callable) -> frozenset[str]:
    return frozenset(inspect.signature(f).parameters)


@cache
def exercises() -> tuple[Exercise, ...]:
    """All exercises, by number."""
    import minitx.learn as package

    found = []
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if re.match(r"ex\d+_", module.name):
            master = importlib.import_module(f"{package.__name__}.{module.name}")
            object.__setattr__(master.EXERCISE, "module", master)
            found.append(master.EXERCISE)
    return tuple(found)


def find_exercise(word: str | int) -> Exercise:
    """The exercise with this number, file name or title: 3, "03", "ex03", "ex03_attention"."""
    wanted = str(word).lower().removesuffix(".py")
    number = re.fullmatch(r"(?:ex)?0*(\d{1,3})(?:_.*)?", wanted)
    for exercise in exercises():
        by_number = number and int(number[1]) == exercise.number
        if by_number or wanted in (exercise.title.lower(), exercise.stem.partition("_")[2]):
            return exercise
    if number or not wanted:
        last = exercises()[-1].number
        raise MinitxError(f"There is no exercise {word}; expected a number from 1 to {last}.")
    names = [exercise.stem.partition("_")[2] for exercise in exercises()]
    raise MinitxError(f"There is no exercise {word!r}; {did_you_mean(wanted, names)}")
