"""Loop perforation of matrix products: some inputs of each weight matrix are always skipped.

The card and options, the part that runs (online), which inputs are kept and what replaces the terms
of the others (offline), notes. search.py: how much of each matrix is skipped.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.progress import bar
from minitx.shared.linears import change_linears, linears
from minitx.shared.observed_inputs import watched
from minitx.shared.quality_monitor import Limit, Monitor, monitored
from minitx.shared.share import share_of
from minitx.skip.perforate.search import random_rates, searched_rates
from minitx.technique import SEEDS, at_least, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="matrices",
    exact=False,
    neutral={"rate": 0.0},
    after=("low_rank",),
    demo={"rate": 0.25, "rates": "uniform", "stories": 2},
    presets={
        "aggressive": {"rate": 0.3},
        "blind": {"rate": 0.25, "pattern": "stride", "fill": "none", "rates": "uniform"},
    },
)
def perforate(
    lm,
    *,
    rate: Annotated[float, "share of the multiply-adds to skip", at_least(0, below=1)] = 0.2,
    pattern: Annotated[
        Literal["norm", "stride", "truncate", "sample"],
        "norm: skip the inputs that change the output least; stride: inputs at equal distances; "
        "truncate: the last ones; sample: random ones, a baseline",
    ] = "norm",
    fill: Annotated[
        Literal["mean", "fit", "scale", "rate", "none"],
        "what replaces the skipped terms. mean: their mean; fit: least squares on the kept inputs; "
        "scale: a factor for each output; rate: the factor 1 / (1 - rate); none: nothing",
    ] = "mean",
    rates: Annotated[
        Literal["greedy", "uniform", "random"],
        "greedy: a rate for each matrix, by a search; uniform: the same for all; random: random "
        "ones, a baseline",
    ] = "greedy",
    matrices: Annotated[Literal["all", "ffn", "attention"], "which are perforated"] = "all",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 16,
    monitor: Monitor = 0,
    limit: Limit = 0.8,
    seed: Annotated[int, "of pattern=sample and rates=random", SEEDS] = 0,
):
    """Perforate matrix products: skip some iterations of the inner loop over the inputs.

    Paper:     Sidiroglou-Douskos, Misailovic, Hoffmann and Rinard, "Managing Performance vs.
               Accuracy Trade-offs with Loop Perforation", ESEC/FSE 2011.
    Fidelity:  a reconstruction from summaries: the three patterns, each loop perforated alone, then
               a greedy search. Ours: pattern=norm, fills, KL divergence as the output's error.
    Kind:      approximate; exact at rate=0.
    Idea:      y_j = sum of x_i W_ij over inputs i is a loop. A program may be good enough with
               fewer iterations of it. Which ones are skipped is fixed: a smaller matrix remains.
    Offline:   for each matrix W (in, out): the r inputs to keep and, from calibration inputs x,
               mean:   c = sum over the skipped i of mean(x_i) W_i     (alpha = 1, the default)
               scale:  alpha_j = <y_j, p_j> / <p_j, p_j>,  p = x[kept] W[kept]     (c = 0)
               rate:   alpha = in / r,  c = 0          none:  alpha = 1,  c = 0
               fit:    c and, instead of alpha W[kept], the matrix with the least squared error
               norm keeps the inputs with the largest rms(x_i - f_i) |W_i|; f_i = mean(x_i) for the
               fills mean and fit, else 0.
               rates=greedy: the KL divergence from the dense model on two texts with only one
               matrix perforated, at 1/4, 1/2, 3/4. Then repeatedly the step with the least
               added KL per multiply-add saved, until a share ``rate`` of all is skipped.
    Online:    y = x[kept] (alpha W[kept]) + (c + b)      both in brackets are stored
    Saves:     (in - r) out multiply-adds per token and as many weights, of each matrix.
    In NumPy:  as fast as dense on stories: with so few inputs, gathering them and adding c take
               what is saved. At 512 x 1408 with a quarter skipped, a product takes 0.8x the time,
               for one token and for 128 (python -m minitx.lab.product_times perforate 512 1408).
    Not for:   text of another kind than the calibration text; techniques that need a whole matrix
               W_o or W_down (head_router, ...).
    Proof:     tests/skip/test_perforate.py; literal version: tests/skip/literal_perforate.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    if monitor and matrices == "attention":
        raise MinitxError(
            "perforate: the quality monitor compares FFNs and matrices=attention perforates none; "
            "use monitor=0, or matrices=ffn or all."
        )
    wanted = linears(lm.model, matrices)
    if rate == 0:
        return lm
    texts = calibration_ids("perforate", lm, stories)
    inputs = observe(lm, wanted, texts, gram=fill in ("scale", "fit"))
    numbers = {key: number for number, key in enumerate(wanted)}

    def make(linear: Linear, rate: float) -> Part:
        key = id(linear)
        return perforated(linear, rate, pattern, fill, inputs[key], (seed, numbers[key]))

    chosen = [rate] * len(wanted)
    if rates == "greedy":
        settings = (pattern, fill, matrices, seed)
        chosen = searched_rates(lm, wanted, rate, texts, make, settings)
    elif rates == "random":
        chosen = random_rates(wanted, rate, seed)
    changed = change_linears(lm, wanted, lambda linear: make(linear, chosen[numbers[id(linear)]]))
    return with_monitor(lm, changed, monitor, limit) if monitor else changed


# Online ------------------------------------------------------------------------------------------


@part
class Perforated(Part):
    """A product over the kept inputs only."""

    inner: Part  # alpha W[kept] (r, out), with the bias c + b
    kept: np.ndarray = table()  # (r,) the inputs that are kept, ascending

    def __call__(self, x):
        return self.inner(x.take(self.kept, -1))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self.inner.outputs(x.take(self.kept, -1), columns)


# Offline: which inputs are kept ------------------------------------------------------------------


def kept_inputs(pattern: str, size: int, count: int, importance, seed) -> np.ndarray:
    """The ``count`` inputs of ``size`` whose iterations run, ascending."""
    if pattern == "truncate":
        return np.arange(count)
    if pattern == "stride":
        return np.arange(count) * size // count
    if pattern == "sample":
        return np.sort(np.random.default_rng(seed).choice(size, count, replace=False))
    return np.sort(np.argsort(-importance, kind="stable")[:count])  # ties: the lower index


def importance(w, inputs: "Inputs", fill: str):
    """(in,) rms(x_i - fill_i) |W_i|: how much the output changes if input i is skipped."""
    squares = inputs.squares / inputs.count
    if fill in ("mean", "fit"):
        squares = np.maximum(squares - inputs.mean**2, 0)  # the variance
    return np.sqrt(squares) * np.linalg.norm(w, axis=1)


# Offline: what replaces the others ---------------------------------------------------------------


@dataclass
class Inputs:
    """Observer: sums over all inputs x (in,) of a matrix, in float64."""

    wants_gram: bool
    count: int = 0
    total: np.ndarray | float = 0.0  # (in,) sum of x
    squares: np.ndarray | float = 0.0  # (in,) sum of x^2
    gram: np.ndarray | float = 0.0  # (in, in) sum of x^T x, if wanted

    def add(self, rows) -> None:
        rows = rows.astype(np.float64)
        self.count += len(rows)
        self.total = self.total + rows.sum(0)
        self.squares = self.squares + (rows * rows).sum(0)
        if self.wants_gram:
            self.gram = self.gram + rows.T @ rows

    @property
    def mean(self):
        return self.total / self.count


def observe(lm, wanted: dict[int, Linear], texts, gram: bool) -> dict[int, Inputs]:
    """The inputs of each wanted matrix while the model reads the texts."""
    model, inputs = watched(lm.model, Linear, lambda: Inputs(gram), wanted)
    for ids in bar(texts, "perforate: calibrate", unit="text", delay=1.0):
        model.hidden(ids)
    return inputs


def perforated(linear: Linear, rate: float, pattern: str, fill: str, inputs: Inputs, seed) -> Part:
    """The matrix without this share of its inputs; itself if that is less than one input."""
    w = linear.w.astype(np.float64)
    size = len(w)
    skipped = min(share_of(size, rate), size - 1)
    if not skipped:
        return linear
    kept = kept_inputs(pattern, size, size - skipped, importance(w, inputs, fill), seed)
    left, c = filled(w, kept, fill, inputs)
    b = c if linear.b is None else linear.b + c
    dtype = linear.w.dtype
    none = linear.b is None and not np.any(c)
    return Perforated(Linear(left.astype(dtype), None if none else b.astype(dtype)), kept)


def filled(w, kept, fill: str, inputs: Inputs):
    """alpha W[kept] (r, out) and c (out,) for w (in, out)."""
    left, zero = w[kept], np.zeros(w.shape[1])
    if fill == "mean":
        return left, inputs.mean @ w - inputs.mean[kept] @ left
    if fill == "fit":
        left = least_squares(w, kept, inputs)
        return left, inputs.mean @ w - inputs.mean[kept] @ left
    if fill == "scale":
        gram = inputs.gram[kept]  # (r, in)
        with_all = np.vecdot(left, gram @ w, axis=0)  # (out,) <y_j, p_j>
        alone = np.vecdot(left, gram[:, kept] @ left, axis=0)  # <p_j, p_j>
        return left * np.divide(with_all, alone, out=zero + 1, where=alone > 0), zero
    if fill == "rate":
        return left * (len(w) / len(kept)), zero
    return left, zero


DAMPING = 0.01  # of fill=fit, added to the diagonal in units of its mean


def least_squares(w, kept, inputs: Inputs):
    """The matrix W' (r, out) that minimizes the squared error of x[kept] W' + c, damped. From
    centered inputs, since c takes care of the means."""
    cov = inputs.gram / inputs.count - np.outer(inputs.mean, inputs.mean)
    damping = DAMPING * (np.trace(cov) / len(cov) or 1.0)
    a = cov[np.ix_(kept, kept)] + damping * np.eye(len(kept))
    b = cov[kept] @ w + damping * w[kept]  # damped towards the weights as they are
    return np.linalg.solve(a, b)


# Offline: the quality monitor --------------------------------------------------------------------


def with_monitor(dense: Part, changed: Part, every: int, limit: float) -> Part:
    """The perforated model, where the monitor may use the exact FFN of each block instead."""
    exact: dict[int, Part] = {}
    wrap(dense, "ffn", lambda ffn, index: exact.setdefault(index, ffn))

    def change(ffn: Part, index: int) -> Part:
        same = ffn is exact[index]  # nothing in it is perforated
        return ffn if same else monitored(exact[index], [ffn], every, limit)

    return wrap(changed, "ffn", change)


# Notes:
#
# - Why fill=mean is the default: relative errors of a product with half of its 256 inputs skipped
#   at equal distances, on synthetic inputs and weights (tested):
#
#                                          none    rate    scale    mean
#       inputs of mean 0                   0.70    0.99    0.70     0.70
#       inputs with means of their own     0.71    1.02    0.63     0.50
#       inputs and weights of mean 1       0.50    0.11    0.08     0.06
#
#   mean is exact on average whatever the signs, costs nothing online, and needs one number per
#   input. The blind factor of rate doubles what is kept, which helps only where the skipped terms
#   have the same sign. fit is better still where there is text enough for as many numbers as it
#   has: minitx sweep perforate rates=uniform rate=0.125 fill=fit,mean stories=4,16,64 --stories 12:
#   with 4, 16 and 64 calibration stories fit costs +0.237, +0.030 and +0.017, mean +0.159, +0.093
#   and +0.093.
# - pattern=sample with fill=rate is unbiased over seeds (tested). Not here: a new draw for each
#   token with probabilities like |x_i| |W_i|, for which a matrix would have to know the position.
# - A skipped input of W_down is a neuron that W_gate and W_up still compute; prune_structure
#   removes those too.
# - The search assumes that errors add up. It runs the model 6 times per matrix, from the block of
#   the matrix on: 3 s on stories, but minutes on a large model (there, rates=uniform).
# - ``monitor`` puts the exact FFN beside the perforated one, which costs memory; attention stays
#   perforated. On 12 stories (minitx sweep perforate rate=0.2,0.3 monitor=16 --stories 12; and
#   rate=0.1 without it) a lower rate is better: 0.915x and 0.894x of the multiply-adds at +0.0021
#   and +0.0059 nats per token, with 1.1x of the memory; rate=0.1 0.911x at +0.0007, with 0.91x.
#       python -m minitx.lab.layer_events perforate monitor=16 limit=0.8 --stories 10
#   An FFN's output is far off long before the loss moves, since the search perforates what hardly
#   matters: with limit=0.3 every check is above it, with 0.8 half are, with 1 4 %.
# - Figures on stories, one BLAS thread:
#       minitx sweep perforate rate=0.1,0.2,0.3 --stories 60
#       minitx sweep perforate rate=0.2 pattern=stride,truncate,sample --stories 60
#       minitx sweep perforate rate=0.2 fill=fit,scale,none --stories 60
#       minitx sweep perforate rate=0.1,0.2 rates=random --stories 60
#       minitx sweep perforate rate=0.1 rates=uniform pattern=norm,stride,truncate,sample \
#           --stories 60
#       minitx sweep perforate rate=0.1 rates=uniform fill=fit,scale,rate,none --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (dense: 99 / 93 / 100 %):
#
#       rate  rates    pattern   fill   multiply-adds  loss     1 / 2 / 3 hops   speed
#       0.1   greedy   norm      mean   0.91x          +0.000   99 / 93 / 97 %   1.1x
#       0.2   greedy   norm      mean   0.82x          +0.004   99 / 93 / 97 %   1.0x
#       0.3   greedy   norm      mean   0.73x          +0.011   98 / 87 / 83 %   1.0x
#       0.2   greedy   truncate  mean   0.82x          +0.004   99 / 91 / 94 %   1.1x
#       0.2   greedy   stride    mean   0.82x          +0.005   100 / 93 / 97 %  1.0x
#       0.2   greedy   sample    mean   0.82x          +0.007   99 / 93 / 97 %   1.1x
#       0.2   greedy   norm      fit    0.82x          +0.004   100 / 89 / 92 %  0.9x
#       0.2   greedy   norm      scale  0.82x          +0.005   99 / 91 / 100 %  1.1x
#       0.2   greedy   norm      none   0.82x          +0.004   99 / 91 / 97 %   1.0x
#       0.1   random   norm      mean   0.91x          +4.5     3 / 0 / 0 %      1.0x
#       0.2   random   norm      mean   0.82x          +5.2     2 / 0 / 0 %      1.1x
#       0.1   uniform  norm      mean   0.92x          +0.042   99 / 91 / 97 %   0.8x
#       0.1   uniform  stride    mean   0.92x          +0.444   89 / 76 / 75 %   0.9x
#       0.1   uniform  truncate  mean   0.92x          +0.615   85 / 76 / 58 %   0.9x
#       0.1   uniform  sample    mean   0.92x          +0.385   89 / 89 / 78 %   0.8x
#       0.1   uniform  norm      fit    0.92x          +0.013   98 / 87 / 97 %   0.8x
#       0.1   uniform  norm      scale  0.92x          +0.041   99 / 95 / 94 %   0.9x
#       0.1   uniform  norm      rate   0.92x          +0.053   97 / 89 / 94 %   1.0x
#       0.1   uniform  norm      none   0.92x          +0.044   99 / 95 / 94 %   1.0x
#
#   At the same rate for all, the pattern decides. After the search it hardly matters, nor does the
#   fill: the search perforates layers 4 to 7 only, which this model hardly needs, and random rates
#   ruin it. On stories mean is little better than none with pattern=norm, which skips inputs that
#   are small anyway.
