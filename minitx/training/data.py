"""Training batches: rows of token ids made from stories, each computed independently of the others.

A row is ``<|endoftext|>``, a story and ``<|endoftext|>``, then further stories until the row is
full (chained) or padding. A row depends only on the seed, the step and its index, so any process
can make any row, in any order.
"""

from typing import NamedTuple

import numpy as np

from minitx.checkpoints.byte_level_bpe import ByteLevelBPE
from minitx.errors import MinitxError
from minitx.training.bpe import bpe_for_words
from minitx.training.stories import Story, stories, vocabulary
from minitx.training.stories.grades import KINDS, Grade, grade_from

END = "<|endoftext|>"
MAX_BRIDGES, NO_BRIDGE = 2, -1  # most bridge entities of an answer; padding of shorter lists
PADDING, ORDINARY = -1, 0  # kinds of a target token; an answer of KINDS[k] is k + 1
KIND_NUMBER = {None: ORDINARY} | {kind: number for number, kind in enumerate(KINDS, 1)}
CACHED_PIECES = 100_000  # texts whose ids are cached, about 30 MB


class Batch(NamedTuple):
    """B rows: token t + 1 is the target at position t."""

    ids: np.ndarray  # (B, T + 1)
    weights: np.ndarray  # (B, T) float32, loss weights of the targets; 0 for padding
    kinds: np.ndarray  # (B, T) int8, the kind of each target
    bridges: np.ndarray  # (B, T, MAX_BRIDGES) ids of the bridge entities, or NO_BRIDGE

    def trimmed(self) -> "Batch":
        """Without the last columns if these are padding in every row."""
        T = int((self.kinds != PADDING).any(0).sum())
        per_target = (self.weights, self.kinds, self.bridges)
        return Batch(self.ids[:, : T + 1], *(array[:, :T] for array in per_target))


def story_tokenizer() -> ByteLevelBPE:
    """The tokenizer of the shipped story models: one token for each word of the stories.

    It prepends ``<|endoftext|>`` to every text, since in training every story follows one: a prompt
    is read as the beginning of a story. Rows are encoded without it.
    """
    return bpe_for_words(vocabulary(), [END], adds_bos=True)


def end_id(tokenizer) -> int:
    """The id of ``<|endoftext|>``; MinitxError if the tokenizer has no such token."""
    ids = tokenizer.encode(END, special=False)
    if len(ids) != 1:
        raise MinitxError(
            f"Training on stories needs a tokenizer with the token {END}; this one has none."
        )
    return ids[0]


class StoryEncoder:
    """Encodes stories piece by piece. That gives the ids of the whole text, since pieces end at
    word boundaries. Most pieces occur many times, so their ids are cached."""

    def __init__(self, tokenizer, end: int | None = None):
        """end: the token before and after each story; default: ``<|endoftext|>``, which the
        tokenizer must then have."""
        self.tokenizer = tokenizer
        self.end = end_id(tokenizer) if end is None else end
        self.known: dict[str, list[int]] = {}

    def piece(self, text: str) -> list[int]:
        if text not in self.known:
            if len(self.known) >= CACHED_PIECES:
                self.known.clear()
            self.known[text] = self.tokenizer.encode(text, special=False)
        return self.known[text]

    def splits_at_pieces(self, story: Story, ids: list[int]) -> bool:
        """Are these ids, made piece by piece, those of the whole text? Not if a tokenizer puts a
        space before every text, or if its tokens reach across words."""
        return [*self.tokenizer.encode(story.text, special=False), self.end] == ids

    def story(self, story: Story) -> tuple[list[int], list[int], list[list[int]]]:
        """Ids of the story and its final ``<|endoftext|>``; the kind of each; and for each the
        MAX_BRIDGES ids (or NO_BRIDGE) of the bridge entities that lead to it."""
        ids: list[int] = []
        kinds: list[int] = []
        bridges: list[list[int]] = []
        answers = {answer.piece_index: answer for answer in story.answers}
        for number, (text, kind, _) in enumerate(story.pieces):
            new = self.piece(text)
            ids += new
            kinds += [KIND_NUMBER[kind]] * len(new)
            words = answers[number].bridges if number in answers else ()
            found = [self.piece(f" {word}")[0] for word in words[:MAX_BRIDGES]]
            bridges += [found + [NO_BRIDGE] * (MAX_BRIDGES - len(found))] * len(new)
        return [*ids, self.end], [*kinds, ORDINARY], [*bridges, [NO_BRIDGE] * MAX_BRIDGES]


class StoryDataset:
    """The data of one training stage: any row of any step, computed on demand.

    grades: {name of a grade: share of the stories}, or pairs (grade, share). row_length T: targets
    per row. seed: integer >= 0. chain: fill rows with further stories. answer_weight: loss weight
    of an answer token; an ordinary token has 1.
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
        self.encoder = StoryEncoder(tokenizer)
        self.grades = share_pairs(grades)
        self.row_length, self.seed, self.split, self.chain = row_length, seed, split, chain
        # The last entry is for padding, whose kind is -1.
        self.weight_of = np.array([1.0, *[answer_weight] * len(KINDS), 0.0], np.float32)

    def batch(self, step: int, first: int, last: int) -> Batch:
        """Rows first .. last - 1 of a step."""
        T = self.row_length
        ids = np.full((last - first, T + 1), self.encoder.end, np.int64)
        kinds = np.full((last - first, T), PADDING, np.int8)
        bridges = np.full((last - first, T, MAX_BRIDGES), NO_BRIDGE, np.int64)
        for row in range(first, last):
            row_ids, row_kinds, row_bridges = self.row(step, row)
            bridges[row - first, : len(row_bridges)] = row_bridges
            ids[row - first, : len(row_ids)] = row_ids
            kinds[row - first, : len(row_kinds)] = row_kinds
        return Batch(ids, self.weight_of[kinds], kinds, bridges)

    def row(self, step: int, row: int) -> tuple[list[int], list[int], list[list[int]]]:
        """At most T + 1 ids, and for all but the first their kinds and bridge entities."""
        ids, kinds, bridges = [self.encoder.end], [], []
        story = 0
        while len(kinds) < self.row_length and (self.chain or story == 0):
            new_ids, new_kinds, new_bridges = self.encoder.story(self.story(step, row, story))
            ids += new_ids
            kinds += new_kinds
            bridges += new_bridges
            story += 1
        T = self.row_length
        return ids[: T + 1], kinds[:T], bridges[:T]

    def story(self, step: int, row: int, number: int) -> Story:
        return story_from_seed(self.grades, self.split, hash_integers(self.seed, step, row, number))


def sample_stories(grades, split: str, seed: int, numbers: range) -> list[Story]:
    """The stories with these indices of an endless sequence, sampled from the grades by share."""
    pairs = share_pairs(grades)
    return [story_from_seed(pairs, split, hash_integers(seed, number)) for number in numbers]


def story_from_seed(pairs: list[tuple[Grade, float]], split: str, seed: int) -> Story:
    """The story of this seed, which also selects its grade by share."""
    grade = pick_by_share(pairs, as_uniform(seed))
    return next(stories(split, grade, hash_integers(seed, 1)))


def share_pairs(grades) -> list[tuple[Grade, float]]:
    """Pairs (grade, share), from a dict {grade name: share} or such pairs."""
    pairs = grades.items() if isinstance(grades, dict) else grades
    return [(grade_from(grade), float(share)) for grade, share in pairs]


def pick_by_share(shares: list[tuple], u: float):
    """Inverse transform sampling: the entry of [(entry, share), ...] at u (0 <= u < 1) of the
    cumulative shares."""
    left = u * sum(share for _, share in shares)
    for entry, share in shares:
        left -= share
        if left < 0:
            return entry
    return shares[-1][0]  # rounding can leave left = 0 after the last


def hash_integers(*numbers: int) -> int:
    """A 64-bit hash of integers >= 0, to derive independent seeds: changing any bit of the input
    changes about half of the output bits (the finalizer of SplitMix64; Steele et al., 2014)."""
    z = 0
    for n in numbers:
        z = (z ^ n) + 0x9E3779B97F4A7C15 & _BITS
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _BITS
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _BITS
        z ^= z >> 31
    return z


_BITS = 2**64 - 1


def as_uniform(number: int) -> float:
    """A 64-bit hash as a uniform number in [0, 1)."""
    return (number >> 11) / 2**53
