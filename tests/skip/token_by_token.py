"""One token through one block, head by head, in plain loops: for the literal versions of techniques
that skip tokens. The norms, projections and feed-forward networks are those of the dense model."""

import math

import numpy as np

from minitx.model import ParallelBlock
from minitx.state import Tokens


def keys_and_values(attn, x, i):
    """Token i with input x (D,): two lists of rows (d,), one for each key head."""
    k, v = attn.qkv.kv(attn.norm(x[None]))  # (1, K*d)
    k = np.split(k, attn.kv_heads, -1)
    k = [attn.rope(head[None], Tokens(slice(i, i + 1)))[0, 0] for head in k]
    return k, [head[0] for head in np.split(v, attn.kv_heads, -1)]


def run(block, x, i, seen):
    """Token i with input x (D,) through a block, attending to ``seen``, a list of (token, keys,
    values): its output (D,), and for each query head a dict {token: attention weight}."""
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
