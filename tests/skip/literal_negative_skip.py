"""Exact negative skipping, literally: one token, one neuron and one term at a time.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def positives_first(weights):
    """The inputs of one neuron: positive weights, then the others, both by decreasing magnitude."""
    return sorted(range(len(weights)), key=lambda i: (weights[i] <= 0, -abs(weights[i]), i))


def largest_first(weights):
    return sorted(range(len(weights)), key=lambda i: (-abs(weights[i]), i))


def shift(x, weights, bias, every, order=positives_first):
    """relu(sum of x_i w_i + bias) of one neuron, and how many terms were added. x may be negative:
    x = (x - m) + m, and x - m >= 0."""
    m = min(0, *x)
    acc = bias + m * sum(weights)
    inputs = order(weights)
    for k, i in enumerate(inputs, 1):
        acc += (x[i] - m) * weights[i]
        only_negative = all(weights[j] <= 0 for j in inputs[k:])
        if k % every == 0 and only_negative and acc <= 0:
            return 0.0, k  # it can only fall
    return max(acc, 0.0), len(x)


def bound(x, weights, bias, every, order=largest_first):
    """The same with the Cauchy-Schwarz bound: the terms left add at most |w_rest| |x|."""
    acc, size = bias, math.sqrt(sum(value * value for value in x))
    inputs = order(weights)
    for k, i in enumerate(inputs, 1):
        acc += x[i] * weights[i]
        rest = math.sqrt(sum(weights[j] ** 2 for j in inputs[k:]))
        if k % every == 0 and acc + rest * size <= 0:
            return 0.0, k
    return max(acc, 0.0), len(x)
