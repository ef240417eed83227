"""Synthetic stories for training recall, in grades of difficulty and with known entropy.

A story is a sequence of random choices. The distribution of each depends only on the text so far,
and the text determines every choice. So the sum of ``-ln p`` over the choices is the negative
log-likelihood of the story under its true distribution. Its mean, called the floor, is the lowest
loss that any model can reach. Answers follow from the facts in the text, so they contribute 0.

Places, colours and owners are sampled independently and with replacement, and no question is asked
again while its answer is unchanged: a model can neither eliminate values nor copy an answer. People
can give things to people in other places ("sent"); everything else happens where the things are.

The same seed gives the same stories on every platform: only ``random.Random(seed).random()`` is
used, whose sequence Python guarantees (those of ``choice`` and ``shuffle`` it does not).

Reading order: ``grammar`` (vocabulary and sentence templates), ``grades`` (difficulty), ``world``
(the facts so far), ``writer`` (sampling and text), ``generator`` (what happens next), and here: the
stream of stories, its splits, and the accuracy of guessing. (``gaps`` is a table that saves time.)
"""

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice

from minitx.errors import MinitxError, abbreviate, one_of
from minitx.training.stories.gaps import GAPS
from minitx.training.stories.generator import StoryGenerator
from minitx.training.stories.grades import GRADES, HOPS, KINDS, Grade, grade_from
from minitx.training.stories.grammar import vocabulary
from minitx.training.stories.writer import Answer, Story
from minitx.values import need_seed

__all__ = [
    "GRADES",
    "HOPS",
    "KINDS",
    "SPLITS",
    "Answer",
    "Grade",
    "Story",
    "first_stories",
    "grade_from",
    "guess_baselines",
    "split_of",
    "stories",
    "vocabulary",
]

MAX_TRIES = 2000  # a split with a twentieth of the stories is missed by chance with 1e-45
SPLITS = ("train", "calibration", "evaluation")


def split_of(text: str) -> str:
    """The split of a story, by a hash of its text: 90 % train, 5 % calibration, 5 % evaluation."""
    twentieth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 20
    return {18: "calibration", 19: "evaluation"}.get(twentieth, "train")


def stories(split: str, grade: Grade | str | dict, seed: int) -> Iterator[Story]:
    """Endless stories of a grade (a ``Grade``, its name, or a dict of its fields) from one split.

    Stories are sampled until one is in the split, so the two small splits take 20 times as long.
    Raises ``MinitxError`` for an unknown split or grade, or a seed that is not an integer >= 0.
    """
    if not isinstance(split, str) or split not in SPLITS:
        raise MinitxError(f"Unknown split {abbreviate(split)}; {one_of(str(split), SPLITS)}")
    seed = need_seed(seed, "The seed of stories")
    gaps = GAPS.get((split, grade, seed), ()) if isinstance(grade, str) else ()
    return _sample(split, grade_from(grade), random.Random(seed).random, gaps)


def first_stories(split: str, grade: Grade | str | dict, seed: int, count: int) -> list[Story]:
    """The first ``count`` of ``stories``. One of a small split takes 10 ms, so those of a grade
    with a name are written once."""
    if not isinstance(grade, str) or type(seed) is not int:
        return list(islice(stories(split, grade, seed), count))
    endless, written = _written(split, grade, seed)
    try:
        written += islice(endless, max(0, count - len(written)))
    except BaseException:  # Ctrl-C, say, which ends the stream: begin a new one next time
        _written.cache_clear()
        raise
    return written[:count]


@cache
def _written(split: str, grade: str, seed: int) -> tuple[Iterator[Story], list[Story]]:
    """The endless stream of stories, and those that were taken from it."""
    return stories(split, grade, seed), []


def _sample(split: str, grade: Grade, uniform, gaps: tuple[int, ...] = ()) -> Iterator[Story]:
    for gap in gaps:  # of the first stories it is known how far apart they are
        for _ in range(gap):
            uniform()
        yield StoryGenerator(grade, uniform).generate()
    tries = 0  # since the last story of the split
    while True:
        story = StoryGenerator(grade, uniform).generate()
        tries += 1
        if split_of(story.text) == split:
            tries = 0
            yield story
        if tries == MAX_TRIES:
            raise MinitxError(
                f"None of {MAX_TRIES} stories of this grade is in the split {split!r}; a grade "
                "needs more variety, such as further kinds of sentences."
            )


def guess_baselines(stories: Iterable[Story]) -> dict[str, dict[str, float]]:
    """Accuracy of guessing without looking up facts: ``{kind of answer: {strategy: accuracy}}``.

    ``mentioned`` guesses a random value of the right type that the story has named, ``latest`` the
    last one, ``most_mentioned`` the most frequent one in the story (a random one of ties), and
    ``most_frequent`` the most frequent answer of that kind in all these stories.
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
        kind: {name: hits / values[kind].total() for name, hits in shares[kind].items()}
        for kind in KINDS
        if kind in shares
    }
