"""MatShrink by loops: a pair of matrices, and the two applied to a row.

Python lists and floats; nothing is shared with minitx. Matrices are lists of rows (in, out).
"""

import math


def product(a, b):
    return [[sum(row[i] * b[i][j] for i in range(len(b))) for j in range(len(b[0]))] for row in a]


def columns(a, chosen):
    return [[row[j] for j in chosen] for row in a]


def pivots(b):
    """The order of b's columns: as often as b has rows the longest residual, then the others."""
    residual = [[row[j] for row in b] for j in range(len(b[0]))]  # a list for each column
    chosen = []
    for _ in range(len(b)):
        free = [j for j in range(len(residual)) if j not in chosen]
        best = max(free, key=lambda j: sum(x * x for x in residual[j]))
        chosen.append(best)
        length = math.sqrt(sum(x * x for x in residual[best]))
        unit = [x / length for x in residual[best]]
        for column in residual:
            along = sum(x * u for x, u in zip(column, unit))
            column[:] = [x - along * u for x, u in zip(column, unit)]
    return chosen + [j for j in range(len(residual)) if j not in chosen]


def solve(m, b):
    """m^-1 b by Gauss-Jordan elimination with partial pivoting."""
    n = len(m)
    rows = [list(map(float, row)) + list(map(float, other)) for row, other in zip(m, b)]
    for c in range(n):
        best = max(range(c, n), key=lambda i: abs(rows[i][c]))
        rows[c], rows[best] = rows[best], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for i in range(n):
            if i != c:
                rows[i] = [x - rows[i][c] * y for x, y in zip(rows[i], rows[c])]
    return [row[n:] for row in rows]


def pair(a, b):
    """(A*, the rest of B*, p) for A (d, r) and B (r, n): A* = A block, B* = block^-1 B."""
    p, r = pivots(b), len(b)
    block = columns(b, p[:r])
    return product(a, block), solve(block, columns(b, p[r:])), p


def apply(a_new, rest, p, x):
    """x A B, from A* and the rest of B*."""
    u = product([x], a_new)[0]
    y = product([u], rest)[0]
    out = [0.0] * len(p)
    for j, value in zip(p, u + y):
        out[j] = value
    return out
