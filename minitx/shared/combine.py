"""Linear combinations of the weights of parts that are built alike, such as two blocks."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from minitx.errors import MinitxError
from minitx.tree import Part, children, is_weight


def combined(name: str, parts: Sequence[Part], coefficients: Sequence[float]) -> Part:
    """One part like these, whose weights are sums over them: coefficient times weight. Settings and
    tables are those of the first. MinitxError, which ``name`` begins, if they are not built alike.
    """
    first = parts[0]
    if len({type(part) for part in parts}) > 1:
        raise unlike(name, first)
    changed = {}
    for f in fields(first):
        values = [getattr(part, f.name) for part in parts]
        if is_weight(f, values[0]):
            changed[f.name] = weighted_sum(name, first, values, coefficients)
        elif isinstance(values[0], Part):
            changed[f.name] = combined(name, values, coefficients)
        elif isinstance(values[0], tuple) and any(True for _ in children(first)):
            changed[f.name] = tuple(
                combined(name, some, coefficients) if isinstance(some[0], Part) else some[0]
                for some in zip(*values, strict=True)
            )
    return replace(first, **changed)


def weighted_sum(name: str, part: Part, arrays: Sequence, coefficients: Sequence[float]):
    """Summed in float64 and rounded once."""
    if len({getattr(array, "shape", None) for array in arrays}) > 1:
        raise unlike(name, part)
    total = sum(c * array.astype(np.float64) for c, array in zip(coefficients, arrays))
    return total.astype(arrays[0].dtype)


def unlike(name: str, part: Part) -> MinitxError:
    return MinitxError(
        f"{name} adds up the weights of layers that are built alike, and a {type(part).__name__} "
        "has another type or shape in another layer; leave out the technique that changed it "
        "(such as head_prune or prune_structure)."
    )
