"""Orders in which a dot product adds its products, found offline from the weights alone.

Each function takes a matrix w (in, out) and gives an array order (in, out): output o adds the
product of input ``order[k, o]`` as its k-th. An order that all outputs share is (in, 1).
"""

import numpy as np

from minitx.shared.ordering import largest_first, small


def in_order(w, order):
    """The weights (in, out) in the order in which each output adds them: w[order[k, o], o]."""
    return np.ascontiguousarray(np.take_along_axis(w, order.astype(np.intp), axis=0))


# Orders ------------------------------------------------------------------------------------------


def positives_first(w):
    """Positive weights, then the others; in both the largest magnitude first, so zeros come last.

    If no input is negative, the running sum rises over the first and falls over the others.
    """
    return small(np.lexsort((-abs(w), w <= 0), axis=0))  # in the smallest integer type that fits


def alternating(w):
    """A negative weight whenever the weights so far sum to more than 0, else a positive one, while
    there are both; of each sign the largest magnitude first.

    So the running sum of the weights stays within their largest magnitude until one sign is used
    up, and then goes straight to the total.
    """
    inputs, outputs = w.shape
    by_sign, each = positives_first(w), np.arange(outputs)
    positive = np.zeros(outputs, np.intp)  # index in by_sign of the next positive weight
    other = first_other = (w > 0).sum(0)  # and of the next other one
    total = np.zeros(outputs)
    order = np.empty_like(by_sign)
    for k in range(inputs):
        rise = (positive < first_other) & ((total <= 0) | (other == inputs))
        order[k] = by_sign[np.where(rise, positive, other), each]
        total += w[order[k], each]
        positive, other = positive + rise, other + ~rise
    return order


def largest_rows_first(w):
    """One order for all outputs: the inputs whose rows of weights have the largest norm first. For
    signs there is no such order: an input's weight is positive for one output and negative for
    another."""
    return small(np.argsort(-(w.astype(np.float64) ** 2).sum(1), kind="stable"))[:, None]


# Baseline ----------------------------------------------------------------------------------------


def original(w):
    """As the matrix is stored."""
    return small(np.arange(len(w)))[:, None]


ORDERINGS = {
    "positives_first": positives_first,
    "largest_first": largest_first,
    "alternating": alternating,
    "largest_rows_first": largest_rows_first,
    "original": original,
}
