"""Writes a story down: draws among options, fills wordings, and counts the surprisal.

It knows nothing about what the sentences mean; that is ``teller.py``.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from minitx.training.words import BOXES, GRAMMAR, TYPES, WORDINGS, Fragment

LOG = [0.0] + [math.log(n) for n in range(1, 1000)]  # -ln p of one among n that are all alike


class Answer(NamedTuple):
    """One word that the facts force, and what a reader that binds nothing could go by."""

    kind: str  # one of grades.KINDS
    value: str  # the word, without its space
    piece_index: int  # its index in the story's pieces
    mentioned: tuple[tuple[str, int], ...]  # each value of its type named so far, and how often
    latest: str  # the one of them named last
    via: tuple[str, ...] = ()  # what the chain of facts leads through before it, first things first


class Story(NamedTuple):
    """``pieces`` are ``(text, kind, nats)``: the story, cut into sentences and around answer words.

    ``kind`` is None for ordinary text. ``nats`` is the surprisal of the choices that the piece
    shows; it is exact for the whole story (a sentence's kind shows only bit by bit), and 0 for
    answers, which the facts force. Pieces are cut where the GPT-2 pre-tokenizer cuts.
    """

    pieces: tuple[tuple[str, str | None, float], ...]
    answers: tuple[Answer, ...]

    @property
    def text(self) -> str:
        return "".join(piece[0] for piece in self.pieces)

    @property
    def nats(self) -> float:
        return math.fsum(piece[2] for piece in self.pieces)


class Writer:
    """A story being written. ``uniform()`` gives the next random number in [0, 1). Of the wordings
    of a sentence, the first ``wordings`` are used."""

    def __init__(self, uniform: Callable[[], float], wordings: int):
        self.uniform, self.wordings = uniform, wordings
        self.named = {kind: {} for kind in TYPES.values()}  # type -> value -> how often so far
        self.latest = dict.fromkeys(self.named)  # type -> value named last
        self.pieces, self.answers = [], []
        self.nats = 0.0  # surprisal of the choices that no piece shows yet
        self.words = 1  # the first has no space before it; all others have

    def story(self) -> Story:
        return Story(tuple(self.pieces), tuple(self.answers))

    # Choices.

    def pick(self, options):
        """One of the options, all alike likely."""
        self.nats += LOG[len(options)]
        return options[int(self.uniform() * len(options))]

    def pick_weighted(self, options):
        """One of the options ``(..., weight)``, by its weight."""
        total = 0.0
        for option in options:  # not sum(): its rounding changed in Python 3.12
            total += option[-1]
        left = self.uniform() * total
        for option in options:
            left -= option[-1]
            if left < 0:
                break
        self.nats += math.log(total / option[-1])
        return option

    def chance(self, p: float) -> bool:
        """True with probability p."""
        happens = self.uniform() < p
        self.nats -= math.log(p if happens else 1 - p)
        return happens

    # Sentences.

    def say(self, wording: str, **slots: str) -> None:
        """A sentence without an answer word, in one of its wordings."""
        (fragment,) = self.pick(WORDINGS[wording][: self.wordings])
        self.write(fragment, slots)

    def say_answer(
        self, kind: str, wording: str, value_type: str, value: str, via: tuple = (), **slots: str
    ) -> None:
        """A sentence with an answer word, which the facts force to be ``value``."""
        before, after = self.pick(WORDINGS[wording][: self.wordings])
        self.write(before, slots)
        self.answer(kind, value_type, value, via)
        self.write(after, slots)

    def answer(self, kind: str, value_type: str, value: str, via: tuple = ()) -> None:
        """The answer word alone."""
        named, latest = tuple(self.named[value_type].items()), self.latest[value_type]
        self.answers.append(Answer(kind, value, len(self.pieces), named, latest, via))
        self.pieces.append((" " + value, kind, 0.0))
        self.words += 1
        self.note(value_type, value)

    def write(self, fragment: Fragment, slots: dict[str, str]) -> None:
        """Fill the slots of the fragment and add its text."""
        for slot, options in fragment.free:
            slots[slot] = self.pick(options)
        if "who" in slots:
            slots.update(GRAMMAR[slots["who"]])
        for slot, value_type in fragment.typed:
            if slot != "object" or slots[slot] in BOXES:  # else a thing, which answers nothing
                self.note(value_type, slots[slot])
        self.add(fragment.template.format_map(slots))

    def add(self, text: str) -> None:
        """Ordinary text, with the surprisal of all choices since the last."""
        self.words += text.count(" ")
        self.pieces.append((text, None, self.nats))
        self.nats = 0.0

    def note(self, value_type: str, value: str) -> None:
        """Remember that the text has named the value."""
        named = self.named[value_type]
        named[value] = named.get(value, 0) + 1
        self.latest[value_type] = value
