"""``python -m minitx.lab.answer_front``: accuracy against cost of cascades and routers."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

import minitx
from minitx.lab import answer_front as lab
from minitx.lab.answer_front import Front, at_random, both, mcnemar, methods
from minitx.lab.answers import answer, held_out_questions
from minitx.shared.small_answers import examples_of
from minitx.skip.cascade import Cascade
from minitx.skip.router import Classifier, PromptTokens, Router


@cache
def measured():
    """(big, small, what both answer to the questions of two stories)."""
    lm, small = minitx.load("stories"), minitx.load("stories-draft").model
    return lm, small, both(lm, small, held_out_questions(lm, 2))


@cache
def front_examples():
    lm, small, _ = measured()
    return lab.calibration_examples(lm, small, 3)


@cache
def front():
    lm, small, found = measured()
    examples = front_examples()
    rows = methods(lm, small, found, examples, (0.3, 0.9), examples)
    return Front("title", found, rows)


def same(found, expected):
    assert found.given == expected.given, "another answer than the real loop's"
    for name in ("multiply_adds", "weight_bytes", "cache_bytes"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)


def test_mixed_answers_are_those_of_the_real_cascade():
    lm, small, found = measured()
    cut = float(np.median(found.confidence))
    real = replace(lm, decode=Cascade(lm.decode, small, lab.SCORES[lab.SCORE], cut))
    mixed = found.mixed(found.confidence >= cut, True, found.scoring)
    same(mixed, answer(real, found.big.questions))
    assert 0 < (found.confidence >= cut).mean() < 1


def test_mixed_answers_are_those_of_the_real_router():
    lm, small, found = measured()
    w = np.random.default_rng(0).standard_normal(found.prompts.shape[1]).astype(np.float32)
    b = -float(np.median(found.prompts @ w))
    real = replace(lm, decode=Router(lm.decode, small, Classifier(PromptTokens(), w, b), 0.5))
    mixed = found.mixed(found.prompts @ w + b >= 0, False, len(w))
    same(mixed, answer(real, found.big.questions))


def test_random_routing_lies_between_both_models_worked_example():
    """Costs 1 and 5: a mean of 2 leaves a quarter to the big model."""
    _, _, found = measured()
    n = len(found.confidence)
    small = replace(found.small, multiply_adds=np.full(n, 1))
    found = replace(found, small=small, big=replace(found.big, multiply_adds=np.full(n, 5)))
    expected = 0.75 * found.small.right + 0.25 * found.big.right
    np.testing.assert_allclose(at_random(found, 2.0), expected)
    np.testing.assert_allclose(at_random(found, 0.5), found.small.right)
    np.testing.assert_allclose(at_random(found, 7.0), found.big.right)


def test_mcnemar_worked_example():
    """12 questions that only b gets right and 3 that only a does: (9 - 1) / sqrt(15) = 2.07."""
    a = np.array([False] * 12 + [True] * 3 + [True] * 40)
    b = np.array([True] * 12 + [False] * 3 + [True] * 40)
    assert mcnemar(a, b) == pytest.approx(-8 / 15**0.5) and mcnemar(b, a) == -mcnemar(a, b)
    assert mcnemar(a, a) == 0


def test_examples_of_questions_agree_with_those_of_the_technique(monkeypatch):
    """The lab's examples are what the technique would make of the same prompts."""
    lm, small, found = measured()
    questions = found.big.questions[:6]
    ours = lab.as_examples(small, questions, found.big.given)
    rows = [q.prompt + q.answer for q in questions]
    calibrated = replace(lm, calibration=minitx.calibration.source_of(lm, rows))
    assert [(e.prompt, e.answer.tokens, e.agrees) for e in ours] == [
        (e.prompt, e.answer.tokens, e.agrees)
        for e in examples_of("x", calibrated, small, 6, 1, 1, "")
    ]


def test_cut_prompts_are_right_if_answered_like_the_big_model():
    lm, small, _ = measured()
    questions = lab.cut_prompts(lm, 1, 3, 2)
    assert len(questions) == 3 and all(len(q.answer) <= 2 for q in questions)
    found = both(lm, small, questions, score="logprob")
    assert found.big.accuracy == 1
    rows = methods(lm, small, found, front_examples(), (0.5,), score="logprob")
    assert [*rows] == [("small alone", ""), ("cascade", "at 0.5"), ("router", "at 0.5"),
                       ("cascade", "p >= 0.9"), ("big alone", "")]  # fmt: skip


def test_report_says_how_well_the_score_ranks():
    """Worked example: right answers score 3 and 1, wrong ones 2: half of the pairs."""
    _, _, found = measured()
    n = len(found.confidence)
    given = [q.answer if i < 2 else [-1] for i, q in enumerate(found.big.questions)]
    scores = np.where(np.arange(n) == 0, 3.0, np.where(np.arange(n) == 1, 1.0, 2.0))
    ranked = replace(found, small=replace(found.small, given=given), confidence=scores)
    said = replace(front(), found=ranked).said()
    assert "A right small answer scores above a wrong one in 50.0 % of all pairs." in said


def test_budget_buys_accuracy_and_costs_what_it_says():
    f = front()
    low, high = (f.rows["cascade", f"at {b:g}"] for b in (0.3, 0.9))
    assert f.cost(f.rows["small alone", ""]) < 0.1 and f.cost(f.rows["big alone", ""]) == 1
    assert 0.05 < f.cost(low) < f.cost(high) < 1.1
    assert low.accuracy <= high.accuracy <= f.found.big.accuracy + 0.1


def test_report_has_a_row_per_setting_a_chart_and_the_verdict():
    text = str(front())
    for words in ("small alone", "cascade at 0.3", "router at 0.9", "big alone",
                  "minus random", "2 hops", "% right", "f random"):  # fmt: skip
        assert words in text, words
    assert text.count("random at the same cost") == 3, "a verdict for each method"
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--budgets", "a,b", "--budgets takes numbers >= 0 separated by commas, got 'a,b'."),
        ("--budgets", "nan", "--budgets takes numbers >= 0 separated by commas, got 'nan'."),
        ("--calibration", "0", "expected a number from 1"),
        ("--seed", "-1", "expected a number from 0"),
    ],
)
def test_command_refuses_numbers_that_make_no_sense(flag, value, message, capsys):
    with pytest.raises(SystemExit) as caught:
        lab.main([f"{flag}={value}"])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
