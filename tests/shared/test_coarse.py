"""coarse: what rounding errors separate becomes equal, what differs by more stays apart."""

import numpy as np
from same import assert_same

from minitx.shared.coarse import ERROR, coarse


def test_worked_example_by_hand():
    """1 + 2^-19 has 20 significant bits, 1 + 2^-20 has 21. Beside 1, the number 2^-41 is less than
    half of the smallest unit, 2^-39 (1 = 0.5 * 2^1, so 1 - 40), and 2^-60 a rounding error."""
    assert coarse([1 + 2**-19, 1 + 2**-40]).tolist() == [1 + 2**-19, 1]
    assert coarse([1, 2**-60, -(2**-41)]).tolist() == [1, 0, 0]
    assert coarse([0.0, 0.0]).tolist() == [0, 0]


def test_equal_numbers_stay_equal_in_vectors_of_other_lengths():
    x = np.random.default_rng(0).standard_normal((500, 8))
    x[:, 3] = 0.3
    x[:250] *= np.where(np.arange(8) == 3, 1, 100)
    noisy = x * (1 + 1e-15 * np.random.default_rng(1).standard_normal(x.shape))
    assert_same(coarse(noisy), coarse(x), "rounding errors are left")
    assert len(np.unique(coarse(noisy)[:, 3])) == 1


def test_error_is_bounded():
    x = np.random.default_rng(2).standard_normal((1000, 5)) ** 5
    error = np.linalg.norm(coarse(x) - x, axis=-1)
    assert (error <= ERROR * np.linalg.norm(x, axis=-1)).all() and error.max() > 0
    assert coarse(x.astype(np.float32)).dtype == np.float64
    assert_same(coarse(x).astype(np.float32), coarse(x), "float32 holds 20 bits")
