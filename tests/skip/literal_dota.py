"""DOTA's detection, literally: one row, one key, one number at a time, on Python lists in float64.

Written from the notes on the paper; nothing in it is shared with minitx.
"""

import math


def coded(row, bits):
    """(whole numbers, scale) of one row."""
    if bits is None:
        return list(row), 1.0
    top = 2 ** (bits - 1) - 1
    largest = max(abs(number) for number in row)
    scale = largest / top if largest else 1.0
    return [max(-top, min(top, round(number / scale))) for number in row], scale


def times(row, matrix):
    return [sum(a * line[c] for a, line in zip(row, matrix)) for c in range(len(matrix[0]))]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def rows_of(xs, p, w, bits):
    """(codes, scale) of Q~ or K~ for each row of X; w is k x k and has one scale."""
    flat, w_scale = coded([number for line in w for number in line], bits)
    k = len(w)
    w = [flat[a * k : (a + 1) * k] for a in range(k)]
    found = []
    for x in xs:
        y, y_scale = coded(times(x, p), bits)
        z, scale = coded(times(y, w), bits)
        found.append((z, scale * y_scale * w_scale))
    return found


def guesses(xs, p, w_q, w_k, bits=None):
    """S~ of each row, over the keys that it sees."""
    queries, keys = rows_of(xs, p, w_q, bits), rows_of(xs, p, w_k, bits)
    return [
        [dot(q, k) * q_scale * k_scale for k, k_scale in keys[: i + 1]]
        for i, (q, q_scale) in enumerate(queries)
    ]


def strongest(guess, kappa):
    """The kappa largest, of equals the earlier, in their order."""
    return sorted(sorted(range(len(guess)), key=lambda j: (-guess[j], j))[:kappa])


def attend(q, keys, values, scale, chosen):
    """Exact softmax attention of one query over the chosen keys."""
    scores = {j: scale * dot(q, keys[j]) for j in chosen}
    top = max(scores.values())
    weights = {j: math.exp(s - top) for j, s in scores.items()}
    total = sum(weights.values())
    return [sum(weights[j] * values[j][c] for j in chosen) / total for c in range(len(values[0]))]


def one_head(xs, p, w_q, w_k, q, keys, values, scale, kappa, bits=None):
    """(outputs, selections) of all rows of one head."""
    chosen = [strongest(guess, kappa) for guess in guesses(xs, p, w_q, w_k, bits)]
    return [attend(q[i], keys, values, scale, chosen[i]) for i in range(len(xs))], chosen


# Loads when some rows run together ---------------------------------------------------------------


def row_by_row(wanted):
    return sum(len(keys) for keys in wanted)


def in_order(wanted):
    """Every row takes its keys from first to last; what several take in a step is loaded once."""
    steps = max(len(keys) for keys in wanted)
    lists = [sorted(keys) for keys in wanted]
    return sum(len({keys[s] for keys in lists if s < len(keys)}) for s in range(steps))


def out_of_order(wanted):
    """In a step every row takes one key that it wants; first comes what most idle rows want."""
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
