"""DOTA's detection, literally: one row, one key, one number at a time, on Python lists in float64.

Written from the notes on the paper, in the words of the card (minitx/skip/dota/__init__.py); it
shares no code with minitx. All functions are about one head.
"""

import math


def quantize(row, bits):
    """(integers, scale) of one row; with bits=None the row itself."""
    if bits is None:
        return list(row), 1.0
    largest = 2 ** (bits - 1) - 1
    peak = max(abs(number) for number in row)
    scale = peak / largest if peak else 1.0
    return [max(-largest, min(largest, round(number / scale))) for number in row], scale


def vector_times_matrix(row, matrix):
    return [sum(a * line[c] for a, line in zip(row, matrix)) for c in range(len(matrix[0]))]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def low_rank_rows(xs, p, w, bits):
    """(integers, scale) of q~ or k~ for each row of x: y = x p, then y w. The rank x rank matrix w
    has one scale; y and q~ or k~ have one for each row. Without rotation."""
    flat, w_scale = quantize([number for line in w for number in line], bits)
    rank = len(w)
    w = [flat[a * rank : (a + 1) * rank] for a in range(rank)]
    found = []
    for x in xs:
        y, y_scale = quantize(vector_times_matrix(x, p), bits)
        z, scale = quantize(vector_times_matrix(y, w), bits)
        found.append((z, scale * y_scale * w_scale))
    return found


def estimates(xs, p, w_q, w_k, bits=None):
    """q~_i . k~_j for each query i, over the keys j <= i that it sees."""
    queries, keys = low_rank_rows(xs, p, w_q, bits), low_rank_rows(xs, p, w_k, bits)
    return [
        [dot(q, k) * q_scale * k_scale for k, k_scale in keys[: i + 1]]
        for i, (q, q_scale) in enumerate(queries)
    ]


def top(row, keep):
    """The indices of the ``keep`` largest numbers, ascending; ties go to the lower index."""
    return sorted(sorted(range(len(row)), key=lambda j: (-row[j], j))[:keep])


def attend(q, keys, values, scale, kept):
    """Exact softmax attention of one query over the kept keys."""
    scores = {j: scale * dot(q, keys[j]) for j in kept}
    largest = max(scores.values())
    weights = {j: math.exp(s - largest) for j, s in scores.items()}
    total = sum(weights.values())
    return [sum(weights[j] * values[j][c] for j in kept) / total for c in range(len(values[0]))]


def one_head(xs, p, w_q, w_k, q, keys, values, scale, keep, bits=None):
    """(outputs, kept keys) of all queries."""
    kept = [top(row, keep) for row in estimates(xs, p, w_q, w_k, bits)]
    return [attend(q[i], keys, values, scale, kept[i]) for i in range(len(xs))], kept


# Key loads when queries run in parallel; wanted: the set of kept keys of each query ---------------


def loads_one_at_a_time(wanted):
    return sum(len(keys) for keys in wanted)


def loads_in_order(wanted):
    """Every query takes its keys in ascending order; what several take in a step is loaded once."""
    steps = max(len(keys) for keys in wanted)
    lists = [sorted(keys) for keys in wanted]
    return sum(len({keys[s] for keys in lists if s < len(keys)}) for s in range(steps))


def loads_out_of_order(wanted):
    """In a step every query takes one key that it wants; first what most idle queries want."""
    left, count = [set(keys) for keys in wanted], 0
    while any(left):
        idle = [row for row, keys in enumerate(left) if keys]
        while idle:
            asked = sorted(set().union(*(left[row] for row in idle)))
            key = max(asked, key=lambda j: (sum(j in left[row] for row in idle), -j))
            count += 1
            for row in [row for row in idle if key in left[row]]:
                left[row].remove(key)
                idle.remove(row)
    return count
