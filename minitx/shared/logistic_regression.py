"""Logistic regression by Newton's method, for gates and classifiers on hidden states."""

import numpy as np

NEWTON_STEPS = 8  # each about doubles the number of correct digits


def sigmoid(z):
    """1 / (1 + exp(-z)), by the hyperbolic tangent, which cannot overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * z)


def standard(x) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the standard deviation (D,) of each feature of x (n, D); the latter is Inf where
    all examples have the same value, so that (x - mean) / spread is 0 there."""
    spread = x.std(0)
    same = spread <= 1e-6 * np.sqrt((x**2).mean())
    return x.mean(0), np.where(same, np.inf, spread)


def fit_logistic(x, target, weight, ridge: float) -> tuple[np.ndarray, float]:
    """w (D,) in float64 and b, so that sigmoid(x w + b) predicts ``target`` (n,), numbers from 0 to
    1, from x (n, D).

    Newton's method (iteratively reweighted least squares) on standardized features. It minimizes

        - sum_i weight[i] * (target[i] log p[i] + (1 - target[i]) log(1 - p[i])) + ridge |w|^2 / 2

    with p = sigmoid(x w + b), for weight (n,). b has no penalty; a feature that is the same in all
    examples, up to rounding, has weight 0.
    """
    x = x.astype(np.float64)
    mean, spread = standard(x)
    x = np.concatenate([(x - mean) / spread, np.ones((len(x), 1))], axis=1)  # (n, D + 1)
    penalty = np.full(x.shape[1], ridge)
    penalty[-1] = 1e-9  # only enough to keep the equations solvable
    w = np.zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        p = sigmoid(x @ w)
        gradient = x.T @ (weight * (p - target)) + penalty * w
        hessian = (x.T * (weight * p * (1 - p))) @ x + np.diag(penalty)
        w -= np.linalg.solve(hessian, gradient)
    scaled = w[:-1] / spread
    return scaled, float(w[-1] - scaled @ mean)
