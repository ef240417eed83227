"""Orders in which a dot product adds its products, found offline from the weights alone.

Each order function takes a matrix w (in, out) and gives an array order (in, out): output o adds the
product of input ``order[k, o]`` as its k-th. An order that all outputs share is (in, 1).
"""

import numpy as np

from minitx import ledger


def largest_first(w):
    """For each output of w (in, out), its inputs by decreasing |w|; ties go to the lower index."""
    return small(np.argsort(-abs(w), axis=0, kind="stable"))


def positives_first(w):
    """Positive weights, then the others; in both the largest magnitude first, so zeros come last.

    If no input is negative, the running sum rises over the first and falls over the others.
    """
    return small(np.lexsort((-abs(w), w <= 0), axis=0))  # in the smallest integer type that fits


def largest_rows_first(w):
    """One order for all outputs: the inputs whose rows of weights have the largest norm first. By
    sign there is no shared order: an input's weight is positive for one output and negative for
    another."""
    return small(np.argsort(-(w.astype(np.float64) ** 2).sum(1), kind="stable"))[:, None]


def original(w):
    """As the matrix is stored: the baseline."""
    return small(np.arange(len(w)))[:, None]


def small(order):
    """The same indices in the smallest unsigned integer type that fits them, to save memory."""
    return order.astype(np.min_scalar_type(order.max()))


def in_order(w, order):
    """The weights (in, out) in the order in which each output adds them: w[order[k, o], o]."""
    return np.ascontiguousarray(np.take_along_axis(w, order.astype(np.intp), axis=0))


# Sums of some of the products ---------------------------------------------------------------------


def by_output(w, order):
    """The weights (in, out) and their order, stored so that each output's are contiguous, as they
    are read: (out, in), and (out, in) or (1, in)."""
    return in_order(w, order).T.copy(), order.T.copy()


def partial_sums(x, w, order, tokens, outputs, a: int, b: int):
    """For each pair i of a token and an output, the sum of its products number a .. b - 1:

        sum over k = a .. b - 1 of  w[outputs[i], k] x[tokens[i], order[outputs[i], k]]

    x (n, in), w and order from ``by_output``, tokens and outputs (pairs,) -> (pairs,)."""
    if len(order) == 1:
        inputs = x[:, order[0, a:b]].take(tokens, 0)
    else:
        inputs = x[tokens[:, None], order[outputs, a:b]]
    each = w.itemsize + (order.itemsize if len(order) > 1 else 0)  # bytes of a weight and its index
    ledger.count(inputs.size, lambda: np.unique(outputs).size * inputs.shape[1] * each)
    return np.einsum("pk,pk->p", inputs, w[outputs, a:b])


GATHERED = 1 << 20  # inputs gathered at a time, so that they fit in memory


def few_at_a_time(run, x, gathered: int):
    """run(rows) (n, out) for the rows (n, in) of x (..., in), a few at a time -> (..., out).
    gathered: how many inputs ``run`` gathers for each row."""
    rows, step = x.reshape(-1, x.shape[-1]), max(1, GATHERED // max(1, gathered))
    starts = range(0, max(1, len(rows)), step)  # a step may have no token
    y = np.concatenate([run(rows[a : a + step]) for a in starts])
    return y.reshape(*x.shape[:-1], y.shape[-1])
