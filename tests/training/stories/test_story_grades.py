"""Grades: lengths, shares of hops, the accuracy of guessing, recaps, and invalid grades."""

import itertools
import json
import re
from collections import Counter
from dataclasses import asdict

import pytest

from minitx.errors import MinitxError
from minitx.training.stories import GRADES, HOPS, KINDS, grade_from, guess_baselines, stories
from minitx.training.stories.grades import ROOM
from minitx.training.stories.grammar import BOXES, COLOURS, NAMES, PLACES, TEMPLATES, THINGS

PRE_TOKEN = re.compile(r" ?[A-Za-z]+| ?[^\sA-Za-z]+|\s+")  # GPT-2's pattern on such plain text


def take(n, grade, seed=1):
    return list(itertools.islice(stories("train", grade, seed), n))


@pytest.fixture(scope="module")
def drawn():
    """600 stories of every grade."""
    return {name: take(600, name) for name in GRADES}


def test_story_length_is_within_the_grade(drawn):
    for name, found in drawn.items():
        grade = GRADES[name]
        lengths = [len(re.findall(r"\w+", story.text)) for story in found]
        assert grade.min_words <= min(lengths) and max(lengths) <= grade.max_words, name
    tokens = [len(PRE_TOKEN.findall(story.text)) for story in drawn["full"]]
    assert 60 <= min(tokens) and max(tokens) <= 250
    assert sum(tokens) / len(tokens) > 150
    tiny = [len(PRE_TOKEN.findall(story.text)) for story in drawn["one_hop_tiny"]]
    assert 25 <= min(tiny) and max(tiny) <= 60 and sum(tiny) / len(tiny) < 45
    longest = max(len(re.findall(r"\w+|\|", w)) for _, group in TEMPLATES.values() for w in group)
    closing = max(len(w.split()) for w in TEMPLATES["close"][1])
    assert longest + closing <= ROOM


def test_share_of_each_number_of_hops(drawn):
    def shares(name):
        kinds = Counter(a.kind for s in drawn[name] for a in s.answers if a.kind != "mention")
        hops = Counter()
        for kind, count in kinds.items():
            hops[HOPS[kind]] += count / kinds.total()
        return hops

    assert all(0.15 < shares("full")[hops] < 0.36 for hops in (0, 1, 2, 3))
    assert set(shares("one_hop")) == set(shares("one_hop_tiny")) == {1}
    assert set(shares("two_hops")) == {1, 2} and shares("two_hops")[2] > 0.5
    assert shares("three_hops")[3] > 0.3
    assert not shares("set_phrases")
    assert {a.kind for s in drawn["full"] for a in s.answers} == {*KINDS} - {"inside"}
    sentences = sum(s.text.count(".") for s in drawn["full"])
    answers = Counter(a.kind == "mention" for s in drawn["full"] for a in s.answers)
    assert 4 < sentences / answers[False] < 7.5 and 4 < sentences / answers[True] < 7.5


def test_guess_baselines_are_low(drawn):
    for name, found in drawn.items():
        for kind, readers in guess_baselines(found).items():
            assert set(readers) == {"mentioned", "latest", "most_mentioned", "most_frequent"}
            assert all(share < 0.7 for share in readers.values()), (name, kind, readers)
            if kind.startswith("where"):
                assert readers["latest"] < 0.52 and readers["mentioned"] < 0.45
                assert readers["most_frequent"] < 0.12
    (where,) = guess_baselines(drawn["one_hop_tiny"]).values()
    assert 0.25 < where["latest"] < 0.45


def test_guess_baselines_by_hand():
    class FakeStory:
        answers = (
            ("where1", "park", 0, (("park", 2), ("barn", 1)), "barn"),
            ("where1", "barn", 0, (("park", 1), ("barn", 1)), "barn"),
            ("count", "four", 0, (("one", 1), ("two", 1)), "two"),
        )

    assert guess_baselines([FakeStory]) == {
        "where1": {
            "mentioned": 0.5, "latest": 0.5, "most_mentioned": 0.75, "most_frequent": 0.5,
        },
        "count": {"mentioned": 0, "latest": 0, "most_mentioned": 0, "most_frequent": 1},
    }  # fmt: skip


VALUES = {*PLACES, *COLOURS, "two", "three", "four", "five"}


@pytest.mark.parametrize("order", ["same", "mixed"])
def test_recap_repeats_all_facts(order):
    """Verbatim, in the same or another order; a value is an answer unless another sentence with the
    same beginning is still to come."""
    moved, unclear, kinds = 0, 0, set()
    often = {"arrive": 2, "see": 1, "find": 3, "own": 3}  # "Tom had two eggs", "Tom had a big kite"
    hard = {"from": "told_twice", "value_first": True}
    for story in take(400, hard | {"sentences": often, "recap": order}):
        text = re.sub(r"\. (The \w+|It) was", r"; \1 was", story.text.removeprefix("One day "))
        *sentences, closing = re.findall(r"[A-Z][^.]*\.", text)
        first, again = sentences[: len(sentences) // 2], sentences[len(sentences) // 2 :]
        assert closing == "The end." and 1 <= len(first) == len(set(first)) <= 12
        assert sorted(first) == sorted(again)
        assert {answer.kind for answer in story.answers} <= {"mention"}
        values = [answer.value for answer in story.answers]
        for number, sentence in enumerate(again):
            (value,) = set(re.findall(r"\w+", sentence)) & VALUES
            kinds |= {"place" if value in PLACES else value}
            begins = sentence.split(value)[0]
            like_it = [other for other in again[number + 1 :] if other.startswith(begins)]
            if order == "same" or not like_it:
                assert value == values.pop(0)
            else:
                unclear += 1
        assert not values
        moved += first != again
    assert kinds == {"place", *COLOURS, "two", "three", "four", "five"}
    assert unclear == 0 if order == "same" else 0 < unclear < 50, unclear
    assert moved == 0 if order == "same" else 100 < moved < 400


def test_recap_fits_into_max_words():
    tight = {
        "from": "told_twice", "max_people": 20, "max_words": 80, "stop": 0.01,
        "sentences": {"arrive": 4, "find": 1, "chat": 1},
    }  # fmt: skip
    lengths = [len(re.findall(r"\w+", story.text)) for story in take(300, tight)]
    assert 70 < max(lengths) <= 80


def test_grade_survives_json():
    for name, grade in GRADES.items():
        again = grade_from(json.loads(json.dumps(asdict(grade), sort_keys=True)))
        assert again == grade
        assert take(3, again) == take(3, name)


@pytest.mark.parametrize(
    "kind, long, short",
    [
        ("colour", " has the colour", " is"),
        ("colour2", " has the colour", " is"),
        ("who", " is still there with", " is with"),
        ("where2", " is still there in the", " is in the"),
    ],
)
def test_shortly_puts_the_answer_closer_to_its_key(kind, long, short):
    grade = {"from": "two_hops", "questions": {kind: 50}}
    for shortly, before in (([], long), ([kind], short)):
        asked = [
            story.pieces[answer.piece_index - 1][0]
            for story in take(60, grade | {"shortly": shortly})
            for answer in story.answers
            if answer.kind == kind
        ]
        assert len(asked) > 20 and all(text.endswith(before) for text in asked)


def test_value_first_puts_values_before_keys():
    grade = {"sentences": {"arrive": 1, "carry": 3, "fill": 3, "find": 3}, "phrases": False}
    for value_first in (False, True):
        for story in take(60, grade | {"value_first": value_first}):
            for box in re.findall(rf"[^.]*\b(?:{'|'.join(BOXES)})\b[^.]*\.", story.text):
                words = re.findall(r"\w+", box)
                held = [i for i, word in enumerate(words) if word in NAMES]
                put = [i for i, word in enumerate(words) if word in THINGS]
                at = next(i for i, word in enumerate(words) if word in BOXES)
                assert all((i < at) == value_first for i in held)
                assert all((i > at) == value_first or "There" in words for i in put)


def test_story_ends_if_no_sentence_is_possible():
    (story,) = take(1, {"phrases": False, "sentences": {}, "min_words": 50, "max_words": 99})
    assert re.fullmatch(r"One day \w+ .*\. The end\.", story.text)


@pytest.mark.parametrize(
    ("grade", "message"),
    [
        ("fulll", "Did you mean 'full'"),
        (3, "must be a name or an object of fields, got 3"),
        ({"max_peple": 3}, "Unknown grade field 'max_peple'"),
        ({"from": "hard"}, "Unknown grade 'hard'"),
        ({"sentences": {"fly": 1}}, "unknown kind 'fly'"),
        ({"questions": {"mention": 1}}, "unknown kind 'mention'"),
        ({"questions": ["where1"]}, "must be an object"),
        ({"sentences": {"move": -1}}, "must be a number >= 0"),
        ({"sentences": {"move": float("nan")}}, "must be a number >= 0"),
        ({"sentences": {"move": True}}, "must be a number >= 0"),
        ({"max_people": 2.5}, "integer"),
        ({"max_people": 25}, "max_people from 1 to 20"),
        ({"phrases": 1}, "true or false"),
        ({"shortly": True}, "a list of kinds among colour, colour2"),
        ({"shortly": ["count"]}, "a list of kinds among colour, colour2"),
        ({"value_first": 1}, "true or false"),
        ({"shortly": [["colour"]]}, "a list of kinds among colour, colour2"),
        ({"stop": 0}, "between 0 and 1"),
        ({"wordings": 0}, "'wordings' must be at least 1, got 0"),
        (
            {"min_people": 3, "max_people": 2},
            "'min_people' must be at most max_people, which is 2; got 3",
        ),
        ({"min_words": 100, "max_words": 100}, "room for the last sentence"),
        ({"recap": "twice"}, "'same', 'mixed' or empty"),
        ({"recap": True}, "'same', 'mixed' or empty"),
        ({"from": "told_twice", "sentences": {"arrive": 1, "move": 0.1}}, "recap .* kind 'move'"),
        ({"from": "told_twice", "sentences": {"arrive": 1, "fetch": 1}}, "recap .* kind 'fetch'"),
        ({"from": "told_twice", "sentences": {"own": 1, "change": 1}}, "recap .* kind 'change'"),
        ({"recap": "same", "sentences": {"meet": 1}}, "no facts to repeat"),
    ],
)
def test_invalid_grade_is_refused_in_one_sentence(grade, message):
    with pytest.raises(MinitxError, match=message) as caught:
        grade_from(grade)
    assert "\n" not in str(caught.value)
