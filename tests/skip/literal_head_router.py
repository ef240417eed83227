"""Mixture-of-Head attention, literally: one token, one head, one number at a time, in plain loops.

Only the dense model's norms, projections, rotation and feed-forward networks are taken from minitx.
"""

import math

import numpy as np


def norm_scores(queries, layer):
    """The length of each head's query: ``queries`` is a list of H lists of d numbers."""
    return [math.sqrt(sum(x * x for x in head)) for head in queries]


def selected(scores, shared: int, running: int) -> list[int]:
    """The shared heads, and of the others those with the highest probability: the authors' way of
    ranking, with the deviation and the softmax."""
    routed = scores[shared:]
    mean = sum(routed) / len(routed)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in routed) / max(len(routed) - 1, 1)) or 1.0
    top = max(s / deviation for s in routed)
    e = [math.exp(s / deviation - top) for s in routed]
    gates = [x / sum(e) for x in e]
    best = sorted(range(len(routed)), key=lambda h: (-gates[h], h))[: running - shared]
    return sorted([*range(shared), *(shared + h for h in best)])


def attention(attn, x, layer, shared, running, score, positions):
    """y (T, D) of the attention part for x (T, D), and the heads that each token ran."""
    T, H, K = len(x), attn.heads, attn.kv_heads
    q, k, v = (a.reshape(T, heads, -1) for a, heads in zip(attn.qkv(attn.norm(x)), (H, K, K)))
    d = q.shape[-1]
    ran = [selected(score(q[t].tolist(), layer), shared, running) for t in range(T)]
    q, k = (attn.rope(a.swapaxes(0, 1), positions).swapaxes(0, 1) for a in (q, k))
    y = np.zeros((T, attn.out.w.shape[1]))
    for t in range(T):
        if attn.out.b is not None:
            y[t] += attn.out.b
        for h in ran[t]:
            of_head = h * K // H
            scores = [float(q[t, h] @ k[s, of_head]) / math.sqrt(d) for s in range(t + 1)]
            e = [math.exp(s - max(scores)) for s in scores]
            ctx = sum((w / sum(e)) * v[s, of_head] for s, w in enumerate(e))
            for i in range(d):
                y[t] += ctx[i] * attn.out.w[h * d + i]
    return y, ran


def run(model, ids, shared: int, running: int, score=norm_scores):
    """Logits (T, V) of the dense ``model`` with head routing, and the heads that ran, by layer and
    token."""
    T, state = len(ids), model.new_state()
    x, ran = model.embed(np.array(ids), slice(0, T)), []
    for index, block in enumerate(model.stack.blocks):
        layer = state.layers[index].take(T)
        y, heads = attention(block.attn, x, index, shared, running, score, layer.tokens)
        ran.append(heads)
        if type(block).__name__ == "ParallelBlock":
            x = x + y + block.ffn(x, layer)
        else:
            x = x + y
            x = x + block.ffn(x, layer)
    return model.head(model.norm(x)), ran
