"""Memoized attention, literally: one token, one head, one number at a time, in plain loops.

Only the part's norm, projections and rotation are taken from minitx.
"""

import math

import numpy as np


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b)))


def nearest(x, stored, basis):
    """Of the stored (key, map) pairs, the one whose key is nearest to x after both are multiplied
    by the basis; and how far x is from it, relative to the key's length."""

    def short(row):
        return [sum(a * b for a, b in zip(row, column)) for column in zip(*basis)]

    found = [distance(short(x), short(key)) for key, _ in stored]
    key, weights = stored[found.index(min(found))]
    return weights, distance(x, key) / math.sqrt(sum(a * a for a in key))


def softmax(scores):
    e = [math.exp(score - max(scores)) for score in scores]
    return [one / sum(e) for one in e]


def attention(part, x, tokens, stored, basis, radius):
    """y (T, D) for a whole sequence x (T, D); and which tokens were hits. stored: for each
    position its (key, map) pairs, a map being H lists of weights."""
    x = part.norm(x)
    T, H, K = len(x), part.heads, part.kv_heads
    q, k, v = (a.reshape(T, heads, -1) for a, heads in zip(part.qkv(x), (H, K, K)))
    q, k = (part.rope(a.swapaxes(0, 1), tokens).swapaxes(0, 1) for a in (q, k))
    context, hits = np.zeros((T, H, v.shape[-1])), []
    for t in range(T):
        here = stored[t] if t < len(stored) else []
        weights, away = nearest(x[t], here, basis) if here else (None, math.inf)
        hits.append(away <= radius)
        for h in range(H):
            j = h * K // H  # its key head
            scores = [part.attend.scale * float(q[t, h] @ k[s, j]) for s in range(t + 1)]
            p = weights[h] if hits[-1] else softmax(scores)
            for s in range(t + 1):
                context[t, h] += p[s] * v[s, j]
    return part.out(context.reshape(T, -1)), hits
