"""Switchable decision, literally: one sequence, one number at a time, in plain loops.

Only the dense model's blocks, norm and head are taken from minitx. ``network`` has the matrices w1
(D, hidden), b1, w2 (hidden, U), b2; ``tokens``, if prompt tokens are dropped, w and v (D, 1), b.
"""

import math

import numpy as np

from minitx.state import Tokens


class Sequence:
    """A running sequence. The first step is the prompt."""

    def __init__(self, model, network, tokens=None):
        self.model, self.network, self.tokens = model, network, tokens
        self.layers = model.new_state().layers
        self.position = 0
        self.keep = None  # unit by unit, once the prompt is read

    def step(self, ids):
        """Logits (T, V) of the next ids."""
        T, blocks = len(ids), self.model.stack.blocks
        positions = [self.position + t for t in range(T)]
        x = self.model.embed(np.array(ids), slice(self.position, self.position + T))
        h = self.block(0, x, positions, run_attention=True, run_ffn=True)
        going = list(range(T))
        if self.keep is None:
            pooled = [sum(float(h[t][i]) for t in range(T)) / T for i in range(len(h[0]))]
            self.keep = [p > 0.5 for p in probabilities(self.network, pooled)]
            if self.tokens is not None:
                going = self.kept_tokens(h, pooled)
        y = np.array([h[t] for t in going])
        for index in range(1, len(blocks)):
            attention, ffn = self.keep[2 * index - 2], self.keep[2 * index - 1]
            y = self.block(index, y, [positions[t] for t in going], attention, ffn)
        out = h.copy()
        for row, t in zip(y, going):
            out[t] = row
        self.position += T
        return self.model.head(self.model.norm(out))

    def block(self, index, x, positions, run_attention, run_ffn):
        block, layer = self.model.stack.blocks[index], self.layers[index]
        layer.tokens = Tokens(np.array(positions))
        entering = x
        if run_attention:
            x = x + block.attn(entering, layer)
        if run_ffn:
            reads = entering if type(block).__name__ == "ParallelBlock" else x
            x = x + block.ffn(reads, layer)
        return x

    def kept_tokens(self, h, pooled):
        w, v, b = self.tokens.w, self.tokens.v, self.tokens.b
        kept = []
        for t in range(len(h)):
            logit = float(b[0])
            for i in range(len(pooled)):
                logit += float(h[t][i]) * float(w[i][0]) + pooled[i] * float(v[i][0])
            if t in (0, len(h) - 1) or 1 / (1 + math.exp(-logit)) > 0.5:
                kept.append(t)
        return kept


def probabilities(network, s):
    """The keep probability of each unit."""
    w1, b1, w2, b2 = network.w1, network.b1, network.w2, network.b2
    hidden = []
    for j in range(len(b1)):
        hidden.append(math.tanh(sum(s[i] * w1[i][j] for i in range(len(s))) + b1[j]))
    found = []
    for u in range(len(b2)):
        logit = sum(hidden[j] * w2[j][u] for j in range(len(hidden))) + b2[u]
        found.append(1 / (1 + math.exp(-logit)))
    return found


def expected_loss(p, loss):
    """E[loss(b)] for b_u ~ Bernoulli(p_u), by enumeration of all 2^U decisions."""
    total = 0.0
    for number in range(2 ** len(p)):
        b = [number >> u & 1 for u in range(len(p))]
        chance = 1.0
        for u in range(len(p)):
            chance *= p[u] if b[u] else 1 - p[u]
        total += chance * loss(b)
    return total
