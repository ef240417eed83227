"""The small model's answers, calibration examples, and one state for prompts that begin alike."""

import math

import numpy as np
import pytest
from same import assert_same
from tiny import tiny_lm, tiny_model

from minitx.decode import Sampler, new_state
from minitx.second_model import first_half
from minitx.shared.same_beginning import state_for
from minitx.shared.small_answers import (
    answer_of,
    confidence,
    cut_for_share,
    cuts_of,
    examples_of,
    halves,
    uniform_of,
)
from minitx.technique import apply

IDS = np.random.default_rng(0).integers(0, 250, 40).tolist()


def test_confidence_worked_example():
    """p = [1/2, 1/4, 1/4]: the entropy is 1.5 ln 2, of ln 3 at most."""
    logprob, entropy = confidence(np.log([0.5, 0.25, 0.25]) + 7, 1)
    assert logprob == pytest.approx(math.log(1 / 4))
    assert entropy == pytest.approx(1.5 * math.log(2) / math.log(3))


@pytest.mark.parametrize(("logits", "expected"), [([0, -np.inf, 0], math.log(2)), ([7.0], 0)])
def test_confidence_of_impossible_tokens_and_of_a_single_one(logits, expected):
    """The entropy of p = [1/2, 0, 1/2] is ln 2, of ln 3 at most; that of the only token is 0."""
    logprob, entropy = confidence(np.array(logits), 0)
    assert logprob == pytest.approx(-expected)
    assert entropy == pytest.approx(expected / math.log(3))


def test_answer_is_that_of_plain_decoding_with_its_log_probabilities():
    lm = tiny_lm(dtype=np.float64)
    answer = answer_of(lm.model, new_state(lm.model, IDS[:9]), IDS[:9], Sampler(), 8)
    assert answer.tokens == lm.generate(IDS[:9], 8) and answer.complete
    logits = lm.model([*IDS[:9], *answer.tokens])[8:-1]
    for token, row, logprob in zip(answer.tokens, logits, answer.logprobs):
        assert logprob == pytest.approx(row[token] - np.log(np.exp(row).sum()))


@pytest.mark.parametrize("limit, length, complete", [(3, 3, True), (4, 4, True), (5, 4, False)])
def test_answer_is_incomplete_where_the_context_ends(limit, length, complete):
    small = tiny_model(context=12, eos=())
    answer = answer_of(small, new_state(small, IDS[:9]), IDS[:9], Sampler(), limit)
    assert (len(answer.tokens), answer.complete) == (length, complete)
    long = answer_of(small, new_state(small, IDS), IDS, Sampler(), limit)
    assert long.tokens == [] and not long.complete


def test_texts_are_cut_at_equal_distances_and_before_their_last_tokens():
    assert cuts_of(41, cuts=4, tokens=1) == [10, 20, 30, 40]
    assert cuts_of(41, cuts=1, tokens=3) == [38]
    assert cuts_of(4, cuts=8, tokens=1) == [1, 2, 3] and cuts_of(3, 8, tokens=3) == []


def test_cut_keeps_the_share_that_was_asked_for():
    scores = [0.1, 0.9, 0.5, 0.7]
    assert [cut_for_share(scores, s) for s in (0, 0.25, 0.5, 0.6)] == [math.inf, 0.9, 0.7, 0.5]
    assert cut_for_share(scores, 1.0) == -math.inf
    assert cut_for_share([0.0] * 100, 0.29) == 0.0


def test_uniform_number_depends_on_prompt_and_seed_alone():
    assert uniform_of([1, 2], 3) == uniform_of([1, 2], 3)
    assert len({uniform_of(ids, seed) for ids in ([1, 2], [2, 1], [1]) for seed in (0, 1)}) == 6
    found = [uniform_of([i], 0) for i in range(300)]
    assert 0 <= min(found) and max(found) < 1 and np.mean(found) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("technique", [{}, {"heavy_hitters": {"recent": 4, "heavy": 2}}], ids=str)
def test_examples_compare_the_greedy_answers_of_both_models(technique):
    """Also where a state cannot be rewound, so that each prompt has to be run anew."""
    lm = apply(tiny_lm(dtype=np.float64, calibration=None), technique)
    small = first_half(lm.model, "", "")
    examples = examples_of("x", lm, small, 3, 5, 2, "")
    assert len(examples) == 15
    for prompt, answer, agrees in examples:
        alone = answer_of(small, new_state(small, prompt), prompt, Sampler(), 2)
        assert answer.tokens == alone.tokens
        loop = lm.decode(lm.model, new_state(lm.model, prompt), prompt, Sampler(), 2)
        assert agrees == (answer.tokens == list(loop)), prompt
    first, second = halves(examples)
    assert len(first) == 7 and [*first, *second] == examples


def test_state_is_rewound_to_the_prompt_that_it_holds():
    model = tiny_model(dtype=np.float64)
    state = state_for(model, IDS[:6])
    model(IDS[:6], state)
    model([3, 3], state)  # an answer
    again = state_for(model, IDS[:10], IDS[:6], state)
    assert again is state and state.position == 6 and state.prompt == 10
    assert_same(model(IDS[6:10], state)[-1], model(IDS[:10])[-1], tolerance=1e-7)
    for other in (IDS[1:9], IDS[:10], IDS[:4]):
        assert state_for(model, other, IDS[:10], state).position == 0, "another beginning"
