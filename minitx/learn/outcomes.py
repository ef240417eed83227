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
    return same_leaves(comparable(found), comparable(expected))


def comparable(outcome):
    """An outcome as ``same_leaves`` compares it: its leaves, or what it raised."""
    return outcome if isinstance(outcome, Raised) else as_leaves(outcome)


def same_leaves(mine, theirs) -> bool:
    if isinstance(mine, Raised) or isinstance(theirs, Raised):
        both = isinstance(mine, Raised) and isinstance(theirs, Raised)
        return both and mine.kind == theirs.kind
    if [name for name, _ in mine] != [name for name, _ in theirs]:
        return False
    return all(same_value(a, b) for (_, a), (_, b) in zip(mine, theirs))


def as_leaves(result) -> list[tuple[str, object]]:
    """The leaves of a result. A list of numbers, or of rows of numbers, counts as one array."""
    try:
        return leaves(with_arrays(result))
    except RecursionError:
        raise BadForm("The result is nested too deeply; does a list contain itself?") from None


def with_arrays(result):
    if isinstance(result, (list, tuple)):
        inside = [with_arrays(value) for value in result]
        shapes = {np.shape(value) if is_number(value) else None for value in inside}
        rows = len(shapes) == 1 and None not in shapes and not mixed(inside)
        if rows and (isinstance(result, list) or () in shapes):
            return np.array(inside)
        return inside
    if isinstance(result, dict):
        return {key: with_arrays(value) for key, value in result.items()}
    return result


def rows_as_list(result, expected):
    """The result with a tuple of rows as a list, where one array is expected: of a tuple,
    ``with_arrays`` thinks that it holds several results."""
    if isinstance(expected, dict) and isinstance(result, dict):
        return {name: rows_as_list(value, expected.get(name)) for name, value in result.items()}
    return (
        list(result) if isinstance(expected, np.ndarray) and isinstance(result, tuple) else result
    )


def mixed(values) -> bool:
    """Are some of them booleans and some numbers? Then they are several results in a list, not the
    rows of one."""
    return len({np.asarray(value).dtype.kind == "b" for value in values}) > 1


def same_value(a, b) -> bool:
    if not (is_number(a) and is_number(b)):
        return type(a) is type(b) and bool(a == b)
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.dtype.kind not in "biuf":
        return False
    if (a.dtype.kind == "b") != (b.dtype.kind == "b"):
        return False
    if (a == b).all():  # as most are
        return True
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # Inf - Inf
        near = np.abs(a - b) <= TOLERANCE * scale_of(b)
    return bool(near.all() or (near | (a == b) | (np.isnan(a) & np.isnan(b))).all())


def scale_of(expected: np.ndarray) -> float:
    """The largest finite absolute value, or 1 if there is nothing larger than that."""
    finite = np.abs(expected[np.isfinite(expected)])
    return max(1.0, float(finite.max(initial=0.0)))
