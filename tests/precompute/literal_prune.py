"""Leaving weights out, literally: one weight, one neuron, one direction at a time.

Python lists and floats; nothing in it is shared with minitx. A matrix is a list of rows W[i][j],
input i, output j. Masks say True where a weight goes.
"""

import math


def lowest(scored, count):
    """The places of the ``count`` lowest of [(score, place)]; of equal ones the earlier place."""
    left, out = list(scored), []
    for _ in range(count):
        worst = left[0]
        for entry in left[1:]:
            if entry[0] < worst[0]:
                worst = entry
        left.remove(worst)
        out.append(worst[1])
    return out


def scores(w, inputs=None):
    """|W_ij|, or |W_ij| times the length of column i of the inputs."""
    found = []
    for i, row in enumerate(w):
        norm = 1.0 if inputs is None else math.sqrt(sum(x[i] * x[i] for x in inputs))
        found.append([abs(a) * norm for a in row])
    return found


def mask_of(s, places):
    return [[(i, j) in places for j in range(len(s[0]))] for i in range(len(s))]


def by_output(s, count):
    """``count`` weights of every output go."""
    gone = []
    for j in range(len(s[0])):
        gone += lowest([(s[i][j], (i, j)) for i in range(len(s))], count)
    return mask_of(s, gone)


def by_matrix(s, count):
    every = [(s[i][j], (i, j)) for i in range(len(s)) for j in range(len(s[0]))]
    return mask_of(s, lowest(every, count))


def by_runs(s, n, m):
    """n stay of every m consecutive inputs of every output."""
    gone = []
    for j in range(len(s[0])):
        for first in range(0, len(s), m):
            gone += lowest([(s[i][j], (i, j)) for i in range(first, first + m)], m - n)
    return mask_of(s, gone)


def together(all_scores, count):
    """``count`` weights of all matrices together go: one mask a matrix."""
    every = [
        (s[i][j], (number, i, j))
        for number, s in enumerate(all_scores)
        for i in range(len(s))
        for j in range(len(s[0]))
    ]
    gone = lowest(every, count)
    return [
        mask_of(s, [(i, j) for which, i, j in gone if which == number])
        for number, s in enumerate(all_scores)
    ]


def contributions(hidden, w, width):
    """For each unit of ``width`` rows of w: the sum over tokens of |h_u W_u|^2."""
    found = []
    for first in range(0, len(w), width):
        total = 0.0
        for h in hidden:
            for j in range(len(w[0])):
                total += sum(h[i] * w[i][j] for i in range(first, first + width)) ** 2
        found.append(total)
    return found


def times(a, b):
    return [
        [sum(a[i][k] * b[k][j] for k in range(len(b))) for j in range(len(b[0]))]
        for i in range(len(a))
    ]


def turned(a):
    return [list(column) for column in zip(*a)]


def directions(y, r, rounds=400):
    """The r directions (rows) in which the rows of y are longest: power iteration, each direction
    taken out before the next is sought."""
    gram, found = times(turned(y), y), []
    for number in range(r):
        v = [1.0 + 0.1 * ((i * 7 + number * 3) % 5) for i in range(len(gram))]
        for _ in range(rounds):
            v = [sum(g * a for g, a in zip(row, v)) for row in gram]
            for u in found:
                along = sum(a * b for a, b in zip(u, v))
                v = [a - along * b for a, b in zip(v, u)]
            length = math.sqrt(sum(a * a for a in v))
            v = [a / length for a in v]
        found.append(v)
    return found


def low_rank(w, r, inputs):
    """The matrix of rank r with the least error of inputs x W: W V^T V, with V the r directions in
    which the outputs are longest."""
    v = directions(times(inputs, w), r)
    return times(times(w, turned(v)), v)
