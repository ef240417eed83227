"""ELSA, literally: one vector, one bit, one key at a time, on Python lists.

Written from the paper's steps, in the words of the card (minitx/skip/elsa.py); it shares no code
with minitx. Causal attention, and the key that is kept when none passes, are choices of ours.
"""

import math


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def norm(x):
    return math.sqrt(dot(x, x))


# The projection A --------------------------------------------------------------------------------


def gram_schmidt(rows):
    """Orthonormal rows: from each row subtract its components along the earlier ones (modified
    Gram-Schmidt: one after another), then scale it to length 1."""
    done = []
    for row in rows:
        row = list(row)
        for unit in done:
            component = dot(row, unit)
            row = [a - component * b for a, b in zip(row, unit)]
        done.append([a / norm(row) for a in row])
    return done


def kron(a, b):
    """The Kronecker product: each entry of a times all of b."""
    return [[x * y for x in row for y in other] for row in a for other in b]


def kron_all(factors):
    """kron(A1, kron(A2, ...))"""
    product = [[1.0]]
    for factor in factors:
        product = kron(product, factor)
    return product


# Online ------------------------------------------------------------------------------------------


def sign_hash(projection, x):
    return [1 if dot(row, x) >= 0 else 0 for row in projection]


def hamming(a, b):
    return sum(x != y for x, y in zip(a, b))


def similarities(q, keys, projection, bias):
    """An estimate of q . key / |q| for each key."""
    found = []
    for key in keys:
        distance = hamming(sign_hash(projection, q), sign_hash(projection, key))
        angle = math.pi / len(projection) * distance - bias
        found.append(norm(key) * math.cos(max(0.0, angle)))
    return found


def select(q, keys, projection, bias, threshold):
    """The indices of the keys that are kept, ascending."""
    sims = similarities(q, keys, projection, bias)
    largest = max(norm(key) for key in keys)
    kept = [y for y in range(len(keys)) if sims[y] > threshold * largest]
    return kept or [sims.index(max(sims))]


def attend(q, keys, values, scale, projection, bias, threshold):
    """(output, kept keys) of one query of one head that sees all of these keys."""
    kept = select(q, keys, projection, bias, threshold)
    scores = {y: scale * dot(q, keys[y]) for y in kept}
    weights = {y: math.exp(scores[y] - max(scores.values())) for y in kept}
    total = sum(weights.values())
    columns = range(len(values[0]))
    return [sum(weights[y] * values[y][c] for y in kept) / total for c in columns], kept


def attention(q, k, v, scale, projection, bias, thresholds, first=0):
    """Causal attention of one sequence: q[H][T][d], k and v[K][S][d], the T newest keys last,
    thresholds[H]; keys before ``first`` are padding. Gives (output[H][T][d], kept[H][T])."""
    out, kept = [], []
    for h in range(len(q)):
        keys, values = k[h // (len(q) // len(k))], v[h // (len(q) // len(k))]
        out.append([])
        kept.append([])
        for i in range(len(q[h])):
            end = len(keys) - len(q[h]) + i + 1
            visible = keys[first:end], values[first:end]
            row, which = attend(q[h][i], *visible, scale, projection, bias, thresholds[h])
            out[-1].append(row)
            kept[-1].append([first + y for y in which])
    return out, kept


# Offline: thresholds -----------------------------------------------------------------------------


def threshold_sample(q, keys, p, scale):
    """What one query that sees all of these keys contributes to its head's threshold."""
    scores = [dot(q, key) for key in keys]
    weights = [math.exp(scale * (s - max(scores))) for s in scores]
    weights = [w / sum(weights) for w in weights]
    relevant = [y for y in range(len(keys)) if weights[y] > p / len(keys)]
    if relevant:
        y = min(relevant, key=lambda y: weights[y])
    else:
        y = max(range(len(keys)), key=lambda y: weights[y])
    return scores[y] / (norm(q) * max(norm(key) for key in keys))


def learn_thresholds(texts, p, scale, min_visible=1):
    """Thresholds[H] of one layer, from (q[H][T][d], k[K][T][d]) of each text."""
    found = []
    for h in range(len(texts[0][0])):
        samples = []
        for q, k in texts:
            keys = k[h // (len(q) // len(k))]
            for i in range(min_visible - 1, len(q[h])):
                samples.append(threshold_sample(q[h][i], keys[: i + 1], p, scale))
        found.append(sum(samples) / len(samples))
    return found
