"""The cross-entropy loss.

It is the sum over tokens, not the mean: the caller divides by the total weight of the whole batch,
so that the losses of shards add up exactly.
"""

import numpy as np

from minitx.ops import op
from minitx.training.autograd.array import Traced, rule


def token_losses(logits, targets):
    """``-log softmax(logits)[target]``, in nats: logits (..., V), targets (...) -> (...)."""
    top = logits.max(-1)
    total = np.exp(logits - top[..., None]).sum(-1)
    return np.log(total) + top - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


@op
def cross_entropy(logits, targets, weights):
    """The weighted sum of ``token_losses``, a scalar: logits (..., V), targets and weights (...). A
    token of weight 0 is ignored."""
    return (token_losses(logits, targets) * np.asarray(weights, logits.dtype)).sum()


@rule(cross_entropy)
def _cross_entropy(logits, targets, weights):
    """d loss / d logits = weight * (softmax(logits) - one_hot(target))."""
    x = logits.value

    def backward(g):
        p = x - x.max(-1, keepdims=True)
        np.exp(p, out=p)
        scale = g * np.asarray(weights, x.dtype)
        p *= (scale / p.sum(-1))[..., None]
        rows = p.reshape(-1, p.shape[-1])  # a view of p
        rows[np.arange(len(rows)), targets.reshape(-1)] -= scale.reshape(-1)
        yield logits, p

    return Traced(cross_entropy(x, targets, weights), backward)
