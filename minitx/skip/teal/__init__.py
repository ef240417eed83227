"""TEAL: each matrix is multiplied by its large inputs only; the rows of the others are not read.

This file: the card and options, the product that runs (online), thresholds, notes. Read next:
allocation.py (how much each matrix of a block skips, offline).

Letters: D width, T tokens.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.model import Linear
from minitx.shared.activation_threshold import AboveThreshold, AsManyAtRandom
from minitx.shared.gathered_rows import PROMPTS, at_rows, sum_of_rows, token_by_token, union_of
from minitx.shared.linears import change_linears, linears
from minitx.skip.teal.allocation import thresholds
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=False,
    neutral={"sparsity": 0.0},
    after=(
        *("cats", "low_rank", "lut_bit_serial", "lut_centroid", "lut_product", "order_products"),
        *("pack_zeros", "perforate", "quantize", "separate_magnitudes", "separate_signs"),
    ),
    demo={"sparsity": 0.5, "step": 0.5, "stories": 1},
    event=("inputs read", "inputs"),
    presets={"aggressive": {"sparsity": 0.5}},
)
def teal(
    lm,
    *,
    sparsity: Annotated[
        float,
        "share of the multiply-adds of each block's matrices to skip, on the calibration text",
        at_least(0, below=1),
    ] = 0.4,
    allocation: Annotated[
        Literal["greedy", "uniform"],
        "greedy: the matrices of a block skip different shares, found by a greedy search for the "
        "smallest error; uniform: all skip the same share of their inputs",
    ] = "greedy",
    choose: Annotated[
        Literal["magnitude", "random"],
        "which inputs are used: those above the threshold, or, as a baseline, as many at random",
    ] = "magnitude",
    step: Annotated[
        float,
        "of greedy: what a step adds to the sparsity of W_q; it adds less to a larger matrix",
        between(0.02, 1),
    ] = 0.5,
    prompts: Annotated[Literal["union", "skip"], PROMPTS] = "union",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 2,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Skip the smallest inputs of every matrix, by a calibrated threshold for each matrix.

    Paper:     Liu et al., "Training-Free Activation Sparsity in Large Language Models" (TEAL),
               ICLR 2025, arXiv 2408.14690.
    Fidelity:  the authors' code for the allocation and its error. Thresholds are exact quantiles;
               the authors fit histograms of four inputs per block. No token stays dense (Notes).
    Kind:      approximate; exact at sparsity=0.
    Idea:      y = sum of x_i W[i] over the inputs i. Many x_i are small in every layer, even where
               no activation function makes them so, and W[i] need not be read for those. Not all
               matrices tolerate it equally, so each gets its own sparsity p.
    Offline:   t = the p quantile of |x| for each matrix, over calibration tokens. Greedy, for each
               block: all p = 0; raise the p of the matrix whose step costs the block's output
               least; repeat until the block skips ``sparsity``. A step skips equally many weights
               in any matrix. allocation=uniform: p = sparsity everywhere.
    Online:    rows = the active inputs: |x| > t
               y    = x[rows] W[rows] + b               only these rows are read
    Saves:     one row of W, so ``out`` multiply-adds, per skipped input; an input costs a
               comparison. Tokens that run at once (a prompt) use the union of their active inputs,
               which is soon all of them (prompts).
    In NumPy:  slower than dense below about 70 % sparsity, where the loss is too high: stories runs
               0.5x as fast. One matrix of 1,536 x 576 (python -m minitx.lab.product_times teal
               1536 576): 0.6x at 50 %, 1.0x at 70 %, 2x at 90 %.
    Not for:   matrices in another format (quantize), batches. Head and embedding stay dense.
    Proof:     tests/skip/test_teal.py; literal version: tests/skip/literal_teal.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    found = linears(lm.model, "all")
    if sparsity == 0:
        return lm
    texts = calibration_ids("teal", lm, stories)
    t = thresholds(lm, texts, sparsity, step if allocation == "greedy" else None, with_threshold)
    order = {key: number for number, key in enumerate(found)}

    def change(linear: Linear) -> Part:
        select: Part = AboveThreshold(t[id(linear)])
        if choose == "random":
            select = AsManyAtRandom.of(t[id(linear)], len(linear.w), (seed, order[id(linear)]))
        return KINDS[prompts].of(linear, select)

    return change_linears(lm, found, change)


def with_threshold(linear: Linear, threshold: float) -> Part:
    """The matrix with the inputs above this threshold only."""
    return ThresholdedLinear.of(linear, AboveThreshold(threshold))


# Online ------------------------------------------------------------------------------------------


@part
class ThresholdedLinear(Part):
    """x @ w + b with only the active inputs of x: the rows of w for the others are not read."""

    needs_inner_first = True  # the thresholds are of this model
    matrix_layout = "row-major"

    w: np.ndarray  # (in, out)
    b: np.ndarray | None
    select: Part

    @classmethod
    def of(cls, linear: Linear, select: Part) -> "ThresholdedLinear":
        return cls(linear.w, linear.b, select)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these output columns: a slice, or an array of indices."""
        return self.run(x, columns)

    def run(self, x, columns):
        """x (..., in) -> (..., columns), over the inputs that any of these tokens needs."""
        active = self.select(x)
        ledger.event("inputs read", active)
        ledger.event("inputs", active.size)
        rows = union_of(active)
        b = None if self.b is None else self.b[columns]
        return sum_of_rows(at_rows(x, active, rows), self.w[:, columns], rows, b)


@part
class EachTokenLinear(ThresholdedLinear):
    """The same, for one token after another."""

    def outputs(self, x, columns):
        return token_by_token(lambda row: self.run(row, columns), x)


KINDS = {"union": ThresholdedLinear, "skip": EachTokenLinear}


# Notes:
#
# - Figures on stories (minitx sweep teal sparsity=0.3,0.4,0.5,0.6 --stories 60, the same with
#   allocation=uniform, and sparsity=0.1,0.4 choose=random; one BLAS thread, a busy machine). Loss:
#   above dense, in nats per token. Hops: % of answers that are right, by the facts that they
#   combine. Counts include the prompt of 32 tokens, which needs nearly all inputs, and the head.
#
#       sparsity  allocation  choose     multiply-adds  loss      1 / 2 / 3 hops   speed
#       dense                                1.000x     0.0000    99 / 93 / 100    1.0x
#       0.3       greedy      magnitude      0.844x    +0.0017    99 / 93 / 100    0.5x
#       0.3       uniform     magnitude      0.842x    +0.0039    99 / 93 / 100    0.4x
#       0.4       greedy      magnitude      0.789x    +0.0082   100 / 93 / 100    0.5x
#       0.4       uniform     magnitude      0.789x    +0.0117    98 / 91 / 100    0.4x
#       0.5       greedy      magnitude      0.722x    +0.0222    99 / 89 /  97    0.5x
#       0.5       uniform     magnitude      0.736x    +0.0634    97 / 89 /  97    0.5x
#       0.6       greedy      magnitude      0.653x    +0.1527    90 / 67 /  81    0.6x
#       0.1       greedy      random         0.953x    +0.6202    85 / 73 /  86    0.4x
#       0.4       greedy      random         0.791x    +6.5909     2 /  2 /   3    0.4x
#
#   The random rows are of step=0.25.
# - The authors step by 0.05, which takes ten times as long to allocate as 0.5 and gains little
#   (minitx sweep teal step=0.05,0.5,1 --stories 20): +0.0042, +0.0064 and +0.0059. As in their
#   code, a block is judged on the last quarter of each text, by what it gets in the dense model,
#   and the error is the norm of each feature over the tokens, averaged. Ours: the last step is
#   shortened so that the target is met, and no matrix skips more than 95 % unless the target is
#   higher.
# - The authors leave the first half of a prompt dense when they evaluate; by a comment in their
#   code, only its first tokens need that. On stories and on SmolLM2-135M-Instruct it made no clear
#   difference in a trial (the first 4 or 16 tokens dense), so no token is dense.
# - SmolLM2-135M-Instruct (not shipped), sparsity=0.3, calibrated on other text, 192 tokens: KL
#   divergence from dense 0.15 nats per token with allocation=uniform, 0.11 with greedy (step=1
#   stories=1); 0.86x and 0.85x of the multiply-adds, 0.5x the speed.
# - The authors read t off a histogram of x as its quantile 0.5 + p / 2, which skips p only if x is
#   symmetric around zero. After ReLU it is not; a quantile of |x| always skips p.
# - W_q, W_k and W_v read the same input with thresholds of their own, so each compares.
# - Random inputs are drawn so that tokens differ, as many as the token has above the threshold.
