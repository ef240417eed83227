"""The ledger counts multiply-adds and bytes read, part by part, as they happen.

Every product of the model goes through ops.py, which reports it here. Nothing is recorded unless a
ledger is open:

    with ledger.counting(lm) as counts:
        lm.generate("Once", 20)
    print(counts.by_group())

It counts the multiply-adds of products (x @ w, q k^T, p v), the bytes of weights and of the KV
cache that they read, and the cost of a technique's decisions. Norms, activations, rotations and the
softmax are not counted: they take a few operations per number. An *event* is something that a
technique counts about itself: tokens that exited early, cache rows evicted.

Multiply-adds are of floats unless the algorithm says of how many bits its integers are. Tables
replace multiply-adds by additions, which are counted apart. Both matter for energy (lab/energy.py).

An algorithm reports its work in a line of its own and never checks whether a ledger is open:

    ledger.product(x, w)                   # x @ w
    ledger.count(multiply_adds=3 * x.size) # anything else
    ledger.count(q.size * S, bits=8)       # products of 8-bit integers
    ledger.event("keys kept", kept)        # booleans: summed only if a ledger is open
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType

from minitx.state import Layer
from minitx.tree import Part, walk


@dataclass
class Entry:
    """The work of one part."""

    multiply_adds: int = 0
    weight_bytes: int = 0  # of the model's arrays
    cache_bytes: int = 0  # of keys and values
    additions: int = 0  # without a multiplication: of table entries
    integers: dict[int, int] = field(default_factory=dict)  # multiply-adds of b-bit integers, by b

    @property
    def floats(self) -> int:
        """The multiply-adds that are not of integers."""
        return self.multiply_adds - sum(self.integers.values())

    def __add__(self, other: "Entry") -> "Entry":
        bits = sorted({*self.integers, *other.integers})
        return Entry(
            self.multiply_adds + other.multiply_adds,
            self.weight_bytes + other.weight_bytes,
            self.cache_bytes + other.cache_bytes,
            self.additions + other.additions,
            {b: self.integers.get(b, 0) + other.integers.get(b, 0) for b in bits},
        )

    def divided(self, n: int) -> "Entry":
        """The work per token, say, of which there were n; rounded."""
        return Entry(
            round(self.multiply_adds / n),
            round(self.weight_bytes / n),
            round(self.cache_bytes / n),
            round(self.additions / n),
            {bits: round(count / n) for bits, count in self.integers.items()},
        )


@dataclass
class Ledger:
    """Counts by the path of the part that worked (``stack.blocks.0.ffn.down``)."""

    entries: dict[str, Entry] = field(default_factory=dict)
    events: Counter = field(default_factory=Counter)
    events_at: dict[str, Counter] = field(default_factory=dict)  # the same, by path
    path: str = ""  # of the part that is running
    paths: dict[int, list[str]] = field(default_factory=dict, repr=False)  # of each part, by id
    entered: Callable[[str], None] | None = (
        None  # called with the path of a part that begins to run
    )
    watcher: "Watcher | None" = None  # told of every call and of all work, as it happens

    def add(
        self,
        multiply_adds: int = 0,
        weight_bytes: int = 0,
        cache_bytes: int = 0,
        additions: int = 0,
        bits: int | None = None,
        part: Part | None = None,
    ) -> None:
        path = _path(self.paths.get(id(part), [self.path]), self.path, ())
        if self.watcher:
            self.watcher.spend(path, multiply_adds, additions)
        entry = self.entries.setdefault(path, Entry())
        entry.multiply_adds += multiply_adds
        entry.weight_bytes += weight_bytes
        entry.cache_bytes += cache_bytes
        entry.additions += additions
        if bits is not None:
            entry.integers[bits] = entry.integers.get(bits, 0) + multiply_adds

    def event(self, name: str, count: int = 1) -> None:
        self.events[name] += int(count)
        self.events_at.setdefault(self.path, Counter())[name] += int(count)

    def total(self, below: str = "") -> Entry:
        """The sum over a part and everything below it (default: over all)."""
        inside = (e for path, e in self.entries.items() if is_below(path, below))
        return sum(inside, Entry())

    def by_group(self) -> dict[str, Entry]:
        """Sums over all blocks, grouped by kind of part: ``blocks.ffn``, ``blocks.attn``,
        ``head``."""
        found: dict[str, Entry] = {}
        for path, entry in self.entries.items():
            group = group_of(path)
            found[group] = found.get(group, Entry()) + entry
        return found


class Watcher:
    """The interface of what looks on while a ledger is open (pictures/token_work.py)."""

    def enter(self, path: str, method: str, arguments: tuple) -> None:
        """A method of the part at this path begins to run."""

    def leave(self) -> None:
        """The method that began last ends."""

    def spend(self, path: str, multiply_adds: int, additions: int) -> None:
        """The part at this path works."""


def is_below(path: str, above: str) -> bool:
    return not above or path == above or path.startswith(above + ".")


def group_of(path: str) -> str:
    """``model.stack.blocks.3.ffn.down`` -> ``blocks.ffn``; ``model.head`` -> ``head``. A
    second model in the decoding loop (a draft) is separate: ``decode.blocks.ffn``."""
    if path.startswith("decode."):
        return f"decode.{group_of(path.removeprefix('decode.'))}"
    words = [word for word in path.split(".") if not word.isdigit()]
    if "blocks" in words:  # whatever a technique wraps around the block or the part
        below = [word for word in words[words.index("blocks") + 1 :] if word != "inner"]
        return ".".join(["blocks", *below[:1]])
    for name in ("head", "embed"):
        if name in words:
            return name  # and whatever a technique wraps around it
    return words[-1] if words else ""


# What algorithms call -----------------------------------------------------------------------------

active: Ledger | None = None  # the open ledger, if any


def product(x, w, bits: int | None = None) -> None:
    """Count the product x (..., in) @ w (in, out), which reads all of w. bits: as for ``count``."""
    if active:
        active.add(x.size * w.shape[-1], w.nbytes, bits=bits)


def count(
    multiply_adds=0, weight_bytes=0, cache_bytes=0, additions=0, bits=None, part=None
) -> None:
    """Count work. Each amount is a number, or a function that is called only if a ledger is open
    (for numbers that take time to compute). bits: of the integers that are multiplied, of the wider
    one if they differ; None: floats. part: whose work it is, if it is done outside that part; None:
    that of the part that is running."""
    if active:
        amounts = (multiply_adds, weight_bytes, cache_bytes, additions)
        active.add(*map(_number, amounts), bits=bits, part=part)


def event(name: str, n=1) -> None:
    """Count an event ``n`` times: a number, an array (its sum), or a function that returns either.
    Arrays are summed and functions called only if a ledger is open."""
    if active:
        active.event(name, _number(n))


def _number(n) -> int:
    n = n() if callable(n) else n
    return int(n.sum()) if hasattr(n, "sum") else int(n)


# Which part is running ----------------------------------------------------------------------------


@contextmanager
def counting(root: Part, watcher: Watcher | None = None) -> Iterator[Ledger]:
    """Count the work of the parts below ``root`` inside the ``with`` block; yields the ledger.
    watcher: told of every call of a part and of all work.

    While the ledger is open, every method of the parts' classes records which part is running; at
    other times that costs nothing. Ledgers do not nest: an inner one counts by itself.
    """
    global active
    outer, active = active, Ledger(watcher=watcher)
    ledger, paths = active, active.paths
    classes = set()
    for path, node in walk(root):
        paths.setdefault(id(node), []).append(path)
        classes.add(type(node))
    methods = list(_methods(classes))
    try:
        for cls, name, method in methods:
            setattr(cls, name, _noted(method, ledger, paths))
        yield ledger
    finally:
        for cls, name, method in methods:
            setattr(cls, name, method)
        active = outer


def _methods(classes: set[type]) -> Iterator[tuple[type, str, Callable]]:
    """(class, name, method) for every method that these part classes define or inherit."""
    bases = {base for cls in classes for base in cls.__mro__ if issubclass(base, Part)} - {Part}
    for base in bases:
        for name, value in list(vars(base).items()):
            special = name.startswith("__") and name != "__call__"
            if isinstance(value, FunctionType) and not special:
                yield base, name, value


def _noted(method, ledger: Ledger, paths: dict[int, list[str]]):
    """The method, wrapped to set the path of its part while it runs."""

    def noted(self, *args, **options):
        before = ledger.path
        ledger.path = _path(paths.get(id(self), [before]), before, args)
        if ledger.entered and ledger.path != before:
            ledger.entered(ledger.path)
        if ledger.watcher:
            ledger.watcher.enter(ledger.path, method.__name__, args)
        try:
            return method(self, *args, **options)
        finally:
            ledger.path = before
            if ledger.watcher:
                ledger.watcher.leave()

    noted.__wrapped__ = method  # for digest.py, to which it stays the same method
    return noted


def _path(places: list[str], caller: str, args: tuple) -> str:
    """The path of a part that is used in several places (the RoPE tables of all blocks): the one in
    the block of this ``Layer``, or the one below the caller."""
    if len(places) == 1:
        return places[0]
    index = next((arg.index for arg in args if isinstance(arg, Layer)), None)
    below = [path for path in places if is_below(path, caller)] or places
    here = [path for path in below if f".blocks.{index}." in f".{path}."]
    return (here or below)[0]
