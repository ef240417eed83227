"""Orders in which a dot product adds its products, found from the weights alone.

The order of a matrix w (in, out) is an array of row numbers (in, out): output o reads input
``order[k, o]`` as its k-th. Its weights are then ``in_order(w, order)``: w[order[k, o], o]. An
order that all outputs share is (in, 1). Kept in the smallest unsigned type that holds the numbers.
"""

import numpy as np

from minitx import ledger, ops
from minitx.tree import Part, part


def positives_first(w):
    """Positive weights, then the others; the largest magnitude first in both, so zeros come last.

    Where no input is negative, a running sum rises over the first and falls over the others.
    """
    return small(np.lexsort((-abs(w), w <= 0), axis=0))


def largest_first(w):
    """The largest magnitude first: what is left to add gets smaller and smaller."""
    return small(np.argsort(-abs(w), axis=0, kind="stable"))


def alternating(w):
    """A negative weight whenever those so far add up to more than 0, else a positive one, as long
    as there are both; of each sign the largest magnitude first.

    So the sums of weights stay within their largest magnitude until one sign is used up, and from
    there on go straight to the whole sum.
    """
    inputs, outputs = w.shape
    split, each = positives_first(w), np.arange(outputs)
    positive = np.zeros(outputs, np.intp)  # next of each sign, as a place in ``split``
    other = first_other = (w > 0).sum(0)
    total = np.zeros(outputs)
    order = np.empty_like(split)
    for k in range(inputs):
        rise = (positive < first_other) & ((total <= 0) | (other == inputs))
        order[k] = split[np.where(rise, positive, other), each]
        total += w[order[k], each]
        positive, other = positive + rise, other + ~rise
    return order


def largest_rows_first(w):
    """One order for all outputs: the inputs with the longest rows of weights first. Signs have no
    such order, since an input's weight is positive for one output and negative for another."""
    return small(np.argsort(-(w.astype(np.float64) ** 2).sum(1), kind="stable"))[:, None]


def stored(w):
    """As the matrix has them."""
    return small(np.arange(len(w)))[:, None]


ORDERS = {
    "positives_first": positives_first,
    "largest_first": largest_first,
    "alternating": alternating,
    "largest_rows_first": largest_rows_first,
    "stored": stored,
}


def small(order):
    """Whole numbers from 0 on, in the smallest unsigned type that holds them."""
    return order.astype(np.min_scalar_type(order.max()))


def in_order(w, order):
    """The weights (in, out) as each output reads them."""
    return np.ascontiguousarray(np.take_along_axis(w, order.astype(np.intp), axis=0))


GATHERED = 1 << 20  # inputs laid out for their weights at a time, so that they fit in memory


@part
class OrderedLinear(Part):
    """x @ w + b, every output adding its products in an order of its own (or in a shared one)."""

    w: np.ndarray  # (in, out) in order: w[k, o] is the k-th weight of output o
    order: np.ndarray  # (in, out) or (in, 1): the input that goes with it
    by: str
    b: np.ndarray | None = None

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        b = None if self.b is None else self.b[columns]
        w = self.w[:, columns]
        if self.order.shape[1] == 1:  # shared: turn x, and the product is an ordinary one
            ledger.count(weight_bytes=self.order.nbytes)  # an order is read like weights
            return ops.linear(x[..., self.order[:, 0]], w, b)
        # Row-major, as w is stored: from another layout einsum adds the products in another order.
        w, order = np.ascontiguousarray(w), np.ascontiguousarray(self.order[:, columns])
        ledger.count(weight_bytes=order.nbytes)
        ledger.product(x, w)
        rows = x.reshape(-1, x.shape[-1])
        step = max(1, GATHERED // max(1, w.size))
        pieces = [
            np.einsum("nko,ko->no", rows[a : a + step, order], w)  # adds k = 0, 1, 2, ...
            for a in range(0, len(rows), step)
        ]
        y = np.concatenate(pieces).reshape(*x.shape[:-1], w.shape[1])
        return y if b is None else y + b
