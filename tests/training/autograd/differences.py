"""Help for the tests of gradients: numbers to differentiate at, and central differences."""

import numpy as np

from minitx.training.autograd import grad_of
from minitx.training.autograd.array import Traced


def draw(*shape, seed=0, low=None):
    """Normal numbers, or numbers from ``low`` upwards, in float64."""
    rng = np.random.default_rng([seed, *shape])
    return np.asarray(rng.standard_normal(shape) if low is None else low + rng.random(shape))


def check(f, *arrays, step=1e-6, within=1e-6):
    """The gradient of sum(f * fixed numbers) with respect to every entry of every array equals its
    central difference, and the traced value equals the plain one bit for bit."""
    plain = f(*arrays)
    mix = draw(*np.shape(plain), seed=99)

    def scalar(*xs):
        return (f(*xs) * mix).sum()

    value, found = grad_of(scalar, *arrays)
    assert value == float(scalar(*arrays))
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
        assert error < within, f"argument {i}: relative error {error:.1e}"
