"""SpAtten's local value pruning, literally: one query, one head and one key at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def kept_values(scores, keep):
    """The indices of the values to use, by the scores of the keys: the ceil(keep n) largest."""
    count = math.ceil(keep * len(scores) - 1e-9)
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], j))
    return sorted(order[:count])


def attend(q, k, v, scale, key_head, keep, renormalize=False):
    """Causal attention [head][query][feature], where the queries q [head][query] are the last ones
    of the keys k [key head][key]."""
    out = []
    for h, queries in enumerate(q):
        keys, values = k[key_head[h]], v[key_head[h]]
        out.append([])
        for t, query in enumerate(queries):
            n = len(keys) - len(queries) + t + 1  # keys that it sees
            p = softmax([scale * sum(a * b for a, b in zip(query, key)) for key in keys[:n]])
            kept = kept_values(p, keep)
            mass = sum(p[j] for j in kept) if renormalize else 1.0
            width = range(len(values[0]))
            out[-1].append([sum(p[j] / mass * values[j][i] for j in kept) for i in width])
    return out
