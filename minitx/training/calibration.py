"""What techniques learn their settings from: stories of the calibration split, always the same."""

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
    """Ids of so many stories of grade full, cut to the model's context. Needs a tokenizer."""
    context = lm.model.config.context
    return [lm.tokenizer.encode(text)[:context] for text in _texts(count)]


@lru_cache
def _texts(count: int) -> tuple[str, ...]:
    return tuple(story.text for story in islice(stories("calibration", "full", 0), count))


def texts_for(name: str, lm, count: int, instead: str = "") -> list[list[int]]:
    """``calibration_texts`` for the technique of that name, which refuses a model that cannot read
    them; ``instead`` says what else would do."""
    if lm.tokenizer is None:
        raise MinitxError(
            f"{name} learns from calibration stories and this model has no tokenizer to read them "
            f"with; load it with tokenizer=PATH{instead and f', or {instead}'}."
        )
    return calibration_texts(lm, count)


# What parts read ---------------------------------------------------------------------------------


def watch_inputs(lm, kind: type, texts: list[list[int]], make: Callable) -> dict[int, object]:
    """What every part of type ``kind`` reads in these texts: by the part's ``id``, what ``make()``
    gave for it, whose method ``add(rows)`` got the inputs (n, in) of each text."""
    witness, found = watched(lm, kind, make)
    for ids in texts:
        witness.logits(ids)
    return found


def matrix_inputs(name: str, lm, stories: int) -> dict[int, "Moments"]:
    """The moments of what every ``Linear`` reads in so many calibration stories, by its ``id``."""
    return watch_inputs(lm, Linear, texts_for(name, lm, stories), Moments)


def watched(root: Part, kind: type, make: Callable) -> tuple[Part, dict[int, object]]:
    """``root`` with its parts of type ``kind`` watched, and what they tell of their inputs to, by
    their ``id``."""
    found: dict[int, object] = {}

    def watch(inner: Part) -> Part:
        return Watched(inner, found.setdefault(id(inner), make()))

    return swap(root, kind, watch), found


@part
class Watched(Part):
    """A part that computes what it did, and tells ``into`` what it read."""

    inner: Part
    into: object

    def __call__(self, x):
        self.into.add(x.reshape(-1, x.shape[-1]))
        return self.inner(x)


@dataclass
class Moments:
    """Sums over the rows x (in,) that a matrix read, in float64."""

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
        """(in,) the length of each column of inputs."""
        return np.sqrt(np.diag(self.gram))


class Rows:
    """All rows that a matrix read."""

    def __init__(self):
        self.pieces: list[np.ndarray] = []

    def add(self, rows) -> None:
        self.pieces.append(rows.copy())

    @property
    def all(self) -> np.ndarray:
        return np.concatenate(self.pieces)  # (n, in)
