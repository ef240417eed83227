"""LazyLLM, literally: one token, one layer and one head at a time, with dictionaries for caches.

KV[index][i] = (k, v): keys and values of token i in that layer, each head by itself.
aux[index][i] = the input (D,) of that layer for token i, while the token waits there.
The norms, projections and feed-forward networks are those of the dense model.
"""

import math
from collections import Counter

import numpy as np

from minitx.model import ParallelBlock
from minitx.state import Tokens


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
                self.KV[index][i] = self.keys_and_values(block.attn, self.aux[index][i], i)
            a = {}  # a[i]: attention weights, one dict {token: weight} for each head
            for i in todo:
                x = self.aux[index].pop(i)  # it waits no longer
                y, a[i] = self.run(block, x, i, [(j, *self.KV[index][j]) for j in cand if j <= i])
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

    def keys_and_values(self, attn, x, i):
        """Two lists of rows (d,), one for each key head."""
        k, v = attn.qkv.kv(attn.norm(x[None]))  # (1, K*d)
        k = np.split(k, attn.kv_heads, -1)
        k = [attn.rope(head[None], Tokens(slice(i, i + 1)))[0, 0] for head in k]
        return k, [head[0] for head in np.split(v, attn.kv_heads, -1)]

    def run(self, block, x, i, seen):
        """Token i with input x (D,) through a block, attending to ``seen``: its output (D,), and
        for each query head a dict {token: attention weight}."""
        attn = block.attn
        q = np.split(attn.qkv.q(attn.norm(x[None])), attn.heads, -1)
        mixed, weights = [], []
        for h, head in enumerate(q):
            head = attn.rope(head[None], Tokens(slice(i, i + 1)))[0, 0]  # (d,)
            group = h // (attn.heads // attn.kv_heads)
            score = {j: float(head @ k[group]) / math.sqrt(len(head)) for j, k, _ in seen}
            largest = max(score.values())
            e = {j: math.exp(s - largest) for j, s in score.items()}
            p = {j: value / sum(e.values()) for j, value in e.items()}
            mixed.append(sum(p[j] * v[group] for j, _, v in seen))
            weights.append(p)
        attended = attn.out(np.concatenate(mixed)[None])[0]
        if isinstance(block, ParallelBlock):
            return x + attended + block.ffn(x[None], None)[0], weights
        h = x + attended
        return h + block.ffn(h[None], None)[0], weights
