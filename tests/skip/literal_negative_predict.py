"""Predictive negative skipping, literally: one token, one neuron and one term at a time.

Python lists and floats; nothing here is shared with minitx.
"""


def largest_first(weights):
    return sorted(range(len(weights)), key=lambda i: (-abs(weights[i]), i))


def predict(x, weights, bias, prefix, threshold):
    """relu(sum of x_i w_i + bias) of one neuron, or 0 if it is predicted; and the terms added."""
    order, acc = largest_first(weights), bias
    for i in order[:prefix]:
        acc += x[i] * weights[i]
    if acc < threshold:
        return 0.0, prefix
    for i in order[prefix:]:
        acc += x[i] * weights[i]
    return max(acc, 0.0), len(x)


def threshold(texts, weights, bias, prefix, miss):
    """The highest of the sums after the prefix at which the share ``miss`` of the positive values
    is lost, or fewer; None if all may be lost. texts: the inputs x of the calibration tokens."""
    order, sums = largest_first(weights), []
    for x in texts:
        if sum(a * w for a, w in zip(x, weights)) + bias > 0:
            sums.append(bias + sum(x[i] * weights[i] for i in order[:prefix]))
    for candidate in sorted(sums, reverse=True):
        lost = sum(found < candidate for found in sums)
        if lost <= miss * len(sums):
            return candidate
    return None
