"""What techniques calibrate on: stories, or any text or token ids that the user gives.

    minitx.load("model/", prune=True)                               # 16 stories
    minitx.load("model/", prune=True, calibrate=read_text("a.txt")) # 16 passages of this text
    minitx.load("model/", prune=True, calibrate=[ids, ids])         # these ids

A technique asks for ids by ``calibration_ids`` and does not know where they come from: the language
model carries its source (``LM.calibration``). While ``apply`` runs, what each technique asked for
is noted, and the model remembers it (``LM.calibrated``).
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from minitx.digest import digest
from minitx.errors import MinitxError, MinitxWarning
from minitx.text import Text, as_text, first_ids, passages, prefix_of

PASSAGE = 256  # tokens of a passage: about as many as a story of ours has
STORIES = "stories"
FAR = 2.0  # a model that needs this many times the entropy of a story has not learned stories


# Sources -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stories:
    """Stories of the grammar, grade full, of the calibration split: always the same ones."""

    name = STORIES

    def ids(self, lm, count: int) -> list[list[int]]:
        """Ids of ``count`` stories, each truncated to the model's context."""
        context = lm.model.config.context
        return [ids[:context] for ids in _story_ids(lm.tokenizer, count)]

    def amount(self, found: list[list[int]]) -> str:
        return f"{len(found)} stories (grade full, calibration split)"


@dataclass(frozen=True)
class Passages:
    """Passages from the beginning of a text."""

    text: Text

    @property
    def name(self) -> str:
        return self.text.name

    def ids(self, lm, count: int) -> list[list[int]]:
        """At most ``count`` passages, each beginning like a prompt."""
        length = min(PASSAGE, lm.model.config.context)
        found = first_ids(lm, self.text, count * length)
        return passages(found, length, prefix_of(lm))[:count]

    def amount(self, found: list[list[int]]) -> str:
        return f"{self.name}, {_size(found)}"


@dataclass(frozen=True)
class Rows:
    """Token ids as they are given, in rows no longer than the model's context."""

    rows: tuple[tuple[int, ...], ...]
    name: str = "the given ids"

    def ids(self, lm, count: int) -> list[list[int]]:
        length, found = lm.model.config.context, []
        for row in self.rows:
            for ids in passages(lm.check_ids(row, any_length=True).tolist(), length, []):
                found.append(ids)
        return found[:count]

    def amount(self, found: list[list[int]]) -> str:
        return f"{self.name}, {_size(found)}"


def source_of(lm, given) -> Any:
    """The source for what the user gives as ``calibrate``: a text, or ids in one list or several.
    MinitxError if it is none of these, or if this model cannot read it."""
    if isinstance(given, str | Text):
        source = Passages(as_text(given))
    else:
        source = Rows(_rows(lm, given))
    source.ids(lm, 1)  # now, not after minutes of work
    return source


def _rows(lm, given) -> tuple[tuple[int, ...], ...]:
    if not isinstance(given, Sequence | np.ndarray) or isinstance(given, bytes):
        raise MinitxError(
            "calibrate must be a text or token ids (one list or several), got a "
            f"{type(given).__name__}."
        )
    several = len(given) > 0 and isinstance(given[0], Sequence | np.ndarray)
    rows = [lm.check_ids(row, any_length=True) for row in (given if several else [given])]
    for row in rows:
        if row.ndim != 1 or len(row) < 2:
            raise MinitxError(
                "calibrate: expected lists of at least 2 token ids, got an array of shape "
                f"{row.shape}."
            )
    return tuple(tuple(row.tolist()) for row in rows)


def _size(rows: list[list[int]]) -> str:
    many = f"{len(rows)} passages, " if len(rows) > 1 else ""
    return f"{many}{sum(map(len, rows)):,} tokens"


def _stories(count: int) -> list:
    """The first ``count`` stories."""
    from minitx.training.stories import first_stories  # only where the default source is used

    return first_stories("calibration", "full", 0, count)


@lru_cache(maxsize=4)
def _story_ids(tokenizer, count: int) -> list[list[int]]:
    """Ids of the first ``count`` stories: several techniques ask for the same."""
    return [tokenizer.encode(story.text) for story in _stories(count)]


# What techniques ask for -------------------------------------------------------------------------


def calibration_ids(name: str, lm, count: int, instead: str = "") -> list[list[int]]:
    """At most ``count`` lists of token ids for the technique ``name`` to calibrate on, each no
    longer than the context. MinitxError without a tokenizer, unless the user gave ids.
    ``instead`` is added to the message: what else the user can do."""
    source = Stories() if lm.calibration is None else lm.calibration
    if lm.tokenizer is None and not isinstance(source, Rows):
        raise MinitxError(
            f"{name} learns from calibration text and this model has no tokenizer to encode "
            f"it; load it with tokenizer=PATH, {'' if instead else 'or '}give calibrate= token ids"
            f"{instead and f', or {instead}'}."
        )
    found = source.ids(lm, count)
    if len(found) < count and isinstance(source, Passages):
        warnings.warn(
            f"{name} would calibrate on {count} passages of up to "
            f"{max(map(len, found))} tokens, but {source.name} has only {len(found)}; give more "
            "text.",
            MinitxWarning,
            stacklevel=2,
        )
    if active is not None:
        active.note(Calibrated(name, source.name, source.amount(found)), found[0])
    return found


@dataclass(frozen=True)
class Calibrated:
    """What a technique was calibrated on: the name of the source ("stories", or a file), and how
    much of it."""

    technique: str
    source: str
    amount: str

    def __str__(self) -> str:
        return f"{self.technique} calibrated on {self.amount}"


@dataclass
class Record:
    """What was asked for while techniques are applied to the language model ``lm``."""

    lm: Any
    found: list[Calibrated] = field(default_factory=list)

    def note(self, new: Calibrated, first: list[int]) -> None:
        """first: the ids of the first calibration text."""
        if new.source == STORIES and all(old.source != STORIES for old in self.found):
            self._warn_general(new.technique, first)
        if new not in self.found:
            self.found.append(new)

    def _warn_general(self, name: str, story: list[int]) -> None:
        if not knows_stories(self.lm, story):
            warnings.warn(
                f"{name} is calibrated on stories, which this model does not know; calibrate it "
                "on text of the kind that it is used on: --calibrate FILE (in Python: calibrate=).",
                MinitxWarning,
                stacklevel=2,
            )


active: Record | None = None  # the open record, if any (as in ledger.py)


@contextmanager
def recording(lm) -> Iterator[list[Calibrated]]:
    """Note what techniques calibrate on inside the ``with`` block; yields the list of notes."""
    global active
    outer, active = active, Record(lm)
    try:
        yield active.found
    finally:
        active = outer


def knows_stories(lm, ids: list[int]) -> bool:
    """Has the model learned stories? Measured on the first calibration story: its loss over the
    whole story, against the entropy of that story, the least that any model reaches on average."""
    if len(ids) < 2:
        return True  # nothing to measure
    (story,) = _stories(1)
    logits = lm.logits(ids[:-1]).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    of_target = np.take_along_axis(logits, np.array(ids[1:])[:, None], -1)[:, 0]
    nats = (np.log(np.exp(logits).sum(-1)) - of_target).sum()
    return nats < FAR * story.nats  # a truncated story: the model is then tiny, and random


# Work that depends on the model and the calibration ids only -------------------------------------

KEPT: dict[str, tuple] = {}  # the last result of each name


def remembered(name: str, lm, texts: list[list[int]], settings: tuple, make):
    """``make()``, or its last result for the same model, ids and settings: a sweep over another
    option needs it once."""
    key = digest(lm.model), texts, settings
    if name not in KEPT or KEPT[name][0] != key:
        KEPT[name] = key, make()
    return KEPT[name][1]
