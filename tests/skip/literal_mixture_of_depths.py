"""Mixture-of-Depths, literally: one token and one block at a time, dictionaries for KV caches.

routers: {number of a block: w (D,)}. Two ways to tell who enters: ``by_threshold``, each token by
itself, as in decoding; ``by_rank``, the k best of the whole text, as in the paper's training.
The norms, projections and feed-forward networks are those of the dense model.
"""

import math

import numpy as np

from minitx.model import ParallelBlock
from minitx.state import Tokens


def by_threshold(threshold):
    def enters(r):
        return {i for i in r if r[i] > threshold}

    return enters


def by_rank(capacity):
    """Exactly k = max(1, int(capacity T)) tokens; of equal ones, the earlier."""

    def enters(r):
        k = max(1, int(capacity * len(r)))
        return set(sorted(r, key=lambda i: (-r[i], i))[:k])

    return enters


def run(model, ids, routers, enters):
    """Logits (T, V) of the ids, and for each routed block who has entered it."""
    x = {i: model.embed(np.array([t]), slice(i, i + 1))[0] for i, t in enumerate(ids)}
    entered = {}
    for index, block in enumerate(model.stack.blocks):
        if index not in routers:
            x = pass_through(block, x)
            continue
        r = {i: float(sum(a * b for a, b in zip(routers[index], x[i]))) for i in x}
        entered[index] = enters(r)
        inside = pass_through(block, {i: x[i] for i in x if i in entered[index]})
        for i, y in inside.items():
            f = y - x[i]  # the block without its residual connection
            x[i] = x[i] + r[i] * f
    return np.array([model.head(model.norm(x[i][None]))[0] for i in x]), entered


def pass_through(block, x):
    """The outputs of a block for tokens {position: x (D,)} that attend to each other, causally."""
    kv, out = {}, {}
    for i in sorted(x):
        kv[i] = keys_and_values(block.attn, x[i], i)
        attended = attend(block.attn, x[i], i, kv)
        if isinstance(block, ParallelBlock):
            out[i] = x[i] + attended + block.ffn(x[i][None], None)[0]
        else:
            h = x[i] + attended
            out[i] = h + block.ffn(h[None], None)[0]
    return out


def keys_and_values(attn, x, i):
    k, v = attn.qkv.kv(attn.norm(x[None]))
    k = [rotated(attn, head, i) for head in np.split(k, attn.kv_heads, -1)]
    return k, [head[0] for head in np.split(v, attn.kv_heads, -1)]


def attend(attn, x, i, kv):
    found = []
    for h, q in enumerate(np.split(attn.qkv.q(attn.norm(x[None])), attn.heads, -1)):
        q, group = rotated(attn, q, i), h // (attn.heads // attn.kv_heads)
        e = {j: math.exp(float(q @ k[group]) / math.sqrt(len(q))) for j, (k, _) in kv.items()}
        found.append(sum(e[j] / sum(e.values()) * v[group] for j, (_, v) in kv.items()))
    return attn.out(np.concatenate(found)[None])[0]


def rotated(attn, head, i):
    return attn.rope(head[None], Tokens(slice(i, i + 1)))[0, 0]
