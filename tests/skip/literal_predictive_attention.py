"""Predict-then-compute attention, literally: one query, one key, one number at a time.

Written on Python lists in float64; nothing in it is shared with minitx. The details are the
reconstruction's (see the technique's card), not the paper's.
"""

import math
from fractions import Fraction


def integer_code(x, b):
    """(codes, scale) of one vector: whole numbers from -L to L."""
    largest = 2 ** (b - 1) - 1
    top = max(abs(number) for number in x)
    scale = top / largest if top else 1.0
    return [max(-largest, min(largest, round(number / scale))) for number in x], scale


def leading_one(x):
    """(codes, 1): of each number its sign and the power of two that is at most its size."""
    codes = []
    for number in x:
        power = 1.0
        while number and power > abs(number):
            power /= 2
        while number and 2 * power <= abs(number):
            power *= 2
        codes.append(math.copysign(power, number) if number else 0.0)
    return codes, 1.0


def predictions(q, keys, scale, b):
    """One predicted score for each key; b None stands for the leading-one codes."""

    def code(x):
        return leading_one(x) if b is None else integer_code(x, b)

    qc, sq = code(q)
    found = []
    for key in keys:
        kc, sk = code(key)
        found.append(scale * sq * sk * sum(x * y for x, y in zip(qc, kc)))
    return found


def survivors(p, tau, rho, r_min):
    """The numbers of the keys that are kept, in order."""
    n = len(p)
    near = [j for j in range(n) if not tau or p[j] >= max(p) - math.log(1 / tau)]
    r = min(n, max(r_min, math.ceil(Fraction(str(rho)) * n)))
    best = sorted(range(n), key=lambda j: (-p[j], j))[:r]
    return [j for j in near if j in best]


def one_query(q, keys, values, scale, b=4, tau=0.05, rho=1.0, r_min=4):
    """(output, survivors) of one query of one head that sees all of these keys."""
    kept = survivors(predictions(q, keys, scale, b), tau, rho, r_min)
    scores = {j: scale * sum(x * y for x, y in zip(q, keys[j])) for j in kept}
    weights = {j: math.exp(scores[j] - max(scores.values())) for j in kept}
    total = sum(weights.values())
    columns = range(len(values[0]))
    return [sum(weights[j] * values[j][c] for j in kept) / total for c in columns], kept


def attention(q, k, v, scale, first=0, **settings):
    """All heads of one sequence: q[H][T][d], k and v[K][S][d], the T newest keys last; keys before
    ``first`` are padding. Gives (output[H][T][d], how many keys were kept by [H][T])."""
    out, counts = [], []
    for h in range(len(q)):
        keys, values = k[h // (len(q) // len(k))], v[h // (len(q) // len(k))]
        out.append([])
        counts.append([])
        for t in range(len(q[h])):
            end = len(keys) - len(q[h]) + t + 1
            row, kept = one_query(q[h][t], keys[first:end], values[first:end], scale, **settings)
            out[-1].append(row)
            counts[-1].append(len(kept))
    return out, counts
