"""Contextual sparsity: small predictors say which FFN neurons and heads a token needs (Deja Vu).

This file: the card and options, the parts that run (online), how they are made, checks, notes. Read
next: predictor.py (the predictor and the selection), fit.py (how predictors are trained), file.py
(the shipped ones), train.py (the command that trains and measures them).
"""

import os
from dataclasses import fields
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import FFN, Attend, Attention
from minitx.shared.quality_monitor import LIMIT, MONITOR, monitored
from minitx.shared.random_baseline import random_scores
from minitx.shared.share import share_of
from minitx.shared.some_heads import attend_one_key_head, mask_of_sequence, mask_of_tokens
from minitx.skip.contextual_sparsity.file import FILE, need_shapes, read_predictors
from minitx.skip.contextual_sparsity.fit import Pace, Training, need_heads, need_neurons, quick
from minitx.skip.contextual_sparsity.predictor import Above, RandomK, TopK
from minitx.state import Layer, Tokens
from minitx.technique import SEEDS, at_least, between, blocks_of, technique, wrap
from minitx.tree import Part, part

THRESHOLD = 1.0  # of the scores, if neither neurons nor threshold is given


@technique(
    level="attention",
    exact=False,
    neutral={"neurons": 1.0, "heads": 1.0},
    demo={"neurons": 0.5, "heads": 0.5, "stories": 2},
    event=("neurons run", "neurons"),
    presets={"top-k": {"neurons": 0.3}, "aggressive": {"threshold": 2.0}},
)
def contextual_sparsity(
    lm,
    *,
    neurons: Annotated[
        float | None,
        "share of the FFN neurons that run, those with the highest scores (rounded down, but at "
        "least one); 1: all, without a predictor; default: those above the threshold instead",
        between(0, 1),
    ] = None,
    threshold: Annotated[
        float | None,
        "run the neurons with a score above this; 0: those whose sigmoid is above one half; "
        f"default: {THRESHOLD:g}",
        between(-100, 100),
    ] = None,
    heads: Annotated[
        float,
        "share of the attention heads that run, those with the highest scores (rounded down, but "
        "at least one); 1: all, without a predictor",
        between(0, 1),
    ] = 1.0,
    choose: Annotated[
        Literal["predictor", "random"],
        "neurons and heads are selected by the predictors, or at random, a baseline (needs "
        "neurons)",
    ] = "predictor",
    rank: Annotated[
        int | None,
        "rank of the predictors; if the file beside the weights has another one, they are trained "
        "on loading; default: a quarter of the width for neurons, a sixteenth for heads",
        at_least(1, limit=1000),
    ] = None,
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text), if predictors are trained on "
        "loading",
        at_least(1, limit=1000),
    ] = 16,
    epochs: Annotated[
        int, "passes over them, if predictors are trained on loading", at_least(1, limit=100)
    ] = 20,
    monitor: Annotated[int, MONITOR, at_least(0)] = 0,
    limit: Annotated[float, LIMIT, between(0, 1000)] = 0.1,
    seed: Annotated[int, "of choose=random, and of training on loading", SEEDS] = 0,
):
    """Predict which FFN neurons and attention heads a token needs, and run only those (Deja Vu).

    Paper:     Liu et al., "Deja Vu: Contextual Sparsity for Efficient LLMs at Inference Time", ICML
               2023, arXiv 2310.17157.
    Fidelity:  the authors' code for the predictors and their loss, as notes on it describe them.
               Ours: predictors read the input of their own sub-layer; in the code, one sub-layer
               (for heads: one layer) ahead, to run at the same time as it (Notes).
    Kind:      approximate; exact with neurons=1 and heads=1. On stories-relu neurons pay, and heads
               do not, so by default all heads run.
    Idea:      ReLU sets most neurons to 0, different ones for each token. A low-rank map predicts
               which will be active, for far less than computing them, so that both FFN products
               shrink. (zero_skip, which sees the zeros, shrinks only the second.) Likewise heads.
    Offline:   each layer: A (D, rank) and B (rank, F), no bias, nothing between. y_j = 1 where
               neuron j is above 0 on calibration text: weighted binary cross entropy in which
               inactive neurons weigh mean(y) + 0.005; AdamW. stories-relu has trained ones.
               W_up is stored transposed: a neuron is a contiguous row of it, and of W_down.
               Heads: B (rank, H); y_h = 1 for the half of the heads with the largest |ctx_h W_o,h|.
    Online:    for each token, with n = norm(x):
                 z = (n A) B                                 a score for each neuron
                 run = the neurons j with z_j > threshold, or the top-k (ties: lower index)
                 h = relu(n W_up[:, run] + b_up[run]);  y = h W_down[run] + b_down
               heads: keys and values of all heads are cached; then q_h, attention and the rows
               W_o,h only of the top-k heads.
    Saves:     2 D multiply-adds per neuron that does not run, less rank (D + F); 2 D d + 2 S d per
               head, less rank (D + H). Per token and layer (S cached tokens, heads of width d).
    In NumPy:  slower on stories-relu, 0.6x as fast as dense: selecting and gathering rows cost more
               than the small products. An FFN of 1,024 x 4,096 breaks even at 23 % of the neurons.
    Not for:   FFNs without ReLU (heads alone are possible: neurons=1), or whose matrices another
               technique has replaced (quantize, ...). If one has changed the model (fold_norms,
               prune, ...), predictors are trained on loading.
    Proof:     tests/skip/test_contextual_sparsity.py;
               literal version: tests/skip/literal_contextual_sparsity.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    check_choice(neurons, threshold, choose, monitor)
    threshold = THRESHOLD if threshold is None else threshold
    training, slots = Training(rank, Pace(epochs), seed), {}
    if neurons != 1:
        for ffn in in_slot(lm, "ffn"):
            need_neurons(ffn)
        slots["ffn"] = neurons
    if heads < 1:
        for attn in in_slot(lm, "attn"):
            need_heads(attn)
        slots["attn"] = heads
    selectors = {}
    for slot, share in slots.items():
        if choose == "random":
            selectors[slot] = random_selectors(lm, slot, share, seed)
        else:
            predictors = shipped(lm, slot, rank) or quick(lm, slot, stories, training)
            selectors[slot] = [select(p, share, threshold) for p in predictors]
    return predicted(lm, selectors, monitor, limit)


# Online: neurons ---------------------------------------------------------------------------------


@part
class FFNByNeuron(Part):
    """A ReLU FFN with both matrices stored by neuron, one contiguous row for each; all run."""

    norm: Part
    w1: np.ndarray  # (F, D), W_up transposed
    b1: np.ndarray  # (F,)
    w2: np.ndarray  # (F, D), W_down
    b2: np.ndarray | None  # (D,)

    def __call__(self, x, layer: Layer):
        h = ops.relu(ops.linear(self.norm(x), self.w1.T, self.b1))
        return ops.linear(h, self.w2, self.b2)


@part
class PredictedNeurons(FFNByNeuron):
    """The same, but each token runs only the neurons that are selected for it."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True

    selector: Part

    def __call__(self, x, layer: Layer):
        n = self.norm(x)
        runs = self.selector(n, layer)  # (..., T, F)
        ledger.event("neurons", runs.size)
        ledger.event("neurons run", runs)
        y = np.empty_like(x)
        for t in np.ndindex(x.shape[:-1]):
            y[t] = self.one_token(n[t], runs[t])
        return y

    def one_token(self, n, runs):
        """n (D,), the normalized input; runs (F,), booleans -> (D,)."""
        run = np.flatnonzero(runs)  # (r,) the indices of those that run
        w1, w2 = self.w1.take(run, 0), self.w2.take(run, 0)  # (r, D)
        h = ops.relu(ops.linear(n, w1.T, self.b1[run]))  # (r,)
        ledger.event("active neurons run", h > 0)
        return ops.linear(h, w2, self.b2)


# Online: heads -----------------------------------------------------------------------------------


@part
class PredictedHeads(Attention):
    """Attention that caches the keys and values of all heads, and in which each token runs only the
    heads that are selected for it. (Called with q, k and v, by a table of them, it runs all.)"""

    needs_inner_first = True

    selector: Part

    def __call__(self, x, layer: Layer):
        n = self.norm(x)
        self.store(*self.qkv.kv(n), layer)
        return self.attend_selected(n, layer)

    def attend_from(self, x, layer: Layer):
        return self.attend_selected(self.norm(x), layer)

    def attend_selected(self, n, layer: Layer):
        """Attention from tokens with the normalized inputs n (..., T, D)."""
        runs = self.selector(n, layer)  # (..., T, H)
        ledger.event("heads", runs.size)
        ledger.event("heads run", runs)
        k, v = self.cache.read(layer)  # (..., K, S, d)
        mask, positions = layer.mask(), layer.tokens.lookup
        if n.ndim == 2:
            return self.one_sequence_of(n, runs, k, v, mask, layer.tokens.array)
        if layer.start is None:
            positions = np.broadcast_to(layer.tokens.array, n.shape[:-1])
        found = [  # the sequences of a batch, which need different work
            self.one_sequence_of(n[b], runs[b], k[b], v[b], mask_of_sequence(mask, b), positions[b])
            for b in np.ndindex(n.shape[:-2])
        ]
        return np.stack(found).reshape(n.shape[:-1] + found[0].shape[-1:])

    def one_sequence_of(self, n, runs, k, v, mask, positions):
        """y (T, D) for n (T, D), runs (T, H), k and v (K, S, d) and the positions (T,)."""
        H, K, T, w_o = self.heads, len(k), len(n), self.out.w
        y = np.zeros((T, w_o.shape[1]), n.dtype)
        if self.out.b is not None:
            y += self.out.b  # belongs to no head
        of_q, of_o = (columns(size, H) for size in (self.qkv.q.w.shape[1], len(w_o)))
        for h in range(H):
            tokens = np.flatnonzero(runs[:, h])
            if not len(tokens):
                continue
            q = self.qkv.q.outputs(n[tokens], of_q[h])[None]  # (1, tokens, d)
            q = self.rope(q, Tokens(positions[tokens]))
            seen = mask_of_tokens(mask, tokens, T, k.shape[-2])
            ctx = attend_one_key_head(q, k, v, h * K // H, self.attend.scale, seen)[0]
            y[tokens] += ops.linear(ctx, w_o[of_o[h]])
        return y


@part
class AttendSomeHeads(Attend):
    """A type of its own, since some heads do not run: techniques that read or replace the weights
    of all heads (lazy_tokens, token_prune) refuse it."""


def columns(width: int, H: int) -> list[slice]:
    """Those of each of H heads, in a matrix of this width."""
    return [slice(h * width // H, (h + 1) * width // H) for h in range(H)]


# Making it ---------------------------------------------------------------------------------------


def predicted(lm, selectors: dict[str, list], monitor: int = 0, limit: float = 0.0):
    """The model whose neurons ("ffn") and heads ("attn") run as the selectors of each block say."""

    def change_ffn(ffn: FFN, index: int) -> Part:
        up, down = ffn.expand.up, ffn.down
        b1 = np.zeros(len(down.w), down.w.dtype) if up.b is None else up.b
        parts = ffn.norm, np.ascontiguousarray(up.w.T), b1, np.ascontiguousarray(down.w), down.b
        some = PredictedNeurons(*parts, selector=selectors["ffn"][index])
        return monitored(FFNByNeuron(*parts), [some], monitor, limit)

    def change_attn(attn: Attention, index: int) -> Part:
        parts = {f.name: getattr(attn, f.name) for f in fields(attn)}
        parts["attend"] = AttendSomeHeads(attn.attend.scale)
        return PredictedHeads(**parts, selector=selectors["attn"][index])

    for slot, change in (("ffn", change_ffn), ("attn", change_attn)):
        if slot in selectors:
            lm = wrap(lm, slot, change)
    return lm


def select(predictor: Part, share: float | None, threshold: float) -> Part:
    if share is None:
        return Above(predictor, threshold)
    return TopK(predictor, at_least_one(predictor.b.shape[1], share))


def at_least_one(units: int, share: float) -> int:
    return max(1, share_of(units, share))


def random_selectors(lm, slot: str, share: float, seed: int) -> list[Part]:
    found = []
    for index, units in enumerate(units_of(lm, slot)):
        number = 2 * index + (slot == "attn")  # other scores for each sub-layer
        scores = random_scores(lm.model.config.context, units, seed + (number << 64))
        found.append(RandomK(at_least_one(units, share), scores))
    return found


def shipped(lm, slot: str, rank: int | None) -> tuple | None:
    """The predictors beside the weights; None if there are none, or if they do not fit since
    another technique has changed the model or another rank is wanted."""
    if lm.folder is None or not os.path.lexists(lm.folder / FILE):  # a link to nothing is refused
        return None
    trained = read_predictors(lm, lm.folder / FILE)
    predictors = trained.predictors[slot]
    if not trained.fits(lm, slot) or any(rank not in (None, len(p.b)) for p in predictors):
        return None
    need_shapes(lm.folder / FILE, predictors, lm.model.config.width, units_of(lm, slot))
    return predictors


def units_of(lm, slot: str) -> list[int]:
    """The number of neurons ("ffn") or heads ("attn") of each block."""
    return [len(x.down.w) if slot == "ffn" else x.heads for x in in_slot(lm, slot)]


def in_slot(lm, slot: str) -> list[Part]:
    """What each block has in this slot."""
    found: dict[int, Part] = {}
    wrap(lm, slot, lambda node, index: found.setdefault(index, node))
    if len(found) < len(blocks_of(lm)):
        raise MinitxError(
            f"contextual_sparsity needs a part named {slot} in every block, and a block of this "
            "model has none; load the model without the technique that replaced it."
        )
    return list(found.values())


# Checks ------------------------------------------------------------------------------------------


def check_choice(neurons: float | None, threshold: float | None, choose: str, monitor: int) -> None:
    if neurons is not None and threshold is not None:
        raise MinitxError(
            "contextual_sparsity: got both neurons and threshold; give the share of the neurons "
            "that run, or the threshold of their scores."
        )
    if choose == "random" and neurons is None:
        raise MinitxError(
            "contextual_sparsity: choose=random runs a share of the neurons; give it as neurons= "
            "(1 for all of them)."
        )
    if monitor and neurons == 1:
        raise MinitxError(
            "contextual_sparsity: monitor checks what the skipped neurons change, and with "
            "neurons=1 all of them run; leave monitor out, or run fewer."
        )


# Notes:
#
# - Unconfirmed in the paper (our source for its code is notes): how a head's output is measured,
#   and that half of them count as active (the code's default share is 0.7). Its other settings are
#   for models a hundred times as wide: rank 1000 (here D / 4, for heads D / 16), 20 epochs, batch
#   1024 (here 64), learning rate 1e-4 (here 0.01, falling to 0), of all epochs the one with the
#   best recall (here the last). For OPT-175B it ran 5,000 of 49,152 neurons, and 24 to 48 of 96
#   heads in most layers.
# - Recall alone says nothing: a predictor that runs all neurons has recall 1. The command
#       python -m minitx.skip.contextual_sparsity.train stories-relu --measure
#   prints it beside what runs, layer by layer, on 20 held-out stories. active: share of the units
#   that are active; recall: of these, how many run; precision: of those that run, how many are
#   active; random: the recall of as many random units.
#
#       threshold=1   active   run    recall   precision   random          heads=0.5, recall
#       layer 0       0.293   0.294   0.880    0.877       0.322           0.917
#       layer 1       0.119   0.140   0.919    0.783       0.160           0.878
#       layer 2       0.206   0.220   0.865    0.808       0.237           0.851
#       layer 3       0.343   0.335   0.828    0.849       0.342           0.802
#       all           0.240   0.247   0.873    0.829       0.265           0.862
#
#   With a threshold, random units find more than the share that runs, since tokens with more active
#   neurons run more.
# - Figures on stories-relu (minitx sweep contextual-sparsity threshold=0,1,2 -m stories-relu
#   --stories 60; the same with neurons=0.4,0.3,0.2; with neurons=0.4,0.5 choose=random; and with
#   neurons=1 heads=0.75,0.5 choose=predictor,random). Loss is above dense, in nats per token; the
#   hops are right answers to questions that need 1, 2 or 3 facts (many of them guesses: the model
#   has not learned to look them up). Multiply-adds include the predictors.
#
#       setting                          multiply-adds   loss      1 / 2 / 3 hops   speed
#       dense                            1.000x         0.0000    54 / 62 / 28
#       threshold=0                      0.705x        +0.0005    52 / 62 / 36      0.56x
#       threshold=1 (default)            0.671x        +0.0023    51 / 60 / 33      0.60x
#       threshold=2                      0.641x        +0.0093    52 / 56 / 25      0.66x
#       neurons=0.4                      0.744x        +0.0010    53 / 66 / 31      0.46x
#       neurons=0.3                      0.687x        +0.0051    53 / 64 / 31      0.47x
#       neurons=0.2                      0.630x        +0.0461    52 / 66 / 19      0.51x
#       neurons=0.5 choose=random        0.713x        +2.4363    31 / 33 / 22      0.48x
#       neurons=0.4 choose=random        0.655x        +3.4928    21 / 26 / 17      0.54x
#       neurons=1 heads=0.75             0.956x        +0.0986    44 / 60 / 25      0.44x
#       neurons=1 heads=0.75 ... random  0.951x        +0.5525    38 / 38 / 28      0.41x
#       neurons=1 heads=0.5              0.907x        +0.4706    31 / 40 / 25      0.47x
#       neurons=1 heads=0.5 ... random   0.902x        +1.3747    28 / 22 / 11      0.46x
#
#   A threshold is better than a top-k of equal cost: tokens and layers differ in how many neurons
#   they need. None of four heads can be spared, though the predictor finds those that write most.
# - The rank decides: in a trial (600 steps of 512 tokens) the threshold at which about 30 % of the
#   neurons run cost +0.0007 nats at rank 32, +0.03 at 16, +0.43 at 8 and +1.4 at 4; the predictor's
#   own share of a dense FFN's multiply-adds is 16, 8, 4 and 2 %. Read one sub-layer early, before
#   attention, rank 16 cost +0.17 instead of +0.03; nothing runs at the same time on one core, so
#   nothing would be gained by it here.
# - Predictors that are trained on loading (16 stories, 1 to 2 seconds on stories-relu) are not
#   as good: with fold_norms the default costs +0.009.
# - Training counts on one BLAS thread for the same bytes: threads add in another order.
# - One FFN, rank D / 4, top-k, one token, microseconds of one core (dense; 50, 25, 10, 5 % of the
#   neurons): 128 x 512: 29; 89, 78, 75, 67. 1,024 x 4,096: 1,578; 3,751, 1,701, 533, 326. A prompt
#   runs token by token, which is slower still: dense products share the reading of weights.
# - monitor: every n-th token runs all neurons too, from the same arrays (FFNByNeuron). It does not
#   pay here: neurons=0.2 monitor=8 limit=0.1, 0.2, 0.4 cost +0.017, +0.028, +0.042 at 0.88x, 0.79x,
#   0.70x of the multiply-adds (20 stories), all more than a larger share of the neurons.
