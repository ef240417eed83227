"""SpAtten's cascade token pruning, literally: one token, one layer and one head at a time, with
dictionaries for caches and for the attention that tokens receive.

KV[index][i] = (k, v): keys and values of token i in that layer, each head by itself; a token that
is pruned there has none.
"""

import math
from collections import defaultdict

import numpy as np
from token_by_token import keys_and_values, run


class SpAtten:
    """One sequence. ``shares``: of all tokens so far, what each layer keeps."""

    def __init__(self, model, shares, correct=True):
        self.model, self.shares, self.correct = model, shares, correct
        self.n = 0
        self.KV = [{} for _ in shares]
        self.received, self.uniform = defaultdict(float), defaultdict(float)
        self.pruned = 0

    def step(self, ids):
        """The hidden states (T, D) of the ids, which continue the sequence: after the layers that
        each of them has run."""
        first, last = self.n, self.n + len(ids) - 1
        x = {}
        for i, token in enumerate(ids, first):
            x[i] = self.model.embed(np.array([token]), slice(i, i + 1))[0]
        self.n += len(ids)
        alive = list(range(self.n))
        for index, block in enumerate(self.model.stack.blocks):
            alive = [i for i in alive if i >= first or i in self.KV[index]]
            alive = self.best(alive, math.ceil(self.shares[index] * self.n - 1e-9), last)
            for later in self.KV[index:]:
                for i in set(later) - set(alive):
                    del later[i]  # pruned here, so gone from all later layers
            new = [i for i in alive if i >= first]
            for i in new:
                self.KV[index][i] = keys_and_values(block.attn, x[i], i)
            for i in new:
                seen = [(j, *self.KV[index][j]) for j in alive if j <= i]
                x[i], weights = run(block, x[i], i, seen)
                for head in weights:
                    for j, weight in head.items():
                        self.received[j] += weight
                        self.uniform[j] += 1 / len(head)
        return np.array([x[i] for i in range(first, self.n)])

    def best(self, alive, count, last):
        """The last token and the best others, ``count`` in all."""
        if len(alive) <= count:
            return alive
        self.pruned += len(alive) - count
        score = {j: self.received[j] / (self.uniform[j] if self.correct else 1) for j in alive}
        others = sorted((j for j in alive if j != last), key=lambda j: (-score[j], j))
        return sorted([last, *others[: count - 1]])
