"""Structured pruning: whole FFN neurons and attention heads are removed; arrays get smaller.

The card, neurons, heads (all offline; online it is a plain model of smaller sizes), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.model import FFN, QKV, Activated, Attention, Linear, SwiGLU
from minitx.shared.block_by_block import block_by_block
from minitx.shared.observed_inputs import Moments
from minitx.shared.share import share_of
from minitx.shared.units import columns, columns_of, contributions, rows
from minitx.technique import at_least, need, swap, technique
from minitx.tree import Part, walk


@technique(
    level="pruning",
    exact=False,
    neutral={"neurons": 0.0, "heads": 0.0},
    after=("prune",),
    presets={"aggressive": {"neurons": 0.25}},
)
def prune_structure(
    lm,
    *,
    neurons: Annotated[float, "share of the FFN neurons to remove", at_least(0, below=1)] = 0.1,
    heads: Annotated[float, "share of the attention heads to remove", at_least(0, below=1)] = 0.0,
    heads_by: Annotated[
        Literal["groups", "queries"],
        "groups: key/value heads with all their query heads; queries: the same number of query "
        "heads from every group",
    ] = "groups",
    score: Annotated[
        Literal["activations", "weights"], "by calibration activations, or by weight norms"
    ] = "activations",
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) for activations",
        at_least(1, limit=1000),
    ] = 16,
):
    """Remove the least important FFN neurons and attention heads from every block.

    Paper:     none alone: structured pruning in its plainest form.
    Fidelity:  ours: both scores. The activation score of a neuron is the sum of the squared Wanda
               scores (arXiv 2306.11695) of its row of W_down.
    Kind:      approximate. A tenth of the neurons costs the shipped models next to nothing.
    Idea:      A unit u (neuron or head) adds h_u W_u to the residual stream: h_u is its activation,
               W_u its row of W_down, or its d rows of W_o (d: head width). Remove the units that
               add little; what is left is a smaller plain model.
    Offline:   activations: score_u = sum |h_u W_u|^2 over the calibration tokens, block by block:
                            a block's inputs come from the earlier blocks, already pruned
               weights:     |W_gate[:, u]| |W_up[:, u]| |W_down[u]|  of a neuron,
                            |W_v|^2 |W_o|^2  of a head (its own columns and rows)
                            Frobenius norms. Up to biases and powers of |x| they bound |h_u W_u|,
                            for heads |h_u W_u|^2 (squared, so that scores of a group add up)
               The units with the highest scores stay, equally many in every block (at least one);
               ties go to the lower index.
    Online:    the same equations with fewer columns and rows.
    Saves:     multiply-adds per token and removed neuron 3 D (2 D without a gate), query head
               2 D d + 2 d S (S: cached tokens), key/value head 2 D d and 2 d cached numbers; and
               the weights.
    In NumPy:  faster: in proportion where matrices are large, less in a narrow model, where the
               overhead of calls stays.
    Not for:   models with parts trained for the original sizes, such as dota's networks that
               select keys.
    Proof:     tests/precompute/test_prune_structure.py;
               literal version: tests/precompute/literal_prune_structure.py
    Tutorial:  tutorials/09_fewer_weights.py
    """
    texts = []
    if score == "activations" and (neurons or heads):
        texts = calibration_ids("prune_structure", lm, stories, "use score=weights")

    def change(block, seen):
        block = swap(block, FFN, lambda ffn: remove_neurons(ffn, neurons, seen))
        return swap(block, Attention, lambda attn: remove_heads(attn, heads, heads_by, seen))

    wanted = judged_matrices(lm.model, neurons, heads)
    return with_new_sizes(
        block_by_block(lm, texts, Moments, change, label="prune structure", wanted=wanted)
    )


def judged_matrices(model: Part, neurons: float, heads: float) -> set[int]:
    """The ids of the matrices whose inputs are the activations of the units: W_down and W_o."""
    nodes = [node for _, node in walk(model)]
    down = {id(node.down) for node in nodes if type(node) is FFN and neurons}
    return down | {id(node.out) for node in nodes if type(node) is Attention and heads}


def with_new_sizes(lm):
    """Write the blocks' new sizes, which are the same in all of them, into the config."""
    block = lm.model.stack.blocks[0]
    hidden = block.ffn.down.w.shape[0]
    sizes = dict(hidden=hidden, heads=block.attn.heads, kv_heads=block.attn.kv_heads)
    config = lm.model.config
    if all(getattr(config, name) == size for name, size in sizes.items()):
        return lm
    return replace(lm, model=replace(lm.model, config=replace(config, **sizes)))


def highest_scoring(scores, count: int):
    """The indices of the ``count`` highest scores, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-scores, kind="stable")[:count])


# Neurons -----------------------------------------------------------------------------------------


def remove_neurons(ffn: FFN, share: float, seen: dict) -> FFN:
    need(ffn.expand, SwiGLU, Activated)
    maps = {name: part for name, part in vars(ffn.expand).items() if isinstance(part, Part)}
    for linear in (*maps.values(), ffn.down):
        need(linear, Linear)
    size = len(ffn.down.w)
    count = min(share_of(size, share), size - 1)
    if not count:
        return ffn
    keep = highest_scoring(neuron_scores(ffn, list(maps.values()), seen), size - count)
    expand = replace(ffn.expand, **{name: columns(part, keep) for name, part in maps.items()})
    return replace(ffn, expand=expand, down=rows(ffn.down, keep))


def neuron_scores(ffn: FFN, maps: list[Linear], seen: dict):
    """(F,) by activations if inputs were seen, else by weights."""
    if seen:
        return contributions(seen[id(ffn.down)].gram, ffn.down.w, 1)
    scores = np.linalg.norm(ffn.down.w, axis=1)
    for linear in maps:  # W_gate and W_up, or W_up alone
        scores = scores * np.linalg.norm(linear.w, axis=0)
    return scores


# Heads -------------------------------------------------------------------------------------------


def remove_heads(attn: Attention, share: float, by: str, seen: dict) -> Attention:
    """Query heads are numbered as an array (K, G): those of group k are k G .. k G + G - 1."""
    need(attn.qkv, QKV)
    for linear in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
        need(linear, Linear)
    K, G = attn.kv_heads, attn.heads // attn.kv_heads
    size = K if by == "groups" else G
    count = min(share_of(size, share), size - 1)
    if not count:
        return attn
    scores = head_scores(attn, seen).reshape(K, G)
    heads, groups = np.arange(K * G).reshape(K, G), np.arange(K)
    if by == "groups":
        groups = highest_scoring(scores.sum(1), K - count)
        heads = heads[groups]  # (K - count, G)
    else:
        keep = np.stack([highest_scoring(group, G - count) for group in scores])
        heads = np.take_along_axis(heads, keep, axis=1)  # (K, G - count)
    d = attn.out.w.shape[0] // attn.heads
    q, kv = columns_of(heads.ravel(), d), columns_of(groups, d)
    qkv = QKV(columns(attn.qkv.q, q), columns(attn.qkv.k, kv), columns(attn.qkv.v, kv))
    sizes = dict(heads=heads.size, kv_heads=len(groups))
    return replace(attn, qkv=qkv, out=rows(attn.out, q), **sizes)


def head_scores(attn: Attention, seen: dict):
    """(H,) for each query head, squared, so that the scores of a group add up."""
    H, G = attn.heads, attn.heads // attn.kv_heads
    d = len(attn.out.w) // H
    if seen:
        return contributions(seen[id(attn.out)].gram, attn.out.w, d)
    values = (attn.qkv.v.w.astype(np.float64) ** 2).sum(0).reshape(-1, d).sum(1)  # (K,)
    return values.repeat(G) * (attn.out.w.astype(np.float64) ** 2).reshape(H, -1).sum(1)


# Notes:
#
# - heads_by=groups removes cached keys and values; queries does not, and does nothing in a model
#   whose heads each have their own keys and values (G = 1).
# - Figures on stories, one BLAS thread, from
#       minitx sweep prune-structure neurons=0.1,0.25,0.5 --stories 60
#       minitx sweep prune-structure neurons=0 heads=0.5 --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts:
#
#       neurons  heads  multiply-adds  memory  cache  loss     1 hop  2 hops  3 hops  speed
#       0        0      (dense)                                99 %   93 %    100 %
#       0.1      0      0.93x          0.93x   1.0x   +0.001   99 %   91 %    97 %    1.05x
#       0.25     0      0.84x          0.84x   1.0x   +0.015   98 %   89 %    92 %    1.1x
#       0.5      0      0.67x          0.67x   1.0x   +0.212   72 %   65 %    58 %    1.2x
#       0        0.5    0.85x          0.88x   0.5x   +1.265   83 %   51 %    33 %    1.1x
#
# - A general model has fewer neurons to spare: SmolLM2-135M-Instruct (not shipped), calibrated on
#   4,096 tokens of text, loses 0.40 nats per token of another text at neurons=0.1, 1.12 at 0.25.
