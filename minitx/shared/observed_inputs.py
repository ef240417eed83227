"""Statistics of what the matrices of a model read while it runs calibration texts."""

from collections.abc import Callable, Container
from dataclasses import dataclass

import numpy as np

from minitx.progress import bar
from minitx.technique import swap
from minitx.tree import Part, part


def watch_inputs(
    lm, kind: type, texts: list[list[int]], make: Callable, label: str = "calibrate"
) -> dict[int, object]:
    """Run the model on the texts and observe the inputs of every part of type ``kind``. Returns
    {id(part): observer}: ``make()`` creates the observer of a part, whose method ``add(rows)`` is
    called with the part's inputs (n, in) of each text."""
    observed, observers = watched(lm.model, kind, make)
    for ids in bar(texts, label, unit="text", delay=1.0):
        x = observed.norm(observed.hidden(ids))
        if observed.head is not lm.model.head:  # what it reads, without computing V logits a token
            observe_head(observed.head, x)
    return observers


def observe_head(head: Part, x) -> None:
    if type(head) is Watched:
        head.observer.add(x)
    else:  # a watched part is inside it
        head(x)


def watched(
    root: Part, kind: type, make: Callable, wanted: Container[int] | None = None
) -> tuple[Part, dict[int, object]]:
    """``root`` with an observer on every part of type ``kind`` (only those whose ``id`` is wanted,
    if given), and {id(part): observer}."""
    observers: dict[int, object] = {}

    def watch(inner: Part) -> Part:
        if wanted is not None and id(inner) not in wanted:
            return inner
        return Watched(inner, observers.setdefault(id(inner), make()))

    return swap(root, kind, watch, optional=True), observers


@part
class Watched(Part):
    """Passes the inputs of a part to an observer, and runs the part."""

    inner: Part
    observer: object

    def __call__(self, x):
        self.observer.add(x.reshape(-1, x.shape[-1]))
        return self.inner(x)


@dataclass
class Moments:
    """Observer: sums over all input rows x (in,), in float64."""

    count: int = 0
    absolute: np.ndarray | float = 0.0  # (in,) sum of |x|
    gram: np.ndarray | float = 0.0  # (in, in) sum of x^T x

    def add(self, rows) -> None:
        rows = rows.astype(np.float64)
        self.count += len(rows)
        self.absolute = self.absolute + abs(rows).sum(0)
        self.gram = self.gram + rows.T @ rows

    @property
    def norms(self) -> np.ndarray:
        """(in,) the L2 norm of each input feature over all rows."""
        return np.sqrt(np.diag(self.gram))


class Rows:
    """Observer: stores all input rows."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []

    def add(self, rows) -> None:
        self.pieces.append(rows.copy())

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.pieces)  # (n, in)
