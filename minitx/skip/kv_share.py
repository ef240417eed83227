"""Cross-layer attention: neighbouring layers read the keys and values of the first of them.

This file: the card and options, the two parts that run (online), where the rows are, how a place
is chosen (offline), checks, notes.
"""

import copy
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import QKV, Attention, merge_heads, split_heads
from minitx.shared.least_loss import least_loss
from minitx.shared.neighbours import check_first
from minitx.state import Layer
from minitx.technique import SEEDS, NoSuchPart, at_least, blocks_of, technique, wrap
from minitx.tree import Part, part


@technique(
    level="block",
    exact=False,
    neutral={"group": 1},
    after=("first_layer", "layer_skip"),
    event="key/value projections skipped",
    presets={"pairs": {"size": None, "group": 2}},
)
def kv_share(
    lm,
    *,
    size: Annotated[
        int | None, "neighbouring layers that are divided into groups; None: all", at_least(1)
    ] = 4,
    group: Annotated[
        int, "layers of a group, which share keys and values; 1: none do", at_least(1)
    ] = 2,
    first: Annotated[
        int | None,
        "the first of them, from 0; None: where the calibration loss is lowest",
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
    """Share keys and values between neighbouring layers (cross-layer attention, CLA).

    Paper:     Brandon et al., "Reducing Transformer Key-Value Cache Size with Cross-Layer
               Attention", NeurIPS 2024, arXiv 2405.12981.
    Fidelity:  a reconstruction from the abstract. The paper trains models that share from the
               start; sharing in a trained model and the choice of its layers are ours.
    Kind:      approximate. If layers share that matter, a short training restores most of the
               quality (Notes).
    Idea:      Query heads may share one key head (multi-query attention); so may layers. The first
               layer of a group computes and caches keys and values, the others only queries.
    Offline:   size layers from ``first`` on are divided into groups of ``group``; the last group
               may be smaller. W_k and W_v of every layer but a group's first are left out.
               first=None: for each place where these layers fit, measure the loss on calibration
               text; take the lowest
    Online:    n: normalized input of layer l;  f: the first layer of its group
                 q = rope(n W_q,l)
                 if l = f:  store rope(n W_k,l) and n W_v,l in the cache of layer f
                 y = softmax(q keys_f^T / sqrt(d)) values_f W_o,l
    Saves:     per token and layer that is not the first of its group: 2 K d cached numbers, and
               2 D K d multiply-adds and weights (K key heads of width d, model width D).
    In NumPy:  no faster: 0.9x to 1.1x on a busy machine. W_k and W_v are small products, and
               attention reads as many keys as before. It saves memory.
    Not for:   layers without plain attention of their own (first_layer, slim_attention, dota, ...);
               techniques that free cache rows, or skip or move layers at run time (layer_router).
    Proof:     tests/skip/test_kv_share.py; literal version: tests/skip/literal_kv_share.py
    """
    L = len(blocks_of(lm))
    size = L if size is None else min(size, L)
    if group == 1 or size < 2:
        return lm
    attns = attention_of(lm)

    def share(start: int):
        return shared(lm, attns, start, size, group)

    if first is not None:
        check_first("kv_share", first, size, L)
    starts = range(L - size + 1) if first is None else [first]
    misfits = {start: misfit(attns, start, size, group) for start in starts}
    starts = [start for start, why in misfits.items() if why is None]
    if not starts:
        raise next(iter(misfits.values()))
    if choose == "random":
        return share(starts[int(np.random.default_rng(seed).integers(len(starts)))])
    if len(starts) == 1:
        return share(starts[0])
    texts = calibration_ids("kv_share", lm, stories, "use first= or choose=random")
    return share(least_loss("kv share", starts, share, texts))


# Online ------------------------------------------------------------------------------------------


@part
class LeaderCache(Part):
    """The KV cache of a layer whose rows other layers read: it notes where they are."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True

    inner: Part
    index: int  # of the layer

    def store(self, k, v, layer: Layer):
        leaders(layer).layers[self.index] = layer
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        return self.inner.read(layer)


@part
class FollowerAttention(Part):
    """Attention without keys and values of its own: queries only, over the leader's rows."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True
    needs_all_rows = True  # reads the leader's row of every token
    reads_other_layers = True

    norm: Part
    q: Part
    rope: Part
    cache: Part  # the leader's
    attend: Part
    out: Part
    heads: int  # H
    leader: int  # the layer whose rows are read

    def __call__(self, x, layer: Layer):
        ledger.event("key/value projections skipped", x.size // x.shape[-1])
        return self.attend_from(x, layer)

    def backfill(self, x, layer: Layer):
        """Nothing to cache: the leader has the rows."""

    def attend_from(self, x, layer: Layer):
        """Attention from tokens x (..., T, D), whose keys and values the leader has cached."""
        rows = rows_of(self.leader, layer)
        q = self.rope(split_heads(self.q(self.norm(x)), self.heads), layer.tokens)
        k, v = self.cache.read(rows)  # (..., K, S, d)
        return self.out(merge_heads(self.attend(q, k, v, rows)))  # (..., T, D)


# State -------------------------------------------------------------------------------------------


def leaders(layer: Layer) -> "Leaders":
    return layer.shared.recall(Leaders, Leaders)


class Leaders:
    """The state of each leader, by the index of its layer."""

    def __init__(self):
        self.layers: dict[int, Layer] = {}

    def rewind(self, position: int) -> None:
        """Nothing to do: each leader forgets its own rows."""


def rows_of(leader: int, layer: Layer) -> Layer:
    """The follower's layer (its tokens of this step, its memory) with the leader's cache rows."""
    rows = copy.copy(leaders(layer).layers[leader])
    rows.index, rows.tokens, rows.memory = layer.index, layer.tokens, layer.memory
    return rows


# Offline -----------------------------------------------------------------------------------------


def shared(lm, attns: dict[int, Part], start: int, size: int, group: int):
    """The model in which layers start .. start + size - 1 share keys and values in groups."""
    leader = {i: i - (i - start) % group for i in range(start, start + size)}

    def change(attn: Part, index: int) -> Part:
        if index not in leader:
            return attn
        first = attns[leader[index]]
        if leader[index] == index:
            return replace(attn, cache=LeaderCache(attn.cache, index))
        return FollowerAttention(
            attn.norm, attn.qkv.q, attn.rope, first.cache, attn.attend, attn.out, attn.heads,
            leader[index],
        )  # fmt: skip

    return wrap(lm, "attn", change)


def attention_of(lm) -> dict[int, Part]:
    """What is in the attention slot of each layer that has one."""
    found: dict[int, Part] = {}
    wrap(lm, "attn", lambda attn, index: found.setdefault(index, attn))
    return found


# Checks ------------------------------------------------------------------------------------------


def misfit(attns: dict[int, Part], start: int, size: int, group: int) -> MinitxError | None:
    """Why these layers cannot share: the attention of one is not the plain one, or it has another
    number of key heads than its group's first."""
    for index in range(start, start + size):
        attn, leader = attns.get(index), attns.get(index - (index - start) % group)
        if type(attn) is not Attention:
            return NoSuchPart(Attention, found=attn)
        if type(attn.qkv) is not QKV:
            return NoSuchPart(QKV, found=attn.qkv)
        if attn.kv_heads != leader.kv_heads:
            return MinitxError(
                f"kv_share: layer {index} has {attn.kv_heads} key heads and the first layer of its "
                f"group {leader.kv_heads}, and only equal numbers can be shared; set first= to "
                "other layers."
            )
    return None


# Notes:
#
# - Words. A leader is the first layer of a group, a follower one of the others. preset=pairs is the
#   setting of the paper's abstract, half of the cache, "nearly the same accuracy"; but in models
#   that were trained so.
# - A follower reads the leader's rows as the leader's cache gives them: with quantize_cache they
#   are dequantized once more for each layer of the group. Its mask is made of the leader's rows and
#   its own tokens, which differ from the leader's if tokens have exited in between (early_exit).
#   A token that skips a follower leaves nothing to backfill.
# - Other projections than three matrices (fuse_projections, slim_attention, absorb_products) are
#   refused: what one layer caches would not be what another layer's queries were made for.
# - Figures on stories, 8 layers (minitx sweep kv-share size=4,6,None --stories 60, and with
#   choose=random seed=0,1 instead). Multiply-adds: 0.98x, 0.97x with size=6, 0.96x with size=None.
#   Hops: how many facts an answer has to combine.
#
#       layers that share, in pairs       cache    loss above dense    1 / 2 / 3 hops
#       none (dense)                      1.00x     0                  99 / 93 / 100 %
#       size=4: 3 to 6 (the default)      0.75x    +0.003              99 / 93 /  97 %
#       size=4 choose=random: 4 to 7      0.75x    +0.006              99 / 93 /  97 %
#       size=4 choose=random: 2 to 5      0.75x    +0.115              89 / 71 /  56 %
#       size=6: 2 to 7                    0.63x    +0.126              80 / 75 /  58 %
#       size=None: all                    0.50x    +1.218              56 / 42 /  28 %
#
#   Layers 4 to 7 hardly add to the residual stream here, so they can share. So can they be dropped:
#   as many cache rows are saved by leaving out two attentions (minitx sweep layer-skip
#   unit=attention drop=4+6 --stories 60), which costs +0.003 and takes 0.93x of the multiply-adds.
#   The other places that random may draw begin at layer 0, 1 or 3.
# - Trained further, through our own gradients, for 150 steps (minitx train
#   weights/recipes/kv_share.json --out runs/kv_share; then minitx evaluate -m runs/kv_share
#   --stories 60), some ten minutes on one core of a busy machine:
#
#                                         cache    loss above dense    1 / 2 / 3 hops
#       size=6, before                    0.63x    +0.126              80 / 75 /  58 %
#       size=6, after                     0.63x    +0.025              92 / 78 /  72 %
#       size=None, before                 0.50x    +1.218              56 / 42 /  28 %
#       size=None, after                  0.50x    +0.160              88 / 60 /  39 %
#
#   (size=None: the recipe with "size": null and without "first".)
