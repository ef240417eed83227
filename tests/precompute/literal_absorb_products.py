"""Attention by its QK and OV matrices, one pair of tokens at a time (Elhage et al., 2021).
float64; positions are not rotated. Written from the formulas, biases spelled out."""

import math

import numpy as np


def attend(rows, w, heads, kv_heads):
    """What attention adds to the stream for normalised rows (T, D); w: W_Q W_K W_V W_O b_Q b_K b_V
    b_O."""
    d = w["W_Q"].shape[1] // heads
    found = []
    for t, x in enumerate(rows):
        out = w["b_O"].copy()
        for i in range(heads):
            q, j = slice(i * d, (i + 1) * d), i // (heads // kv_heads)
            k = slice(j * d, (j + 1) * d)
            qk = w["W_Q"][:, q] @ w["W_K"][:, k].T
            ov = w["W_V"][:, k] @ w["W_O"][q]
            score = [
                (
                    x @ qk @ y
                    + w["b_Q"][q] @ w["W_K"][:, k].T @ y
                    + x @ w["W_Q"][:, q] @ w["b_K"][k]
                    + w["b_Q"][q] @ w["b_K"][k]
                )
                / math.sqrt(d)
                for y in rows[: t + 1]
            ]
            weight = [math.exp(s - max(score)) for s in score]
            for p, y in zip(weight, rows):
                out += p / sum(weight) * (y @ ov)
            out += w["b_V"][k] @ w["W_O"][q]
        found.append(out)
    return np.array(found)
