"""Attention by the QK and OV matrices of each head, one pair of tokens at a time (Elhage et al.,
2021), in float64 and without RoPE. All biases are spelled out, also those that cancel."""

import math

import numpy as np


def attend(rows, w, heads, kv_heads):
    """The output of attention for normalized inputs (T, D); w: W_q W_k W_v W_o b_q b_k b_v b_o."""
    d = w["W_q"].shape[1] // heads
    found = []
    for t, x in enumerate(rows):
        out = w["b_o"].copy()
        for i in range(heads):
            q, j = slice(i * d, (i + 1) * d), i // (heads // kv_heads)
            k = slice(j * d, (j + 1) * d)
            qk = w["W_q"][:, q] @ w["W_k"][:, k].T
            ov = w["W_v"][:, k] @ w["W_o"][q]
            score = [
                (
                    x @ qk @ y
                    + w["b_q"][q] @ w["W_k"][:, k].T @ y
                    + x @ w["W_q"][:, q] @ w["b_k"][k]
                    + w["b_q"][q] @ w["b_k"][k]
                )
                / math.sqrt(d)
                for y in rows[: t + 1]
            ]
            weight = [math.exp(s - max(score)) for s in score]
            for p, y in zip(weight, rows):
                out += p / sum(weight) * (y @ ov)
            out += w["b_v"][k] @ w["W_o"][q]
        found.append(out)
    return np.array(found)
