"""Low-rank factorization, literally: one direction at a time.

Python lists and floats; nothing here is shared with minitx. A matrix is a list of rows.
"""

import math


def product(a, b):
    return [
        [sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))]
        for i in range(len(a))
    ]


def transposed(a):
    return [list(column) for column in zip(*a)]


def right_singular_vectors(y, r, rounds=400):
    """The r directions (rows) in which the rows of y are longest, by power iteration: multiply a
    vector by y^T y until it no longer turns, each time without its part along those found before.
    """
    gram, found = product(transposed(y), y), []
    for number in range(r):
        v = [1.0 + 0.1 * ((i * 7 + number * 3) % 5) for i in range(len(gram))]
        for _ in range(rounds):
            v = [sum(g * a for g, a in zip(row, v)) for row in gram]
            for u in found:
                along = sum(a * b for a, b in zip(u, v))
                v = [a - along * b for a, b in zip(v, u)]
            norm = math.sqrt(sum(a * a for a in v))
            v = [a / norm for a in v]
        found.append(v)
    return found


def low_rank(w, r, inputs):
    """The matrix of rank r with the least error of inputs W: W V^T V, V the r directions in which
    the outputs are longest. With the identity as inputs it is the plain truncated SVD of W."""
    v = right_singular_vectors(product(inputs, w), r)
    return product(product(w, transposed(v)), v)
