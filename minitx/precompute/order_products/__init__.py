"""Ordered dot products: each adds its products in an order that was found from the weights.

Here: the card and the ordered product (online). Beside it: orderings.py names the orders (offline),
accumulator.py simulates a narrow accumulator that adds in such an order.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.model import Linear
from minitx.precompute.order_products.accumulator import SaturatingLinear
from minitx.precompute.order_products.orderings import ORDERINGS
from minitx.shared.linears import change_linears, linears
from minitx.shared.ordering import in_order
from minitx.technique import between, technique
from minitx.tree import Part, part


@technique(level="matrices", exact=True, neutral=None, after=("low_rank", "perforate"))
def order_products(
    lm,
    *,
    order: Annotated[
        Literal[
            "positives_first", "largest_first", "alternating", "largest_rows_first", "original"
        ],
        "the order in which products are added; see Offline",
    ] = "positives_first",
    accumulator_bits: Annotated[
        int | None,
        "add int8 products in a saturating accumulator of this width, in bits; None: add floats",
        between(8, 32),
    ] = None,
    matrices: Annotated[Literal["all", "ffn", "attention"], "which matrices are reordered"] = "all",
):
    """Reorder the products within each dot product, by sign or by magnitude of the weights.

    Paper:     listed on David Spuler's page "Weight Precomputations" (to avoid overflows), without
               a method. Narrow accumulators: Natesh and Kung, "PQS (Prune, Quantize, and Sort)",
               2025, arXiv 2504.09064. Early stopping: Akhlaghi et al., "SnaPEA", ISCA 2018.
    Fidelity:  ours: the orders. PQS sorts the products of each token online (its exact procedure is
               unconfirmed here); these orders are found offline from the weights alone.
    Kind:      exact but for rounding in float sums; approximate with accumulator_bits. No saving on
               the shipped models at any setting: what it shows is for hardware that adds in few
               bits or stops early.
    Idea:      A running sum may overflow a narrow accumulator although the total fits (a transient
               overflow); another order may avoid it. And with inputs >= 0 and positive weights
               first, a sum that falls below 0 stays there: before a ReLU, negative_skip stops.
    Offline:   for each output o an order of the inputs, by its weights w[:, o]:
               positives_first     w > 0, then the others; both by decreasing |w|
               largest_first       by decreasing |w|
               alternating         negative if the weights so far sum to more than 0, else positive;
                                   of each sign by decreasing |w|
               largest_rows_first  one order for all outputs, by decreasing norm of the rows of w
               original            as stored: the baseline
    Online:    y[o] = sum over k = 0, 1, 2, ... of x[i] w[i, o],  i = order[k, o]
               With a shared order, BLAS decides the order of float sums.
               accumulator_bits=n: x and w in int8, added exactly in this order; each running sum is
               clipped to n bits, and the overflows are counted
    Saves:     no multiply-adds: here all products are added. An order for each output costs 1 byte
               per weight (2 from 257 inputs on), read as well; a shared one hardly anything.
    In NumPy:  several times slower, since every output gathers its own inputs; a shared order costs
               little. The accumulator is simulated step by step, and slower by far.
    Not for:   narrower accumulators in the shipped models: no order allows them (Notes). The head
               is not reordered.
    Proof:     tests/precompute/test_order_products.py;
               literal version: tests/precompute/literal_order_products.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """

    def ordered(linear: Linear):
        found = ORDERINGS[order](linear.w)
        if accumulator_bits is not None:
            return SaturatingLinear.of(linear.w, linear.b, found, order, accumulator_bits)
        return OrderedLinear(in_order(linear.w, found), found, order, linear.b)

    return change_linears(lm, linears(lm, matrices), ordered)


# Online ------------------------------------------------------------------------------------------

GATHERED = 1 << 20  # inputs gathered at a time, so that they fit in memory


@part
class OrderedLinear(Part):
    """``x @ w + b``; every output adds its products in its own order.

    If all share one order, ``order`` is (in, 1). Then x is reordered once and BLAS multiplies,
    which decides itself in which order it adds.
    """

    w: np.ndarray  # (in, out) in order: w[k, o] is the weight of output o's k-th product
    order: np.ndarray  # (in, out) or (in, 1): the input of that product
    ordering: str  # the name of that order
    b: np.ndarray | None = None

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        b = None if self.b is None else self.b[columns]
        w = self.w[:, columns]
        if self.order.shape[1] == 1:  # a shared order: reorder x, then an ordinary BLAS product
            ledger.count(weight_bytes=self.order.nbytes)  # the order is read like weights
            return ops.linear(x[..., self.order[:, 0]], w, b)
        # Row-major, as w is stored: in another layout einsum would add in another order.
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


# Notes:
#
# - Where inputs are >= 0 and of similar size, alternating needs an accumulator no wider than the
#   totals do. In the shipped models, measured on calibration stories, no offline order saves a bit:
#   the totals alone need the width. Where inputs have both signs, so have the products, whatever
#   the signs of the weights; and after a ReLU most inputs are 0, which breaks the alternation.
# - positives_first is by far the worst order there: the running sum climbs to the end of the range
#   and back. So the order that suits early stopping is the worst for a narrow accumulator.
# - Generating text on stories (minitx sweep order-products order=positives_first,largest_rows_first
#   --stories 60; one BLAS thread) runs at 0.14x of the dense speed with an order for each output,
#   and at 0.71x with a shared one.
# - Sorting products token by token, as in PQS, would avoid all transient overflows; the counter
#   "transient overflows" of the report says how many that are. A wrapping accumulator needs no
#   order at all.
