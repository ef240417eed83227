"""Attention with only keys in the cache, token by token and head by head, from arXiv 2503.05840
(section on decoding, and the appendix on biases). float64; only dot products are vectorized.
"""

import math

import numpy as np


def rope(x, position, width, base=10000.0):
    """Rotate columns (i, i + width / 2) of one head by position * base^(-2 i / width)."""
    y, half = list(x), width // 2
    for i in range(half):
        angle = position * base ** (-2 * i / width)
        c, s = math.cos(angle), math.sin(angle)
        y[i], y[i + half] = x[i] * c - x[i + half] * s, x[i + half] * c + x[i] * s
    return np.array(y)


def w_kv(w_k, w_v):
    """W_kv with W_k W_kv = W_v: by the inverse, or the right inverse of a W_k with more columns."""
    D, E = w_k.shape
    if D == E:
        return np.linalg.inv(w_k) @ w_v
    return w_k.T @ np.linalg.inv(w_k @ w_k.T) @ w_v


def attend(rows, w, heads, rope_width, rope_base=10000.0):
    """The output of attention for normalized inputs (T, D); w: W_q W_k W_v W_o b_q b_k b_v b_o.
    Also the cache at the end: one row of raw keys for each token."""
    E = w["W_k"].shape[1]
    d = E // heads
    kv = w_kv(w["W_k"], w["W_v"])
    c = w["b_o"] + w["b_v"] @ w["W_o"]  # softmax rows sum to 1
    cache, found = [], []
    for m, x in enumerate(rows):
        cache.append(x @ w["W_k"] + w["b_k"])
        q = x @ w["W_q"] + w["b_q"]
        o = []
        for i in range(heads):
            own = slice(i * d, (i + 1) * d)
            q_r = rope(q[own], m, rope_width, rope_base)
            score = [
                q_r @ rope(k[own], t, rope_width, rope_base) / math.sqrt(d)
                for t, k in enumerate(cache)
            ]
            top = max(score)
            weight = [math.exp(s - top) for s in score]
            total = sum(weight)
            u = np.zeros(E)
            for p, k in zip(weight, cache):
                u += p / total * (k - w["b_k"])  # values without b_v = (keys - b_k) W_kv
            o.append(u @ kv[:, own])
        found.append(np.concatenate(o) @ w["W_o"] + c)
    return np.array(found), np.array(cache)
