"""What a student sees after the exercise is solved: the answer at work in a shipped model."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np

import minitx
from minitx import ledger
from minitx.learn.check import verdict_on_error
from minitx.learn.exercise import Exercise
from minitx.learn.outcomes import with_arrays
from minitx.lm import LM
from minitx.technique import apply
from minitx.tree import nbytes

PROMPT, NEW = "Once upon a time", 48
SAMPLED = dict(temperature=0.8, seed=0)  # a story that does not repeat itself


def demonstration(exercise: Exercise, answer: SimpleNamespace) -> str:
    """The text that the model generates with the answer inside, what that saved, and where minitx
    does the same."""
    parts, answer = [], with_plain_arrays(answer)
    try:
        with np.errstate(all="warn", under="ignore"):  # as usual, whatever np.seterr was told
            if exercise.into_model is not None:
                parts.append(swapped_in(exercise, answer))
            if exercise.show is not None:
                parts.append(exercise.show(answer))
    except Exception as error:  # the answer is right on every case, and still does not fit in
        parts.append(f"In the model it did not work, though. {verdict_on_error(error).message}")
    parts += [exercise.saves, f"minitx does the same in {exercise.library}."]
    return "\n\n".join(parts)


def with_plain_arrays(answer: SimpleNamespace) -> SimpleNamespace:
    """The answer for the model, which needs arrays: the check also takes lists of numbers, or
    arrays of another class."""

    def plain(result):
        if isinstance(result, np.ndarray):
            return np.asarray(result)
        return list(map(plain, result)) if isinstance(result, list) else result

    def returns_arrays(function):
        return lambda *args: plain(with_arrays(function(*args)))

    return SimpleNamespace(
        **{n: f if isinstance(f, type) else returns_arrays(f) for n, f in vars(answer).items()}
    )


def swapped_in(exercise: Exercise, answer: SimpleNamespace) -> str:
    dense = minitx.load(exercise.model)
    before = run(dense)
    after = run(exercise.into_model(dense, answer))
    library = run(apply(dense, exercise.same_as)) if exercise.same_as else before
    *others, last = exercise.names
    names = ", ".join(others) + " and " * bool(others) + last
    lines = [f"With your {names} inside, the model `{exercise.model}` writes:", "", after.text, ""]
    if after.text == library.text:
        lines.append("That is the text that minitx's own code writes.")
    else:
        lines.append(f"minitx's own code writes another text, though: {library.text}")
    lines += savings(before, after)
    return "\n".join(lines)


@dataclass
class Run:
    """One completion, and what it cost."""

    text: str
    multiply_adds: int
    cache_bytes: int  # of keys and values, read
    weights: int  # bytes, in memory


def run(lm: LM) -> Run:
    with ledger.counting(lm) as counts:
        text = PROMPT + lm.generate(PROMPT, NEW, **SAMPLED)
    total = counts.total()
    return Run(text, total.multiply_adds, total.cache_bytes, nbytes(lm))


def savings(before: Run, after: Run) -> Iterator[str]:
    """One line for each figure that changed."""
    if before.multiply_adds == after.multiply_adds:
        yield f"Multiply-adds for these {NEW} tokens: {after.multiply_adds:,}, as before."
    else:
        yield changed(f"Multiply-adds for these {NEW} tokens", *of("multiply_adds", before, after))
    for name, words in (("cache_bytes", "read from the KV cache"), ("weights", "of weights")):
        old, new = of(name, before, after)
        if old != new:
            yield changed(f"Bytes {words}", old, new)


def of(name: str, before: Run, after: Run) -> tuple[int, int]:
    return getattr(before, name), getattr(after, name)


def changed(what: str, old: int, new: int) -> str:
    return f"{what}: {new:,} instead of {old:,} ({new / old:.2f}x)."
