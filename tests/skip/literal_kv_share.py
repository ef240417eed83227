"""Cross-layer attention, literally: one token, one head, one key at a time, in plain loops.

Only the dense model's norms, projections, rotation and feed-forward networks are taken from minitx.
"""

import math

import numpy as np


def run(model, ids, first, size, group):
    """Logits (T, V) when layers first .. first + size - 1 share keys and values in groups."""
    T, state = len(ids), model.new_state()
    x = model.embed(np.array(ids), slice(0, T))
    keys = values = None
    for index, block in enumerate(model.stack.blocks):
        layer = state.layers[index].take(T)
        attn, n = block.attn, block.attn.norm(x)
        shares = first <= index < first + size
        if not shares or (index - first) % group == 0:  # it has keys and values of its own
            keys = rotated(attn, attn.qkv.k(n), attn.kv_heads, layer)
            values = heads_of(attn.qkv.v(n), attn.kv_heads)
        queries = rotated(attn, attn.qkv.q(n), attn.heads, layer)
        added = attn.out(attention(queries, keys, values))
        if type(block).__name__ == "ParallelBlock":
            x = x + added + block.ffn(x, layer)
        else:
            x = x + added
            x = x + block.ffn(x, layer)
    return model.head(model.norm(x))


def heads_of(x, heads):
    """x (T, heads*d) -> [head][token] -> (d,)"""
    d = x.shape[-1] // heads
    return [[row[h * d : (h + 1) * d] for row in x] for h in range(heads)]


def rotated(attn, x, heads, layer):
    return attn.rope(np.array(heads_of(x, heads)), layer.tokens)


def attention(queries, keys, values):
    """(T, H*d): each token attends to itself and the tokens before it."""
    shared_by = len(queries) // len(keys)  # query heads per key head
    out = []
    for t in range(len(queries[0])):
        row = []
        for h, head in enumerate(queries):
            q, k, v = head[t], keys[h // shared_by], values[h // shared_by]
            scores = [float(q @ k[s]) / math.sqrt(len(q)) for s in range(t + 1)]
            top = max(scores)
            p = [math.exp(score - top) for score in scores]
            row.append(sum(p[s] * v[s] for s in range(t + 1)) / sum(p))
        out.append(np.concatenate(row))
    return np.array(out)
