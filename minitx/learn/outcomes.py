"""Compare what two answers return: numbers, arrays, booleans; tuples, lists and dicts of them."""

from dataclasses import dataclass

import numpy as np

TOLERANCE = 1e-9  # of the largest expected value: float64 rounding is a million times smaller


@dataclass(frozen=True)
class Raised:
    """An answer that raised an exception instead of returning."""

    error: BaseException

    @property
    def kind(self) -> str:
        return type(self.error).__name__


class BadForm(Exception):
    """What a function returned cannot be taken apart; the message is told to the student."""


def unpack(result, function: str, *names: str):
    """The values that a student's function returned, if it returned one for each of these names."""
    if isinstance(result, (tuple, list)) and len(result) == len(names):
        return result
    raise BadForm(f"{function} must return {len(names)} values: {', '.join(names)}.")


def leaves(result, name: str = "") -> list[tuple[str, object]]:
    """The arrays and other values inside a result, each with its place: ``[0]``, ``['keys']``."""
    if isinstance(result, dict):
        return [leaf for key, value in result.items() for leaf in leaves(value, f"{name}[{key!r}]")]
    if isinstance(result, (tuple, list)):
        return [leaf for i, value in enumerate(result) for leaf in leaves(value, f"{name}[{i}]")]
    return [(name, result)]


def is_number(value) -> bool:
    return isinstance(value, (np.ndarray, np.generic, bool, int, float))


def same(found, expected) -> bool:
    """Are two outcomes equal, floats within TOLERANCE?"""
    if isinstance(found, Raised) or isinstance(expected, Raised):
        both = isinstance(found, Raised) and isinstance(expected, Raised)
        return both and found.kind == expected.kind
    mine, theirs = as_leaves(found), as_leaves(expected)
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        return False
    return all(same_value(a, b) for (_, a), (_, b) in zip(mine, theirs))


def as_leaves(result) -> list[tuple[str, object]]:
    """The leaves of a result. A list of plain numbers counts as an array: 1 leaf, not many."""
    return leaves(with_arrays(result))


def with_arrays(result):
    if isinstance(result, (list, tuple)):
        if result and all(is_number(value) and np.ndim(value) == 0 for value in result):
            return np.array(result)
        return [with_arrays(value) for value in result]
    if isinstance(result, dict):
        return {key: with_arrays(value) for key, value in result.items()}
    return result


def same_value(a, b) -> bool:
    if not (is_number(a) and is_number(b)):
        return type(a) is type(b) and bool(a == b)
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype.kind not in "biuf":
        return False
    if (a.dtype.kind == "b") != (b.dtype.kind == "b"):
        return False
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf - Inf; np.allclose takes several times as long
        close = (np.abs(a - b) <= TOLERANCE * scale_of(b)) | (a == b) | ((a != a) & (b != b))
    return bool(close.all())


def scale_of(expected: np.ndarray) -> float:
    """The largest finite absolute value, or 1 if there is nothing larger than that."""
    finite = np.abs(expected[np.isfinite(expected)])
    return max(1.0, float(finite.max(initial=0.0)))
