"""Weight pruning, literally: one weight at a time.

Python lists and floats; nothing here is shared with minitx. A matrix is a list of rows W[i][j],
input i, output j. Masks are True where a weight becomes zero.
"""

import math


def scores(w, inputs=None):
    """Magnitude: |W_ij|. Wanda: |W_ij| ||X_i||, the norm of input i over the calibration inputs."""
    found = []
    for i, row in enumerate(w):
        norm = 1.0 if inputs is None else math.sqrt(sum(x[i] * x[i] for x in inputs))
        found.append([abs(a) * norm for a in row])
    return found


def lowest(scored, count):
    """The positions of the ``count`` lowest of [(score, position)]; ties go to the earlier one."""
    left, positions = list(scored), []
    for _ in range(count):
        worst = left[0]
        for entry in left[1:]:
            if entry[0] < worst[0]:
                worst = entry
        left.remove(worst)
        positions.append(worst[1])
    return positions


def mask_of(s, positions):
    return [[(i, j) in positions for j in range(len(s[0]))] for i in range(len(s))]


def by_output(s, count):
    """``count`` weights of each output."""
    pruned = []
    for j in range(len(s[0])):
        pruned += lowest([(s[i][j], (i, j)) for i in range(len(s))], count)
    return mask_of(s, pruned)


def by_matrix(s, count):
    """``count`` weights of the matrix."""
    everything = [(s[i][j], (i, j)) for i in range(len(s)) for j in range(len(s[0]))]
    return mask_of(s, lowest(everything, count))


def n_of_m(s, n, m):
    """All but n of each m consecutive inputs of each output."""
    pruned = []
    for j in range(len(s[0])):
        for first in range(0, len(s), m):
            pruned += lowest([(s[i][j], (i, j)) for i in range(first, first + m)], m - n)
    return mask_of(s, pruned)


def globally(all_scores, count):
    """``count`` weights of all matrices together: one mask for each matrix."""
    everything = [
        (s[i][j], (number, i, j))
        for number, s in enumerate(all_scores)
        for i in range(len(s))
        for j in range(len(s[0]))
    ]
    pruned = lowest(everything, count)
    return [
        mask_of(s, [(i, j) for which, i, j in pruned if which == number])
        for number, s in enumerate(all_scores)
    ]
