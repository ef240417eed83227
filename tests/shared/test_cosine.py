"""Cosines by hand, in either dtype."""

import numpy as np
import pytest
from same import assert_same

from minitx.ledger import counting
from minitx.shared.cosine import cosine
from minitx.skip.early_exit.confidence import Saturation


def test_cosine_by_hand():
    """(3, 4) . (4, 4) = 28 over 5 sqrt(32); orthogonal: 0; a zero row: 0; the same direction: 1."""
    a = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    b = np.array([[4.0, 4.0], [0.0, 1.0], [1.0, 1.0], [4.0, 0.0]])
    assert_same(cosine(a, b), [28 / 5 / 32**0.5, 0, 0, 1], tolerance=1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cosine_keeps_the_dtype(dtype):
    a = np.random.default_rng(0).standard_normal((5, 8)).astype(dtype)
    assert cosine(a, a).dtype == dtype
    assert_same(cosine(a, -a), -np.ones(5), tolerance=1e-6)


def test_cosine_counts_three_multiply_adds_per_number():
    """a . b, a . a and b . b."""
    a = np.ones((5, 8))
    with counting(part := Saturation()) as counts:
        part(a, a, 2, None)
    assert counts.total().multiply_adds == 3 * 5 * 8
