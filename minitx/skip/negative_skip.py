"""Negative skipping, exact: stop a neuron's dot product once it is certain that ReLU makes it 0.

The card and options, the part that runs (online), the bounds (offline), notes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.model import FFN, Linear
from minitx.shared.ordering import (
    by_output,
    few_at_a_time,
    largest_first,
    largest_rows_first,
    original,
    partial_sums,
    positives_first,
)
from minitx.shared.relu_ffn import inputs_of_up, need_relu
from minitx.technique import at_least, need, swap, technique
from minitx.tree import Part, part, walk

ORDERS = {f.__name__: f for f in (positives_first, largest_first, largest_rows_first, original)}


@technique(
    level="ffn",
    exact=True,
    neutral=None,
    after=("zero_skip",),
    demo={"every": 4},
    event=("terms computed", "terms"),
    presets={"centered": {"center": True}},
)
def negative_skip(
    lm,
    *,
    method: Annotated[
        Literal["shift", "bound"],
        "when the sign is certain. shift: inputs are shifted to be >= 0, and only negative weights "
        "are left; bound: by the Cauchy-Schwarz bound on the terms that are left",
    ] = "bound",
    order: Annotated[
        Literal["positives_first", "largest_first", "largest_rows_first", "original"] | None,
        "the order of the terms, as in order_products; default: positives_first for shift, "
        "largest_first for bound",
    ] = None,
    every: Annotated[int, "terms between two checks", at_least(1)] = 16,
    center: Annotated[
        bool,
        "subtract the mean input, measured on calibration text, so that inputs are smaller; its "
        "product with the weights is added to the bias",
    ] = False,
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) for center",
        at_least(1, limit=1000),
    ] = 4,
):
    """Stop a neuron's dot product as soon as it is certain to end below 0, where ReLU makes it 0.

    Paper:     Akhlaghi et al., "SnaPEA: Predictive Early Activation for Reducing Computation in
               Deep Convolutional Neural Networks", ISCA 2018; its exact mode.
    Fidelity:  a reconstruction from the abstract and summaries. SnaPEA's inputs are >= 0; those of
               an FFN have both signs, and its rule would be wrong. Ours: the two rules below.
    Kind:      exact, up to rounding: the zeros are those of ReLU.
    Idea:      ReLU needs only the sign of a negative sum. Add the terms in an order, found offline,
               that settles the sign early (order_products), and stop once the terms that are left
               cannot lift the sum above 0.
    Offline:   shift: for each neuron, its positive weights first, then the negative ones, both by
                      decreasing magnitude; and r (total), the sum of its weights
               bound: for each neuron, its weights by decreasing magnitude; and the norm |w_rest| of
                      those that are left at each check
    Online:    shift: m = min(0, min_i x_i);  x' = x - m >= 0;  acc = b + m r
                      acc += x'_i w_i, term by term; once only negative weights are left, acc can
                      only fall: if acc <= 0, stop
               bound: acc = b;  acc += x_i w_i, term by term; if acc + |w_rest| |x| <= 0, stop
                      (Cauchy-Schwarz; x is first divided by |x|, so that a check is one comparison)
               h = 0 if stopped, else relu(acc). The check comes once in ``every`` terms.
    Saves:     the terms after the stop. A check costs a comparison, a token D + F multiply-adds
               (shift) or 2 D + 2 F (bound). The orders are D F small integers, read like weights.
    In NumPy:  9 times slower. Every neuron gathers its own inputs, and one such gather takes longer
               than BLAS's product with all terms.
    Not for:   SwiGLU and GELU, where a negative sum does not end as 0. Saving bytes or time.
    Proof:     tests/skip/test_negative_skip.py; literal version:
               tests/skip/literal_negative_skip.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    for _, node in walk(lm.model):
        if type(node) is FFN:
            need_relu("negative_skip", node)
            need(node.expand.up, Linear)
    order = order or {"shift": "positives_first", "bound": "largest_first"}[method]
    inputs = {}
    if center:
        texts = calibration_ids("negative_skip", lm, stories, "use center=false")
        inputs = inputs_of_up(lm, texts, "negative skip")

    def change(ffn: FFN) -> Part:
        up = ffn.expand.up
        mean = inputs[id(up)].mean(0) if id(up) in inputs else None
        return replace(ffn, expand=StoppedEarly.of(up, method, ORDERS[order], every, mean))

    return swap(lm, FFN, change)


# Online ------------------------------------------------------------------------------------------


@part
class StoppedEarly(Part):
    """relu(x @ w + b), where each dot product stops at the first check after which it is certain to
    end at or below 0.

    x (..., D) -> (..., F). Stored by neuron, in the order in which its terms are added.
    """

    w: np.ndarray  # (F, D)
    order: np.ndarray  # (F, D) or (1, D): the input of each weight
    b: np.ndarray  # (F,)
    limit: np.ndarray  # (F, checks): stop if the sum so far is at most this
    total: np.ndarray | None  # (F,): r, the sum of a neuron's weights, for shift; None: bound
    every: int
    mean: np.ndarray | None = None  # (D,): subtracted from x, its product is in b

    @staticmethod
    def of(up: Linear, method: str, order: Callable, every: int, mean=None) -> "StoppedEarly":
        w, inputs = by_output(up.w, order(up.w))
        b = np.zeros(len(w), w.dtype) if up.b is None else up.b
        b = b if mean is None else b + mean @ up.w
        if method == "shift":
            return StoppedEarly(w, inputs, b, limits_of_shift(w, every), w.sum(1), every, mean)
        return StoppedEarly(w, inputs, b, limits_of_bound(w, every), None, every, mean)

    def __call__(self, x):
        x = x if self.mean is None else x - self.mean
        run = self.bounded if self.total is None else self.shifted
        return few_at_a_time(run, x, len(self.w) * self.every)

    def shifted(self, x):
        """x - m >= 0, and x w = (x - m) w + m sum(w)"""
        m = np.minimum(x.min(1), 0)[:, None]
        ledger.count(x.size + m.size * len(self.b))  # comparisons, multiply-adds
        return self.neurons(x - m, self.b + m * self.total)

    def bounded(self, x):
        """relu(x w + b) = |x| relu(x / |x| w + b / |x|)"""
        wide = x.astype(np.float64)  # in float32 large squares overflow
        size = np.sqrt(np.vecdot(wide, wide))[:, None].astype(x.dtype)
        size[size == 0] = 1
        ledger.count(2 * x.size + 2 * size.size * len(self.b))
        return self.neurons(x / size, self.b / size) * size

    def neurons(self, x, acc):
        """relu(acc + the terms of x): x (n, D), acc (n, F) -> (n, F)"""
        n, (F, D) = len(x), self.w.shape
        h, acc = np.zeros((n, F), x.dtype), acc.reshape(-1)
        tokens, neurons = np.indices((n, F)).reshape(2, -1)  # of the sums that are not stopped
        ledger.count(weight_bytes=self.limit.nbytes)
        for check, a in enumerate(range(0, D, self.every)):
            acc = acc + partial_sums(x, self.w, self.order, tokens, neurons, a, a + self.every)
            ledger.event("terms computed", acc.size * min(self.every, D - a))
            limit = self.limit[neurons, check]
            if a + self.every < D:  # the last check is ReLU itself
                ledger.count(np.isfinite(limit))  # comparisons
            on = ~(acc <= limit)  # and NaN goes on
            acc, tokens, neurons = acc[on], tokens[on], neurons[on]
        ledger.event("terms", n * F * D)
        h[tokens, neurons] = acc
        return h


# Offline -----------------------------------------------------------------------------------------


def limits_of_shift(w, every: int):
    """(F, checks): 0 where no positive weight is left, so that with inputs >= 0 the sum can only
    fall; -Inf before, where it may still rise."""
    may_rise = np.logical_or.accumulate(w[:, ::-1] > 0, axis=1)[:, ::-1]
    return np.where(at_checks(may_rise, every), -np.inf, 0).astype(w.dtype)


def limits_of_bound(w, every: int):
    """(F, checks): minus the norm of the weights that are left. With |x| = 1 their terms add at
    most that: |w_rest . x_rest| <= |w_rest| |x_rest| <= |w_rest|  (Cauchy-Schwarz)."""
    squares = w.astype(np.float64) ** 2
    return -np.sqrt(at_checks(squares[:, ::-1].cumsum(1)[:, ::-1], every)).astype(w.dtype)


def at_checks(left, every: int):
    """Of left (F, D), where column k is about the terms k .. D - 1, the columns every, 2 every and
    so on, then zeros: after all terms none is left."""
    return np.pad(left[:, every::every], ((0, 0), (0, 1)))


# Notes:
#
# - With inputs >= 0 only (m = 0), shift is SnaPEA's rule. With signed inputs that rule is wrong:
#   weights 1 and -1, inputs -1 and -3. After the positive weight the sum is -1, in the end 2.
# - Figures on stories-relu, where 76 % of the neurons are 0 (minitx sweep negative-skip
#   method=shift,bound center=false,true -m stories-relu --stories 20; all give the dense text):
#
#       method    center    multiply-adds    speed
#       shift     false     0.994x           0.10x
#       shift     true      0.989x           0.11x
#       bound     false     0.990x           0.11x
#       bound     true      0.978x           0.11x
#
#   So little because W_up is 28 % of this model, and because most sums become certain late. Of the
#   terms of W_up in one text of 200 tokens, and with checks and all other work:
#
#       method    order                 every    terms    multiply-adds of W_up
#       shift     positives_first           8    0.920    0.984x
#       shift     positives_first          16    0.942    0.979x
#       bound     largest_first             8    0.865    0.991x
#       bound     largest_first            16    0.888    0.960x
#       bound     largest_first            32    0.933    0.975x
#       bound     positives_first          16    0.946    1.020x
#       bound     largest_rows_first       16    1.000    1.074x
#       either    original                 16    1.000    above 1
#
#   The default with center=true: 0.861 and 0.932x. An order that all neurons share never pays.
# - |x| of all inputs is used in the bound. The norm of the inputs that are left would be smaller,
#   but it is another sum over each neuron's own inputs: an addition for every term.
# - center: x w + b = (x - mean) w + (b + mean w), for any mean; it only has to make inputs small.
# - zero_skip beside it skips the rows of W_down for the zeros that are found here.
