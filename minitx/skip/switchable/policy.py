"""The policy network of switchable, and the units that it decides about.

Letters: D width, L layers, T tokens; U = 2 (L - 1) units: attention and FFN of every layer but 0.
"""

from typing import NamedTuple

import numpy as np

from minitx import ops
from minitx.technique import blocks_of
from minitx.tree import Part, part

HIDDEN = 16  # tanh neurons of the network


class Unit(NamedTuple):
    """An attention or FFN sub-layer that may be skipped."""

    slot: str  # "attn" or "ffn"
    layer: int

    def __str__(self) -> str:
        return f"{self.slot}{self.layer}"


def units_of(lm) -> list[Unit]:
    """All U units in the order in which they run. Layer 0 always runs: the policy reads it."""
    return [Unit(slot, i) for i in range(1, len(blocks_of(lm))) for slot in ("attn", "ffn")]


@part
class PolicyNetwork(Part):
    """p = sigmoid(tanh(s W1 + b1) W2 + b2): the probability to keep each unit, for s (D,), the mean
    over the prompt's tokens of layer 0's output."""

    w1: np.ndarray  # (D, hidden)
    b1: np.ndarray  # (hidden,)
    w2: np.ndarray  # (hidden, U)
    b2: np.ndarray  # (U,)

    def __call__(self, s):
        """(U,) booleans: the units that run."""
        return self.logits(s[None])[0] > 0  # p > 0.5

    def logits(self, s):
        """(n, U) for the pooled prompts s (n, D)."""
        a = np.tanh(ops.linear(s, self.w1, self.b1))  # (n, hidden)
        return ops.linear(a, self.w2, self.b2)


@part
class TokenPolicy(Part):
    """r = sigmoid(h w + s v + b): the probability to keep each prompt token, for layer 0's output h
    (T, D) and its mean s."""

    w: np.ndarray  # (D, 1)
    v: np.ndarray  # (D, 1)
    b: np.ndarray  # (1,)

    def __call__(self, h):
        """Indices of the tokens that are kept, in order; the first and the last always are."""
        kept = self.logits(h, h.mean(0)) > 0  # r > 0.5
        kept[[0, -1]] = True
        return np.flatnonzero(kept)

    def logits(self, h, s):
        """(T,)"""
        return (ops.linear(h, self.w) + ops.linear(s[None], self.v, self.b))[:, 0]
