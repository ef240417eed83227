"""Calibration data: the same stories every time, and statistics of what parts of a model read."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.technique import swap
from minitx.training.stories import stories
from minitx.tree import Part, part


def calibration_texts(lm, count: int) -> list[list[int]]:
    """Token ids of ``count`` stories of grade full, truncated to the model's context. Needs a
    tokenizer."""
    context = lm.model.config.context
    return [lm.tokenizer.encode(text)[:context] for text in _texts(count)]


@lru_cache
def _texts(count: int) -> tuple[str, ...]:
    return tuple(story.text for story in islice(stories("calibration", "full", 0), count))


def texts_for(name: str, lm, count: int, instead: str = "") -> list[list[int]]:
    """``calibration_texts`` for the technique ``name``; MinitxError without a tokenizer.
    ``instead`` is added to the message: what the user can do instead."""
    if lm.tokenizer is None:
        raise MinitxError(
            f"{name} learns from calibration stories and this model has no tokenizer to encode "
            f"them; load it with tokenizer=PATH{instead and f', or {instead}'}."
        )
    return calibration_texts(lm, count)


# Inputs of parts ---------------------------------------------------------------------------------


def watch_inputs(lm, kind: type, texts: list[list[int]], make: Callable) -> dict[int, object]:
    """Run the model on the texts and observe the inputs of every part of type ``kind``. Returns
    {id(part): observer}: ``make()`` creates the observer of a part, whose method ``add(rows)`` is
    called with the part's inputs (n, in) of each text."""
    observed, observers = watched(lm, kind, make)
    for ids in texts:
        observed.logits(ids)
    return observers


def matrix_inputs(name: str, lm, stories: int) -> dict[int, "Moments"]:
    """{id(part): moments of its inputs} for every ``Linear``, over calibration stories."""
    return watch_inputs(lm, Linear, texts_for(name, lm, stories), Moments)


def watched(root: Part, kind: type, make: Callable) -> tuple[Part, dict[int, object]]:
    """``root`` with an observer on every part of type ``kind``, and {id(part): observer}."""
    observers: dict[int, object] = {}

    def watch(inner: Part) -> Part:
        return Watched(inner, observers.setdefault(id(inner), make()))

    return swap(root, kind, watch), observers


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
