"""A norm and the matrix that reads it, before and after folding: one number at a time, from
arXiv 2407.09577. Vectors are lists; a matrix is a list of rows (in, out).
"""

import math


def normalize(x, kind, eps):
    """n(x): x / rms(x), or (x - mean(x)) / std(x) with kind="layer"."""
    if kind == "layer":
        mean = sum(x) / len(x)
        x = [value - mean for value in x]
    rms = math.sqrt(sum(value * value for value in x) / len(x) + eps)
    return [value / rms for value in x]


def project(x, w, c):
    """x W + c"""
    z = list(c)
    for i in range(len(x)):
        for j in range(len(z)):
            z[j] += x[i] * w[i][j]
    return z


def norm_then_project(x, gain, bias, w, c, kind, eps):
    """z = (n(x) * g + b) W + c"""
    y = [n * g + b for n, g, b in zip(normalize(x, kind, eps), gain, bias)]
    return project(y, w, c)


def fold(gain, bias, w, c):
    """W* = diag(g) W and c* = c + b W (the original W)."""
    new_c = project(bias, w, c)
    new_w = [[gain[i] * w[i][j] for j in range(len(w[i]))] for i in range(len(w))]
    return new_w, new_c


def folded(x, new_w, new_c, kind, eps):
    """z = n(x) W* + c*"""
    return project(normalize(x, kind, eps), new_w, new_c)
