"""Predictive attention, literally: one query, one key, one number at a time.

On Python lists in float64, in the words of the card (minitx/skip/predictive_attention.py); it
shares no code with minitx. The details are the reconstruction's, not the paper's.
"""

import math
from fractions import Fraction


def integer_code(x, bits):
    """(codes, scale) of one vector: integers of ``bits`` bits, symmetric around 0."""
    largest = 2 ** (bits - 1) - 1
    peak = max(abs(number) for number in x)
    scale = peak / largest if peak else 1.0
    return [max(-largest, min(largest, round(number / scale))) for number in x], scale


def leading_one(x):
    """(codes, 1): each number rounded toward 0 to a power of two."""
    codes = []
    for number in x:
        power = 1.0
        while number and power > abs(number):
            power /= 2
        while number and 2 * power <= abs(number):
            power *= 2
        codes.append(math.copysign(power, number) if number else 0.0)
    return codes, 1.0


def predictions(q, keys, scale, bits):
    """One predicted score for each key; bits=None: leading-one codes."""

    def code(x):
        return leading_one(x) if bits is None else integer_code(x, bits)

    q_codes, q_scale = code(q)
    found = []
    for key in keys:
        codes, k_scale = code(key)
        product = sum(x * y for x, y in zip(q_codes, codes))
        found.append(scale * q_scale * k_scale * product)
    return found


def survivors(p, threshold, share, min_keys):
    """The indices of the kept keys, ascending. Ties go to the lower index."""
    n = len(p)
    near = [j for j in range(n) if not threshold or p[j] >= max(p) - math.log(1 / threshold)]
    most = min(n, max(min_keys, math.ceil(Fraction(str(share)) * n)))
    best = sorted(range(n), key=lambda j: (-p[j], j))[:most]
    return [j for j in near if j in best]


def one_query(q, keys, values, scale, bits=4, threshold=0.05, share=1.0, min_keys=4):
    """(output, kept keys) of one query of one head that sees all of these keys."""
    kept = survivors(predictions(q, keys, scale, bits), threshold, share, min_keys)
    scores = {j: scale * sum(x * y for x, y in zip(q, keys[j])) for j in kept}
    weights = {j: math.exp(scores[j] - max(scores.values())) for j in kept}
    total = sum(weights.values())
    columns = range(len(values[0]))
    return [sum(weights[j] * values[j][c] for j in kept) / total for c in columns], kept


def attention(q, k, v, scale, first=0, **settings):
    """All heads of one sequence: q[H][T][d] of the T newest tokens, k and v[K][S][d] of all. Keys
    before ``first`` are padding. Returns (output[H][T][d], number of kept keys[H][T])."""
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
