"""TEAL: each matrix uses only those of its inputs that are large, and does not read the other rows.

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
from minitx.shared.gathered_rows import at_rows, sum_of_rows, union_of
from minitx.shared.linears import change_linears, linears
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, part


@technique(
    level="matrices",
    exact=False,
    neutral={"sparsity": 0.0},
    after=(
        *("cats", "low_rank", "lut_bit_serial", "lut_centroid", "lut_product", "order_products"),
        *("pack_zeros", "quantize", "separate_magnitudes", "separate_signs"),
    ),
    demo={"sparsity": 0.5, "step": 0.5, "stories": 1},
    event=("inputs read", "inputs"),
    presets={"paper": {"sparsity": 0.5, "step": 0.05}},
)
def teal(
    lm,
    *,
    sparsity: Annotated[
        float,
        "share of the multiply-adds of each block's matrices that is skipped, on the calibration "
        "text",
        at_least(0, below=1),
    ] = 0.4,
    allocation: Annotated[
        Literal["greedy", "uniform"],
        "greedy: the matrices of a block skip different shares, those that cost least; uniform: "
        "all skip the same share of their inputs",
    ] = "greedy",
    choose: Annotated[
        Literal["magnitude", "random"],
        "which inputs are used: those above the threshold, or a random baseline of as many",
    ] = "magnitude",
    step: Annotated[
        float,
        "of greedy: how much a step adds to the sparsity of W_q; to that of a larger matrix, less",
        between(0.02, 1),
    ] = 0.5,
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
    Idea:      y = sum of x_i W[i] over the inputs i. Many x_i are small in every layer, also where
               no activation function makes them so, and W[i] need not be read for those. Not all
               matrices bear it equally, so each gets a sparsity p of its own.
    Offline:   t = the p quantile of |x| for each matrix, over calibration tokens. Greedy, for each
               block: all p = 0; raise the p of the matrix whose step costs the block's output
               least; repeat until the block skips ``sparsity``. A step skips equally many weights
               in any matrix. allocation=uniform: p = sparsity everywhere.
    Online:    A = the inputs with |x| > t
               y = x[A] W[A] + b                        only these rows are read
    Saves:     one row of W, so ``out`` multiply-adds, per skipped input; an input costs a
               comparison. Tokens that run at once (a prompt) use the union of their inputs, which
               soon is all of them.
    In NumPy:  slower than dense below about 75 % sparsity, which costs too much: 0.5x on stories.
               One matrix of 1,536 x 576: 0.4x at 50 %, 1.0x at 80 %, 2x at 90 %.
    Not for:   matrices that are not plain (quantize), batches. Head and embedding stay dense.
    Proof:     tests/skip/test_teal.py; literal version: tests/skip/literal_teal.py
    """
    from minitx.skip.teal.allocation import thresholds

    found = linears(lm.model, "all")
    if sparsity == 0:
        return lm
    texts = calibration_ids("teal", lm, stories)
    t = thresholds(lm, texts, sparsity, step if allocation == "greedy" else None)
    order = {key: number for number, key in enumerate(found)}

    def change(linear: Linear) -> Part:
        select: Part = AboveThreshold(t[id(linear)])
        if choose == "random":
            select = AsManyAtRandom.of(t[id(linear)], len(linear.w), (seed, order[id(linear)]))
        return ThresholdedLinear.of(linear, select)

    return change_linears(lm, found, change)


# Online ------------------------------------------------------------------------------------------


@part
class ThresholdedLinear(Part):
    """x @ w + b with only the active inputs of x: the rows of w for the others are not read."""

    needs_inner_first = True  # the thresholds are of this model
    matrix_layout = "row-major"

    w: np.ndarray  # (in, out)
    b: np.ndarray | None
    select: Part

    @staticmethod
    def of(linear: Linear, select: Part) -> "ThresholdedLinear":
        return ThresholdedLinear(linear.w, linear.b, select)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these output columns: a slice, or an array of indices."""
        active = self.select(x)
        ledger.event("inputs read", active)
        ledger.event("inputs", active.size)
        rows = union_of(active)
        b = None if self.b is None else self.b[columns]
        return sum_of_rows(at_rows(x, active, rows), self.w[:, columns], rows, b)


# Notes:
#
# - Figures on stories
