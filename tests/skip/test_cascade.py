"""A cascade: the small model's answer is kept if its score reaches a cut that calibration sets."""

import math
from dataclasses import replace
from functools import cache

import literal_cascade as literal
import numpy as np
import pytest
from same import assert_same
from tiny import END, FAMILIES, ScriptedLoop, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Autoregressive, Sampler
from minitx.errors import MinitxError, MinitxWarning
from minitx.second_model import first_half
from minitx.shared.small_answers import Answer, Example, examples_of, halves
from minitx.skip import cascade as module
from minitx.skip.cascade import (
    SCORES,
    Cascade,
    break_even,
    cascade,
    expected_cost,
    isotonic,
    share_for,
)
from minitx.technique import apply

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]
PROMPTS = [np.random.default_rng(i).integers(0, 250, 4 + i).tolist() for i in range(12)]

# The worked example ------------------------------------------------------------------------------
#
# Five calibration answers, in the order of rising scores:
#
#     score        1    2    3    4    5
#     right        0    1    0    1    1
#     pooled       0   [ .5 .5 ] [ 1   1 ]     2 and 3 violate the order: their mean is 1/2
#
# So an answer with score 3.5 is right with probability 1/2, and threshold 0.9 keeps scores >= 4.
# Of ten requests let six be kept; the small model costs 1, the big one 20:
#     E[cost] = 1 + (1 - 0.6) * 20 = 9;   break-even at 1 / 20 = 0.05


def test_isotonic_fit_worked_example():
    g = isotonic([3, 1, 5, 2, 4], [False, False, True, True, True])
    assert g.score.tolist() == [1, 2, 4] and g.p.tolist() == [0, 0.5, 1]
    assert [g(s) for s in (0.5, 1, 2, 3.5, 4, 9)] == [0, 0, 0.5, 0.5, 1, 1]
    assert [g.cut(t) for t in (0, 0.3, 0.5, 0.9, 1)] == [-math.inf, 2, 2, 4, 4]
    assert isotonic([1, 2], [True, False]).cut(0.6) == math.inf, "no score is that likely right"


def test_expected_cost_worked_example():
    assert expected_cost(0.6, 1, 20) == pytest.approx(9)
    assert break_even(1, 20) == 0.05 and break_even(1, 2) == 0.5
    assert expected_cost(break_even(1, 20), 1, 20) == pytest.approx(20), "as the big model alone"
    assert expected_cost(share_for(0.4, 0.05), 0.05, 1) == pytest.approx(0.4)
    assert share_for(2.0, 0.05) == 0


def test_scores_worked_example():
    """Two tokens with probabilities 1/2 and 1/8, distributions of entropy 0.2 and 0.6 ln V."""
    answer = Answer([1, 2], [math.log(1 / 2), math.log(1 / 8)], [0.2, 0.6], True)
    found = {name: score(answer) for name, score in SCORES.items()}
    assert found["logprob"] == pytest.approx(math.log(1 / 4)), "(ln 1/2 + ln 1/8) / 2"
    assert found["lowest"] == pytest.approx(1 / 8) and found["entropy"] == pytest.approx(0.6)


# Against the literal version ---------------------------------------------------------------------


def test_isotonic_fit_equals_the_minimax_formula():
    rng = np.random.default_rng(0)
    for _ in range(40):
        scores, right = rng.permutation(20), rng.random(20) < 0.5
        g, expected = isotonic(scores, right), literal.isotonic(right[scores.argsort()])
        assert_same([g(s) for s in range(20)], expected, tolerance=1e-7)


def test_equal_scores_get_one_probability():
    g = isotonic([1, 1, 1, 2], [True, False, False, True])
    assert g.score.tolist() == [1, 2] and g.p.tolist() == pytest.approx([1 / 3, 1])


def plain(model):
    return lambda text: model(text)[-1].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCORES)
def test_cascade_equals_the_literal_version(family, name):
    lm = tiny_lm(family, dtype=np.float64)
    small, eos = first_half(lm.model, "cascade", "small"), lm.model.config.eos
    lm = replace(lm, decode=Cascade(lm.decode, small, SCORES[name], 0.0))
    who = set()
    answers = [literal.greedy(plain(small), ids, 3, eos) for ids in PROMPTS[:6]]
    scores = sorted(literal.score(name, *rest) for _, *rest in answers)
    cut = (scores[2] + scores[3]) / 2  # half of them are kept
    lm = replace(lm, decode=replace(lm.decode, cut=cut))
    for ids in PROMPTS[:6]:
        by, expected = literal.cascade(plain(small), plain(lm.model), ids, 3, name, cut, eos)
        found = list(decode(lm.decode, lm.model, ids, Sampler(), 3))
        assert found[: len(expected)] == expected, f"the {by} model's answer to {ids}"
        who.add(by)
    assert who == {"small", "big"}


# The extremes ------------------------------------------------------------------------------------


def test_threshold_above_one_is_the_big_model_and_nothing_else():
    lm = tiny_lm()
    assert cascade(lm, threshold=1.5) is lm


def test_threshold_zero_is_always_the_small_model_without_calibration():
    lm = tiny_lm(tokenizer=None)
    found = cascade(lm, small="self", threshold=0.0)
    small = replace(lm, model=first_half(lm.model, "", ""))
    with ledger.counting(found) as counts:
        texts = [found.generate(ids, 9) for ids in PROMPTS]
    assert texts == [small.generate(ids, 9) for ids in PROMPTS]
    assert counts.total("model").multiply_adds == 0, "the big model ran"


def test_score_is_compared_with_the_cut_inclusively():
    loop = Cascade(None, None, SCORES["lowest"], 0.25)
    assert loop.keeps(Answer([1], [math.log(0.25)], [0], True), PROMPT)
    assert not loop.keeps(Answer([1], [math.log(0.2499)], [0], True), PROMPT)
    assert not loop.keeps(Answer([1], [math.nan], [0], True), PROMPT), "NaN is not confident"


# The loop ----------------------------------------------------------------------------------------


def with_loop(inner=None, small=None, cut=-math.inf, **changes):
    """A tiny model with a cascade; small: default its first half."""
    lm = tiny_lm(**changes)
    small = small or first_half(lm.model, "", "")
    return replace(lm, decode=Cascade(inner or lm.decode, small, SCORES["lowest"], cut))


def test_answer_that_is_not_kept_comes_from_the_inner_loop_on_the_same_state():
    inner = ScriptedLoop(([7, 8, 9],), [])
    lm = with_loop(inner, cut=math.inf)
    assert lm.generate(PROMPT, 3) == [7, 8, 9] and inner.calls[0] == (PROMPT, 3)


def test_answer_ends_with_the_text_and_later_tokens_cost_nothing():
    free = greedy_tokens(first_half(tiny_model(), "", ""), 12)
    end = free[4]
    lm = with_loop(model=tiny_model(eos=(END, end)))
    n = free.index(end)
    assert lm.generate(PROMPT, 12) == free[:n]
    with ledger.counting(lm) as counts:
        tokens = list(decode(lm.decode, lm.model, PROMPT, Sampler(), 12))
    assert tokens == free[: n + 1] + [end] * (11 - n), "a batch needs as many tokens in each row"
    with ledger.counting(lm) as fewer:
        list(decode(lm.decode, lm.model, PROMPT, Sampler(), n + 1))
    assert counts.total() == fewer.total(), "work after the end of the text"


def greedy_tokens(model, n):
    return tiny_lm(model=model).generate(PROMPT, n)


def test_prompt_or_answer_beyond_the_small_context_goes_to_the_big_model():
    small = tiny_model(seed=3, context=12, eos=())
    lm = with_loop(small=small, model=tiny_model(eos=()))
    big = tiny_lm(model=tiny_model(eos=()))
    of_small = list(decode(Autoregressive(), small, PROMPT, Sampler(), 4))
    for limit in (1, 3, 4):
        assert lm.generate(PROMPT, limit) == of_small[:limit], "at most 12 tokens are read"
    assert lm.generate(PROMPT, 5) == big.generate(PROMPT, 5), "its 5th token would need 13"
    assert lm.generate([1] * 13, 2) == big.generate([1] * 13, 2)


def test_random_baseline_decides_by_prompt_and_seed():
    lm = tiny_lm()

    def kept(seed, threshold=0.7):
        loop = cascade(lm, small="self", choose="random", threshold=threshold, seed=seed).decode
        return [loop.keeps(Answer([1], [0.0], [0.0], True), ids) for ids in many]

    many = [[i, i + 1] for i in range(200)]
    assert kept(0) == kept(0) != kept(1)
    assert np.mean(kept(0)) == pytest.approx(0.3, abs=0.1), "keeps 1 - threshold"


# Cost --------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_formula():
    lm = tiny_lm(dtype=np.float64)
    small = first_half(lm.model, "", "")
    c_s = [
        work(replace(lm, decode=Cascade(lm.decode, small, SCORES["lowest"], 0.0)), p)
        for p in PROMPTS
    ]
    c_b = [work(lm, p) for p in PROMPTS]
    for cut in (0.0, 0.5, 0.9, 2.0):
        found = replace(lm, decode=Cascade(lm.decode, small, SCORES["lowest"], cut))
        with ledger.counting(found) as counts:
            kept = []
            for ids in PROMPTS:
                before = counts.events["small answers kept"]
                found.generate(ids, 2)
                kept.append(counts.events["small answers kept"] > before)
        expected = sum(c_s) + sum(c for c, k in zip(c_b, kept) if not k)
        assert counts.total().multiply_adds == expected, "c_s for all, c_b for those not kept"
    assert not any(kept)


def work(lm, ids):
    with ledger.counting(lm) as counts:
        lm.generate(ids, 2)
    return counts.total().multiply_adds


# Calibration -------------------------------------------------------------------------------------


def test_scorer_and_threshold_are_set_on_different_halves(monkeypatch):
    """First half: 0.1 wrong, 0.3 right. Second: 0.6 wrong, 0.8 right, of which half is kept."""
    scores = [(0.1, False), (0.3, True), (0.6, False), (0.8, True)]
    examples = [Example([1], Answer([2], [math.log(p)], [0], True), r) for p, r in scores]
    monkeypatch.setattr(module, "examples_of", lambda *_: examples)
    monkeypatch.setattr(module, "relative_cost", lambda *_: 0.4)
    lm = tiny_lm()
    assert cascade(lm, small="self", threshold=0.9).decode.cut == pytest.approx(0.3)
    assert cascade(lm, small="self", budget=0.9).decode.cut == pytest.approx(0.8)


@cache
def shipped():
    """64 examples from stories, and the stories model."""
    lm, small = minitx.load("stories"), minitx.load("stories-draft").model
    return examples_of("cascade", lm, small, 8, 8, 1, ""), lm


def test_budget_is_met_on_the_half_that_sets_the_threshold():
    examples, lm = shipped()
    _, tune = halves(examples)
    options = dict(small="stories-draft", budget=0.6, stories=8)
    cut = apply(lm, {"cascade": options}).decode.cut
    kept = np.mean([SCORES["lowest"](e.answer) >= cut for e in tune])
    c_s = 0.05  # measured: 0.050; another draft of this shape costs as much
    assert 0.55 < expected_cost(kept, c_s, 1) < 0.61


def test_kept_answers_agree_more_often_than_random_ones():
    """On stories, at equal cost: the same share is kept, by score or at random."""
    examples, _ = shipped()
    right = np.array([e.agrees for e in examples])
    for name, score in SCORES.items():
        order = np.argsort([-score(e.answer) for e in examples])
        kept = right[order[: len(order) // 2]].mean()
        assert kept > right.mean() + 0.3 * (1 - right.mean()), f"{name} is no better than random"


def test_threshold_is_a_probability_on_text_it_was_not_fitted_to():
    examples, _ = shipped()
    learn, tune = halves(examples)
    g = isotonic([SCORES["lowest"](e.answer) for e in learn], [e.agrees for e in learn])
    kept = [e.agrees for e in tune if SCORES["lowest"](e.answer) >= g.cut(0.9)]
    assert len(kept) >= 8 and np.mean(kept) > 0.8


def test_calibration_text_is_given_as_ids():
    """No tokenizer, no stories: rows of ids, and the two models' agreement on them."""
    lm, rows = tiny_lm(tokenizer=None), [ids * 2 for ids in PROMPTS]
    found = apply(lm, {"cascade": {"small": "self", "budget": 1.0, "cuts": 2}}, calibrate=rows)
    assert "cascade calibrated on the given ids" in str(found.calibrated[0])
    assert np.isfinite(found.decode.cut)


# Messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(threshold=0.5, budget=0.5), "got both threshold and budget"),
        (dict(budget=0.1), "no threshold meets budget=0.1"),
        (dict(small="no such model"), "cascade cannot load its small"),
        (dict(tokens=60), "texts of more than tokens=60 tokens, and got none"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_a_sentence(options, words):
    with pytest.raises(MinitxError, match=words) as caught:
        apply(tiny_lm(), {"cascade": {"small": "self", "stories": 2} | options})
    assert "cascade" in str(caught.value) and "\n" not in str(caught.value)


def test_setting_that_costs_more_than_it_saves_warns():
    with pytest.warns(MinitxWarning, match="both together take at least as much"):
        apply(tiny_lm(), {"cascade": {"small": "self", "budget": 1.4, "stories": 2}})
