"""LaCo: several neighbouring layers become one, whose weights are a sum of theirs.

This file: the card and options, the sum, the choice of the layers, checks, notes. What runs is a
plain model with fewer layers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.model import Stack, Transformer
from minitx.progress import bar
from minitx.shared.combine import combined
from minitx.shared.neighbours import check_first
from minitx.technique import SEEDS, at_least, blocks_of, swap, technique
from minitx.tree import Part


@technique(
    level="pruning",
    exact=False,
    neutral={"size": 1},
    after=("prune", "prune_structure", "head_prune"),
    demo={"size": 2},
)
def layer_merge(
    lm,
    *,
    size: Annotated[
        int, "neighbouring layers that become one; 1: nothing is merged", at_least(1)
    ] = 3,
    first: Annotated[
        int | None,
        "the first of them, from 0; None: where hidden states stay most similar",
        at_least(0),
    ] = None,
    choose: Annotated[
        Literal["similarity", "random"], "how first=None is chosen; random: the baseline"
    ] = "similarity",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 4,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Merge neighbouring layers into one by adding up their weights' differences (LaCo).

    Paper:     Yang et al., "LaCo: Large Language Model Pruning via Layer Collapse", 2024,
               arXiv 2402.11187.
    Fidelity:  a reconstruction from other people's implementations. There, merges go on from the
               last layer down, wherever the similarity stays above a threshold; here one group of a
               fixed size is merged, where the similarity is highest.
    Kind:      approximate. No setting pays on the shipped models: size=2 is nothing but a dropped
               layer (below), and size=3 costs 0.08 nats where dropping two layers costs 0.002.
    Idea:      Neighbouring layers are alike. Keep one of them, and add the differences of the
               others from it.
    Offline:   W[l], W[l+1], ..., W[l+m]: the weights of m + 1 = size layers, matrices, norms and
               biases alike
                 W = W[l] + sum over k = 1..m of (W[l+k] - W[l])
               For m = 1 that is W = W[l+1]: the model without layer l (layer_skip drop=l).
               first=None: for each l, the mean cosine between the last hidden states of the dense
               model and of the merged one, over calibration tokens; take the highest
    Online:    the dense model's steps, with one layer instead of ``size``.
    Saves:     of size - 1 layers, everything: multiply-adds, weights and cache rows.
    In NumPy:  1.2x at size=2, 1.4x at size=3 on stories: time falls with the multiply-adds.
    Not for:   layers whose matrices have different shapes (prune_structure); use together with
               detectors that were trained for every layer (dota fit=trained).
    Proof:     tests/skip/test_layer_merge.py; literal version: tests/skip/literal_layer_merge.py
    """
    blocks = blocks_of(lm)
    size = min(size, len(blocks))
    if size == 1:
        return lm

    def merge(start: int):
        merged = merged_block(blocks[start : start + size])
        return with_blocks(lm, (*blocks[:start], merged, *blocks[start + size :]))

    starts = range(len(blocks) - size + 1)
    if first is not None:
        check_first("layer_merge", first, size, len(blocks))
        return merge(first)
    if choose == "random":
        return merge(int(np.random.default_rng(seed).integers(len(starts))))
    if len(starts) == 1:
        return merge(0)
    texts = calibration_ids("layer_merge", lm, stories, "use first= or choose=random")
    shown = bar(starts, "layer merge: choose", unit="candidate", delay=1.0)
    return merge(int(np.argmax([round(similarity(lm, merge(start), texts), 6) for start in shown])))


# Offline -----------------------------------------------------------------------------------------


def merged_block(blocks: Sequence[Part]) -> Part:
    """W[l] + sum over k of (W[l+k] - W[l]) = (1 - m) W[l] + W[l+1] + ... + W[l+m]."""
    m = len(blocks) - 1
    return combined("layer_merge", blocks, [1 - m, *[1] * m])


def with_blocks(lm, blocks: Sequence[Part]):
    def change(model: Transformer) -> Transformer:
        stack = swap(model.stack, Stack, lambda stack: replace(stack, blocks=tuple(blocks)))
        return replace(model, stack=stack, config=replace(model.config, layers=len(blocks)))

    return swap(lm, Transformer, change)


def similarity(lm, merged, texts) -> float:
    """The mean cosine between the last hidden states of the two models, over all tokens."""
    cosines = []
    for ids in texts:
        a, b = (one.model.hidden(ids).astype(np.float64) for one in (lm, merged))  # (T, D)
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosines.append((a * b).sum(-1) / lengths)
    return float(np.concatenate(cosines).mean())


# Notes:
#
# - What comes of the sum: of m + 1 layers, W = W[l+1] + ... + W[l+m] - (m - 1) W[l]. Unless the
#   layers are nearly the same, these are weights that no layer has ever had; and what two layers
#   add to the residual stream, one after another, is no sum of weights.
# - The configuration of the merged model has fewer layers, so files written for the old ones no
#   longer fit: dota refuses the detectors that were trained with stories (fit=post-hoc fits new
#   ones).
# - Figures on stories, 8 layers (minitx sweep layer-merge size=2,3 --stories 60; with choose=random
#   seed=0,1,2; and minitx sweep layer-skip count=1,2 --stories 60). Hops: how many facts an answer
#   has to combine.
#
#                                        multiply-adds    loss above dense    1 / 2 / 3 hops
#       none (dense)                     1.00x             0                  99 / 93 / 100 %
#       size=2: the model without one    0.88x            +0.001              99 / 93 / 100 %
#       size=3: 4 to 6 (the default)     0.76x            +0.077              93 / 62 /  67 %
#       size=3 seed=0,2: 5 to 7          0.76x            +0.179              92 / 60 /  94 %
#       size=3 seed=1: 2 to 4            0.76x            +2.164              13 /  9 /  11 %
#       layer_skip count=2               0.76x            +0.002              99 / 93 /  97 %
