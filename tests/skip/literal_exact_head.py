"""The two searches of the exact head, one row at a time, with sums over Python floats.

No slack for rounding: use it on data without near-ties.
"""

import math


def dot(a, b) -> float:
    return math.fsum(float(p) * float(q) for p, q in zip(a, b))


def norm(a) -> float:
    return math.sqrt(dot(a, a))


def dense(W, h) -> int:
    """The argmax of all logits; ties go to the lower index."""
    z = [dot(row, h) for row in W]
    return z.index(max(z))


def preview(W, h, rank, directions):
    """(argmax token, candidates). The columns of ``directions`` (D, D) are the right singular
    vectors of W, strongest first."""
    columns = list(zip(*directions))
    g = [dot(column, h) for column in columns]
    B = [[dot(row, column) for column in columns] for row in W]
    P = [dot(row[:rank], g[:rank]) for row in B]
    u = [p + norm(row[rank:]) * norm(g[rank:]) for p, row in zip(P, B)]  # Cauchy-Schwarz
    top = P.index(max(P))
    low = dot(W[top], h)
    candidates = [v for v in range(len(W)) if u[v] >= low or v == top]
    z = {v: dot(W[v], h) for v in candidates}
    token = min(v for v in candidates if z[v] == max(z.values()))
    return token, candidates


def by_norms(W, h, block):
    """(argmax token, rows read): rows in blocks, longest first, until no later row can win."""
    order = sorted(range(len(W)), key=lambda v: (-norm(W[v]), v))
    best, token, read = -math.inf, None, 0
    for first in range(0, len(W), block):
        if norm(W[order[first]]) * norm(h) < best:  # Cauchy-Schwarz
            break
        for v in order[first : first + block]:
            z = dot(W[v], h)
            read += 1
            if z > best or z == best and v < token:
                best, token = z, v
    return token, read
