"""Delta networks, literally: one token, one output and one coordinate at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def dense(x, w, b):
    return [b[j] + sum(x[i] * w[i][j] for i in range(len(x))) for j in range(len(b))]


def products(xs, w, b, threshold, refresh=None, compare_with="sent"):
    """x W + b for each of the inputs xs [token][coordinate], approximately, and how many
    coordinates each token sends. compare_with="previous": the naive variant, which compares with
    the previous input instead of what was last sent."""
    results, counts = [], []
    for t, x in enumerate(xs):
        if t == 0 or (refresh is not None and t % refresh == 0):
            reference, y, sent = list(x), dense(x, w, b), len(x)
        else:
            limit = threshold * math.sqrt(sum(value * value for value in x) / len(x))
            y, sent = list(y), 0
            for i in range(len(x)):
                change = x[i] - reference[i]
                if abs(change) > limit:
                    for j in range(len(y)):
                        y[j] += change * w[i][j]
                    reference[i] = x[i]
                    sent += 1
                elif compare_with == "previous":
                    reference[i] = x[i]
        results.append(y)
        counts.append(sent)
    return results, counts
