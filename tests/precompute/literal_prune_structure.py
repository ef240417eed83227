"""Structured pruning, literally: the scores of one neuron or head at a time, and which stay.

Python lists and floats; nothing here is shared with minitx. Matrices are lists of rows (in, out).
"""

import math


def contributions(hidden, w, rows):
    """For each unit, which has ``rows`` rows of w: the sum over tokens of |h_u W_u|^2."""
    scores = []
    for first in range(0, len(w), rows):
        total = 0.0
        for h in hidden:
            for j in range(len(w[0])):
                total += sum(h[i] * w[i][j] for i in range(first, first + rows)) ** 2
        scores.append(total)
    return scores


def squares(numbers):
    return sum(a * a for a in numbers)


def neuron_scores_by_weights(maps, down):
    """|W_gate[:, u]| |W_up[:, u]| |W_down[u]| of each neuron u; maps: W_gate and W_up, or W_up."""
    scores = []
    for u in range(len(down)):
        score = math.sqrt(squares(down[u]))
        for w in maps:
            score *= math.sqrt(squares(row[u] for row in w))
        scores.append(score)
    return scores


def head_scores_by_weights(w_v, w_o, heads, kv_heads):
    """|W_v|^2 |W_o|^2 of each query head, W_v that of its group."""
    d, scores = len(w_o) // heads, []
    for h in range(heads):
        k = h // (heads // kv_heads)
        value = sum(squares(row[k * d : k * d + d]) for row in w_v)
        out = sum(squares(row) for row in w_o[h * d : h * d + d])
        scores.append(value * out)
    return scores


def highest(scores, count):
    """The indices of the ``count`` highest, ascending; ties go to the lower index."""
    left = list(range(len(scores)))
    found = []
    for _ in range(count):
        best = left[0]
        for index in left[1:]:
            if scores[index] > scores[best]:
                best = index
        left.remove(best)
        found.append(best)
    return sorted(found)


def heads_to_keep(scores, kv_heads, count, by):
    """(query heads, key/value heads) that stay if ``count`` groups go, or ``count`` of each."""
    G = len(scores) // kv_heads
    groups = [range(k * G, k * G + G) for k in range(kv_heads)]
    if by == "groups":
        kept = highest([sum(scores[h] for h in group) for group in groups], kv_heads - count)
        return [h for k in kept for h in groups[k]], kept
    queries = []
    for group in groups:
        queries += [group[i] for i in highest([scores[h] for h in group], G - count)]
    return queries, list(range(kv_heads))
