"""Logistic regression: by hand, at its minimum, and features that say nothing."""

import numpy as np
import pytest

from minitx.shared.logistic_regression import fit_logistic, sigmoid, standard


def test_constant_alone_by_hand():
    # Without a feature, sigmoid(b) is the weighted mean target: (3 * 0.8 + 1 * 0.4) / 4 = 0.7
    w, b = fit_logistic(np.zeros((2, 1)), np.array([0.8, 0.4]), np.array([3.0, 1.0]), 1.0)
    assert w[0] == 0 and sigmoid(b) == pytest.approx(0.7)


def test_gradient_of_the_penalized_loss_is_0_at_the_result():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((50, 4)) * [1, 10, 0.1, 2] + [0, 5, 1, 0]
    target, weight = rng.random(50), rng.random(50)
    w, b = fit_logistic(x, target, weight, ridge=3.0)
    error = weight * (sigmoid(x @ w + b) - target)
    mean, spread = standard(x)
    assert abs(error.sum()) < 1e-7, "d loss / d b"
    gradient = ((x - mean) / spread).T @ error + 3.0 * w * spread
    assert abs(gradient).max() < 1e-7, "d loss / d w of the standardized features"


def test_feature_that_only_rounding_changes_has_weight_0():
    rng = np.random.default_rng(1)
    x = np.stack([rng.standard_normal(20), np.full(20, 5.0) + 1e-9 * rng.random(20)], 1)
    w, _ = fit_logistic(x, (x[:, 1] > x[:, 1].mean()) * 1.0, np.ones(20), 0.1)
    assert w[1] == 0, "a difference of 1e-9 decided"
