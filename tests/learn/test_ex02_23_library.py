"""The solutions of exercises 2, 4, 5, 6 and 23 do what the library does."""

import numpy as np
from same import assert_same

from minitx import ops
from minitx.learn import ex02_rotary


def test_exercise_2_equals_rotate_with_its_tables():
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((5, 8)), np.array([3, 0, 11, 7, 4])
    cos, sin = ops.rope_tables(8, 12, 500.0, np.float64)
    expected = ops.rotate(x, cos[positions], sin[positions])
    found = ex02_rotary.rotate(x, positions, 500.0)
    assert_same(found, expected, "rotated rows", tolerance=1e-12)
