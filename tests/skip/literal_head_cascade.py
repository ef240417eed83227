"""SpAtten's cascade head pruning, literally: one head, one query and one key at a time.

Only the norms and feed-forward networks are those of the model. Queries, keys and values are
projected head by head, with the slices of the matrices that belong to a head.
"""

import math

import numpy as np

from minitx.model import ParallelBlock
from minitx.state import Tokens


class Cascade:
    """One sequence. ratios[l]: p_l, the share of the alive heads that is pruned after layer l."""

    def __init__(self, model, ratios):
        self.model, self.ratios = model, ratios
        self.blocks = model.stack.blocks
        self.H = self.blocks[0].attn.heads
        self.s = [0.0] * self.H
        self.keys = [[] for _ in self.blocks]  # [layer][position] -> one key for each key head
        self.values = [[] for _ in self.blocks]
        self.alive_in: list[list[int]] = []  # the heads that each layer of the last step has run

    def step(self, ids):
        """Logits (T, V) of the ids, which continue the sequence."""
        first = len(self.keys[0])
        x = self.model.embed(np.array(ids), slice(first, first + len(ids)))
        alive = list(range(self.H))
        self.alive_in = []
        for index, block in enumerate(self.blocks):
            self.alive_in.append(alive)
            y = self.attention(index, block.attn, x, first, alive)
            if type(block) is ParallelBlock:
                x = x + y + block.ffn(x, None)
            else:
                x = x + y
                x = x + block.ffn(x, None)
            alive = self.prune(alive, self.ratios[index])
        return self.model.head(self.model.norm(x))

    def attention(self, index, attn, x, first, alive):
        d, group = len(attn.out.w) // attn.heads, attn.heads // attn.kv_heads
        n = attn.norm(x)
        for t in range(len(x)):
            where = Tokens(slice(first + t, first + t + 1))
            key, value = (
                [of_head(m, n[t], j, d) for j in range(attn.kv_heads)]
                for m in (attn.qkv.k, attn.qkv.v)
            )
            self.keys[index].append([attn.rope(k[None, None], where)[0, 0] for k in key])
            self.values[index].append(value)
        y = np.zeros_like(x)
        for t in range(len(x)):
            where = Tokens(slice(first + t, first + t + 1))
            if attn.out.b is not None:
                y[t] += attn.out.b
            for m in alive:
                query = attn.rope(of_head(attn.qkv.q, n[t], m, d)[None, None], where)[0, 0]
                seen = range(first + t + 1)
                scores = [
                    float(query @ self.keys[index][i][m // group]) / math.sqrt(d) for i in seen
                ]
                weights = [math.exp(score - max(scores)) for score in scores]
                e = np.zeros(d)
                for i in seen:
                    e += weights[i] / sum(weights) * self.values[index][i][m // group]
                self.s[m] += float(sum(abs(number) for number in e))
                y[t] += e @ attn.out.w[m * d : m * d + d]
        return y

    def prune(self, alive, ratio):
        count = max(1, math.floor(len(alive) * (1 - ratio) + 1e-9))
        best = sorted(alive, key=lambda m: (-self.s[m], m))[:count]
        return sorted(best)


def of_head(linear, x, head, d):
    """What a matrix makes of x (D,) for one head."""
    own = slice(head * d, head * d + d)
    return x @ linear.w[:, own] + (0 if linear.b is None else linear.b[own])
