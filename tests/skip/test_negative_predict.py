"""negative_predict: what is predicted, how it is tuned, what that computes, and what it costs on
stories-relu."""

from dataclasses import replace
from functools import cache

import literal_negative_predict as literal
import numpy as np
import pytest
from same import assert_same
from tiny import WIDE, check_close, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.model import FFN, Linear
from minitx.shared.quality_monitor import Monitored
from minitx.skip.negative_predict import Plan, Predicted, plan_of, thresholds, tuned
from minitx.technique import apply, blocks_of, swap
from minitx.training.loss import token_losses

RNG = np.random.default_rng(6)
IDS = RNG.integers(0, 258, 40)


def made(w, b, prefix, threshold, others=None):
    plan = Plan(prefix, np.broadcast_to(np.asarray(threshold, float), w.shape[1]), 0.0)
    return Predicted.of(Linear(w, b), plan, others)


def run(part, x):
    """The neurons, multiply-adds, and dot products finished."""
    with counting(part) as counts:
        h = part(x)
    assert counts.events["dot products"] == h.size
    return h, counts.total().multiply_adds, counts.events["dot products finished"]


def test_worked_example_by_hand():
    """w = 1 -3 2, so the order is input 1, 2, 0. x = 2 1 1: after a prefix of 2 terms -3 + 2 = -1,
    and in the end 1. Threshold -2: finished, 1. Threshold 0: predicted negative, the 1 is lost."""
    x, w = np.array([[2.0, 1, 1]]), np.array([[1.0], [-3], [2]])
    for threshold, value, terms in ((-2.0, 1, 3), (0.0, 0, 2)):
        h, work, finished = run(made(w, None, 2, threshold), x)
        assert h.item() == value and finished == (terms == 3), f"threshold {threshold}"
        assert work == terms + 1, "the terms and a comparison"
        assert literal.predict([2, 1, 1], [1, -3, 2], 0, 2, threshold) == (value, terms)


@pytest.mark.parametrize("prefix", [1, 4, 11, 12])
@pytest.mark.parametrize("threshold", [-np.inf, -1.0, 0.0, np.inf])
def test_equals_the_literal_version(prefix, threshold):
    x, w, b = RNG.standard_normal((2, 3, 12)), RNG.standard_normal((12, 9)), RNG.standard_normal(9)
    h, work, finished = run(made(w, b, prefix, threshold), x)
    by_hand = [
        literal.predict(row.tolist(), w[:, j].tolist(), b[j], prefix, threshold)
        for row in x.reshape(-1, 12)
        for j in range(9)
    ]
    assert_same(h.reshape(-1), [value for value, _ in by_hand], "neurons", atol=1e-12)
    assert work == sum(terms for _, terms in by_hand) + 6 * 9, "other sums were finished"
    if threshold == -np.inf:
        check_close(h, np.maximum(x @ w + b, 0), 1e-12, "no threshold: the dense neurons")


@pytest.mark.parametrize("miss", [0.0, 0.1, 0.5, 1.0])
def test_thresholds_lose_the_given_share_of_positive_values(miss):
    x, w, b = RNG.standard_normal((60, 12)), RNG.standard_normal((12, 9)), RNG.standard_normal(9)
    plan = plan_of(Linear(w, b), x, 5, miss)
    h, work, finished = run(made(w, b, 5, plan.threshold), x)
    dense = np.maximum(x @ w + b, 0)
    for j in range(9):
        expected = literal.threshold(x.tolist(), w[:, j].tolist(), b[j], 5, miss)
        positive = dense[:, j] > 0
        lost = (positive & (h[:, j] == 0)).sum()
        if expected is None:
            assert lost == positive.sum(), f"neuron {j}: a share of 1 may lose all"
            continue
        assert plan.threshold[j] == pytest.approx(expected, abs=1e-3), f"neuron {j}"
        assert lost == int(miss * positive.sum() + 1e-9), f"neuron {j} loses {lost} values"
    assert work == pytest.approx(plan.work * 60 * 9), "the plan's work is not the measured one"


def test_nan_is_not_predicted_negative():
    h = made(np.ones((4, 3)), None, 2, 0.0)(np.full((1, 4), np.nan))
    assert np.isnan(h).all()


def test_neuron_that_is_never_positive_is_predicted_negative_below_what_was_seen():
    sums, none = np.array([[-3.0], [-1], [-2]]), np.zeros((3, 1), bool)
    assert -1 < thresholds(sums, none, 0.0) < -0.99


def test_same_token_rounded_differently_is_on_the_same_side():
    sums = np.array([[0.3], [-0.2], [0.1]], np.float32)
    threshold = thresholds(sums.astype(np.float64), np.ones((3, 1), bool), 0.0)
    assert -0.2001 < threshold < np.nextafter(np.float32(-0.2), np.float32(-1))


def test_prefix_is_the_one_that_leaves_the_fewest_multiply_adds():
    x, w = RNG.standard_normal((80, 32)), RNG.standard_normal((32, 20))
    w[5:] *= 0.05  # five inputs decide
    up = Linear(w, np.full(20, -2.0))
    best = tuned(up, x, None, 0.05)
    assert best.prefix == 4, "of 4, 8, 12 ... the first that holds most of the five"
    for k in range(4, 32, 4):
        assert plan_of(up, x, k, 0.05).work >= best.work
    assert [tuned(up, x, share, 0.05).prefix for share in (0.001, 0.25, 0.5)] == [1, 8, 16]
    assert tuned(Linear(w, np.full(20, 9.0)), x, None, 0.0) is None, "nothing to save: dense"


def test_baseline_drops_as_many_neurons_of_each_token():
    x, w = RNG.standard_normal((30, 12)), RNG.standard_normal((12, 9))
    others = np.random.default_rng(0).permutation(9)
    h, work, finished = run(made(w, None, 4, 0.0), x)
    random, same, as_many = run(made(w, None, 4, 0.0, others), x)
    assert (work, finished) == (same, as_many), "it costs another number of multiply-adds"
    dense = np.maximum(x @ w, 0)
    right, chance = ((dense - found).sum() for found in (h, random))
    assert right < 0.3 * chance, f"it loses {right:.1f}, chance {chance:.1f}"


def test_model_with_large_matrices():
    """A miss of 0 on the text that it was calibrated on is exact there."""
    dense = to_column_major(tiny_lm(model=tiny_model("gpt2", dtype=np.float64, **WIDE)))
    options = {"prefix": 0.5, "miss": 0.0}
    lm = apply(dense, {"negative_predict": options, "zero_skip": {}}, calibrate=IDS)
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")
    for block in blocks_of(lm):
        assert type(block.ffn.expand) is Predicted
        assert block.ffn.expand.w.flags.c_contiguous, "a neuron's weights are not contiguous"


def test_monitor_runs_the_exact_ffn_now_and_then():
    options = {"prefix": 0.25, "miss": 0.5, "stories": 1, "monitor": 4, "limit": 1e-9}
    dense = tiny_lm("gpt2", dtype=np.float64)
    lm = apply(dense, {"negative_predict": options})
    for block in blocks_of(lm):
        assert type(block.ffn) is Monitored and type(block.ffn.versions[0]) is FFN
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["quality checks"] == 20, "every 4th of 40 tokens, in two layers"
    late = counts.events["dot products"]
    assert late < 2 * 10 * 24 * 2, "after the first check, which fails, the FFNs run exactly"


@pytest.mark.parametrize("family, activation", [("llama", "SwiGLU"), ("gpt_neox", "gelu")])
def test_models_without_relu_are_refused(family, activation):
    with pytest.raises(MinitxError, match=f"negative_predict needs FFNs with ReLU.*{activation}"):
        apply(tiny_lm(family), {"negative_predict": {}})


def test_other_formats_are_refused_by_name():
    for other in ("quantize", "function_tables", "negative_skip"):
        with pytest.raises(MinitxError, match="negative_predict") as caught:
            apply(tiny_lm("gpt2"), {"negative_predict": {"stories": 1}, other: {}})
        assert other in str(caught.value)


def test_nothing_to_save_is_said():
    lm = tiny_lm("gpt2")
    up = lm.model.stack.blocks[0].ffn.expand.up
    always = swap(lm, Linear, lambda w: replace(w, b=w.b + 99) if w.w.shape == up.w.shape else w)
    with pytest.warns(MinitxWarning, match="negative_predict changed nothing: with miss=0.02"):
        assert apply(always, {"negative_predict": {"stories": 1}}).model is always.model


@cache
def loaded():
    return minitx.load("stories-relu")


def test_on_stories_relu_the_prediction_is_better_than_random_predictions():
    dense = loaded()
    ids = encode(dense.tokenizer, held_out(dense, 1))[0].ids[:60]

    def figures(options):
        lm = apply(dense, {"negative_predict": {"stories": 2} | options}) if options else dense
        with counting(lm) as counts:
            losses = token_losses(lm.logits(ids[:-1]), np.array(ids[1:]))
        return float(losses.mean()), counts.total().multiply_adds

    (before, all_of_it), (after, work), (random, same) = map(
        figures, ({}, {"miss": 0.02}, {"choose": "random"})
    )
    assert work == pytest.approx(same, rel=0.03), "not at equal cost"
    assert 0.89 < work / all_of_it < 0.94, f"{work / all_of_it:.3f} of the multiply-adds"
    assert -0.01 < after - before < 0.03, f"{after - before:+.4f} nats per token"
    assert random - before > 1, f"the random baseline costs {random - before:+.3f}"
