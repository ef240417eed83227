"""A3, literally: one query, one product, one pop at a time, on Python lists.

It shares no code with minitx. ``search_by_sorting`` is the paper's plain form of the search: sort
all products; each iteration takes the next largest and, if the gate is open, the next smallest.
``search_by_queues`` is its efficient form, with pointers into sorted columns and two priority
queues. Causal attention, ``rebuild``, and what a query without candidates keeps, are choices of
ours.
"""

import heapq
import math

# Candidate search --------------------------------------------------------------------------------


def search_by_sorting(q, keys, M):
    """(greedy sums, number of products added) after M iterations. Ties: first the lower column, and
    in a column the number nearer to its end."""
    products = [(q[j] * x, j, row) for row, key in enumerate(keys) for j, x in enumerate(key)]

    def from_the_end(j, row):
        return -row if q[j] > 0 else row

    largest = sorted(products, key=lambda p: (-p[0], p[1], from_the_end(p[1], p[2])))
    smallest = sorted(products, key=lambda p: (p[0], p[1], -from_the_end(p[1], p[2])))
    greedy, running, added, taken = [0.0] * len(keys), 0.0, 0, 0
    for t in range(min(M, len(products))):
        product, _, row = largest[t]
        if product > 0:
            greedy[row] += product
            running += product
            added += 1
        if running >= 0:
            product, _, row = smallest[taken]
            if product < 0:
                greedy[row] += product
                running += product
                added += 1
            taken += 1
    return greedy, added


def sorted_columns(keys):
    """For each column its numbers in ascending order, as pairs of a number and its row."""
    return [sorted((key[j], row) for row, key in enumerate(keys)) for j in range(len(keys[0]))]


def search_by_queues(q, keys, M, gate="after"):
    """(greedy sums, number of products computed, not counting the first of each column). gate: the
    running sum is read "after" an iteration's largest product, at its "start", or "never"."""
    columns, n = sorted_columns(keys), len(keys)
    products = 0

    def push(side, j, pointer):
        """side 1 for the largest, -1 for the smallest; a used-up column has no entry."""
        nonlocal products
        if 0 <= pointer < n:
            products += 1
            number, row = columns[j][pointer]
            heapq.heappush(queues[side], (-side * number * q[j], j, row, pointer))

    queues = {1: [], -1: []}
    for j in range(len(q)):
        push(1, j, n - 1 if q[j] > 0 else 0)
        push(-1, j, 0 if q[j] > 0 else n - 1)
    products = 0  # the paper counts one for each pop
    greedy, running = [0.0] * n, 0.0

    def pop(side):
        nonlocal running
        if queues[side]:
            product, j, row, pointer = heapq.heappop(queues[side])
            product *= -side
            if side * product > 0:
                greedy[row] += product
                running += product
            push(side, j, pointer + (-side if q[j] > 0 else side))

    for _ in range(M):
        negative = running < 0
        pop(1)
        if gate == "after":
            negative = running < 0
        if gate == "never" or not negative:
            pop(-1)
    return greedy, products


def candidates(q, keys, share, rebuild=0):
    n = len(keys)
    finished = n - n % rebuild if rebuild else n
    M = max(1, round(share * n))
    greedy = search_by_sorting(q, keys[:finished], M)[0] if finished else []
    found = [row for row, total in enumerate(greedy) if total > 0] + list(range(finished, n))
    return found or [greedy.index(max(greedy))]


# Second filter, and attention --------------------------------------------------------------------


def filter_by_score(scores, threshold):
    """The rows, of scores by row, that are at most ln(100 / threshold) below the largest."""
    t = math.log(100 / threshold) if threshold else math.inf
    return [row for row, score in scores.items() if max(scores.values()) - score <= t]


def fixed_point(x, integer_bits, fraction_bits):
    """The nearest number with these integer and fraction bits."""
    code = round(x * 2**fraction_bits)
    largest = 2 ** (integer_bits + fraction_bits) - 1
    return max(-largest, min(largest, code)) / 2**fraction_bits


def exp_from_tables(x, fraction_bits):
    f = fraction_bits
    code = round(-x * 2 ** (2 * f))
    if code >= 2 ** (4 * f):
        return 0.0
    high, low = code >> 2 * f, code & (2 ** (2 * f) - 1)
    return math.exp(-high) * math.exp(-low / 2 ** (2 * f))


def attend(
    q,
    keys,
    values,
    scale,
    iterations=0.5,
    threshold=5.0,
    rebuild=0,
    exp="exact",
    integer_bits=None,
    fraction_bits=4,
):
    """(output, candidates, kept keys) of one query of one head that sees all of these keys."""
    n, q = len(keys), [x * scale for x in q]
    if integer_bits is not None:
        bits = integer_bits, fraction_bits
        q = [fixed_point(x, *bits) for x in q]
        keys = [[fixed_point(x, *bits) for x in key] for key in keys]
        values = [[fixed_point(x, *bits) for x in value] for value in values]
    found = list(range(n)) if iterations is None else candidates(q, keys, iterations, rebuild)
    scores = {row: sum(x * y for x, y in zip(q, keys[row])) for row in found}
    kept = filter_by_score(scores, threshold)
    largest = max(scores.values())

    def exponential(x):
        return exp_from_tables(x, fraction_bits) if exp == "tables" else math.exp(x)

    def rounded(x):
        unit = 2 ** (2 * fraction_bits)
        return x if integer_bits is None else round(x * unit) / unit

    weights = {row: rounded(exponential(scores[row] - largest)) for row in kept}
    total = sum(weights.values())
    weights = {row: rounded(w / total) for row, w in weights.items()}
    columns = range(len(values[0]))
    return [sum(weights[row] * values[row][c] for row in kept) for c in columns], found, kept


def attention(q, k, v, scale, **settings):
    """Causal attention of one sequence: q[H][T][d], k and v[K][S][d], the T newest keys last. Gives
    (output[H][T][d], candidates and kept keys by [H][T])."""
    out, selected = [], []
    for h in range(len(q)):
        keys, values = k[h // (len(q) // len(k))], v[h // (len(q) // len(k))]
        out.append([])
        selected.append([])
        for t in range(len(q[h])):
            end = len(keys) - len(q[h]) + t + 1
            row, *found = attend(q[h][t], keys[:end], values[:end], scale, **settings)
            out[-1].append(row)
            selected[-1].append(found)
    return out, selected
