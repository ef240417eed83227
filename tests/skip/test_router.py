"""A router: a classifier of the prompt decides which of two models answers."""

from dataclasses import replace
from functools import cache

import literal_router as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, ScriptedLoop, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.second_model import first_half
from minitx.shared.small_answers import Answer, Example, examples_of, halves
from minitx.skip import router as module
from minitx.skip.router import (
    BUCKETS,
    Always,
    Classifier,
    PromptLoss,
    PromptTokens,
    Router,
    bucket,
    expected_cost,
    learned,
    router,
    share_for,
)
from minitx.technique import apply

PROMPTS = [np.random.default_rng(i).integers(0, 250, 4 + 2 * i).tolist() for i in range(10)]

# The worked example ------------------------------------------------------------------------------
#
# The small model costs 1, the big one 20, the router 0.1 per request. To spend 10 on average, the
# share a of the requests that the small model answers must be
#     0.1 + a * 1 + (1 - a) * 20 = 10     a = 10.1 / 19 = 0.532
# A cascade that keeps as many spends 1 + 0.468 * 20 = 10.4: it pays both where it does not keep.


def test_expected_cost_worked_example():
    a = share_for(0.5, c_s=1.1 / 20, c_r=0.1 / 20)  # a routed request costs the routing too
    assert a == pytest.approx(10.1 / 19)
    assert expected_cost(a, 1, 20, 0.1) == pytest.approx(10)
    assert share_for(2.0, 0.1, 0.0) == 0 and share_for(0.1, 0.1, 0.0) == pytest.approx(1)


def test_features_of_a_prompt_worked_example():
    x = PromptTokens()(None, None, [7, 3, 3])
    assert x[0] == pytest.approx(np.log(3)) and x.sum() == pytest.approx(np.log(3) + 1 + 3)
    assert x[1 + bucket(3)] == 1, "the last token"
    assert x[1 + BUCKETS + bucket(3)] == 2 and x[1 + BUCKETS + bucket(7)] == 1, "the bag"


# Against the literal version ---------------------------------------------------------------------


def test_features_equal_the_literal_version():
    small = tiny_model(dtype=np.float64)

    def plain(text):
        return small(text)[-1].tolist()

    for ids in [[4], *PROMPTS]:
        state = new_state(small, ids)
        assert_same(PromptTokens()(small, state, ids), literal.features(ids), tolerance=1e-7)
        assert_same(PromptLoss()(small, state, ids), literal.losses(plain, ids), tolerance=1e-7)
    assert {bucket(token) for token in range(50_000)} == set(range(BUCKETS)), "unused buckets"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("features", [PromptTokens(), PromptLoss()], ids=["tokens", "perplexity"])
def test_router_equals_the_literal_version(family, features):
    lm = tiny_lm(family, dtype=np.float64)
    half = replace(lm, model=first_half(lm.model, "", ""))
    x = [features(half.model, new_state(half.model, ids), ids) for ids in PROMPTS]
    w = np.random.default_rng(2).standard_normal(len(x[0]))
    b = -float(np.median(x @ w))  # half of the prompts each
    found = replace(lm, decode=Router(lm.decode, half.model, Classifier(features, w, b), 0.5))
    who = [literal.route(one, w, b, 0.5) for one in x]
    assert set(who) == {"small", "big"}
    for ids, by in zip(PROMPTS, who):
        alone = half if by == "small" else lm
        assert found.generate(ids, 6) == alone.generate(ids, 6), f"the {by} model should answer"


# The extremes ------------------------------------------------------------------------------------


def test_threshold_above_one_is_the_big_model_and_nothing_else():
    lm = tiny_lm()
    assert router(lm, threshold=1.5) is lm


def test_threshold_zero_is_always_the_small_model_without_calibration():
    lm = tiny_lm(tokenizer=None)
    found, small = router(lm, small="self", threshold=0.0), first_half(lm.model, "", "")
    with ledger.counting(found) as counts:
        texts = [found.generate(ids, 5) for ids in PROMPTS]
    assert texts == [replace(lm, model=small).generate(ids, 5) for ids in PROMPTS]
    assert counts.total("model").multiply_adds == 0, "the big model ran"


def test_prompt_beyond_the_small_context_goes_to_the_big_model():
    inner, small = ScriptedLoop(([7, 8, 9],), []), tiny_model(seed=3, context=12)
    lm = tiny_lm()
    lm = replace(lm, decode=Router(inner, small, Always(), -np.inf))
    assert lm.generate([1] * 11, 2) == list(decode(tiny_lm().decode, small, [1] * 11, Sampler(), 2))
    assert lm.generate([1] * 11, 3) == [7, 8, 9], "11 tokens and 3 new ones need a context of 13"


def test_random_baseline_routes_by_prompt_and_seed():
    many = [[i, i + 1] for i in range(200)]

    def routed(seed):
        loop = router(tiny_lm(), small="self", choose="random", threshold=0.7, seed=seed).decode
        return [loop.score(ids)[0] >= loop.cut for ids in many]

    assert routed(0) == routed(0) != routed(1)
    assert np.mean(routed(0)) == pytest.approx(0.3, abs=0.1)


# Cost --------------------------------------------------------------------------------------------


def work(lm, ids, n=2):
    with ledger.counting(lm) as counts:
        lm.generate(ids, n)
    return counts.total().multiply_adds


@pytest.mark.parametrize("features", [PromptTokens(), PromptLoss()], ids=["tokens", "perplexity"])
def test_multiply_adds_are_those_of_the_formula(features):
    """Exactly one model answers. What the router reads is paid for all; of the perplexity the
    small model's answer goes on from there."""
    lm = tiny_lm(dtype=np.float64)
    small = first_half(lm.model, "", "")
    n = len(features(small, new_state(small, PROMPTS[0]), PROMPTS[0]))

    def with_cut(cut):
        return replace(
            lm, decode=Router(lm.decode, small, Classifier(features, np.zeros(n), 0.0), cut)
        )

    for ids in PROMPTS[:4]:
        with ledger.counting(lm) as counts:
            with_cut(0.0).decode.score(ids)
        c_r, c_b = counts.total().multiply_adds, work(lm, ids)
        assert work(with_cut(1.0), ids) == c_r + c_b
        if isinstance(features, PromptTokens):
            assert c_r == 1 + 2 * BUCKETS
            assert work(with_cut(0.0), ids) == c_r + work(replace(lm, model=small), ids)
        else:
            with ledger.counting(lm) as counts:
                small(ids[:-1])
            assert c_r == counts.total().multiply_adds + 3
            state = new_state(small, ids)
            small(ids[:-1], state)
            with ledger.counting(lm) as counts:
                list(lm.decode(small, state, ids, Sampler(), 2))
            assert work(with_cut(0.0), ids) == c_r + counts.total().multiply_adds


@pytest.mark.parametrize("features, budget", [("tokens", 0.8), ("perplexity", 1.9)])
def test_budget_is_met_on_the_half_that_sets_the_threshold(features, budget):
    """On a model this small every logit of the prompt costs more than its blocks, so the perplexity
    does not pay; but it is counted."""
    dense = tiny_lm(dtype=np.float64)
    options = dict(small="self", budget=budget, features=features, stories=8)
    lm = apply(dense, {"router": options})
    _, tune = halves(examples_of("router", dense, lm.decode.small, 8, 8, 1, ""))
    cost = [sum(work(model, e.prompt, 1) for e in tune) for model in (lm, dense)]
    assert budget - 0.1 < cost[0] / cost[1] < budget + 0.1


# What is learned ---------------------------------------------------------------------------------


def test_classifier_and_threshold_are_set_on_different_halves(monkeypatch):
    """First half: the small model is good enough after a 5, not after a 6. Second: only prompts
    that end with 6, of which one in two is to be routed to it."""
    answer = Answer([2], [0.0], [0.0], True)
    learn = [Example([n, last], answer, last == 5) for n in range(4) for last in (5, 6)]
    tune = [Example([1] * n + [6], answer, True) for n in range(1, 9)]
    monkeypatch.setattr(module, "examples_of", lambda *_: learn + tune)
    monkeypatch.setattr(module, "relative_cost", lambda *_: 0.0)
    loop = router(tiny_lm(), small="self", budget=0.5).decode
    assert loop.score([1, 5])[0] > 0.6 > 0.4 > loop.score([1, 6])[0]
    routed = [loop.score(e.prompt)[0] >= loop.cut for e in tune]
    assert loop.cut < 0.5 and sum(routed) >= 4, "no prompt of the second half would be routed"


@cache
def shipped():
    lm, small = minitx.load("stories"), minitx.load("stories-draft").model
    return small, examples_of("router", lm, small, 24, 8, 1, "")


def test_routed_prompts_are_easier_than_random_ones():
    """On stories, on texts that it has not learned from: any share of them that is routed by score
    has more right answers, at the same cost, if right ones score higher than others."""
    small, examples = shipped()
    learn, tune = halves(examples)
    w, b = learned(PromptTokens(), small, learn, np.float32)
    right = np.array([e.agrees for e in tune])
    scores = np.array([PromptTokens()(small, None, e.prompt) @ w + b for e in tune])
    higher = scores[right][:, None] > scores[~right]  # at random in half of the pairs
    assert higher.mean() > 0.57, "the router does not tell easy prompts from others"


# Messages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(threshold=0.5, budget=0.5), "got both threshold and budget"),
        (dict(budget=0.1), "no threshold meets budget=0.1"),
        (dict(small="no such model"), "router cannot load its small"),
        (dict(tokens=60), "texts of more than tokens=60 tokens, and got none"),
    ],
    ids=str,
)
def test_bad_options_are_refused_in_a_sentence(options, words):
    with pytest.raises(MinitxError, match=words) as caught:
        apply(tiny_lm(), {"router": {"small": "self", "stories": 2} | options})
    assert "router" in str(caught.value) and "\n" not in str(caught.value)
