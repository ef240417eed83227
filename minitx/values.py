"""Checks on values that come from outside: numbers in a range, fields of a type, dtypes.

One mechanism for the options of techniques, the fields of configurations and recipes, and what is
read from files. A declaration says what is allowed; here it is checked.
"""

import warnings
from dataclasses import dataclass, fields
from inspect import isclass
from numbers import Integral, Real
from types import UnionType
from typing import Any, get_args, get_origin

import numpy as np

from minitx.errors import MinitxError, abbreviate

# Ranges -------------------------------------------------------------------------------------------

MOST = 2**40  # no option of a technique is larger than this, unless its range says so


@dataclass(frozen=True)
class Range:
    """The allowed values of a number: from ``low`` (excluded if ``open_low``) to ``high``. There is
    always a ``high``, since a value may mean gigabytes, hours or an overflow; where it is only that
    (``implied``) it is mentioned to those who exceed it."""

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False  # ``high`` itself is not allowed
    implied: bool = False

    def __contains__(self, value) -> bool:
        above_low = self.low < value if self.open_low else self.low <= value
        return above_low and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        return self.in_words(not self.implied)

    def in_words(self, with_high: bool = True) -> str:
        low, high = _short(self.low), _short(self.high)
        if not with_high:
            return f"{'above' if self.open_low else 'at least'} {low}"
        if self.open_low:
            return f"above {low} and at most {high}"
        return f"at least {low} and below {high}" if self.open_high else f"{low} to {high}"


def _short(number: float) -> str:
    return str(number) if type(number) is int else f"{number:g}"


def at_least(low: float, below: float | None = None, limit: float = MOST) -> Range:
    """``limit``: where larger values would take gigabytes or hours."""
    return Range(low, limit, implied=True) if below is None else Range(low, below, open_high=True)


def above(low: float, high: float | None = None, limit: float = MOST) -> Range:
    return Range(low, limit if high is None else high, open_low=True, implied=high is None)


def between(low: float, high: float) -> Range:
    return Range(low, high)


SEEDS = Range(0, 2**64 - 1, implied=True)  # of a random generator
ANY_NUMBER = Range(-MOST, MOST, implied=True)


def as_number(value: Any, kind: type) -> Any:
    """The value as a Python ``int`` or ``float``, if it is one or one of NumPy's (or, for a float,
    any real number); ValueError for anything else, such as True, "3" or a NaN."""
    allowed = Integral if kind is int else Real
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{abbreviate(value)} is not a number")
    try:
        number = kind(value)
    except OverflowError:  # an integer of 400 digits as a float
        raise ValueError("too large for a float") from None
    if number != number:
        raise ValueError("NaN is not a number")
    return number


def need_seed(seed: Any, name: str = "seed") -> int:
    """The seed of a random generator as a Python integer: one of NumPy's would wrap around when
    something is added to it."""
    return need_integer(seed, name, SEEDS)


def need_count(value: Any, name: str) -> int:
    """A number of things to do, at least one, as a Python integer."""
    return need_integer(value, name, at_least(1))


def need_integer(value: Any, name: str, allowed: Range) -> int:
    """The value as a Python integer; MinitxError unless it is one in this range."""
    try:
        found = as_number(value, int)
    except ValueError:
        found = None
    if found is None or found not in allowed:
        too_large = found is not None and found > allowed.high
        expected = allowed.in_words() if too_large else allowed
        raise MinitxError(f"{name} must be an integer, {expected}; got {abbreviate(value)}.")
    return found


# Types --------------------------------------------------------------------------------------------


def need_field_types(instance: Any, what: str) -> None:
    """Raise MinitxError unless every field of this dataclass has its declared type."""
    for f in fields(instance):
        value = getattr(instance, f.name)
        if not has_type(value, f.type):
            raise MinitxError(
                f"{what} has {f.name} = {abbreviate(value)}; expected {type_name(f.type)}."
            )


def has_type(value: Any, declared: Any) -> bool:
    """Does the value have the declared type of its field? A float must be finite and may be
    written as an integer; True is not an integer. Annotations that are not checked here pass."""
    if isinstance(declared, UnionType):
        return any(has_type(value, option) for option in get_args(declared))
    if declared is None:
        return value is None
    if declared is float:
        return type(value) in (int, float) and abs(value) < 1e300  # NaN is not below
    if declared is int:
        return type(value) is int and abs(value) < 2**63
    if declared in (bool, str, tuple, list, dict):
        return type(value) is declared
    if get_origin(declared) is tuple and get_args(declared)[1:] == (Ellipsis,):
        return type(value) is tuple and all(has_type(v, get_args(declared)[0]) for v in value)
    return isinstance(value, declared) if isclass(declared) else True


def type_name(declared: Any) -> str:
    """A declared type in words, for a message: "an integer or None"."""
    if isinstance(declared, UnionType):
        return " or ".join(map(type_name, get_args(declared)))
    words = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}
    words |= {None: "None", type(None): "None", dict: "an object", list: "a list"}
    if get_origin(declared) is tuple and get_args(declared)[1:] == (Ellipsis,):
        return f"a list of {get_args(declared)[0].__name__}"
    return words.get(declared) or (declared.__name__ if isclass(declared) else str(declared))


def need_float_dtype(dtype: Any) -> np.dtype:
    """The dtype as a NumPy dtype; raises MinitxError unless it is float32 or float64."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy warns about some spellings before it refuses
            found = None if dtype is None else np.dtype(dtype)  # np.dtype(None) is float64
    except Exception:  # TypeError, ValueError, SyntaxError, ...: whatever NumPy raises
        found = None
    if found is None or found not in (np.float32, np.float64):
        raise MinitxError(f"dtype must be float32 or float64, got {abbreviate(dtype)}.")
    return found
