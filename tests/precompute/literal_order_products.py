"""Ordered dot products and narrow accumulators, literally: one output and one product at a time.

Python lists, integers and floats; nothing here is shared with minitx. ``weights`` are those of one
output; an order is a list of input indices.
"""


def positives_first(weights):
    """Positive weights, then the others, by decreasing size; ties go to the lower index."""
    inputs = range(len(weights))
    positive = [i for i in inputs if weights[i] > 0]
    others = [i for i in inputs if not weights[i] > 0]
    return sorted(positive, key=lambda i: -weights[i]) + sorted(others, key=lambda i: weights[i])


def largest_first(weights):
    return sorted(range(len(weights)), key=lambda i: -abs(weights[i]))


def alternating(weights):
    """A negative weight if the sum so far is above 0, else a positive one; the largest that is
    left of that sign."""
    order, total = [], 0.0
    left = positives_first(weights)
    while left:
        positive = [i for i in left if weights[i] > 0]
        others = [i for i in left if not weights[i] > 0]
        take = others if others and (total > 0 or not positive) else positive
        order.append(take[0])
        total += weights[take[0]]
        left.remove(take[0])
    return order


def largest_rows_first(rows):
    """rows: one list of weights for each input."""
    return sorted(range(len(rows)), key=lambda i: -sum(w * w for w in rows[i]))


def saturating(products, bits):
    """(what a saturating accumulator ends with, whether a running sum left its range)"""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    total, overflowed = 0, False
    for p in products:
        total += p
        if total < low or total > high:
            overflowed = True
        total = max(low, min(high, total))
    return total, overflowed


def wrapping(products, bits):
    """What a two's complement accumulator ends with."""
    total = 0
    for p in products:
        total = (total + p) % 2**bits
    return total - 2**bits if total >= 2 ** (bits - 1) else total


def sorted_online(products):
    """The products of one token in an order whose running sums stay within the larger of the
    largest product and the total. It needs the products: no order of weights can do that."""
    positive = [p for p in products if p > 0]
    others = [p for p in products if p <= 0]
    order, total = [], 0
    while positive or others:
        take = others if others and (total > 0 or not positive) else positive
        order.append(take.pop())
        total += order[-1]
    return order


def stopped_early(inputs, weights, order, bias):
    """(ReLU of the dot product, products computed): with inputs >= 0 and positive weights first, a
    sum that is not above 0 among the negative weights can only fall, so it stops."""
    total, computed = bias, 0
    for i in order:
        if weights[i] <= 0 and total <= 0:
            return 0.0, computed
        total += inputs[i] * weights[i]
        computed += 1
    return max(total, 0.0), computed
