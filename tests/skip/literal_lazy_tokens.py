"""LazyLLM, literally: one token, one layer and one head at a time, with dictionaries for caches.

KV[index][i] = (k, v): keys and values of token i in that layer, each head by itself.
aux[index][i] = the input (D,) of that layer for token i, while the token waits there.
The norms, projections and feed-forward networks are those of the dense model.
"""

import math
from collections import Counter

import numpy as np
from token_by_token import keys_and_values, run


class LazyLLM:
    """One sequence. ``cuts``: how many layers have run where tokens are pruned."""

    def __init__(self, model, keep, cuts):
        self.model, self.keep, self.cuts = model, keep, cuts
        L = len(model.stack.blocks)
        self.n = 0
        self.KV = [{} for _ in range(L)]
        self.aux = [{} for _ in range(L + 1)]  # aux[L]: the outputs of the last layer
        self.times_run = Counter()  # (token, layer) -> how often
        self.revived = 0

    def step(self, ids):
        """Logits (V,) after the last of the ids, which continue the sequence."""
        for token in ids:
            where = slice(self.n, self.n + 1)
            self.aux[0][self.n] = self.model.embed(np.array([token]), where)[0]
            self.n += 1
        last = self.n - 1
        cand = list(range(self.n))
        ran = cand  # tokens that the layer before has run in this step
        for index, block in enumerate(self.model.stack.blocks):
            todo = [i for i in cand if i not in self.KV[index]]
            self.revived += len([i for i in todo if i not in ran])
            for i in todo:
                self.KV[index][i] = keys_and_values(block.attn, self.aux[index][i], i)
            a = {}  # a[i]: attention weights, one dict {token: weight} for each head
            for i in todo:
                x = self.aux[index].pop(i)  # it waits no longer
                y, a[i] = run(block, x, i, [(j, *self.KV[index][j]) for j in cand if j <= i])
                self.aux[index + 1][i] = y
                self.times_run[i, index] += 1
            if index + 1 in self.cuts:
                heads = len(a[last])
                score = {j: sum(head[j] for head in a[last]) / heads for j in cand}
                cand = self.best(score, last)
            ran = todo
        y = self.aux[-1].pop(last)
        return self.model.head(self.model.norm(y[None]))[0]

    def best(self, score, last):
        """The last token and the best others, ceil(keep * n) in all."""
        count = math.ceil(self.keep * len(score) - 1e-9)
        others = sorted((j for j in score if j != last), key=lambda j: (-score[j], j))
        return sorted([last, *others[: count - 1]])
