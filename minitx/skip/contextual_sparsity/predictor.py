"""The predictor, and three ways to select with it: which units (neurons or heads) a token runs.

A selector is called with the normalized input x (..., T, D) of a sub-layer and returns booleans
(..., T, units).
"""

import numpy as np

from minitx import ops
from minitx.shared.coarse import coarse
from minitx.shared.sparse_attention import top_k
from minitx.state import Layer
from minitx.tree import Part, part, table


@part
class Predictor(Part):
    """One score for each unit, z = (x A) B: the higher, the likelier it is active. A map of low
    rank, without biases and without an activation between."""

    a: np.ndarray  # (D, rank)
    b: np.ndarray  # (rank, units)

    def __call__(self, x):
        return ops.linear(ops.linear(x, self.a), self.b)  # (..., units)


def comparable(z):
    """Scores (..., units), rounded so that their order does not depend on the last bits. NaN comes
    first: where x is NaN, units run, so that it is not hidden."""
    z = coarse(z)
    return np.where(np.isnan(z), np.inf, z)


@part
class Above(Part):
    """The units with a score above the threshold: more for one token than for another."""

    predictor: Part
    threshold: float

    def __call__(self, x, layer: Layer):
        return comparable(self.predictor(x)) > self.threshold


@part
class TopK(Part):
    """The ``count`` units with the highest scores; ties go to the lower index."""

    predictor: Part
    count: int

    def __call__(self, x, layer: Layer):
        return top_k(comparable(self.predictor(x)), self.count)


@part
class RandomK(Part):
    """``count`` random units: a baseline. A token has the same ones whatever is run beside it."""

    count: int
    scores: np.ndarray = table()  # (context, units), by position

    def __call__(self, x, layer: Layer):
        selected = top_k(self.scores[layer.tokens.lookup], self.count)  # (T or B, T, units)
        return np.broadcast_to(selected, (*x.shape[:-1], selected.shape[-1]))
