"""Ordered dot products and narrow accumulators, literally: one output and one product at a time.

Python lists and whole numbers or floats; nothing in it is shared with minitx. ``weights`` are those
of one output; an order is a list of inputs.
"""


def positives_first(weights):
    """Positive ones by falling size, then the rest by falling size; equals as they stand."""
    inputs = range(len(weights))
    positive = [i for i in inputs if weights[i] > 0]
    rest = [i for i in inputs if not weights[i] > 0]
    return sorted(positive, key=lambda i: -weights[i]) + sorted(rest, key=lambda i: weights[i])


def largest_first(weights):
    return sorted(range(len(weights)), key=lambda i: -abs(weights[i]))


def alternating(weights):
    """A negative one whenever the sum so far is above 0, else a positive one; the largest left."""
    order, total = [], 0.0
    left = positives_first(weights)
    while left:
        positive = [i for i in left if weights[i] > 0]
        rest = [i for i in left if not weights[i] > 0]
        take = rest if rest and (total > 0 or not positive) else positive
        order.append(take[0])
        total += weights[take[0]]
        left.remove(take[0])
    return order


def largest_rows_first(rows):
    """rows: one list of weights for each input."""
    return sorted(range(len(rows)), key=lambda i: -sum(w * w for w in rows[i]))


def saturating(products, bits):
    """(what the accumulator ends with, did a running sum leave its range)"""
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    total, left = 0, False
    for p in products:
        total += p
        if total < least or total > most:
            left = True
        total = max(least, min(most, total))
    return total, left


def wrapping(products, bits):
    """What an accumulator in two's complement ends with."""
    total = 0
    for p in products:
        total = (total + p) % 2**bits
    return total - 2**bits if total >= 2 ** (bits - 1) else total


def balanced(products):
    """The products in an order whose running sums stay within the larger of the largest product and
    the whole sum: sorted when they are known, which no order of weights can be."""
    positive = [p for p in products if p > 0]
    rest = [p for p in products if p <= 0]
    found, total = [], 0
    while positive or rest:
        take = rest if rest and (total > 0 or not positive) else positive
        found.append(take.pop())
        total += found[-1]
    return found


def stopped_early(inputs, weights, order, bias):
    """(the neuron behind its ReLU, products made): for inputs >= 0 and positive weights first, a
    sum that is no longer above 0 among the negative weights is not finished."""
    total, made = bias, 0
    for i in order:
        if weights[i] <= 0 and total <= 0:
            return 0.0, made
        total += inputs[i] * weights[i]
        made += 1
    return max(total, 0.0), made
