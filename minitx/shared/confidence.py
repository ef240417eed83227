"""How sure a model is of a token before it has done all its work, and how sure is sure enough.

Each measure of confidence is a part, called with the stream x (tokens, D) after ``depth`` blocks,
what it was a block before, and the tokens' positions t; it gives c (tokens,), at most 1, and larger
means surer. What is done with that is a technique's business.
"""

import math

import numpy as np

from minitx import ledger
from minitx.tree import Part, part, table


@part
class SoftmaxGap(Part):
    """How far the likeliest token is ahead of the second, by the model's own norm and head."""

    norm: Part
    head: Part

    def __call__(self, x, before, depth: int, t):
        return top_two_gap(self.head(self.norm(x)))


def top_two_gap(z):
    """p_(1) - p_(2) (tokens,) of the softmax p of logits z (tokens, V)."""
    two = np.partition(z, -2)[:, -2:]  # the second largest, then the largest
    total = np.exp(z - two[:, 1:]).sum(-1)
    return (1 - np.exp(two[:, 0] - two[:, 1])) / total


@part
class Saturation(Part):
    """The cosine between the stream and what it was a block ago."""

    def __call__(self, x, before, depth: int, t):
        ledger.count(3 * x.size)
        dot, xx, bb = (np.einsum("td,td->t", u, v) for u, v in ((x, before), (x, x), (before,) * 2))
        return dot / (np.sqrt(xx) * np.sqrt(bb) + 1e-30)


@part
class Probe(Part):
    """A logistic read-out of the stream: how likely is it that nothing will change any more?"""

    w: np.ndarray  # (D,)
    b: float

    def __call__(self, x, before, depth: int, t):
        ledger.count(x.size, self.w.nbytes)
        return sigmoid(x @ self.w + self.b)


def sigmoid(z):
    return 0.5 + 0.5 * np.tanh(0.5 * z)  # nothing in it can overflow


@part
class Drawn(Part):
    """Chance, the same each time for a depth and a position."""

    u: np.ndarray = table()  # (L, context), from 0 up to but not including 1

    def __call__(self, x, before, depth: int, t):
        return self.u[depth, np.atleast_1d(t)]


def draws(L: int, context: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((L, context), np.float32)


@part
class Limit(Part):
    """CALM's lam_t: how confident a token at position t has to be."""

    threshold: float
    tau: float | None
    N: int
    warm_up: int

    def __call__(self, t):
        """lam_t at positions t (...) of a token's own sequence; infinite where none may leave: in
        the warm-up, in padding (t < 0), and with a threshold that no confidence reaches."""
        lam = self.threshold if self.threshold <= 1 else math.inf
        if self.tau is not None and self.threshold <= 1:
            lam = np.clip(0.9 * lam + 0.1 * np.exp(-self.tau * t / self.N), 0, 1)
        return np.where(t < self.warm_up, math.inf, lam)
