"""A3, literally: one query, one product, one pop at a time, on Python lists.

Nothing in it is shared with minitx. ``by_queues`` is the paper's search with pointers into sorted
columns and two priority queues; ``by_sorting`` its plainer form, which sorts all products first and
says which of equal ones comes first: that of the earlier key, then of the earlier column.
"""

import heapq
import math


def sorted_columns(keys):
    """For each column its numbers in ascending order, as pairs of a number and its row."""
    return [sorted((key[j], row) for row, key in enumerate(keys)) for j in range(len(keys[0]))]


def by_queues(q, keys, M, gate="after"):
    """(greedy sums, products made). gate: the sum is looked at "after" an iteration's largest
    product, at its "start", or "never"."""
    columns, n = sorted_columns(keys), len(keys)
    products = 0

    def entry(side, j, pointer):
        """side 1 for the largest, -1 for the smallest; a used-up column has no entry."""
        nonlocal products
        if 0 <= pointer < n:
            products += 1
            number, row = columns[j][pointer]
            heapq.heappush(queues[side], (-side * number * q[j], row, j, pointer))

    queues = {1: [], -1: []}
    for j in range(len(q)):
        entry(1, j, n - 1 if q[j] > 0 else 0)
        entry(-1, j, 0 if q[j] > 0 else n - 1)
    products = 0  # the first ones fill the queues; the paper counts one a pop
    greedy, running = [0.0] * n, 0.0

    def pop(side):
        nonlocal running
        if queues[side]:
            product, row, j, pointer = heapq.heappop(queues[side])
            product *= -side
            if side * product > 0:
                greedy[row] += product
                running += product
            entry(side, j, pointer + (-side if q[j] > 0 else side))

    for _ in range(M):
        negative = running < 0
        pop(1)
        if gate == "after":
            negative = running < 0
        if gate == "never" or not negative:
            pop(-1)
    return greedy, products


def by_sorting(q, keys, M):
    """(greedy sums, how many negative products were taken)."""
    every = [(q[j] * x, row, j) for row, key in enumerate(keys) for j, x in enumerate(key)]
    largest = sorted(every, key=lambda e: (-e[0], e[1], e[2]))
    smallest = sorted(every)
    greedy, running, taken = [0.0] * len(keys), 0.0, 0
    for t in range(min(M, len(every))):
        product, row, _ = largest[t]
        if product > 0:
            greedy[row] += product
            running += product
        if running >= 0:
            product, row, _ = smallest[taken]
            if product < 0:
                greedy[row] += product
                running += product
            taken += 1
    return greedy, sum(e[0] < 0 for e in smallest[:taken])


def candidates(q, keys, share, rebuild=0):
    n = len(keys)
    finished = n - n % rebuild if rebuild else n
    M = max(1, round(share * n))
    greedy = by_sorting(q, keys[:finished], M)[0] if finished else []
    found = [row for row, total in enumerate(greedy) if total > 0] + list(range(finished, n))
    return found or [greedy.index(max(greedy))]


def survivors(scores, T):
    """Of scores by row those that are near enough to the largest."""
    t = math.log(100 / T) if T else math.inf
    return [row for row, score in scores.items() if max(scores.values()) - score <= t]


def fixed(x, i, f):
    """The nearest number with i integer and f fraction bits."""
    code = round(x * 2**f)
    most = 2 ** (i + f) - 1
    return max(-most, min(most, code)) / 2**f


def table_exp(x, f):
    code = round(-x * 2 ** (2 * f))
    if code >= 2 ** (4 * f):
        return 0.0
    upper, lower = code >> 2 * f, code & (2 ** (2 * f) - 1)
    return math.exp(-upper) * math.exp(-lower / 2 ** (2 * f))


def one_query(q, keys, values, scale, M=0.5, T=5.0, rebuild=0, exp="exact", i=None, f=4):
    """(output, candidates, survivors) of one query of one head that sees all of these keys."""
    n, q = len(keys), [x * scale for x in q]
    if i is not None:
        q = [fixed(x, i, f) for x in q]
        keys = [[fixed(x, i, f) for x in key] for key in keys]
        values = [[fixed(x, i, f) for x in value] for value in values]
    found = list(range(n)) if M is None else candidates(q, keys, M, rebuild)
    scores = {row: sum(x * y for x, y in zip(q, keys[row])) for row in found}
    kept = survivors(scores, T)
    best = max(scores.values())
    exponential = (lambda x: table_exp(x, f)) if exp == "tables" else math.exp
    weights = {row: exponential(scores[row] - best) for row in kept}
    unit = 2 ** (2 * f)
    if i is not None:
        weights = {row: round(w * unit) / unit for row, w in weights.items()}
    total = sum(weights.values())
    weights = {row: w / total for row, w in weights.items()}
    if i is not None:
        weights = {row: round(w * unit) / unit for row, w in weights.items()}
    columns = range(len(values[0]))
    return [sum(weights[row] * values[row][c] for row in kept) for c in columns], found, kept


def attention(q, k, v, scale, **settings):
    """All heads of one sequence: q[H][T][d], k and v[K][S][d], the T newest keys last. Gives
    (output[H][T][d], candidates and survivors by [H][T])."""
    out, chosen = [], []
    for h in range(len(q)):
        keys, values = k[h // (len(q) // len(k))], v[h // (len(q) // len(k))]
        out.append([])
        chosen.append([])
        for t in range(len(q[h])):
            end = len(keys) - len(q[h]) + t + 1
            row, *found = one_query(q[h][t], keys[:end], values[:end], scale, **settings)
            out[-1].append(row)
            chosen[-1].append(found)
    return out, chosen
