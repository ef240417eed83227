"""The ledger: multiply-adds that were really done and bytes that were really read, part by part.

Every product of the model goes through ops.py, and each of them tells the ledger, if one is open:

    with ledger.counting(lm) as counts:
        lm.generate("Once", 20)
    print(counts.by_group())

What is counted: the multiply-adds of products (x @ w, q k^T, p v), the bytes of weights and of
cached keys and values that they read, and whatever a technique's decisions cost (``add``). What is
not: norms, activations, rotations and the softmax, which take a few operations per number. An
``event`` is something that a technique counts about itself: tokens that left early, rows skipped.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from minitx.tree import Part, walk


@dataclass
class Entry:
    """What one part has done."""

    multiply_adds: int = 0
    weight_bytes: int = 0  # of the model's arrays, read from end to end or in part
    cache_bytes: int = 0  # of keys and values

    def __add__(self, other: "Entry") -> "Entry":
        return Entry(
            self.multiply_adds + other.multiply_adds,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
        )


@dataclass
class Ledger:
    """Counts by the path of the part that worked (``stack.blocks.0.ffn.down``)."""

    entries: dict[str, Entry] = field(default_factory=dict)
    events: Counter = field(default_factory=Counter)
    path: str = ""  # of the part at work

    def add(self, multiply_adds: int = 0, weight_bytes: int = 0, cache_bytes: int = 0) -> None:
        entry = self.entries.setdefault(self.path, Entry())
        entry.multiply_adds += multiply_adds
        entry.weight_bytes += weight_bytes
        entry.cache_bytes += cache_bytes

    def event(self, name: str, count: int = 1) -> None:
        self.events[name] += int(count)

    def total(self, below: str = "") -> Entry:
        """The sum over a part and everything below it; over all, by default."""
        inside = (e for path, e in self.entries.items() if is_below(path, below))
        return sum(inside, Entry())

    def by_group(self) -> dict[str, Entry]:
        """Summed over blocks and put together by what the work is for: ``stack.blocks.*.ffn``."""
        found: dict[str, Entry] = {}
        for path, entry in self.entries.items():
            group = group_of(path)
            found[group] = found.get(group, Entry()) + entry
        return found


def is_below(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(above + ".")


def group_of(path: str) -> str:
    """``model.stack.blocks.3.ffn.down`` -> ``blocks.ffn``; ``model.head`` -> ``head``. A model that
    the token loop has for itself (a draft) stands apart: ``decode.blocks.ffn``."""
    if path.startswith("decode."):
        return f"decode.{group_of(path.removeprefix('decode.'))}"
    words = [word for word in path.split(".") if not word.isdigit()]
    if "blocks" in words:
        return ".".join(words[words.index("blocks") :][:2])
    if "head" in words:
        return "head"  # and all that a technique has put around it
    return words[-1] if words else ""


active: Ledger | None = None  # where ops.py counts, if anywhere


# The methods of parts in which work is done.
WORK = ("__call__", "fill", "kv", "best", "remember", "outputs")


@contextmanager
def counting(root: Part) -> Iterator[Ledger]:
    """Count what the parts below ``root`` do while the block runs; gives the ledger.

    Meanwhile the parts' classes say whose turn it is, which costs nothing at any other time. One
    ledger is open at a time: an inner one counts for itself alone.
    """
    global active
    outer, active = active, Ledger()
    ledger = active
    paths: dict[int, str] = {}
    for path, node in walk(root):
        paths.setdefault(id(node), path)
    classes = {type(node) for _, node in walk(root)}
    originals = [
        (cls, name, vars(cls)[name]) for cls in classes for name in WORK if name in vars(cls)
    ]
    try:
        for cls, name, method in originals:
            setattr(cls, name, _told(method, ledger, paths))
        yield ledger
    finally:
        for cls, name, method in originals:
            setattr(cls, name, method)
        active = outer


def _told(method, ledger: Ledger, paths: dict[int, str]):
    """The method, with the ledger told which part is at work."""

    def told(self, *args, **options):
        before = ledger.path
        ledger.path = paths.get(id(self), before)
        try:
            return method(self, *args, **options)
        finally:
            ledger.path = before

    return told
