"""The story writer: samples among options, fills templates, and adds up the surprisal.

It knows nothing about the meaning of the sentences; see ``generator.py`` for that.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from minitx.training.stories.grammar import BOXES, COMPILED_TEMPLATES, GRAMMAR, TYPES, Fragment

LOG_N = [0.0] + [math.log(n) for n in range(1, 1000)]  # -ln p of one of n equally likely options


class Answer(NamedTuple):
    """A word that is determined by facts in the text, and what a guess could be based on."""

    kind: str  # one of grades.KINDS
    value: str  # the word, without the leading space
    piece_index: int  # its index in the story's pieces
    mentioned: tuple[tuple[str, int], ...]  # values of its type so far, with their counts
    latest: str  # the last of these values
    bridges: tuple[str, ...] = ()  # bridge entities of a multi-hop answer, in order


class Story(NamedTuple):
    """``pieces`` are ``(text, kind, nats)``: the story, split at sentences and around answer words.

    ``kind`` is None for ordinary text. ``nats`` is the surprisal of the choices behind the piece.
    It is exact for the whole story, not for each token, and 0 for answers, which the facts
    determine. Pieces are split where GPT-2's pre-tokenizer splits.
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
    """Writes one story. ``uniform()`` returns the next random number in [0, 1). Of each kind of
    sentence, the first ``wordings`` templates are used."""

    def __init__(self, uniform: Callable[[], float], wordings: int):
        self.uniform, self.wordings = uniform, wordings
        self.named = {kind: {} for kind in TYPES.values()}  # type -> value -> its count so far
        self.latest = dict.fromkeys(self.named)  # type -> last value
        self.pieces, self.answers = [], []
        self.nats = 0.0  # surprisal of the choices since the last piece
        self.words = 1  # counted by their leading space, which the first lacks

    def story(self) -> Story:
        return Story(tuple(self.pieces), tuple(self.answers))

    # Random choices

    def sample(self, options):
        """One of the options, uniformly."""
        self.nats += LOG_N[len(options)]
        return options[int(self.uniform() * len(options))]

    def sample_weighted(self, options):
        """One of the options ``(..., weight)``, with probability proportional to its weight."""
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

    def bernoulli(self, p: float) -> bool:
        """True with probability p."""
        happens = self.uniform() < p
        self.nats -= math.log(p if happens else 1 - p)
        return happens

    # Text

    def add_sentence(self, template: str, **slots: str) -> None:
        """A sentence without an answer word, from a random template of its kind."""
        (fragment,) = self.sample(COMPILED_TEMPLATES[template][: self.wordings])
        self.fill(fragment, slots)

    def add_answer_sentence(
        self,
        kind: str,
        template: str,
        value_type: str,
        value: str,
        bridges: tuple = (),
        **slots: str,
    ) -> None:
        """A sentence with an answer word, which the facts determine to be ``value``."""
        before, after = self.sample(COMPILED_TEMPLATES[template][: self.wordings])
        self.fill(before, slots)
        self.add_answer(kind, value_type, value, bridges)
        self.fill(after, slots)

    def add_answer(self, kind: str, value_type: str, value: str, bridges: tuple = ()) -> None:
        """The answer word."""
        named, latest = tuple(self.named[value_type].items()), self.latest[value_type]
        self.answers.append(Answer(kind, value, len(self.pieces), named, latest, bridges))
        self.pieces.append((" " + value, kind, 0.0))
        self.words += 1
        self.record(value_type, value)

    def fill(self, fragment: Fragment, slots: dict[str, str]) -> None:
        """Fill the slots of a fragment and add its text."""
        for slot, options in fragment.free:
            slots[slot] = self.sample(options)
        if "who" in slots:
            slots.update(GRAMMAR[slots["who"]])
        for slot, value_type in fragment.typed:
            if slot != "object" or slots[slot] in BOXES:  # not a thing: these are no answers
                self.record(value_type, slots[slot])
        self.add_text(fragment.template.format_map(slots))

    def add_text(self, text: str) -> None:
        """Ordinary text, with the surprisal of all choices since the last piece."""
        self.words += text.count(" ")
        self.pieces.append((text, None, self.nats))
        self.nats = 0.0

    def record(self, value_type: str, value: str) -> None:
        """Count a value that the text has named."""
        named = self.named[value_type]
        named[value] = named.get(value, 0) + 1
        self.latest[value_type] = value
