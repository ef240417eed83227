"""``minitx show --diff``: the tree of parts before and after techniques, as a readable diff.

    minitx show --diff --fold-norms --quantize bits=8

      model: Transformer
        stack: Stack
          blocks.0-7: Block
            attn: Attention
    -         norm: RMSNorm(gain 128, eps=1e-05)
    +         norm: WeightlessRMSNorm(eps=1e-05)
    ~         qkv: QKV, with 3 parts: other values

The two trees are compared part by part, so a part that was wrapped stays the same inside its
wrapper. Subtrees that did not change take one line, and so do those that only hold other numbers.
Blocks that changed alike are folded.
"""

from dataclasses import dataclass, field

import numpy as np

from minitx.lm import LM
from minitx.tree import Part, children, draw, nbytes, settings, walk, weights

SAME, REMOVED, ADDED, VALUES = "  ", "- ", "+ ", "~ "


@dataclass(frozen=True)
class Line:
    mark: str  # SAME, REMOVED, ADDED or VALUES
    depth: int
    text: str

    def __str__(self) -> str:
        return f"{self.mark}{'  ' * self.depth}{self.text}".rstrip()


@dataclass(frozen=True)
class TreeDiff:
    """lines: of the diff. before, after: weights and bytes."""

    title: str
    lines: list[Line]
    before: dict[str, int] = field(default_factory=dict)
    after: dict[str, int] = field(default_factory=dict)

    @property
    def changed(self) -> bool:
        return any(line.mark != SAME for line in self.lines)

    def __str__(self) -> str:
        if not self.changed:
            body = "The trees are the same."
        else:
            body = "\n".join(map(str, self.lines))
        return "\n".join([body, "", *self.totals()])

    def totals(self) -> list[str]:
        found = []
        for name, was in self.before.items():
            now = self.after[name]
            ratio = f" ({now / was:.3f}x)" if was else ""
            if was or now:
                found.append(f"{name}: {was:,} -> {now:,}{ratio}")
        return found

    def as_dict(self) -> dict:
        return {
            "title": self.title,
            "changed": self.changed,
            "lines": list(map(str, self.lines)),
            "before": self.before,
            "after": self.after,
        }


def tree_diff(dense: LM, changed: LM, title: str = "") -> TreeDiff:
    """What techniques changed in the model and in the decoding loop."""
    lines = diff("model", dense.model, changed.model, 0)
    lines += diff("decode", dense.decode, changed.decode, 0)
    return TreeDiff(title, lines, sizes(dense), sizes(changed))


def sizes(lm: LM) -> dict[str, int]:
    found = weights(lm.model).values()
    floats = [w for w in found if w.dtype.kind == "f"]
    return {
        "weights": sum(w.size for w in found),
        "zeros among the floats": sum(int(w.size - np.count_nonzero(w)) for w in floats),
        "bytes in memory": nbytes(lm),
        "parts": sum(1 for _ in walk(lm)),
    }


# Comparing ----------------------------------------------------------------------------------------


def diff(name: str, a: Part, b: Part, depth: int) -> list[Line]:
    """The lines of two parts that stand in the same place."""
    if draw(a) == draw(b):
        return unchanged(name, a, b, depth)
    if wrapped := path_to_same(a, b):
        return around(name, a, b, wrapped, depth)
    title_a, title_b = head(name, a), head(name, b)
    mine, theirs = dict(children(a)), dict(children(b))
    if not set(mine) & set(theirs):  # nothing in common
        return [*whole(REMOVED, name, a, depth), *whole(ADDED, name, b, depth)]
    lines = [Line(SAME, depth, title_a)]
    if title_a != title_b:
        lines = [Line(REMOVED, depth, title_a), Line(ADDED, depth, title_b)]
    found = []
    for key in in_order(mine, theirs):
        if key not in theirs:
            found.append((key, whole(REMOVED, key, mine[key], depth + 1)))
        elif key not in mine:
            found.append((key, whole(ADDED, key, theirs[key], depth + 1)))
        else:
            found.append((key, diff(key, mine[key], theirs[key], depth + 1)))
    return lines + folded(found)


def around(name: str, a: Part, b: Part, wrapped: str, depth: int) -> list[Line]:
    """b has a part at ``wrapped`` (one of its fields) that looks like a: show what is around it."""
    lines = [Line(ADDED, depth, head(name, b))]
    for key, child in children(b):
        if key == wrapped:
            lines += diff(key, a, child, depth + 1)
        else:
            lines += whole(ADDED, key, child, depth + 1)
    return lines


def path_to_same(a: Part, b: Part) -> str:
    """The field of b that holds a part of a's type, if b is another kind of part: a wrapper."""
    if type(a) is type(b):
        return ""
    for key, child in children(b):
        if type(child) is type(a) or path_to_same(a, child):
            return key
    return ""


def unchanged(name: str, a: Part, b: Part, depth: int) -> list[Line]:
    """One line for two parts that look the same, whatever is in them."""
    inside = sum(1 for _ in walk(a)) - 1
    same = same_values(a, b)
    more = f", with {inside} parts" if inside else ""
    more += "" if same and not inside else ": as before" if same else ": other values"
    return [Line(SAME if same else VALUES, depth, head(name, a) + more)]


def same_values(a: Part, b: Part) -> bool:
    """Do two trees that look the same hold the same numbers?"""
    for (_, x), (_, y) in zip(walk(a), walk(b), strict=True):
        for key, value in vars(x).items():
            if isinstance(value, np.ndarray) and not np.array_equal(value, vars(y)[key]):
                return False
    return True


def whole(mark: str, name: str, part: Part, depth: int) -> list[Line]:
    """A part and all that is in it, as ``tree.draw`` has it."""
    first, *rest = draw(part).splitlines()
    title = f"{name}: {first}" if name else first
    below = [Line(mark, depth + 1 + indent(line), line.strip()) for line in rest]
    return [Line(mark, depth, title), *below]


def indent(line: str) -> int:
    return (len(line) - len(line.lstrip(" "))) // 2 - 1


def head(name: str, part: Part) -> str:
    title = f"{name}: " if name else ""
    return f"{title}{type(part).__name__}{settings(part)}"


def in_order(mine: dict, theirs: dict) -> list[str]:
    """The names of both, those of the first in their order, new ones after those before them."""
    found = list(mine)
    at = 0
    for name in theirs:
        if name in mine:
            at = found.index(name) + 1
        else:
            found.insert(at, name)
            at += 1
    return found


def folded(found: list[tuple[str, list[Line]]]) -> list[Line]:
    """``blocks.0``, ``blocks.1``, ... of which the same is to say become one ``blocks.0-7``."""
    runs: list[tuple[str, str, list[Line]]] = []  # first name, last index, lines
    for name, lines in found:
        stem, _, index = name.rpartition(".")
        if runs and stem and runs[-1][0].startswith(f"{stem}."):
            first, _, same = runs[-1]
            if plain(first, same) == plain(name, lines):
                runs[-1] = (first, index, same)
                continue
        runs.append((name, "", lines))
    out = []
    for first, last, lines in runs:
        for line in lines:
            text = line.text
            if last and text.startswith(f"{first}: "):
                text = f"{first}-{last}: {text.removeprefix(f'{first}: ')}"
            out.append(Line(line.mark, line.depth, text))
    return out


def plain(name: str, lines: list[Line]) -> list[Line]:
    """The lines without the name of the part, which differs from block to block."""
    return [Line(x.mark, x.depth, x.text.removeprefix(f"{name}: ")) for x in lines]
