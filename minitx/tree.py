"""A model is a tree of parts. This file draws it, walks it, and makes changed copies.

A part is a frozen, callable dataclass. Its fields are weights (arrays), child parts, tuples of
parts, and plain settings. The functions of this file work on any part, whatever it computes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Any

import numpy as np


class Part:
    """Base class of every part. ``print(part)`` draws the tree below it.

    The class attributes declare how a part uses the KV cache and how it decides what to skip, so
    that techniques can be combined safely. A technique's part overrides those that differ.
    """

    # What decides which work is skipped: each "token" by itself, all tokens of a "step" together,
    # or the first step of a "sequence" (its prompt) for all that follows. A part that skips nothing
    # is a "token" part.
    decides = "token"
    frees_rows = False  # a layer's KV cache may hold fewer rows than there are tokens
    needs_all_rows = False  # needs one cache row for every token, in order
    has_history = False  # keeps state of a sequence beyond its keys and values
    # Made for the parts inside it as they are: techniques of inner levels can no longer be applied
    # (to a saved model that has it).
    needs_inner_first = False
    reads_other_layers = False  # reads cache rows that an earlier layer stores in the same step
    one_sequence = False  # cannot run sequences of different lengths in one batch
    matrix_layout = None  # of ``w``: "column-major", "row-major" or None (memory_layout.py)

    def __repr__(self) -> str:
        return draw(self)

    def __deepcopy__(self, memo) -> "Part":
        return self  # parts are immutable

    def tokenizer_for(self, tokenizer):
        """The tokenizer of a model with this part; for most parts, the one it had."""
        return tokenizer

    def forget(self) -> None:
        """Drop what is stored across sequences (a prefix cache, say); most parts store nothing."""


def part(cls):
    """Class decorator: a frozen dataclass that is compared (and hashed) by identity, since arrays
    cannot be compared with one ==."""
    return dataclass(frozen=True, eq=False, repr=False)(cls)


def table(**options) -> Any:
    """A field for an array that is computed from the settings (RoPE angles), not a weight."""
    return field(metadata={"weight": False}, **options)


def children(node: Part) -> Iterator[tuple[str, Part]]:
    """(field name, child) for each child part, tuples numbered: ``blocks.3``."""
    for name in field_names(type(node)):
        value = getattr(node, name)
        if isinstance(value, Part):
            yield name, value
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if isinstance(item, Part):
                    yield f"{name}.{i}", item


@cache
def field_names(kind: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def walk(node: Part, path: str = "") -> Iterator[tuple[str, Part]]:
    """(path, part) for the node itself and everything below it, from the root down. A part that
    is used in two places comes twice."""
    waiting = [(path, node)]
    while waiting:
        path, node = waiting.pop()
        yield path, node
        below = [(f"{path}.{name}" if path else name, child) for name, child in children(node)]
        waiting += reversed(below)


def rebuild(node: Part, change: Callable[[Part], Part | None], seen: dict | None = None) -> Part:
    """A copy of the tree in which ``change(node)`` replaces each node for which it returns a part.

    Nodes are visited from the root down; a replacement is not visited again. Unchanged subtrees
    stay the same objects, and a part that is used in two places is replaced once."""
    seen = {} if seen is None else seen
    if id(node) not in seen:
        new = change(node)
        seen[id(node)] = node, (_rebuild_children(node, change, seen) if new is None else new)
    return seen[id(node)][1]  # the node is kept too, so that its id is not reused


def _rebuild_children(node: Part, change, seen: dict) -> Part:
    changed = {}
    for name in field_names(type(node)):
        old = getattr(node, name)
        if isinstance(old, Part):
            new = rebuild(old, change, seen)
        elif isinstance(old, tuple):
            new = tuple(rebuild(o, change, seen) if isinstance(o, Part) else o for o in old)
            new = old if all(a is b for a, b in zip(new, old)) else new
        else:
            continue
        if new is not old:
            changed[name] = new
    return replace(node, **changed) if changed else node


def with_empty_stores(root: Part) -> Part:
    """A copy with stores of its own, which are empty, for whatever must neither see nor change what
    is stored across sequences, such as a calibration. All other parts are shared."""

    def change(node: Part) -> Part | None:
        if type(node).forget is Part.forget:  # no store
            return None
        own = replace(node)
        own.forget()
        return own

    return rebuild(root, change)


def weights(node: Part, path: str = "") -> dict[str, np.ndarray]:
    """Every weight below ``node`` by its path (``stack.blocks.0.ffn.down.w``), each array once,
    under the first path that leads to it (a tied head is found under ``embed``). ``path``: a
    prefix that ends with a dot."""
    found: dict[str, np.ndarray] = {}
    _collect(node, path, found, set())
    return found


def _collect(node: Part, path: str, found: dict, seen: set) -> None:
    for f in fields(node):
        value = getattr(node, f.name)
        if is_weight(f, value) and id(value) not in seen:
            seen.add(id(value))
            found[f"{path}{f.name}"] = value
    for name, child in children(node):
        if id(child) not in seen:
            seen.add(id(child))
            _collect(child, f"{path}{name}.", found, seen)


def nbytes(node: Part) -> int:
    """Bytes of all arrays below ``node``, tables too, each array once."""
    values = (value for _, part in walk(node) for value in vars(part).values())
    arrays = {id(value): value for value in values if isinstance(value, np.ndarray)}
    return sum(array.nbytes for array in arrays.values())


def float_type(node: Part) -> np.dtype:
    """The dtype that the parts below ``node`` compute in: that of their first float32 or float64
    weight (other dtypes are storage only)."""
    return next(w.dtype for w in weights(node).values() if w.dtype in (np.float32, np.float64))


def is_weight(f, value) -> bool:
    """Is this field's value an array that training would update?"""
    return f.metadata.get("weight", True) and hasattr(value, "shape") and hasattr(value, "dtype")


def map_weights(node: Part, make: Callable[[Any], Any]) -> Part:
    """A copy of the tree with ``make(array)`` for every weight; an array shared by two parts
    (tied embeddings) is made once and stays shared, and so is a part that is used in two places.
    Tables stay as they are."""
    made: dict[int, tuple] = {}
    copied: dict[int, Part] = {}

    def once(array):
        if id(array) not in made:
            made[id(array)] = array, make(array)
        return made[id(array)][1]

    def copy(node: Part) -> Part:
        if id(node) not in copied:
            copied[id(node)] = copy_once(node)
        return copied[id(node)]

    def copy_once(node: Part) -> Part:
        changed = {}
        for f in fields(node):
            value = getattr(node, f.name)
            if is_weight(f, value):
                changed[f.name] = once(value)
            elif isinstance(value, Part):
                changed[f.name] = copy(value)
            elif isinstance(value, tuple):
                changed[f.name] = tuple(copy(v) if isinstance(v, Part) else v for v in value)
        return replace(node, **changed)

    return copy(node)


# Drawing ------------------------------------------------------------------------------------------


def draw(node: Part) -> str:
    """The tree as indented text; a run of equal-looking blocks is folded into one entry, and of a
    block that stands in several places the later ones only name the first."""
    return "\n".join(_lines("", node))


def _lines(name: str, node: Part) -> list[str]:
    title = f"{name}: " if name else ""
    lines = [f"{title}{type(node).__name__}{settings(node)}"]
    drawn, names = [], {}
    for child_name, child in children(node):
        first = names.setdefault(id(child), child_name)
        same = [f"{type(child).__name__}, the same as {first}"]
        drawn.append((child_name, _lines("", child) if first == child_name else same))
    for label, body in _folded(drawn):
        lines += [f"  {label}: {body[0]}"] + ["  " + line for line in body[1:]]
    return lines


def _folded(drawn: list[tuple[str, list[str]]]) -> list[tuple[str, list[str]]]:
    """``blocks.0``, ``blocks.1``, ... that look the same become one ``blocks.0-7``."""
    out: list[tuple[str, list[str]]] = []
    first = ""
    for name, body in drawn:
        stem, _, index = name.rpartition(".")
        if out and stem and body == out[-1][1] and out[-1][0].startswith(f"{stem}."):
            out[-1] = (f"{first}-{index}", body)
        else:
            first = name
            out.append((name, body))
    return out


def settings(node: Part) -> str:
    """``(w 352x128, eps=1e-05)``: the fields in order, arrays by their shape."""
    words = []
    for f in fields(node):
        value = getattr(node, f.name)
        if hasattr(value, "shape"):
            words.append(f"{f.name} {'x'.join(map(str, value.shape))}{_zeros(f, value)}")
        elif isinstance(value, tuple) and value and all(type(v) in (int, float) for v in value):
            words.append(f"{f.name}={','.join(f'{v:g}' for v in value)}")
        elif isinstance(value, (bool, int, float, str)):
            words.append(f"{f.name}={value:g}" if isinstance(value, float) else f"{f.name}={value}")
        elif callable(value) and not isinstance(value, Part):
            words.append(f"{f.name}={getattr(value, '__name__', value)}")
    return f"({', '.join(words)})" if words else ""


def _zeros(f, value) -> str:
    """`` 50% zeros`` for a matrix of which something was left out: which its shape does not
    show."""
    if not is_weight(f, value) or value.ndim < 2 or value.dtype.kind != "f":
        return ""
    share = 1 - np.count_nonzero(value) / max(value.size, 1)
    return f" {share:.0%} zeros" if share >= 0.005 else ""
