"""Confidence measures of early exit, and the threshold that a confidence has to reach.

A measure is called with h (tokens, D), the hidden states after ``depth`` layers; previous
(tokens, D), those one layer earlier; and t (tokens,), the tokens' positions in their sequences. It
returns conf (tokens,), at most 1: the larger, the less the remaining layers are expected to change.
"""

import math

import numpy as np

from minitx import ledger
from minitx.shared.cosine import cosine
from minitx.shared.logistic_regression import sigmoid
from minitx.tree import Part, part, table


@part
class SoftmaxGap(Part):
    """CALM's softmax response: p1 - p2, the two largest probabilities by the model's own head."""

    norm: Part
    head: Part

    def __call__(self, h, previous, depth: int, t):
        return softmax_gap(self.head(self.norm(h)))


def softmax_gap(logits):
    """p1 - p2 (tokens,), the two largest entries of softmax(logits), for logits (tokens, V).

    With z1 >= z2 the two largest logits: p1 = 1 / sum exp(z - z1) and p2 = exp(z2 - z1) * p1.
    """
    top = np.partition(logits, -2)[:, -2:]  # (tokens, 2)
    z2, z1 = top[:, 0], top[:, 1]
    return (1 - np.exp(z2 - z1)) / np.exp(logits - z1[:, None]).sum(-1)


@part
class Saturation(Part):
    """Hidden-state saturation: the cosine between the hidden states after and before a layer."""

    def __call__(self, h, previous, depth: int, t):
        return cosine(h, previous)


@part
class ExitProbe(Part):
    """CALM's classifier: the probability that the last layer would predict the same token."""

    w: np.ndarray  # (D,)
    b: float

    def __call__(self, h, previous, depth: int, t):
        ledger.count(h.size, self.w.nbytes)
        return sigmoid(h @ self.w + self.b)


@part
class RandomConfidence(Part):
    """Random baseline: the same confidence each time for a depth and a position."""

    scores: np.ndarray = table()  # (L, context), uniform in [0, 1)

    def __call__(self, h, previous, depth: int, t):
        return self.scores[depth, t]


@part
class ThresholdSchedule(Part):
    """The threshold at each position: constant, or falling along the sequence as in CALM."""

    threshold: float
    decay: float | None  # None: constant
    horizon: int  # positions over which the threshold falls
    warm_up: int  # first tokens, which must not exit

    def __call__(self, t):
        """The threshold at the positions t (...). Inf where a token must not exit: in the warm-up,
        in padding (t < 0), and everywhere if the threshold is above 1."""
        if self.threshold > 1:  # before the clip: 1.1 clipped to 1 is reached by a softmax of 1
            return np.full(np.shape(t), math.inf)
        threshold = self.threshold
        if self.decay is not None:
            decayed = np.exp(-self.decay * np.maximum(t, 0) / self.horizon)
            threshold = np.clip(0.9 * self.threshold + 0.1 * decayed, 0, 1)
        return np.where(t < self.warm_up, math.inf, threshold)
