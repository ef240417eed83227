"""The logarithms of a model's next-token probabilities."""

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """ln softmax(logits) over the last axis (..., V), in float64."""
    z = logits.astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))
