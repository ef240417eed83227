"""Learn then Test: p-values by hand, a simulation of the guarantee, calibration of a model."""

import math

import numpy as np
import pytest
from tiny import TOKENIZER, tiny_model

from minitx.errors import MinitxError
from minitx.lab import learn_then_test as module
from minitx.lab.learn_then_test import (
    binomial_tail,
    calibrate,
    fixed_sequence,
    hoeffding_bentkus,
    loss,
)
from minitx.lm import LM
from minitx.technique import apply


@pytest.mark.parametrize(
    "risk, n, p",
    [(0.02, 500, 0.00125), (0.03, 500, 0.0540), (0, 58, 0.0510), (0, 59, 0.0485)],
)
def test_hoeffding_bentkus_p_values_by_hand(risk, n, p):
    """delta = 0.05. The last two without any loss: e * 0.95^58 = 0.139 and exp(58 ln 0.95) =
    0.0510, so Hoeffding's bound is the smaller; 0.0510 rejects nothing at 0.05, 0.0485 does."""
    assert hoeffding_bentkus(risk, n, 0.05) == pytest.approx(p, rel=0.005)


def test_hoeffding_bentkus_grows_with_the_risk_and_is_one_above_delta():
    found = [hoeffding_bentkus(k / 200, 200, 0.1) for k in range(201)]
    assert all(a <= b for a, b in zip(found, found[1:])) and 0 < found[0]
    assert set(found[20:]) == {1.0} and found[19] <= 1
    assert hoeffding_bentkus(0.02, 1000, 0.05) < hoeffding_bentkus(0.02, 500, 0.05)


@pytest.mark.parametrize("n, p", [(1, 0.3), (7, 0.05), (40, 0.5), (500, 0.01)])
def test_binomial_tail_is_the_sum_of_its_terms(n, p):
    terms = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    for k in range(n + 1):
        assert binomial_tail(k, n, p) == pytest.approx(min(sum(terms[: k + 1]), 1), abs=1e-12)


@pytest.mark.parametrize(
    "values", [(-0.1, 5, 0.1), (1.2, 5, 0.1), (0, 0, 0.1), (0, 5, 0), (0, 5, 1)]
)
def test_hoeffding_bentkus_refuses_losses_and_bounds_out_of_range(values):
    with pytest.raises(MinitxError, match="needs a mean loss in"):
        hoeffding_bentkus(*values)


def test_fixed_sequence_stops_at_the_first_failure():
    asked = []

    def p_values():
        for p in (0.01, 0.05, 0.06, 0.0):
            asked.append(p)
            yield p

    assert fixed_sequence(p_values(), 0.05) == 2
    assert asked == [0.01, 0.05, 0.06], "later p-values should not be computed"
    assert fixed_sequence([0.2, 0.0], 0.05) == 0
    assert fixed_sequence([0.01] * 3, 0.05) == 3
    assert fixed_sequence([math.nan], 0.05) == 0


def test_guarantee_holds_and_is_broken_by_the_naive_rule():
    """Settings with true risks from .005 to .12, the probability that a text's loss is 1. A choice
    whose true risk is above delta is a violation. The naive rule takes the loosest setting whose
    empirical risk is at most delta."""
    draws, n, delta, epsilon = 2000, 500, 0.05, 0.05
    risks = np.array([0.005, 0.01, 0.02, 0.03, 0.035, 0.04, 0.045, 0.049, 0.052, 0.06, 0.08, 0.12])
    u = np.random.default_rng(0).random((draws, n)).astype(np.float32)
    losses = np.stack([(u < risk).sum(1) for risk in risks], axis=1)  # (draws, settings)
    p_of = [hoeffding_bentkus(k / n, n, delta) for k in range(n + 1)]
    violated, naive, useful = 0, 0, 0
    for row in losses:
        safe = fixed_sequence((p_of[k] for k in row), epsilon)
        violated += safe > 0 and risks[safe - 1] > delta
        useful += safe > 2
        naive += risks[np.flatnonzero(row <= delta * n)[-1]] > delta
    bound = epsilon + 3 * math.sqrt(epsilon * (1 - epsilon) / draws)
    assert violated / draws <= bound, "the guarantee is violated"
    assert naive / draws > 0.25 and useful / draws > 0.9


# Calibrating a model -----------------------------------------------------------------------------

TEXTS = np.random.default_rng(1).integers(0, 258, (60, 12)).tolist()
STATIC = dict(measure="random", first=3)  # threshold=0: all exit after three layers


@pytest.fixture(scope="module")
def lm():
    return LM(tiny_model(layers=4), TOKENIZER)


def test_calibrate_takes_the_last_value_of_the_grid_if_the_bound_is_loose(lm):
    found = calibrate(lm, TEXTS, 0.99, grid=(0.9, 0.5, 0.0), **STATIC)
    assert found.options == STATIC | {"threshold": 0.0}
    assert [value for value, _, _ in found.tested] == [0.9, 0.5, 0.0]
    changed = apply(lm, {"early_exit": found.options})
    risks = [loss(changed, ids, lm.logits(ids).argmax(-1)) for ids in TEXTS]
    assert found.tested[-1][1] == pytest.approx(np.mean(risks)) and 0 < np.mean(risks) < 0.99


def test_calibrate_falls_back_to_neutral_if_no_value_is_safe(lm):
    found = calibrate(lm, TEXTS, 0.0001, grid=(0.0,), **STATIC)
    assert found.options == STATIC | {"threshold": 1.1} and len(found.tested) == 1
    changed = apply(lm, {"early_exit": found.options})
    np.testing.assert_array_equal(changed.logits(TEXTS[0]), lm.logits(TEXTS[0]))


def test_calibrate_stops_at_the_first_value_that_is_not_safe(lm):
    grid = (0.99, 0.9, 0.7, 0.5, 0.2, 0.0)
    risks = [row[1] for row in calibrate(lm, TEXTS, 0.99, grid=grid, **STATIC).tested]
    found = calibrate(lm, TEXTS, risks[2] + 0.2, grid=grid, **STATIC)
    assert found.options["threshold"] in grid[2:]
    *passed, last = found.tested
    assert all(p <= 0.05 for *_, p in passed)
    assert last[2] > 0.05 or len(found.tested) == len(grid)


def test_calibrate_works_for_other_techniques(lm):
    found = calibrate(lm, TEXTS, 0.9, grid=(0.99,), technique="ffn_skip", warm_up=2, cold_start=1)
    assert found.options["threshold"] in (0.99, 1.1)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(delta=0.0), "delta must be between 0 and 1; got 0"),
        (dict(epsilon=1.0), "epsilon must be between 0 and 1; got 1"),
        (dict(texts=[]), "at least one text"),
        (dict(technique="exact_head"), "fall back"),
        (dict(technique="early"), "no technique"),
        (dict(grid=(-1.0,)), "threshold"),
    ],
)
def test_calibrate_refuses_bad_arguments_in_one_sentence(lm, change, match):
    with pytest.raises(MinitxError, match=match) as refused:
        calibrate(lm, **dict(texts=TEXTS[:2], delta=0.1) | change)
    assert "\n" not in str(refused.value)


def test_calibrate_default_grid_begins_with_the_safest_value():
    grid = calibrate.__kwdefaults__ or module.calibrate.__defaults__
    (values,) = [value for value in grid if isinstance(value, tuple)]
    assert list(values) == sorted(values, reverse=True) and values[0] < 1
