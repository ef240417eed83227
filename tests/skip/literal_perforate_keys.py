"""Loop perforation of attention, literally: one query, one head and one key at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def keeps(i, j, sinks, window, stride):
    """Does the query at position i keep the key at position j <= i?"""
    return j < sinks or j > i - window or j % stride == 0


def attend(q, k, v, scale, key_head, sinks, window, stride, form="skip", factor=1.0, bias=0.0):
    """Causal attention [head][query][feature], where the queries q [head][query] are the last ones
    of the keys k [key head][key]. factor: the output is multiplied by it. bias: added to the
    scores of strided keys, those outside the window that are no sinks."""
    out = []
    for h, queries in enumerate(q):
        keys, values = k[key_head[h]], v[key_head[h]]
        out.append([])
        for t, query in enumerate(queries):
            i = len(keys) - len(queries) + t  # its position
            scores, weights = [], []
            for j in range(i + 1):
                score = 0.0
                for a, b in zip(query, keys[j]):
                    score += a * b
                strided = j >= sinks and j <= i - window
                scores.append(scale * score + (bias if strided else 0.0))
            kept = [j for j in range(i + 1) if keeps(i, j, sinks, window, stride)]
            over = kept if form == "skip" else range(i + 1)  # what the softmax is over
            largest = max(scores[j] for j in over)
            weights = {j: math.exp(scores[j] - largest) for j in over}
            total = sum(weights.values())
            width = range(len(values[0]))
            row = [sum(weights[j] / total * values[j][c] for j in kept) for c in width]
            out[-1].append([factor * x for x in row])
    return out
