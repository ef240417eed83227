"""Attention with keys alone in the cache, token by token and head by head, as arXiv 2503.05840 has
it (section on decoding, and the appendix on biases). float64, nothing vectorised but dot products.
"""

import math

import numpy as np


def rotated(x, position, width, base=10000.0):
    """One head's row x (d,): column i turns with column i + width / 2."""
    y, half = list(x), width // 2
    for i in range(half):
        angle = position * base ** (-2 * i / width)
        c, s = math.cos(angle), math.sin(angle)
        y[i], y[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return np.array(y)


def w_kv(w_k, w_v):
    """K W_KV = V for every input: by the inverse, or the right inverse of a wide W_K."""
    D, E = w_k.shape
    if D == E:
        return np.linalg.inv(w_k) @ w_v
    return w_k.T @ np.linalg.inv(w_k @ w_k.T) @ w_v


def attend(rows, w, heads, rope_width, rope_base=10000.0):
    """What attention adds to the stream for normalised rows (T, D); w: W_Q W_K W_V W_O b_Q b_K b_V
    b_O. Also gives the cache, as it is at the end: one row of raw keys for each token."""
    E = w["W_K"].shape[1]
    d = E // heads
    kv = w_kv(w["W_K"], w["W_V"])
    c = w["b_O"] + w["b_V"] @ w["W_O"]  # softmax rows sum to 1
    cache, found = [], []
    for m, x in enumerate(rows):
        cache.append(x @ w["W_K"] + w["b_K"])
        q = x @ w["W_Q"] + w["b_Q"]
        o = []
        for i in range(heads):
            own = slice(i * d, (i + 1) * d)
            q_r = rotated(q[own], m, rope_width, rope_base)
            score = [
                q_r @ rotated(k[own], t, rope_width, rope_base) / math.sqrt(d)
                for t, k in enumerate(cache)
            ]
            top = max(score)
            weight = [math.exp(s - top) for s in score]
            total = sum(weight)
            u = np.zeros(E)
            for p, k in zip(weight, cache):
                u += p / total * (k - w["b_K"])  # V = (K - b_K) W_KV
            o.append(u @ kv[:, own])
        found.append(np.concatenate(o) @ w["W_O"] + c)
    return np.array(found), np.array(cache)
