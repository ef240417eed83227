"""Exercises 7 to 11: the solutions do what minitx's own parts do, in float64."""

import numpy as np
from same import assert_same

from minitx.learn import ex07_fold_norm as ex07
from minitx.model import Linear
from minitx.shared.folding import fold_into

RNG = np.random.default_rng(0)


def test_fold_equals_the_library():
    gain, bias, W, b = (RNG.standard_normal(shape) for shape in (5, 5, (5, 7), 7))
    found_W, found_b = ex07.fold(gain, bias, W, b)
    expected = fold_into(Linear(W, b), gain, bias)
    assert_same(found_W, expected.w, "the folded matrix", tolerance=1e-12)
    assert_same(found_b, expected.b, "the folded bias", tolerance=1e-12)
