"""Short stories to learn recall from: our own grammar, graded, with the entropy of every choice.

A story is a sequence of choices. The chance of each is a function of the text so far alone (there
is no hidden plan), and the text tells which choices were made, so the sum of their ``-ln p`` is
what the best possible reader pays for the story: the floor of any model's loss. Words that the
facts force (answers and mentions) cost that reader nothing.

People and things take their places, colours and owners independently and with replacement, and
nothing is asked twice while its answer is unchanged: nothing to eliminate, nothing to copy. People
may hand things over from afar ("sent"); everything else happens where the things are.

The same seed gives the same stories everywhere: only ``random.Random(seed).random()`` is used,
whose stream Python guarantees (those of ``choice`` and ``shuffle`` it does not).

Reading order: ``words`` (vocabulary, wordings), ``grades`` (how hard), ``world`` (the facts),
``writer`` (choices into text), ``teller`` (what happens next), and here: streams of stories, their
splits, and what guessing would score.
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from minitx.errors import MinitxError
from minitx.training.grades import GRADES, HOPS, KINDS, Grade, grade_from
from minitx.training.teller import Teller
from minitx.training.words import vocabulary
from minitx.training.writer import Answer, Story

__all__ = [
    "GRADES",
    "HOPS",
    "KINDS",
    "SPLITS",
    "Answer",
    "Grade",
    "Story",
    "grade_from",
    "guess_baselines",
    "split_of",
    "stories",
    "vocabulary",
]

SPLITS = ("train", "calibration", "evaluation")


def split_of(text: str) -> str:
    """The split of a story, by a hash of its text: 90 % train, 5 % calibration, 5 % evaluation."""
    twentieth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20
    return {18: "calibration", 19: "evaluation"}.get(twentieth, "train")


def stories(split: str, grade: Grade | str | dict, seed: int) -> Iterator[Story]:
    """Endless stories of a grade (a ``Grade``, its name, or a dict of its fields) from one split.

    Stories of other splits are drawn and thrown away: the two small splits take 20 times as long.
    Raises ``MinitxError`` for an unknown split or grade, or a seed that is no integer >= 0.
    """
    if split not in SPLITS:
        raise MinitxError(f"Unknown split {split!r}; known: {', '.join(SPLITS)}.")
    if type(seed) is not int or seed < 0:
        raise MinitxError(f"The seed of stories is {seed!r}; it must be an integer >= 0.")
    return _draw(split, grade_from(grade), random.Random(seed).random)


def _draw(split: str, grade: Grade, uniform) -> Iterator[Story]:
    while True:
        story = Teller(grade, uniform).tell()
        if split_of(story.text) == split:
            yield story


def guess_baselines(stories: Iterable[Story]) -> dict[str, dict[str, float]]:
    """How often readers that bind nothing would be right: ``{kind of answer: {reader: share}}``.

    ``mentioned`` picks any value of the right type that the story has named, ``latest`` the one
    named last, ``most_mentioned`` the one named most often (ties are shared), and ``most_frequent``
    the commonest answer to that kind of question in all these stories.
    """
    shares = defaultdict(Counter)
    values = defaultdict(Counter)
    for story in stories:
        for kind, value, _, mentioned, latest, *_ in story.answers:
            top = max(count for _, count in mentioned)
            most = [name for name, count in mentioned if count == top]
            share = shares[kind]
            share["mentioned"] += any(name == value for name, _ in mentioned) / len(mentioned)
            share["latest"] += latest == value
            share["most_mentioned"] += (value in most) / len(most)
            values[kind][value] += 1
    for kind, counts in values.items():
        shares[kind]["most_frequent"] = max(counts.values())
    return {
        kind: {reader: hits / values[kind].total() for reader, hits in shares[kind].items()}
        for kind in KINDS
        if kind in shares
    }
