"""The entropy of stories is exact: all stories of small worlds have probabilities that sum to 1."""

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
    "recap": Grade(
        sentences={"arrive": 1, "meet": 1, "find": 1, "mention": 1}, questions={"where1": 2},
        phrases=False, max_people=2, max_things=1, max_words=32 + ROOM, stop=0.3, recap="mixed",
    ),
    "recap in order": Grade(
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
    """Few words and at most two templates per kind of sentence, so all stories can be
    enumerated."""
    for name, words in SMALL_WORDS.items():
        for module in (world_module, generator_module):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, words)
    for kind, templates in list(COMPILED_TEMPLATES.items()):
        kept = [
            tuple(part._replace(free=tuple((s, w[:2]) for s, w in part.free)) for part in template)
            for template in templates[:2]
        ]
        monkeypatch.setitem(
            COMPILED_TEMPLATES, kind, tuple(kept[-1:] if kind in ("open", "close") else kept)
        )


class Enumerator:
    """Replaces the sampling of ``Writer``: enumerates all choices, depth first."""

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
def test_story_probabilities_sum_to_one(small_world, monkeypatch, name):
    probabilities = {}
    for story in Enumerator(monkeypatch).every_story(SMALL_GRADES[name]):
        assert story.text not in probabilities, f"two sequences of choices give: {story.text}"
        probabilities[story.text] = math.exp(-story.nats)
    assert 500 < len(probabilities) < 100_000
    assert math.fsum(probabilities.values()) == pytest.approx(1, abs=1e-9)


def test_story_frequency_equals_its_probability(small_world):
    """Chi-squared test over the most frequent stories and all others together, with a fixed
    seed."""
    uniform, draws = random.Random(5).random, 40_000
    seen, probability = Counter(), {}
    for _ in range(draws):
        story = StoryGenerator(SMALL_GRADES["people"], uniform).generate()
        seen[story.text] += 1
        probability[story.text] = math.exp(-story.nats)
    common = [text for text in probability if probability[text] * draws >= 10]
    assert len(common) > 100
    rest = 1 - sum(probability[text] for text in common)
    cells = [(seen[text], probability[text] * draws) for text in common]
    cells.append((draws - sum(n for n, _ in cells), rest * draws))
    statistic = sum((n - expected) ** 2 / expected for n, expected in cells)
    freedom = len(cells) - 1
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom), (
        "frequency differs from exp(-nats)"
    )


@pytest.mark.parametrize("name", GRADES)
def test_answers_have_zero_surprisal(name):
    found = list(itertools.islice(stories("train", name, 1), 200))
    for story in found:
        assert all(nats == 0 for _, kind, nats in story.pieces if kind)
        assert all(nats >= 0 for _, _, nats in story.pieces)
    tokens = sum(len(re.findall(r"\w+|[.,?]", story.text)) for story in found)
    assert 0.55 < sum(story.nats for story in found) / tokens < 0.9


def test_templates_contain_their_facts_and_are_unambiguous():
    patterns = []
    for kind, (facts, templates) in TEMPLATES.items():
        for template in templates:
            assert set(facts.split()) <= set(SLOT.findall(template)), template
            pattern = re.escape(template.replace("|", " {answer}"))
            pattern = re.sub(r"\\{(\w+)\\}", lambda m: slot_pattern(m[1]), pattern)
            patterns.append((kind, pattern))
    for kind, (_, templates) in TEMPLATES.items():
        for template in templates:
            for pick in (0, -1):
                text = SLOT.sub(
                    lambda m, pick=pick: FILLERS[m[1]][pick], template.replace("|", " park")
                )
                matches = [k for k, pattern in patterns if re.fullmatch(pattern, text)]
                assert matches == [kind], text


def slot_pattern(slot):
    words = (*PLACES, *COLOURS, *NAMES, *NUMBERS) if slot == "answer" else FILLERS[slot]
    return f"(?:{'|'.join(words)})"
