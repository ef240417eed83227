"""Thresholds as quantiles of magnitudes, and as many at random."""

import numpy as np
import pytest
from same import assert_same

from minitx.shared.activation_threshold import AboveThreshold, AsManyAtRandom, Magnitudes


def test_threshold_is_a_quantile_of_the_magnitudes():
    values = np.array([[-4.0, 1.0], [-2.0, 3.0]])  # magnitudes 1 2 3 4
    for share, inactive in ((0.0, 0), (0.2, 0), (0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)):
        active = AboveThreshold(Magnitudes(values).threshold(share))(values)
        assert (~active).sum() == inactive, f"share {share}"


def test_magnitudes_need_not_be_symmetric_around_zero():
    """icdf(0.5 + p / 2) of a normal distribution would be wrong here."""
    values = np.random.default_rng(0).standard_normal(4000) + 3
    active = AboveThreshold(Magnitudes(values).threshold(0.4))(values)
    assert active.mean() == pytest.approx(0.6)


def test_value_that_set_the_threshold_stays_below_it_if_it_is_rounded_otherwise():
    values = np.random.default_rng(0).standard_normal(1001).astype(np.float32)
    t = Magnitudes(values).threshold(0.5)
    (one,) = values[abs(values) == np.sort(abs(values))[499]]
    for nearby in (one, one * (1 + 4e-7), one * (1 - 4e-7)):
        assert not AboveThreshold(t)(np.array([nearby]))[0], "rounding decides"


def test_zeros_are_below_a_threshold_of_zero():
    relu = np.maximum(np.linspace(-1, 1, 9), 0)  # five zeros
    for share in (0.2, 0.5):
        assert AboveThreshold(Magnitudes(relu).threshold(share))(relu).sum() == 4


def test_random_baseline_selects_as_many_but_others_for_each_token():
    x = np.random.default_rng(0).standard_normal((50, 40))
    largest, random = AboveThreshold(1.0)(x), AsManyAtRandom.of(1.0, 40, 3)(x)
    assert_same(random.sum(1), largest.sum(1), "not the same number")
    assert (random != largest).any(1).all()
    assert random.any(0).mean() > 0.8 and not random.all(0).any(), "the same for every token"
    assert_same(AsManyAtRandom.of(1.0, 40, 3)(x[7]), random[7])
    assert (AsManyAtRandom.of(1.0, 40, 4)(x) != random).any(), "the seed makes no difference"


def test_nan_is_active_and_not_hidden():
    x = np.array([[np.nan, 0.1, 2.0]])
    assert AboveThreshold(1.0)(x).tolist() == [[True, False, True]]
    assert AboveThreshold(np.nan)(x).all(), "calibrated on a model with NaN"
    assert AsManyAtRandom.of(1.0, 3, 0)(x).sum() == 2
