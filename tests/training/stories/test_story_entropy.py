"""The entropy of stories is exact: small worlds are listed in full, and chances sum to one."""

import itertools
import math
import random
import re
from collections import Counter

import pytest

from minitx.training.stories import GRADES, stories
from minitx.training.stories import generator as generator_module
from minitx.training.stories import world as world_module
from minitx.training.stories import writer as writer_module
from minitx.training.stories.generator import StoryGenerator
from minitx.training.stories.grades import ROOM, Grade
from minitx.training.stories.grammar import (
    COLOURS,
    COMPILED_TEMPLATES,
    FILLERS,
    NAMES,
    NUMBERS,
    PLACES,
    SLOT,
    TEMPLATES,
)

SMALL_WORDS = {
    "NAMES": ("Eva", "Tom"),
    "PLACES": ("park", "barn"),
    "THINGS": ("kite", "ball"),
    "BOXES": ("box",),
    "COLOURS": ("red", "blue"),
    "FOODS": ("apple",),
}
SMALL_GRADES = {
    "people": Grade(
        sentences={"arrive": 1, "move": 2, "mention": 1}, questions={"where1": 3},
        phrases=False, max_people=2, min_words=8, max_words=22 + ROOM, stop=0.3,
    ),
    "boxes": Grade(
        sentences={"carry": 1, "spot": 1, "fill": 1, "put": 3, "take": 3, "leave": 1, "fetch": 1},
        questions={"where2": 2, "where3": 2, "who2": 1},
        phrases=False, min_people=1, max_people=1, max_things=1, max_boxes=1, max_words=16 + ROOM,
    ),
    "things": Grade(
        sentences={"meet": 1, "find": 1, "give": 1, "mention": 2},
        questions={"colour": 1, "who": 1, "colour2": 1},
        min_people=1, max_people=2, max_things=2, max_words=30 + ROOM, stop=0.4,
    ),
    "retold": Grade(
        sentences={"arrive": 1, "meet": 1, "find": 1, "mention": 1}, questions={"where1": 2},
        phrases=False, max_people=2, max_things=1, max_words=32 + ROOM, stop=0.3, recap="mixed",
    ),
    "retold in order": Grade(
        sentences={"arrive": 1, "chat": 2}, questions={"where1": 1},
        phrases=False, max_people=2, max_words=20 + ROOM, stop=0.3, recap="same",
    ),
    "counts": Grade(
        sentences={"own": 1, "change": 2, "scene": 1, "chat": 1}, questions={"count": 3},
        min_people=1, max_people=1, max_words=14 + ROOM, stop=0.2,
    ),
}  # fmt: skip


@pytest.fixture
def small_world(monkeypatch):
    """Few words and at most two wordings a sentence, so that all stories can be listed."""
    for name, words in SMALL_WORDS.items():
        for module in (world_module, generator_module):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, words)
    for kind, wordings in list(COMPILED_TEMPLATES.items()):
        kept = [
            tuple(part._replace(free=tuple((s, w[:2]) for s, w in part.free)) for part in wording)
            for wording in wordings[:2]
        ]
        monkeypatch.setitem(
            COMPILED_TEMPLATES, kind, tuple(kept[-1:] if kind in ("open", "close") else kept)
        )


class Lister:
    """Stands in for the draws of ``Writer``: goes through all branches, depth first."""

    def __init__(self, monkeypatch):
        self.path, self.widths = [], []
        draws = writer_module.Writer
        monkeypatch.setattr(draws, "sample", lambda w, options: self.take(w, options, None))
        monkeypatch.setattr(
            draws,
            "sample_weighted",
            lambda w, options: self.take(w, options, [option[-1] for option in options]),
        )
        monkeypatch.setattr(
            draws, "bernoulli", lambda w, p: self.take(w, (True, False), (p, 1 - p))
        )

    def take(self, writer, options, weights):
        depth = len(self.widths)
        self.widths.append(len(options))
        if depth == len(self.path):
            self.path.append(0)
        taken = self.path[depth]
        share = weights[taken] / sum(weights) if weights else 1 / len(options)
        writer.nats -= math.log(share)
        return options[taken]

    def every_story(self, grade):
        self.path = []
        while True:
            self.widths = []
            yield StoryGenerator(grade, None).generate()
            while self.path and self.path[-1] == self.widths[len(self.path) - 1] - 1:
                self.path.pop()
            if not self.path:
                return
            self.path[-1] += 1


@pytest.mark.parametrize("name", SMALL_GRADES)
def test_every_story_has_one_history_and_all_chances_sum_to_one(small_world, monkeypatch, name):
    chances = {}
    for story in Lister(monkeypatch).every_story(SMALL_GRADES[name]):
        assert story.text not in chances, f"two histories give: {story.text}"
        chances[story.text] = math.exp(-story.nats)
    assert 500 < len(chances) < 100_000
    assert math.fsum(chances.values()) == pytest.approx(1, abs=1e-9)


def test_stories_come_as_often_as_their_nats_say(small_world):
    """Chi-square over the commonest stories and all the others together, with a fixed seed."""
    uniform, draws = random.Random(5).random, 40_000
    seen, chance = Counter(), {}
    for _ in range(draws):
        story = StoryGenerator(SMALL_GRADES["people"], uniform).generate()
        seen[story.text] += 1
        chance[story.text] = math.exp(-story.nats)
    common = [text for text in chance if chance[text] * draws >= 10]
    assert len(common) > 100
    rest = 1 - sum(chance[text] for text in common)
    cells = [(seen[text], chance[text] * draws) for text in common]
    cells.append((draws - sum(n for n, _ in cells), rest * draws))
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    freedom = len(cells) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("name", GRADES)
def test_answers_cost_nothing_and_the_rest_is_moderate(name):
    found = list(itertools.islice(stories("train", name, 1), 200))
    for story in found:
        assert all(nats == 0 for _, kind, nats in story.pieces if kind)
        assert all(nats >= 0 for _, _, nats in story.pieces)
    tokens = sum(len(re.findall(r"\w+|[.,?]", story.text)) for story in found)
    assert 0.55 < sum(story.nats for story in found) / tokens < 0.9


def test_wordings_show_all_their_facts_and_none_matches_another():
    patterns = []
    for kind, (facts, wordings) in TEMPLATES.items():
        for wording in wordings:
            assert set(facts.split()) <= set(SLOT.findall(wording)), wording
            pattern = re.escape(wording.replace("|", " {answer}"))
            pattern = re.sub(r"\\{(\w+)\\}", lambda m: slot_pattern(m[1]), pattern)
            patterns.append((kind, pattern))
    for kind, (_, wordings) in TEMPLATES.items():
        for wording in wordings:
            for pick in (0, -1):
                text = SLOT.sub(
                    lambda m, pick=pick: FILLERS[m[1]][pick], wording.replace("|", " park")
                )
                matches = [k for k, pattern in patterns if re.fullmatch(pattern, text)]
                assert matches == [kind], text


def slot_pattern(slot):
    words = (*PLACES, *COLOURS, *NAMES, *NUMBERS) if slot == "answer" else FILLERS[slot]
    return f"(?:{'|'.join(words)})"
