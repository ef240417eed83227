"""How wrong the logits are: the cross-entropy that training makes small.

The sum over tokens is given, not the mean: the caller divides by the weights of the whole batch, so
parts of a batch that are worked on separately add up exactly.
"""

import numpy as np

from minitx.ops import op
from minitx.training.traced import Traced, rule


def token_losses(logits, targets):
    """``-log softmax(logits)[target]``, in nats: logits (..., V), targets (...) -> (...)."""
    top = logits.max(-1)
    total = np.exp(logits - top[..., None]).sum(-1)
    return np.log(total) + top - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@op
def cross_entropy(logits, targets, weights):
    """The weighted sum of ``token_losses``, a scalar: targets and weights have the shape (...) of
    logits (..., V) without its last axis. A weight of 0 leaves a token out."""
    return (token_losses(logits, targets) * np.asarray(weights, logits.dtype)).sum()


@rule(cross_entropy)
def _cross_entropy(logits, targets, weights):
    """d loss / d logits = weight * (softmax(logits) - one at the target)."""
    x = logits.value

    def pull(g):
        p = x - x.max(-1, keepdims=True)
        np.exp(p, out=p)
        scale = g * np.asarray(weights, x.dtype)
        p *= (scale / p.sum(-1))[..., None]
        rows = p.reshape(-1, p.shape[-1])  # a view: what is written here is written in p
        rows[np.arange(len(rows)), targets.reshape(-1)] -= scale.reshape(-1)
        yield logits, p

    return Traced(cross_entropy(x, targets, weights), pull)
