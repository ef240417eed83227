"""``python -m minitx.lab.answers``: questions answered by the decoding loop, and their costs."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tiny import ScriptedLoop, tiny_lm

import minitx
from minitx.errors import MinitxError
from minitx.lab import answers as lab
from minitx.lab.answers import Question, answer, bootstrap, difference, held_out_questions
from minitx.technique import apply
from minitx.training.stories import HOPS, first_stories

# Two questions of one story and one of another, by hand.
QUESTIONS = [
    Question(0, "where1", [258, 1, 2], [7]),
    Question(0, "where2", [258, 1, 2, 7, 5, 6], [8, 9]),
    Question(3, "count", [258, 4, 4, 4], [7]),
]


@cache
def draft():
    return minitx.load("stories-draft")


def scripted(*tokens):
    """A model whose loop yields these tokens for every prompt."""
    return replace(tiny_lm(), decode=ScriptedLoop((tokens,), []))


def test_answer_is_right_if_all_of_its_tokens_are():
    found = answer(scripted(7, 9, 9), QUESTIONS)
    assert found.given == [[7], [7, 9], [7]], "as many tokens as the right answer has"
    assert found.right.tolist() == [True, False, True]
    assert found.by_hops() == {0: 1.0, 1: 1.0, 2: 0.0} and found.accuracy == pytest.approx(2 / 3)
    assert answer(scripted(8, 9, 9), QUESTIONS).right.tolist() == [False, True, False]


def test_questions_are_cuts_of_the_story_before_each_answer():
    lm, stories = draft(), first_stories("evaluation", "full", 0, 2)
    found = held_out_questions(lm, 2)
    assert len(found) == sum(len(story.answers) for story in stories)
    for q, a in zip(found, [a for story in stories for a in story.answers]):
        assert lm.tokenizer.decode(q.answer).strip() == a.value and q.hops == HOPS[a.kind]
        text = stories[q.story].text
        assert text.startswith(lm.tokenizer.decode(q.prompt[1:]) + " " + a.value)
        assert lm.encode(lm.tokenizer.decode(q.prompt[1:])) == q.prompt, "as a user would ask"


def test_generated_answer_is_the_prediction_that_evaluate_grades():
    """Teacher forcing and generation agree on answers of one token."""
    lm, questions = draft(), held_out_questions(draft(), 3)
    found = answer(lm, questions)
    expected = [int(lm.logits(q.prompt)[-1].argmax()) for q in questions]
    assert found.given == [[token] for token in expected]


def test_shared_state_gives_the_same_answers_for_less():
    lm, questions = draft(), held_out_questions(draft(), 3)
    alone, together = answer(lm, questions), answer(lm, questions, shared=True)
    assert together.given == alone.given, "the state of the question before was not rewound"
    assert together.multiply_adds.sum() < 0.5 * alone.multiply_adds.sum()
    first = [i for i, q in enumerate(questions) if i == 0 or q.story != questions[i - 1].story]
    np.testing.assert_array_equal(together.multiply_adds[first], alone.multiply_adds[first])


@pytest.mark.parametrize("technique", [{"early_exit": True}, {"sink_window": {"window": 16}}])
def test_shared_state_is_not_used_where_it_would_change_the_answer(technique):
    lm = apply(draft(), technique)
    questions = held_out_questions(lm, 3)
    assert answer(lm, questions, shared=True).given == answer(lm, questions).given


def test_costs_are_those_of_each_question_alone_and_of_each_model():
    lm = apply(tiny_lm(), {"speculative": {"draft": "self", "gamma": 1}})
    found = answer(lm, QUESTIONS)
    assert set(found.calls) == {"model", "decode.draft.model"}
    # One token: gamma 0, so the prompt but its last token, then that token. Two: one more draft.
    assert found.calls["model"].tolist()[0] == 2 and found.calls["decode.draft.model"][1] == 1
    for i, question in enumerate(QUESTIONS):
        alone = answer(lm, [question])
        for name in ("multiply_adds", "weight_bytes", "cache_bytes"):
            assert getattr(alone, name)[0] == getattr(found, name)[i] > 0, name


def test_seed_samples_each_question_with_its_own_seed():
    lm = tiny_lm()
    same = [QUESTIONS[0]] * 8
    assert len({*map(tuple, answer(lm, same, temperature=1.0, seed=1).given)}) > 1
    one = answer(lm, same, temperature=1.0, seed=1)
    assert one.given == answer(lm, same, temperature=1.0, seed=1).given


# Intervals ---------------------------------------------------------------------------------------


def test_bootstrap_interval_worked_example():
    """Two stories: one question right in the first, none of three in the second. Drawn with
    replacement: both (1/4), the first twice (1), the second twice (0), with 1/2, 1/4 and 1/4. So
    the interval is [0, 1], and its middle half is not wider than [0, 1/4] and [1/4, 1]."""
    right, stories = [1, 0, 0, 0], [5, 9, 9, 9]
    assert bootstrap(right, stories) == (0.0, 1.0)
    assert bootstrap([1, 1], [0, 1]) == (1.0, 1.0)


def test_bootstrap_draws_stories_not_questions():
    """Ten questions that are right or wrong together are no more than one question."""
    rng = np.random.default_rng(1)
    story = rng.integers(2, size=60)
    low, high = bootstrap(story, range(60))
    repeated = bootstrap(np.repeat(story, 10), np.repeat(np.arange(60), 10))
    assert repeated == pytest.approx((low, high)), "more questions of the same stories add nothing"
    assert bootstrap(np.repeat(story, 10), range(600))[1] < high - 0.03


def test_bootstrap_interval_is_that_of_the_normal_distribution():
    values = np.random.default_rng(0).standard_normal(400)
    error = values.std() / 20  # of the mean of 400
    low, high = bootstrap(values, range(400))
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_of_a_ratio_draws_both_sums_together():
    cost, dense = np.arange(1.0, 51), 2 * np.arange(1.0, 51)
    assert bootstrap(cost, range(50), per=dense) == pytest.approx((0.5, 0.5))


def test_difference_is_paired():
    a = answer(scripted(7, 9), QUESTIONS)
    d, low, high = difference(a, a)
    assert (d, low, high) == (0, 0, 0), "equal answers differ by nothing, with certainty"
    b = answer(scripted(8, 9), QUESTIONS)
    assert difference(a, b)[0] == pytest.approx(1 / 3)
    assert difference(a, b, where=a.hops == 2)[0] == -1


# The command -------------------------------------------------------------------------------------


def test_command_prints_accuracy_by_hops_and_costs(capsys):
    lab.main("-m stories-draft --stories 2 --prompt-lookup".split())
    out = capsys.readouterr().out
    questions = held_out_questions(draft(), 2)
    assert f"{len(questions)} questions of 2 held-out stories." in out
    assert "prompt_lookup minus stories-draft: +0.0 points (+0.0 to +0.0)." in out
    assert "1 hop" in out and "1.00 model" in out


class WholeText:
    """A tokenizer with one token for every text."""

    def encode(self, text, special=True):
        return [len(text) % 250]


def test_questions_that_do_not_fit_the_context_are_left_out():
    stories = first_stories("evaluation", "full", 0, 1)
    assert lab.questions_of(tiny_lm(), stories) == [], "a context of 48"


def test_model_that_cannot_read_stories_is_refused():
    with pytest.raises(MinitxError, match="reach across the words of a story"):
        held_out_questions(tiny_lm(tokenizer=WholeText()), 1)
    with pytest.raises(MinitxError, match="no tokenizer"):
        held_out_questions(tiny_lm(tokenizer=None), 1)
