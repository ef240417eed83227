"""Negative skipping, predictive: a few terms of a dot product predict that ReLU makes it 0.

The card and options, the part that runs (online), how prefix and thresholds are tuned (offline),
notes.
"""

from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.model import FFN, Linear
from minitx.shared.break_even import warn
from minitx.shared.ordering import by_output, few_at_a_time, largest_first, partial_sums
from minitx.shared.quality_monitor import Limit, Monitor, monitored
from minitx.shared.relu_ffn import inputs_of_up, need_relu
from minitx.shared.share import share_of
from minitx.technique import SEEDS, above, at_least, between, need, swap, technique
from minitx.tree import Part, part, table, walk


@technique(
    level="ffn",
    exact=False,
    neutral={"prefix": 1.0},
    after=("zero_skip",),
    demo={"prefix": 0.25, "miss": 0.3, "stories": 1},
    event=("dot products finished", "dot products"),
    presets={"aggressive": {"miss": 0.1}},
)
def negative_predict(
    lm,
    *,
    prefix: Annotated[
        float | None,
        "share of the terms that are added before the prediction; 1: all, so nothing is predicted; "
        "default: for each layer the one of 1/8, 2/8, ... 7/8 with the fewest multiply-adds on the "
        "calibration text",
        above(0, 1),
    ] = None,
    miss: Annotated[
        float,
        "share of each neuron's positive values on the calibration text that may be predicted "
        "negative, and so become 0",
        between(0, 1),
    ] = 0.02,
    choose: Annotated[
        Literal["prefix", "random"],
        "which neurons are predicted negative: by their own sums, or, as a random baseline, by "
        "those of other neurons, so that each token skips as many",
    ] = "prefix",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 8,
    monitor: Monitor = 0,
    limit: Limit = 0.2,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Predict from a few large terms that a neuron's sum ends below 0, and skip the other terms.

    Paper:     Akhlaghi et al., "SnaPEA: Predictive Early Activation for Reducing Computation in
               Deep Convolutional Neural Networks", ISCA 2018; its predictive mode.
    Fidelity:  a reconstruction from the abstract and summaries. Unconfirmed there and chosen here:
               how prefix and thresholds are tuned (theirs are optimized together, for a given loss
               of accuracy).
    Kind:      approximate; exact at prefix=1.
    Idea:      The terms with the largest weights usually settle the sign of a sum. If after them it
               is clearly negative, take the neuron for 0, as ReLU would make it.
    Offline:   for each neuron, its weights by decreasing magnitude. On the calibration text, for a
               prefix of k terms and each neuron:
                 threshold = the highest at which at most the share miss of its positive values is
                             lost
               k = of D/8, 2 D/8, ... 7 D/8, for each layer, the one with the fewest multiply-adds;
               a layer in which none has fewer than the dense product stays dense
    Online:    acc = b + sum of the first k terms
               acc < threshold:  h = 0
               otherwise:        acc += the other D - k terms;  h = relu(acc)
    Saves:     D - k of D multiply-adds for each neuron that is predicted negative, less one
               comparison per neuron. The orders are D F small integers, read like weights.
    In NumPy:  5 times slower: every neuron gathers its own inputs, and one such gather takes longer
               than BLAS's product with all terms.
    Not for:   SwiGLU and GELU, where a negative sum does not end as 0. Saving bytes or time. Text
               of another kind than the calibration text.
    Proof:     tests/skip/test_negative_predict.py; literal version:
               tests/skip/literal_negative_predict.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    if prefix == 1:
        return lm
    for _, node in walk(lm.model):
        if type(node) is FFN:
            need_relu("negative_predict", node)
            need(node.expand.up, Linear)
    texts = calibration_ids("negative_predict", lm, stories)
    inputs = inputs_of_up(lm, texts, "negative predict")
    rng = np.random.default_rng(seed)

    def change(ffn: FFN) -> Part:
        up = ffn.expand.up
        if id(up) not in inputs:  # nothing reads it
            return ffn
        plan = tuned(up, inputs[id(up)], prefix, miss)
        if plan is None:
            return ffn
        others = rng.permutation(up.w.shape[1]) if choose == "random" else None
        found = replace(ffn, expand=Predicted.of(up, plan, others))
        return monitored(ffn, [found], monitor, limit)

    changed = swap(lm, FFN, change)
    if changed is lm:
        warn(
            f"negative_predict changed nothing: with miss={miss:g}, predictions cost more than "
            "they save in every layer; allow a larger miss."
        )
    return changed


# Online ------------------------------------------------------------------------------------------


@part
class Predicted(Part):
    """relu(x @ w + b), and 0 where the sum of the largest terms is below a threshold.

    x (..., D) -> (..., F). Stored by neuron, in the order in which its terms are added.
    """

    w: np.ndarray  # (F, D)
    order: np.ndarray  # (F, D): the input of each weight
    b: np.ndarray  # (F,)
    threshold: np.ndarray  # (F,)
    prefix: int  # terms before the prediction
    others: np.ndarray | None = table(default=None)  # (F,) of choose=random: whose prediction

    @staticmethod
    def of(up: Linear, plan: "Plan", others=None) -> "Predicted":
        w, order = by_output(up.w, largest_first(up.w))
        b = np.zeros(len(w), w.dtype) if up.b is None else up.b
        return Predicted(w, order, b, plan.threshold, plan.prefix, others)

    def __call__(self, x):
        return few_at_a_time(self.neurons, x, len(self.w) * self.prefix)

    def neurons(self, x):
        """x (n, D) -> (n, F)"""
        n, (F, D) = len(x), self.w.shape
        tokens, neurons = np.indices((n, F)).reshape(2, -1)
        acc = self.b[neurons] + partial_sums(x, self.w, self.order, tokens, neurons, 0, self.prefix)
        on = ~(acc < self.threshold[neurons])  # and NaN goes on
        ledger.count(acc.size, weight_bytes=self.threshold.nbytes)  # comparisons
        if self.others is not None:
            on = on.reshape(n, F)[:, self.others].reshape(-1)
        acc, tokens, neurons = acc[on], tokens[on], neurons[on]
        acc = acc + partial_sums(x, self.w, self.order, tokens, neurons, self.prefix, D)
        ledger.event("dot products", n * F)
        ledger.event("dot products finished", on)
        h = np.zeros((n, F), acc.dtype)
        h[tokens, neurons] = np.maximum(acc, 0)
        return h


# Offline -----------------------------------------------------------------------------------------

MARGIN = 1e-5  # of the largest sum: the same token is on the same side, however it is rounded


class Plan(NamedTuple):
    """How the neurons of a layer are predicted."""

    prefix: int  # terms
    threshold: np.ndarray  # (F,)
    work: float  # multiply-adds per neuron and token of the calibration text


def tuned(up: Linear, x, prefix: float | None, miss: float) -> Plan | None:
    """The plan with this prefix, a share of the terms; without one, the cheapest of seven, or None
    if all cost more than the dense product. x (n, D): the inputs of the calibration text."""
    D = len(up.w)
    if prefix is not None:
        return plan_of(up, x, max(1, share_of(D, prefix)), miss)
    plans = [plan_of(up, x, k, miss) for k in sorted({max(1, D * i // 8) for i in range(1, 8)})]
    best = min(plans, key=lambda plan: plan.work)
    return best if best.work < D else None


def plan_of(up: Linear, x, k: int, miss: float) -> Plan:
    """The thresholds of all neurons for a prefix of k terms."""
    w, b = up.w.astype(np.float64), 0 if up.b is None else up.b.astype(np.float64)
    rank = np.argsort(largest_first(up.w), axis=0, kind="stable")  # of each weight, in its neuron
    sums = x @ np.where(rank < k, w, 0) + b  # (n, F), what is known after k terms
    positive = x @ w + b > 0
    threshold = thresholds(sums, positive, miss)
    finished = (sums >= threshold).mean()
    return Plan(k, threshold.astype(up.w.dtype), k + 1 + (len(w) - k) * finished)


def thresholds(sums, positive, miss: float):
    """(F,): for each neuron, with sums (n, F) after its prefix, the highest threshold that predicts
    at most the share ``miss`` of its positive values negative. If there are none left to be found,
    it is above all sums."""
    count, margin = positive.sum(0), MARGIN * abs(sums).max(0)
    lost = np.floor(np.round(count * miss, 6)).astype(int)
    found = np.sort(np.where(positive, sums, np.inf), axis=0)  # the positive values come first
    lowest_kept = np.take_along_axis(found, np.minimum(lost, len(found) - 1)[None], 0)[0]
    return np.where(lost < count, lowest_kept - margin, sums.max(0) + margin)


# Notes:
#
# - Figures on stories-relu, where 76 % of the neurons are 0 and W_up is 28 % of the multiply-adds:
#       minitx sweep negative-predict miss=0,0.02,0.05,0.1 -m stories-relu --stories 20
#       minitx sweep negative-predict miss=0.02 choose=random -m stories-relu --stories 20
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (few: 20 stories).
#
#       miss    choose    multiply-adds    loss       1 / 2 / 3 hops    speed
#       dense             1.00x             0.0000    61 / 84 / 31 %    1.0x
#       0       prefix    0.919x           -0.0000    61 / 84 / 31 %    0.19x
#       0.02    prefix    0.901x           +0.0004    61 / 84 / 38 %    0.21x
#       0.05    prefix    0.887x           +0.0030    58 / 74 / 38 %    0.21x
#       0.1     prefix    0.871x           +0.0037    58 / 74 / 38 %    0.24x
#       0.02    random    0.904x           +3.0802    19 / 32 / 15 %    0.21x
#
# - The baseline gives each neuron the prediction of another one, always the same. So as many
#   neurons of each token are dropped, and as many terms computed.
# - A threshold is a little below the lowest sum that it keeps (1e-5 of the largest): the same token
#   in another text, or in another batch, is rounded differently, and must not be dropped by that.
# - A neuron that is never positive on the calibration text gets a threshold above all its sums.
# - miss counts values, not how large they are: those that are lost are small ones mostly, since a
#   sum that is far below 0 after its largest terms rarely ends far above.
# - Why 8 calibration stories: with 4 of them and miss=0.1, a few tokens are far off. On 6 stories
#   (minitx compare --negative-predict miss=0.1 stories=4 -m stories-relu --stories 6) the mean KL
#   divergence is 0.012 nats per token, a quarter of it from one token of 1,147; with 8 it is
#   0.0039. The largest KL of a single token is an exercise of the tutorial.
# - The quality monitor costs more than it prevents here:
#       python -m minitx.lab.layer_events negative_predict miss=0.1 monitor=8 -m stories-relu
#   leaves 0.936x of the blocks' multiply-adds instead of 0.865x (without monitor=8), and 0.6 % of
#   the checks are above the limit of 0.2: with limit=0.08 a third are. At the default miss, a
#   quarter of the checks are above limit=0.02.
# - zero_skip beside it skips the rows of W_down for the zeros that are predicted here.
