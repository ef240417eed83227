"""Early exit, literally: one token at a time, one layer at a time, in plain loops.

Only the dense model's blocks, norm and head are taken from minitx. Keys and values are never filled
in: a token that has left is run through a layer's attention and feed-forward network in the dense
way, from the state that it left with, and what comes out is thrown away.
"""

import math

import numpy as np


def gap(z) -> float:
    """The softmax's largest less its second largest, over Python floats."""
    top = float(max(z))
    e = sorted(math.exp(float(v) - top) for v in z)
    return (e[-1] - e[-2]) / sum(e)


def cosine(a, b) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, b))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))


def lam(threshold, tau, N, t) -> float:
    if tau is None:
        return threshold
    return min(max(0.9 * threshold + 0.1 * math.exp(-tau * t / N), 0.0), 1.0)


def run(model, ids, measure, threshold, tau, N, first, every, warm_up):
    """The dense ``model`` with copied states: logits (T, V), and after how many layers each token
    left (T,)."""
    L, state = len(model.stack.blocks), model.new_state()
    logits, depths = [], []
    for t, token in enumerate(ids):
        h = [model.embed(np.array([token]), slice(t, t + 1))]
        left = None
        for i in range(L):
            block, layer = model.stack.blocks[i], state.layers[i]
            if left is None and t >= warm_up and i >= first and (i - first) % every == 0:
                if measure == "softmax":
                    c = gap(model.head(model.norm(h[i]))[0])
                else:
                    c = cosine(h[i][0], h[i - 1][0]) if i > 1 else -math.inf
                if c >= lam(threshold, tau, N, t):
                    left = i
            out = block(h[i] if left is None else h[left], layer.take(1))
            h.append(out)
        left = L if left is None else left
        depths.append(left)
        logits.append(model.head(model.norm(h[left]))[0])
    return np.array(logits), np.array(depths)


def teacher_forced(model, ids, depths):
    """Logits (T, V) read off the dense model after so many layers (T,), of one dense pass."""
    state, T = model.new_state(), len(ids)
    h = [model.embed(np.array(ids), slice(0, T))]
    for block, layer in zip(model.stack.blocks, state.layers):
        h.append(block(h[-1], layer.take(T)))
    rows = [h[depth][t] for t, depth in enumerate(depths)]
    return model.head(model.norm(np.array(rows)))
