"""CALM's early exit, one token and one layer at a time, in the paper's steps and with Python loops.

``run`` is kv_fill=copy; ``run_deferred`` is kv_fill=deferred, given where each token exits. Only
the embedding, blocks, norm and head of the dense model are used.

``run`` copies without ``backfill``: a token that has exited still runs every later layer, always
from its exit state, so that each layer caches keys and values made from that state. The output is
dropped.
"""

import math

import numpy as np


def softmax_gap(logits) -> float:
    """p1 - p2: the largest entry of the softmax minus the second largest."""
    largest = max(float(z) for z in logits)
    e = sorted(math.exp(float(z) - largest) for z in logits)
    return (e[-1] - e[-2]) / sum(e)


def cosine(a, b) -> float:
    dot = sum(float(p) * float(q) for p, q in zip(a, b))
    return dot / math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))


def threshold_at(t, threshold, decay, horizon) -> float:
    """Constant, or falling with the position t (CALM: decay is tau, horizon is N)."""
    if decay is None:
        return threshold
    return min(max(0.9 * threshold + 0.1 * math.exp(-decay * t / horizon), 0.0), 1.0)


def run(model, ids, measure, threshold, decay, horizon, first, every, warm_up):
    """Logits (T, V) of the dense ``model`` with early exit, kv_fill=copy, and the number of layers
    that each token ran (T,)."""
    L, state = len(model.stack.blocks), model.new_state()
    if measure == "saturation":
        first = max(first, 2)  # cos(h[1], h[0]) is not used
    logits, depths = [], []
    for t, token in enumerate(ids):
        h = [model.embed(np.array([token]), slice(t, t + 1))]  # h[i] (1, D): after i layers
        exited_after = None
        for i in range(L):
            may_exit = t >= warm_up and i >= first and (i - first) % every == 0
            if exited_after is None and may_exit:
                if measure == "softmax":
                    confidence = softmax_gap(model.head(model.norm(h[i]))[0])
                else:
                    confidence = cosine(h[i][0], h[i - 1][0])
                if confidence >= threshold_at(t, threshold, decay, horizon):
                    exited_after = i
            x = h[i] if exited_after is None else h[exited_after]
            h.append(model.stack.blocks[i](x, state.layers[i].take(1)))
        depth = L if exited_after is None else exited_after
        depths.append(depth)
        logits.append(model.head(model.norm(h[depth]))[0])
    return np.array(logits), np.array(depths)


def dense_after(model, ids, depths):
    """What kv_fill=deferred gives: logits (T, V) of the dense model, where token t is read after
    depths[t] layers. All keys and values are those of the dense model."""
    state, T = model.new_state(), len(ids)
    h = [model.embed(np.array(ids), slice(0, T))]
    for block, layer in zip(model.stack.blocks, state.layers):
        h.append(block(h[-1], layer.take(T)))  # h[i] (T, D): after i layers
    at_exit = [h[depth][t] for t, depth in enumerate(depths)]
    return model.head(model.norm(np.array(at_exit)))


def run_deferred(model, ids, exit_after):
    """Logits (T, V) and the tokens that each layer ran (L lists), with kv_fill=deferred, one token
    at a time. exit_after[t]: the number of layers after which token t exits, or L."""
    L, state = len(model.stack.blocks), model.new_state()
    h, ran, logits = [], [[] for _ in range(L)], []
    for t, token in enumerate(ids):
        h.append(model.embed(np.array([token]), slice(t, t + 1)))  # h[t]: after its last layer
        for l in range(exit_after[t]):  # noqa: E741
            for s in range(t + 1):  # token t, and earlier ones that have not run layer l
                if s not in ran[l]:
                    h[s] = model.stack.blocks[l](h[s], state.layers[l].take(1))
                    ran[l].append(s)
        logits.append(model.head(model.norm(h[t]))[0])
    return np.array(logits), ran
