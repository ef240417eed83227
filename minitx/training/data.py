"""Rows of token ids to train on, made from stories; any row of any step can be made by itself.

A row begins with ``<|endoftext|>`` and a story. Behind the story's own ``<|endoftext|>`` come more
stories until the row is full (chained), or padding. What is drawn depends on the seed, the step and
the number of the row alone, so it does not matter which process makes a row, or in which order.
"""

from typing import NamedTuple

import numpy as np

from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.errors import MinitxError
from minitx.training.bpe import bpe_for_words
from minitx.training.grades import KINDS, Grade, grade_from
from minitx.training.stories import Story, stories, vocabulary

END = "<|endoftext|>"
LINKS, NONE = 2, -1  # that a chain of facts leads through at most; no link
PADDING, ORDINARY = -1, 0  # kinds of a target token; an answer of KINDS[k] is k + 1
KIND_NUMBER = {None: ORDINARY} | {kind: number for number, kind in enumerate(KINDS, 1)}
CACHED_PIECES = 100_000  # texts whose ids are remembered, about 30 MB


class Batch(NamedTuple):
    """Rows side by side: token t + 1 is the target at t."""

    ids: np.ndarray  # (B, T + 1)
    weights: np.ndarray  # (B, T) float32, what a wrong guess of each target costs; padding 0
    kinds: np.ndarray  # (B, T) int8, the kind of each target
    via: np.ndarray  # (B, T, LINKS) ids that the facts behind each target lead through, or NONE

    def trimmed(self) -> "Batch":
        """Without the columns at the end that are padding in every row."""
        T = int((self.kinds != PADDING).any(0).sum())
        return Batch(self.ids[:, : T + 1], self.weights[:, :T], self.kinds[:, :T], self.via[:, :T])


def story_tokenizer() -> ByteLevelBPE:
    """The tokenizer of the shipped story models: one token for every word that a story can hold.

    It puts ``<|endoftext|>`` before every text by itself, since every story of the training follows
    one: so a prompt is read as the beginning of a story. Rows are put together without that.
    """
    return bpe_for_words(vocabulary(), [END], adds_bos=True)


def end_id(tokenizer) -> int:
    """The id of ``<|endoftext|>``; MinitxError if the tokenizer has no such token."""
    ids = tokenizer.encode(END, special=False)
    if len(ids) != 1:
        raise MinitxError(f"The tokenizer has no {END} token; training on stories needs one.")
    return ids[0]


class Encoder:
    """Stories to ids. Encoding piece by piece gives the ids of the whole text, since pieces of a
    story end where words end; most pieces come again and again, so their ids are remembered."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end = end_id(tokenizer)
        self.known: dict[str, list[int]] = {}

    def piece(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) >= CACHED_PIECES:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text, special=False)
        return self.known[text]

    def story(self, story: Story) -> tuple[list[int], list[int], list[list[int]]]:
        """Ids of the story and its closing ``<|endoftext|>``; the kind of each; and for each the
        LINKS ids (or NONE) that the chain of facts leads through before it."""
        ids: list[int] = []
        kinds: list[int] = []
        via: list[list[int]] = []
        answers = {answer.piece_index: answer for answer in story.answers}
        for number, (text, kind, _) in enumerate(story.pieces):
            new = self.piece(text)
            ids += new
            kinds += [KIND_NUMBER[kind]] * len(new)
            words = answers[number].via if number in answers else ()
            links = [self.piece(f" {word}")[0] for word in words[:LINKS]]
            via += [links + [NONE] * (LINKS - len(links))] * len(new)
        return [*ids, self.end], [*kinds, ORDINARY], [*via, [NONE] * LINKS]


class Rows:
    """The rows of one stage of training.

    grades: {name of a grade: share of the stories}, or pairs (grade, share). row_length T: targets
    in a row. seed: integer >= 0. chain: fill rows with further stories. answer_weight: weight
    of an answer token, where an ordinary token has 1.
    """

    def __init__(
        self,
        tokenizer,
        grades,
        row_length: int,
        seed: int,
        split: str = "train",
        chain: bool = True,
        answer_weight: float = 1.0,
    ):
        self.encoder = Encoder(tokenizer)
        self.grades = share_pairs(grades)
        self.row_length, self.seed, self.split, self.chain = row_length, seed, split, chain
        # The last entry stands for padding, which is numbered -1.
        self.weight_of = np.array([1.0, *[answer_weight] * len(KINDS), 0.0], np.float32)

    def batch(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of a step."""
        T = self.row_length
        ids = np.full((last - first, T + 1), self.encoder.end, np.int64)
        kinds = np.full((last - first, T), PADDING, np.int8)
        via = np.full((last - first, T, LINKS), NONE, np.int64)
        for row in range(first, last):
            row_ids, row_kinds, row_via = self.row(step, row)
            via[row - first, : len(row_via)] = row_via
            ids[row - first, : len(row_ids)] = row_ids
            kinds[row - first, : len(row_kinds)] = row_kinds
        return Batch(ids, self.weight_of[kinds], kinds, via)

    def row(self, step: int, row: int) -> tuple[list[int], list[int], list[list[int]]]:
        """At most T + 1 ids, and the kinds of all but the first of them and what they lead via."""
        ids, kinds, via = [self.encoder.end], [], []
        story = 0
        while len(kinds) < self.row_length and (self.chain or story == 0):
            new_ids, new_kinds, new_via = self.encoder.story(self.story(step, row, story))
            ids += new_ids
            kinds += new_kinds
            via += new_via
            story += 1
        T = self.row_length
        return ids[: T + 1], kinds[:T], via[:T]

    def story(self, step: int, row: int, number: int) -> Story:
        seed = mix(self.seed, step, row, number)
        return next(stories(self.split, pick(self.grades, unit(seed)), mix(seed, 1)))


def drawn_stories(grades, split: str, seed: int, numbers: range) -> list[Story]:
    """The stories so numbered of an endless list, drawn from the grades by their shares."""
    pairs = share_pairs(grades)
    seeds = [mix(seed, number) for number in numbers]
    return [next(stories(split, pick(pairs, unit(s)), mix(s, 1))) for s in seeds]


def share_pairs(grades) -> list[tuple[Grade, float]]:
    """Pairs (grade, share) from a dict {grade name: share} or from such pairs."""
    pairs = grades.items() if isinstance(grades, dict) else grades
    return [(grade_from(grade), float(share)) for grade, share in pairs]


def pick(shares: list[tuple], where: float):
    """The entry of [(entry, share), ...] in which the fraction ``where`` of all shares lies."""
    left = where * sum(share for _, share in shares)
    for entry, share in shares:
        left -= share
        if left < 0:
            return entry
    return shares[-1][0]  # rounding may leave nothing to spare


def mix(*numbers: int) -> int:
    """One 64-bit number from several, all whole and >= 0; any change of any of them changes about
    half of its bits (the mixing steps of SplitMix64; Steele, Lea and Flood, 2014)."""
    z = 0
    for n in numbers:
        z = (z ^ n) + 0x9E3779B97F4A7C15 & _BITS
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _BITS
        z ^= z >> 31
    return z


_BITS = 2**64 - 1


def unit(number: int) -> float:
    """A 64-bit number as a fraction from 0 to just below 1."""
    return (number >> 11) / 2**53
