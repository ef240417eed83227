"""Random scores for baselines: they select as much as a criterion does, but without looking."""

import numpy as np


def random_scores(L: int, context: int, seed: int) -> np.ndarray:
    """(L, context) scores, uniform in [0, 1): one for each layer and position, so that a token gets
    the same scores whatever is run beside it."""
    return np.random.default_rng(seed).random((L, context), np.float32)
