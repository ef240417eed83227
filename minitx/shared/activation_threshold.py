"""Select the activations that are above a threshold in magnitude, or as many at random."""

import numpy as np

from minitx import ledger
from minitx.shared.share import share_of
from minitx.tree import Part, part, table

LIFT = 1 + 2.0**-16  # more than rounding changes, less than matters


class Magnitudes:
    """The sorted magnitudes of activations, for quantiles of them."""

    def __init__(self, values):
        self.sorted = np.sort(abs(values), axis=None)

    def threshold(self, share: float) -> float:
        """t such that this share of the magnitudes is at most t: a quantile. -1 for none of them.

        t is a little above the magnitude that it is taken from. The same token in another text has
        the same activation up to rounding, and must not be above t here and below it there."""
        count = share_of(len(self.sorted), share)
        return float(self.sorted[count - 1]) * LIFT if count else -1.0


@part
class AboveThreshold(Part):
    """Active are the numbers that exceed the threshold in magnitude."""

    threshold: float

    def __call__(self, x):
        """x (..., n) -> booleans (..., n)."""
        ledger.count(x.size)  # comparisons
        return is_above(x, self.threshold)


def is_above(x, threshold: float):
    return ~(abs(x) <= threshold)  # NaN counts as above, so that it is not hidden


STRIDE = 7919  # a prime


@part
class AsManyAtRandom(Part):
    """Random baseline: for each token n activations, as many as are above the threshold, that are
    consecutive in a random order. The first one depends on n, so that tokens differ."""

    threshold: float
    rank: np.ndarray = table()  # (inputs,): the place of each in the order

    @staticmethod
    def of(threshold: float, inputs: int, seed) -> "AsManyAtRandom":
        return AsManyAtRandom(threshold, np.random.default_rng(seed).permutation(inputs))

    def __call__(self, x):
        ledger.count(x.size)
        n = is_above(x, self.threshold).sum(-1, keepdims=True)
        return (self.rank + STRIDE * n) % len(self.rank) < n
