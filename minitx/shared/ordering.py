"""Orders of the inputs of a matrix, as arrays of input indices."""

import numpy as np


def largest_first(w):
    """For each output of w (in, out), its inputs by decreasing |w|; ties go to the lower index."""
    return small(np.argsort(-abs(w), axis=0, kind="stable"))


def small(order):
    """The same indices in the smallest unsigned integer type that fits them, to save memory."""
    return order.astype(np.min_scalar_type(order.max()))
