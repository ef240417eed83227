"""The exact head's two searches, literally: one row at a time, sums over Python floats.

Exact arithmetic is taken to be exact here, so rounding gets no room: for data without near-ties.
"""

import math


def dot(a, b) -> float:
    return math.fsum(float(p) * float(q) for p, q in zip(a, b))


def length(a) -> float:
    return math.sqrt(dot(a, a))


def dense(W, h) -> int:
    """The smallest id of those with the largest logit."""
    z = [dot(row, h) for row in W]
    return z.index(max(z))


def norms(W, h, block):
    """(token, rows multiplied): rows by length, longest first, in blocks, until none can win."""
    order = sorted(range(len(W)), key=lambda v: (-length(W[v]), v))
    best, token, read = -math.inf, None, 0
    for a in range(0, len(W), block):
        if length(W[order[a]]) * length(h) < best:
            break
        for v in order[a : a + block]:
            z = dot(W[v], h)
            read += 1
            if z > best or z == best and v < token:
                best, token = z, v
    return token, read


def svd(W, h, k, directions):
    """(token, candidates): ``directions`` (D, D) are the columns of V, strongest first."""
    columns = list(zip(*directions))
    g = [dot(column, h) for column in columns]
    B = [[dot(row, column) for column in columns] for row in W]
    P = [dot(row[:k], g[:k]) for row in B]
    u = [p + length(row[k:]) * length(g[k:]) for p, row in zip(P, B)]
    top = P.index(max(P))
    lo = dot(W[top], h)
    candidates = [v for v in range(len(W)) if u[v] >= lo or v == top]
    z = {v: dot(W[v], h) for v in candidates}
    token = min(v for v in candidates if z[v] == max(z.values()))
    return token, candidates
