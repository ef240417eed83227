"""False hits of the semantic cache: the bound, the requests, and that the store is served alike."""

import random

import numpy as np
import pytest
from tiny import tiny_lm

import minitx
from minitx import ledger
from minitx.errors import MinitxError
from minitx.lab import semantic_hits as lab
from minitx.lab.semantic_hits import Asked, auc, served, upper_bound, wrong_in_nearer_half
from minitx.technique import apply
from minitx.training.stories import first_stories

STORY = "Once Tom was in the park. Eva had a ball. Where is Tom? Tom is in the"


@pytest.mark.parametrize(
    "wrong, n, percent", [(0, 300, 0.99), (0, 3000, 0.10), (2, 300, 2.08), (0, 1, 95.0)]
)
def test_clopper_pearson_bounds_by_hand(wrong, n, percent):
    """Without any wrong one 1 - 0.05^(1/n): 1 - 0.05^(1/300) = 0.0099. With 2 of 300, p = 0.0208:
    (1 - p)^300 (1 + 300 p / (1 - p) + 44850 p^2 / (1 - p)^2) = 0.0018 (1 + 6.37 + 20.3) = 0.05."""
    assert 100 * upper_bound(wrong, n) == pytest.approx(percent, abs=0.005)


def test_clopper_pearson_bound_is_above_the_share_and_one_if_all_are_wrong():
    found = [upper_bound(k, 40) for k in range(41)]
    assert all(a < b for a, b in zip(found, found[1:])) and found[-1] == 1
    assert all(bound > k / 40 for k, bound in enumerate(found[:-1]))
    assert upper_bound(3, 40, 0.99) > upper_bound(3, 40) > upper_bound(3, 40, 0.5)
    assert upper_bound(0, 0) == 1, "nothing is known of no hits"


def test_a_changed_prompt_differs_in_one_word_of_the_story():
    draw = random.Random(1).random
    for _ in range(40):
        words = lab.change_a_word(STORY, draw).split(" ")
        pairs = [(a, b) for a, b in zip(STORY.split(" "), words, strict=True) if a != b]
        assert len(pairs) == 1 and pairs[0][0].rstrip(".") in "Tom park Eva ball".split()
        assert words[-7:] == STORY.split(" ")[-7:], "the question is the same"


def test_the_same_question_is_asked_about_another_person_of_the_story():
    expected = "Once Tom was in the park. Eva had a ball. Where is Eva? Eva is in the"
    assert lab.ask_about_another(STORY, random.Random(1).random) == [expected]
    alone = STORY.replace("Eva had", "There was")
    assert lab.ask_about_another(alone, random.Random(1).random) == [], "nobody else is there"


def test_questions_end_before_their_answers():
    (story,) = first_stories("evaluation", "full", 0, 1)
    found = lab.questions(story)
    answers = [answer.value for answer in story.answers if answer.kind != "mention"]
    assert len(found) == len(answers) > 0
    for text, answer in zip(found, answers):
        assert story.text.startswith(f"{text} {answer}") and "?" in text


def asked(similarity, answer):
    e = np.array([similarity, np.sqrt(1 - similarity**2)])
    return Asked([0], answer, {"e": e})


def test_hits_and_false_hits_by_hand():
    """Similarities to the first request: 1, 0.95, 0.6. At 0.9 the second and third hit, the third
    with a wrong answer; the fourth is stored. Of 4 requests 2 hit and 1 is wrong: 1/4 of all."""
    some = [asked(1.0, 7), asked(1.0, 7), asked(0.95, 8), asked(0.6, 7)]
    row = served(some, 0.9, 10, "e")
    assert (row.requests, row.hits, row.wrong, row.by_chance) == (4, 2, 1, 1)
    assert (row.hit_rate, row.false_hits, row.wrong_answers) == (0.5, 0.5, 0.25)
    assert served(some, 1.1, 10, "e").hits == 0 and served(some, -1, 10, "e").hits == 3
    assert served(some, 1.1, 10, "e").false_hits == 0


def test_auc_is_the_share_of_pairs_in_order():
    """(3, 1) against (2, 1): 3 > 2, 3 > 1, 1 < 2, 1 = 1: (2 + 0.5) / 4."""
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 1.0])) == 2.5 / 4


def test_wrong_in_nearer_half_counts_pairs_above_the_median():
    same, different = np.array([0.9, 0.8, 0.1]), np.array([0.7, 0.2, 0.0])
    assert wrong_in_nearer_half(same, different) == 1 / 3


def test_counted_hits_are_those_of_the_technique():
    """Requests served by the technique, every hit of which is audited only by us."""
    dense, draw = tiny_lm(dtype=np.float64), np.random.default_rng(0)
    base = draw.integers(0, 258, 12)
    prompts = [np.where(draw.random(12) < 0.2, draw.integers(0, 258, 12), base) for _ in range(30)]
    found = [lab.ask(dense, prompt.tolist()) for prompt in prompts]
    row = served(found, 0.7, 5, lab.EMBEDDINGS[0])
    options = {"threshold": 0.7, "entries": 5, "audit": 1000}
    lm, wrong = apply(dense, {"semantic_cache": options}), 0
    with ledger.counting(lm) as counts:
        for prompt, one in zip(prompts, found):
            wrong += lm.generate(prompt.tolist(), 1) != [one.answer]
    assert (row.hits, row.wrong) == (counts.events["semantic hits"], wrong)
    assert 0 < row.wrong < row.hits < 30


def test_report_and_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["x", "--stories", "2", "--changes", "1", "--thresholds", "0"])
    monkeypatch.setattr(minitx, "load", lambda name: tiny_lm(model=tiny_lm_model()))
    lab.main()
    text = capsys.readouterr().out
    assert "P(wrong | hit)" in text and "95 % bound" in text and "AUC" in text
    monkeypatch.setattr("sys.argv", ["x", "--stories", "0"])
    with pytest.raises(SystemExit):
        lab.main()
    with pytest.raises(MinitxError, match="tokenizer"):
        lab.measure(tiny_lm(tokenizer=None), 1, 1, (0.9,), bar=False)


def test_report_without_a_pair_of_one_kind():
    """As of a single story, all of whose pairs have the same answer."""
    row = lab.Row(0.9, 3, 1, 0, 0)
    report = lab.Report("x", [row], {"mean": (np.array([0.9, 0.8]), np.array([]))})
    assert "2 have the same answer, 0 another one" in str(report)
    assert "0.8500 (0.8000 to 0.9000)" in str(report) and "no pair" in str(report)


def tiny_lm_model():
    from tiny import tiny_model

    return tiny_model(context=1024)  # bytes instead of words are longer
