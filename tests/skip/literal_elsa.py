"""ELSA, literally: one vector, one bit, one key at a time.

Written on Python lists in float64 from the paper's steps; nothing in it is shared with minitx. What
a query sees in a causal model, and the key that is kept where none is enough, are choices (see the
technique's card) and not the paper's.
"""

import math


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def norm(x):
    return math.sqrt(dot(x, x))


def gram_schmidt(rows):
    """Each row less its shadows on all before it, then made 1 long (modified: one at a time)."""
    done = []
    for row in rows:
        row = list(row)
        for unit in done:
            shadow = dot(row, unit)
            row = [a - shadow * b for a, b in zip(row, unit)]
        done.append([a / norm(row) for a in row])
    return done


def kron(a, b):
    """Each number of a times the whole of b, in its place."""
    return [[x * y for x in row for y in other] for row in a for other in b]


def kron_all(factors):
    """A1 (x) A2 (x) ... of lists of rows."""
    product = [[1.0]]
    for factor in factors:
        product = kron(product, factor)
    return product


def bits(directions, x):
    return [1 if dot(row, x) >= 0 else 0 for row in directions]


def hamming(a, b):
    return sum(x != y for x, y in zip(a, b))


def similarities(q, keys, directions, bias):
    """An estimate of (q / |q|) . K_y for each key."""
    found = []
    for key in keys:
        ham = hamming(bits(directions, q), bits(directions, key))
        angle = math.pi / len(directions) * ham - bias
        found.append(norm(key) * math.cos(max(0.0, angle)))
    return found


def survivors(q, keys, directions, bias, t):
    """The numbers of the keys that are kept, in order."""
    sims = similarities(q, keys, directions, bias)
    longest = max(norm(key) for key in keys)
    kept = [y for y in range(len(keys)) if sims[y] > t * longest]
    return kept or [sims.index(max(sims))]


def one_query(q, keys, values, scale, directions, bias, t):
    """(output, survivors) of one query of one head that sees all of these keys."""
    kept = survivors(q, keys, directions, bias, t)
    scores = {y: scale * dot(q, keys[y]) for y in kept}
    weights = {y: math.exp(scores[y] - max(scores.values())) for y in kept}
    total = sum(weights.values())
    columns = range(len(values[0]))
    return [sum(weights[y] * values[y][c] for y in kept) / total for c in columns], kept


def attention(q, k, v, scale, directions, bias, t, first=0):
    """All heads of one sequence: q[H][T][d], k and v[K][S][d], the T newest keys last, t[H]; keys
    before ``first`` are padding. Gives (output[H][T][d], survivors[H][T], padding counted)."""
    out, kept = [], []
    for h in range(len(q)):
        keys, values = k[h // (len(q) // len(k))], v[h // (len(q) // len(k))]
        out.append([])
        kept.append([])
        for i in range(len(q[h])):
            end = len(keys) - len(q[h]) + i + 1
            seen = keys[first:end], values[first:end]
            row, which = one_query(q[h][i], *seen, scale, directions, bias, t[h])
            out[-1].append(row)
            kept[-1].append([first + y for y in which])
    return out, kept


# Learning thresholds -----------------------------------------------------------------------------


def sample(q, keys, p, scale):
    """What one query that sees all of these keys says about its head's threshold."""
    scores = [dot(q, key) for key in keys]
    weights = [math.exp(scale * (s - max(scores))) for s in scores]
    weights = [w / sum(weights) for w in weights]
    relevant = [y for y in range(len(keys)) if weights[y] > p / len(keys)]
    if relevant:
        chosen = min(relevant, key=lambda y: weights[y])
    else:
        chosen = max(range(len(keys)), key=lambda y: weights[y])
    return scores[chosen] / (norm(q) * max(norm(key) for key in keys))


def thresholds(texts, p, scale, min_visible=1):
    """t[H] of one layer, from (q[H][T][d], k[K][T][d]) of each text."""
    found = []
    for h in range(len(texts[0][0])):
        said = []
        for q, k in texts:
            keys = k[h // (len(q) // len(k))]
            for i in range(min_visible - 1, len(q[h])):
                said.append(sample(q[h][i], keys[: i + 1], p, scale))
        found.append(sum(said) / len(said))
    return found
