"""Gradient checking: random arrays, and comparison with central differences."""

import numpy as np

from minitx.training.autograd import grad_of
from minitx.training.autograd.array import Traced


def draw(*shape, seed=0, low=None):
    """Standard normal numbers, or uniform ones in [low, low + 1), in float64."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.standard_normal(shape) if low is None else low + rng.random(shape))


def check(f, *arrays, step=1e-6, within=1e-6):
    """Check the gradient of sum(f * coefficients), with respect to every element of every array,
    against central differences; and that the traced forward pass equals the plain one exactly."""
    plain = f(*arrays)
    coefficients = draw(*np.shape(plain), seed=99)

    def scalar(*xs):
        return (f(*xs) * coefficients).sum()

    value, found = grad_of(scalar, *arrays)
    assert value == float(scalar(*arrays)), "traced and plain value differ"
    assert np.array_equal(f(*map(Traced, arrays)).value, plain)
    for i, (x, got) in enumerate(zip(arrays, found)):
        assert got.shape == x.shape and got.dtype == x.dtype
        expected = np.empty_like(x)
        for at in np.ndindex(x.shape):
            ends = []
            for sign in (1, -1):
                moved = x.copy()
                moved[at] += sign * step
                ends.append(float(scalar(*arrays[:i], moved, *arrays[i + 1 :])))
            expected[at] = (ends[0] - ends[1]) / (2 * step)
        error = np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-3)
        assert error < within, (
            f"gradient of argument {i}: relative error {error:.1e}, expected below {within:.0e}"
        )
