"""Random scores: uniform, and the same for a layer, a position and a seed."""

import numpy as np
from same import assert_same

from minitx.shared.random_baseline import random_scores


def test_random_scores_are_uniform_in_zero_to_one():
    scores = random_scores(8, 512, 0)
    assert scores.shape == (8, 512) and scores.dtype == np.float32
    assert 0 <= scores.min() and scores.max() < 1
    counts = np.histogram(scores, 10, (0, 1))[0]  # 4096 / 10 = 410, standard deviation 19
    assert abs(counts - 409.6).max() < 80, f"not uniform: {counts}"


def test_random_scores_depend_on_the_seed_alone():
    assert_same(random_scores(2, 9, 3), random_scores(2, 9, 3))
    assert (random_scores(2, 9, 3) != random_scores(2, 9, 4)).any()
