"""Say in one or two sentences where and how two arrays differ.

    The first difference is at token 3, column 5: expected 0.25, got -0.25. Everywhere the sign is
    wrong.

A list of numbers that differ helps nobody. What helps is the place of the first one, and whether
something simple explains all of them: a constant factor, a sign, rows shifted by one, two halves
swapped. A pattern is named only if it explains every number.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

TOKENS = ("token", "column")


def describe(
    found, expected, axes: Sequence[str] | None = TOKENS, tolerance: float = 1e-9
) -> str | None:
    """Where and how ``found`` differs from ``expected``, or None if it does not.

    found, expected: arrays (or lists) of numbers or booleans, of any shape. axes: a name for each
    axis, or for the last ones; None: "row" and "column". tolerance: the allowed difference, as a
    fraction of the largest finite number expected. NaN and infinity must be in the same places.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        return _shapes(found, expected, tolerance)
    if found.dtype.kind not in "biuf" or (found.dtype.kind == "b") != (expected.dtype.kind == "b"):
        if found.dtype != expected.dtype:
            return f"Expected the dtype {expected.dtype}, got {found.dtype}."
    if found.dtype.kind not in "biuf":
        wrong = found != expected
    else:
        wrong = differs(found, expected, tolerance)
    if not wrong.any():
        return None
    axes = axis_names(found.ndim, axes)
    first = tuple(int(i) for i in np.argwhere(wrong)[0])
    place = f" at {where(first, axes)}" if axes else ""
    article = "The only" if wrong.sum() == 1 and wrong.size > 1 else "The first"
    start = f"{article} difference is{place}: e" if axes else "E"
    wanted, got = numbers(expected[first], found[first])
    sentence = f"{start}xpected {wanted}, got {got}."
    if wrong.sum() == 1 < wrong.size:
        return sentence
    with np.errstate(all="ignore"):  # squares of large numbers overflow
        explained = pattern(found, expected, wrong, axes, tolerance)
    return f"{sentence} {explained}" if explained else sentence


def differs(found: np.ndarray, expected: np.ndarray, tolerance: float) -> np.ndarray:
    """True where two arrays of one shape differ by more than the tolerance times ``scale_of``."""
    if found.dtype.kind == "b":
        return found != expected
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(all="ignore"):
        near = np.abs(a - b) <= tolerance * scale_of(b)
    return ~(near | (a == b) | (np.isnan(a) & np.isnan(b)))


def scale_of(expected: np.ndarray) -> float:
    """The largest finite absolute value, or 1 if there is none above 0."""
    finite = np.abs(expected[np.isfinite(expected)])
    return float(finite.max(initial=0.0)) or 1.0


# Words --------------------------------------------------------------------------------------------


def axis_names(ndim: int, axes: Sequence[str] | None) -> tuple[str, ...]:
    """A name for each axis. Names that are given stand for the last axes; earlier ones get theirs
    from their number. One axis alone is an "index", unless one name was given."""
    axes = tuple(axes or ("row", "column"))
    if ndim == 1 and len(axes) != 1:
        return ("index",)
    missing = max(ndim - len(axes), 0)
    return (*(f"axis {i} index" for i in range(missing)), *axes[max(len(axes) - ndim, 0) :])


def where(place: Sequence[int], axes: Sequence[str]) -> str:
    """ "head 1, token 3, column 5" """
    return ", ".join(f"{name} {i}" for name, i in zip(axes, place))


def plural(name: str) -> str:
    if name.endswith("index"):
        return f"{name[:-2]}ices"
    return name[:-1] + "ies" if name.endswith("y") and name != "key" else name + "s"


def number(x, digits: int = 4) -> str:
    """Some digits of a float, or all that an integer has."""
    return str(x) if np.asarray(x).dtype.kind != "f" else f"{float(x):.{digits}g}"


def numbers(x, y) -> tuple[str, str]:
    """Two numbers, with as many digits as it takes to see that they differ."""
    for digits in (4, 8, 12, 17):
        words = number(x, digits), number(y, digits)
        if words[0] != words[1]:
            break
    return words


def decapitalized(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def named_factor(factor: float, tolerance: float = 1e-6) -> str:
    """A factor in words: "2.828 = sqrt(8)", "0.125 = 1/8", "-1", or just its digits."""
    size, sign = abs(factor), "-" if factor < 0 else ""
    if not 1e-6 < size < 1e6:
        return f"{sign}{size:.4g}"
    names: list[tuple[str, float]] = []
    for n in (round(size), round(1 / size), round(size**2), round(1 / size**2)):
        if 1 < n <= 4096:
            root = math.sqrt(n)
            names += [(f"{n}", n), (f"1/{n}", 1 / n), (f"sqrt({n})", root)]
            names += [(f"1/sqrt({n})", 1 / root)]
    digits = f"{size:.4g}" if abs(size - 1) > 1e-3 else f"{size:.8g}"
    for name, value in names:
        if abs(value / size - 1) <= tolerance:
            return sign + (digits if name == digits else f"{digits} = {sign}{name}")
    return sign + digits


# Shapes -------------------------------------------------------------------------------------------


def _shapes(found: np.ndarray, expected: np.ndarray, tolerance: float) -> str:
    sentence = f"Expected the shape {expected.shape}, got {found.shape}"
    if found.ndim == expected.ndim == 2 and found.shape == expected.shape[::-1]:
        same = found.dtype.kind in "biuf" and not differs(found.T, expected, tolerance).any()
        return f"{sentence}: " + ("it is transposed." if same else "rows and columns are swapped.")
    if found.size == expected.size:
        return f"{sentence}: as many numbers, in another shape."
    if found.ndim == expected.ndim:
        axes = [i for i in range(found.ndim) if found.shape[i] != expected.shape[i]]
        if len(axes) == 1:
            have, need = found.shape[axes[0]], expected.shape[axes[0]]
            more = f"{abs(have - need)} too {'many' if have > need else 'few'}"
            return f"{sentence}: {more} along axis {axes[0]}."
    return f"{sentence}."


# Patterns -----------------------------------------------------------------------------------------


def pattern(found, expected, wrong, axes: Sequence[str], tolerance: float) -> str | None:
    """The first of the known patterns that explains every number; otherwise which rows differ."""
    if found.dtype.kind not in "biuf":
        return extent(wrong, axes)
    if found.dtype.kind == "b":
        return "True and False are exchanged." if wrong.all() and axes else extent(wrong, axes)
    a, b = found.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a) == np.isfinite(b)).all():
        return not_finite(a, b, axes)
    if not np.isfinite(b).all():
        return extent(wrong, axes)
    if small := rounding(a, b, tolerance):
        return small
    tolerance = max(tolerance, 1e-12)  # a product of the pattern is rounded once more
    allowed = tolerance * max(scale_of(a), scale_of(b))

    def same(x, y) -> bool:
        return bool((np.abs(x - y) <= allowed).all())

    explained = one_factor(a, b, same)
    if explained or not axes:
        return explained
    for of in (signs, moved, factors, reordered, offset):
        explained = of(a, b, same, wrong, axes, tolerance)
        if explained:
            return explained
    there = one_factor(a[wrong], b[wrong], same)  # not everywhere, but wherever they differ
    return " ".join(filter(None, [extent(wrong, axes), there and f"There, {decapitalized(there)}"]))


def not_finite(a, b, axes) -> str:
    """Where there is NaN or infinity but should not be, or the other way round."""
    bad = np.isfinite(a) != np.isfinite(b)
    if np.isfinite(b[bad]).all():
        kind = "NaN" if np.isnan(a[bad]).all() else "NaN or infinite"
        count = f"{bad.sum()} of {bad.size} numbers are {kind}"
    else:
        count = f"{bad.sum()} of {bad.size} numbers should be NaN or infinite, or should not"
    rest = extent(bad, axes)
    return f"{count}: {decapitalized(rest)}" if rest else f"{count}."


def one_factor(a, b, same: Callable) -> str | None:
    """Is found = factor * expected, with one factor for all numbers?"""
    size = float((b * b).sum())
    if size == 0:
        return None
    factor = float((a * b).sum()) / size
    if not same(a, factor * b):
        return None
    if abs(factor) < 1e-12:
        return "Everything is 0." if b.size > 1 else None
    if np.count_nonzero(b) < 2:  # one number is always off by some factor
        telling = factor == -1 or "=" in named_factor(factor, 1e-9)
        if not telling:
            return None
    if abs(factor + 1) < 1e-9:
        return "The sign is wrong, everywhere." if b.size > 1 else "The sign is wrong."
    subject = "All are" if b.size > 1 else "It is"
    return f"{subject} off by the factor {named_factor(factor)}."


def rounding(a, b, tolerance: float) -> str | None:
    """Differences as small as rounding, but more than the tolerance allows."""
    off = float(np.abs(a - b).max() / scale_of(b))
    if off > 1e-5:
        return None
    if tolerance == 0:
        return f"The differences are small, at most {off:.1e} of the largest number."
    return (
        f"The differences are small, at most {off:.1e} of the largest number, but only "
        f"{tolerance:.0e} is allowed: perhaps a step runs in float32, or a constant is rounded."
    )


def signs(a, b, same, wrong, axes, tolerance) -> str | None:
    """Are only signs wrong?"""
    if not same(np.abs(a), np.abs(b)):
        return None
    rest = extent(wrong, axes)
    return "Only signs are wrong." + (f" {rest}" if rest else "")


def moved(a, b, same, wrong, axes, tolerance) -> str | None:
    """Are rows (or columns, ...) shifted by one, or two halves swapped, or the order reversed?"""
    for axis, name in _last_first(axes):
        length = b.shape[axis]
        if length < 2:
            continue
        x, y = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
        if same(y, y[:1]):  # all alike: any order would explain it
            continue
        if length % 2 == 0 and same(x, np.roll(y, length // 2, 0)):
            halves = "two" if length == 2 else "two halves of the"
            return f"The {halves} {plural(name)} are swapped."
        if length > 2 and same(x, y[::-1]):
            return f"The {plural(name)} are in reverse order."
        if length > 2 and same(x[1:], y[:-1]):
            return f"Each {name} holds what belongs to the {name} before it: a shift by one."
        if length > 2 and same(x[:-1], y[1:]):
            return f"Each {name} holds what belongs to the {name} after it: a shift by one."
    return None


def factors(a, b, same, wrong, axes, tolerance) -> str | None:
    """Is each row (or each column) off by a factor of its own?"""
    if a.ndim < 2:
        return None
    for axis, name in _last_first(axes):
        others = tuple(i for i in range(a.ndim) if i != axis)
        if (np.count_nonzero(b, axis=others) < 2).any():
            continue  # one number is always off by some factor
        factor = (a * b).sum(others, keepdims=True) / (b * b).sum(others, keepdims=True)
        if not same(a, factor * b):
            continue
        off = [i for i, f in enumerate(factor.ravel()) if abs(f - 1) > max(tolerance, 1e-9)]
        if same(factor.ravel()[off], factor.ravel()[off[:1]]):  # the same: that is said below
            continue
        words = [f"{number(factor.ravel()[i])} at {name} {i}" for i in off[:2]]
        return f"Each {name} is off by a factor of its own: {', '.join(words)}."
    return None


def reordered(a, b, same, wrong, axes, tolerance) -> str | None:
    """Are the rows (or columns, ...) the expected ones in another order?"""
    for axis, name in _last_first(axes):
        x = np.moveaxis(a, axis, 0).reshape(b.shape[axis], -1)
        y = np.moveaxis(b, axis, 0).reshape(b.shape[axis], -1)
        if not 2 < len(x) <= 256 or x.size > 100_000:
            continue
        order, free = [], list(range(len(y)))
        for row in x:
            match = next((j for j in free if same(row, y[j])), None)
            if match is None:
                break
            order.append(match)
            free.remove(match)
        else:
            i = next(i for i, j in enumerate(order) if i != j)
            return (
                f"The {plural(name)} are the expected ones in another order: {name} {i} holds what "
                f"belongs to {name} {order[i]}."
            )
    return None


def offset(a, b, same, wrong, axes, tolerance) -> str | None:
    """Is the same number added everywhere?"""
    added = float((a - b).mean())
    if a.size < 2 or not same(a, b + added):
        return None
    return f"All are too {'large' if added > 0 else 'small'} by {number(abs(added))}."


def _last_first(axes: Sequence[str]) -> list[tuple[int, str]]:
    """(axis, name): tokens before columns, then earlier axes."""
    order = sorted(range(len(axes)), key=lambda i: (i < len(axes) - 2, i))
    return [(i, axes[i]) for i in order]


# Which rows ---------------------------------------------------------------------------------------


def extent(wrong: np.ndarray, axes: Sequence[str]) -> str | None:
    """Which rows, columns, ... differ, along the axis that says most. None: all numbers differ."""
    said: dict[bool, tuple[float, str]] = {}  # of the last two axes, and of those before
    for axis, name in _last_first(axes):
        others = tuple(i for i in range(wrong.ndim) if i != axis)
        which = np.flatnonzero(wrong.any(others))
        share, early = len(which) / wrong.shape[axis], axis < wrong.ndim - 2
        if share < 1 and (early not in said or share < said[early][0]):
            said[early] = share, sentence_of(which, wrong.shape[axis], name)
    if said:
        return " ".join(said[early][1] for early in (True, False) if early in said)
    if wrong.all() or not axes:
        return None
    return f"{wrong.sum()} of {wrong.size} numbers differ."


def sentence_of(which: np.ndarray, length: int, name: str) -> str:
    """Indices in words: "Only token 3 differs; ...", "Token 3 and all later tokens differ.", ..."""
    first, last = int(which[0]), int(which[-1])
    names = plural(name)
    if len(which) == 1:
        return f"Only {name} {first} differs."
    if len(which) == last - first + 1:  # without a gap
        if last == length - 1:
            before = f"{names} 0 to {first - 1} agree" if first > 1 else f"{name} 0 agrees"
            return f"{name[0].upper()}{name[1:]} {first} and all later {names} differ; {before}."
        return f"Only {names} {first} to {last} differ."
    step = which[1] - which[0]
    if len(which) > 2 and (np.diff(which) == step).all() and last + step >= length:
        every = {2: "second", 3: "third", 4: "fourth"}.get(int(step), f"{step}th")
        return f"Only every {every} {name} differs, from {name} {first} on."
    if length - len(which) == 1:
        (left,) = set(range(length)) - set(which.tolist())
        return f"All {names} but {name} {left} differ."
    shown = ", ".join(str(i) for i in which[:4])
    return f"Only {names} {shown}{' ...' if len(which) > 4 else ''} differ."
