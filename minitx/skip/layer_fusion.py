"""Layer fusion: neighbouring layers share one set of weights, and each still runs.

This file: the card and options, which layers share (the pattern), the weights that they share,
checks, notes. What runs is the plain model, in which one block stands in several places.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.model import Stack
from minitx.shared.combine import combined
from minitx.shared.least_loss import least_loss
from minitx.shared.neighbours import check_first
from minitx.technique import SEEDS, at_least, blocks_of, swap, technique
from minitx.tree import Part


@technique(
    level="pruning",
    exact=False,
    neutral={"group": 1},
    after=("prune", "prune_structure", "head_prune", "layer_merge"),
    presets={"all": {"size": None}, "pairs": {"size": None, "group": 2}},
)
def layer_fusion(
    lm,
    *,
    size: Annotated[
        int | None, "neighbouring layers that share weights; None: all layers", at_least(1)
    ] = 4,
    group: Annotated[
        int | None, "layers per set of weights; 1: nothing is shared; None: one set", at_least(1)
    ] = None,
    pattern: Annotated[
        Literal["sequence", "cycle"], "order of the sets, such as 0,0,1,1 or 0,1,0,1"
    ] = "sequence",
    weights: Annotated[
        Literal["first", "last", "mean"], "of the layers that share a set: whose weights it has"
    ] = "first",
    first: Annotated[
        int | None,
        "the first layer that shares, from 0; None: where the calibration loss is lowest",
        at_least(0),
    ] = None,
    choose: Annotated[
        Literal["loss", "random"], "how first=None is chosen; random: the baseline"
    ] = "loss",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 4,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Let neighbouring layers share one set of weights, which runs once per layer.

    Paper:     Takase and Kiyono, "Lessons on Parameter Sharing across Layers in Transformers",
               SustaiNLP 2023, arXiv 2104.06022. preset=all: Lan et al., "ALBERT", ICLR 2020,
               arXiv 1909.11942, in which all layers share all weights.
    Fidelity:  the patterns: a reconstruction from the abstracts. Both papers train models that
               share from the start. Sharing in a trained model, the choice of its layers and the
               mean of their weights are ours.
    Kind:      approximate. Where layers share that matter, a short training afterwards restores
               most of the quality (Notes). Layers that hardly matter can share at once, but may as
               well be dropped (layer_skip), which saves multiply-adds too.
    Idea:      In a residual network neighbouring layers do similar things, some of them hardly
               anything. One set of weights can serve several of them.
    Offline:   n = size layers from ``first`` on share ceil(n / group) sets of weights; layer i of
               them (i = 0 .. n-1) has set
                 sequence:  i // group                 0,0,1,1,2,2    (n = 6, group = 2)
                 cycle:     i mod ceil(n / group)      0,1,2,0,1,2
               weights of a set: those of its first layer, of its last, or the mean of all its
               layers
               first=None: for each place where n layers fit, measure the loss on calibration text;
               take the lowest
    Online:    the dense model's steps. A layer runs with the weights of its set and stores keys
               and values in cache rows of its own.
    Saves:     memory: the weights of n - ceil(n / group) layers. No multiply-adds, no cache, and
               as many bytes of weights are read per token.
    In NumPy:  the same products, so the same speed (1.0x to 1.1x on a busy machine). Where
               weights do not fit the CPU's caches, a shared set may still be there for the next.
    Not for:   mean: layers whose matrices have different shapes (prune_structure). Techniques that
               rewrite weights place by place store a shared set once per layer again (Notes).
    Proof:     tests/skip/test_layer_fusion.py; literal version: tests/skip/literal_layer_fusion.py
    Tutorial:  tutorials/12_which_layers_matter.py
    """
    blocks = blocks_of(lm)
    size = len(blocks) if size is None else min(size, len(blocks))
    sets = pattern_of(size, size if group is None else group, pattern)
    if len(set(sets)) == size:
        return lm

    def fuse(start: int):
        return with_blocks(lm, fused(blocks, start, sets, weights))

    starts = range(len(blocks) - size + 1)
    if first is not None:
        check_first("layer_fusion", first, size, len(blocks))
        return fuse(first)
    if choose == "random":
        return fuse(int(np.random.default_rng(seed).integers(len(starts))))
    if len(starts) == 1:
        return fuse(0)
    texts = calibration_ids("layer_fusion", lm, stories, "use first= or choose=random")
    return fuse(least_loss("layer fusion", starts, fuse, texts))


# Which layers share ------------------------------------------------------------------------------


def pattern_of(size: int, group: int, pattern: str) -> list[int]:
    """The number of the set of weights of each of ``size`` layers."""
    sets = -(-size // group)
    return [i // group if pattern == "sequence" else i % sets for i in range(size)]


def fused(blocks: Sequence[Part], start: int, sets: Sequence[int], weights: str) -> list[Part]:
    """The blocks, where those from ``start`` on have the given sets of weights."""
    new = list(blocks)
    for one in set(sets):
        places = [start + i for i, its_set in enumerate(sets) if its_set == one]
        shared = shared_weights([blocks[place] for place in places], weights)
        for place in places:
            new[place] = shared
    return new


def shared_weights(blocks: Sequence[Part], weights: str) -> Part:
    """One block for all of these."""
    if weights == "mean" and len(blocks) > 1:
        return combined("layer_fusion with weights=mean", blocks, [1 / len(blocks)] * len(blocks))
    return blocks[-1] if weights == "last" else blocks[0]


def with_blocks(lm, blocks: Sequence[Part]):
    return swap(lm, Stack, lambda stack: replace(stack, blocks=tuple(blocks)))


# Notes:
#
# - Takase and Kiyono name a third strategy, "cycle (rev)"; not built here. Nor is sharing only the
#   attention, or only the FFN, of all layers.
# - Layers are shared before other techniques run (level "pruning"), and what runs is the plain
#   model with one block in several places. Techniques that change a matrix by itself (quantize,
#   prune) change a shared one once. Those that look at each place (low_rank, fold_norms,
#   prune_structure before sharing) may make one for each layer, so that memory is no longer saved.
# - The ledger counts the bytes of a shared matrix each time that it is read.
# - Figures on stories, 8 layers (minitx sweep layer-fusion size=3,4 weights=first,mean
#   --stories 60, and choose=random seed=0,1,2 instead). Multiply-adds and cache are 1.00x. Hops:
#   how many facts an answer has to combine.
#
#       layers that share                     memory    loss above dense    1 / 2 / 3 hops
#       none (dense)                          1.00x      0                  99 / 93 / 100 %
#       size=3 weights=first                  0.78x     +0.003              99 / 93 / 100 %
#       size=3 weights=mean                   0.78x     +0.003              99 / 89 /  97 %
#       size=4 weights=first (the default)    0.66x     +0.011              99 / 95 / 100 %
#       size=4 weights=mean                   0.66x     +0.007              99 / 62 /  53 %
#       size=4 choose=random seed=0,2         0.66x     +0.011              99 / 95 / 100 %
#       size=4 choose=random seed=1           0.66x     +0.189              58 / 66 /  44 %
#
#   Of the five places for four layers the default takes the last, 4 to 7; seeds 0 and 2 happen to
#   draw it too, and seed 1 draws 2 to 5. Layers 4 to 7 hardly add to the residual stream of this
#   model. Dropping three of them saves as much memory and costs less (minitx sweep layer-skip
#   drop=5+6+7 --stories 60): +0.004, 99 / 91 / 94 %, with 0.64x of the multiply-adds.
# - Half of the weights of all layers: the first four layers, then the same four again (size=None
#   group=2 pattern=cycle). That costs 0.09 nats, but the answers are gone. Trained further, through
#   our own gradients, for 150 steps (minitx train weights/recipes/layer_fusion.json --out
#   runs/layer_fusion; then minitx evaluate -m runs/layer_fusion --stories 60), some ten minutes on
#   one core of a busy machine:
#
#                        memory    loss above dense    1 / 2 / 3 hops
#       dense            1.00x      0                  99 / 93 / 100 %
#       before           0.55x     +0.092              57 / 31 /   0 %
#       after            0.55x     +0.012              98 / 73 /  72 %
