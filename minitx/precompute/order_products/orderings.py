"""The orders by name. Those that a technique which stops early uses too are in shared/ordering.py;
here is the one that only makes sense for a narrow accumulator."""

import numpy as np

from minitx.shared.ordering import largest_first, largest_rows_first, original, positives_first


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


ORDERINGS = {
    "positives_first": positives_first,
    "largest_first": largest_first,
    "alternating": alternating,
    "largest_rows_first": largest_rows_first,
    "original": original,
}
