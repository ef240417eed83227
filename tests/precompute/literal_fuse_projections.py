"""Fused projections by loops: matrices side by side, one product, the result cut by columns.

Vectors are lists; a matrix is a list of rows (in, out).
"""

import math


def project(x, w, b):
    """x W + b"""
    z = list(b)
    for i in range(len(x)):
        for j in range(len(z)):
            z[j] += x[i] * w[i][j]
    return z


def side_by_side(*matrices):
    """[W_1, W_2, ...]: each row is the rows of all, one after another."""
    return [sum(rows, []) for rows in zip(*matrices)]


def scale(w, factor):
    return [[value * factor for value in row] for row in w]


def fuse_qkv(w_q, b_q, w_k, b_k, w_v, b_v, d):
    """[W_q / sqrt(d), W_k, W_v] and its bias."""
    factor = 1 / math.sqrt(d)
    w = side_by_side(scale(w_q, factor), w_k, w_v)
    return w, scale([b_q], factor)[0] + b_k + b_v


def split(z, *widths):
    """z cut into pieces of these widths."""
    pieces, start = [], 0
    for width in widths:
        pieces.append(z[start : start + width])
        start += width
    return pieces
