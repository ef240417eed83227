"""Smaller arrays: whole neurons of the feed-forward networks and whole heads are cut out."""

from dataclasses import replace
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import FFN, QKV, Activated, Attention, Linear, SwiGLU
from minitx.shared.block_by_block import block_by_block
from minitx.shared.share import share_of
from minitx.technique import need, swap, technique
from minitx.tree import Part


@technique(level="pruning", exact=False, neutral={"neurons": 0.0, "heads": 0.0}, after=("prune",))
def prune_structure(
    lm,
    *,
    neurons: float = 0.25,
    heads: float = 0.0,
    heads_by: Literal["groups", "queries"] = "groups",
    score: Literal["activations", "weights"] = "activations",
    stories: int = 16,
):
    """Cut the least important FFN neurons and attention heads out of every block.

    Paper: no single one; structured pruning in its plainest form. The scores were chosen here; by
        activations, a neuron's is Wanda's (arXiv 2306.11695) taken over its whole row of W_down.
    Kind: approximate; which tokens change depends on how much is cut.
    Skips or precomputes: the share ``neurons`` of the F hidden neurons and the share ``heads`` of
        the heads, the same number in every block (rounded down), so that what is left is a plain
        model of smaller sizes. At least one of each stays.
    Offline: unit u reads x and gives h_u, of which h_u W_u goes to the stream: W_u is its row of
        W_down, or its d rows of W_o. By "activations" its score is the sum of |h_u W_u|^2 over
        ``stories`` calibration stories, block by block, behind the blocks that are cut already. By
        "weights" what bounds it, but for biases and the length of x: the product of the lengths of
        a neuron's columns of W_gate, W_up and row of W_down; of a head's W_v and W_o. Heads that
        share keys and values stay in equal groups: "groups" cuts key/value heads with all their
        query heads, and their cache with them; "queries" cuts equally many query heads of every
        group (none where a head stands alone).
    Online: the same equations, with fewer columns and rows.
    Saves: 3 D multiply-adds a token for every neuron (2 D without a gate); 2 D d + 2 d S for every
        query head that looks at S keys, and 2 D d more for every key/value head, with its 2 d
        numbers in the cache of each token. As many weights. This is really faster in NumPy, in
        proportion where matrices are large, less in a narrow model, where calls take their time.
    Neutral: neurons=0 heads=0.
    Not for: what needs the sizes that the model was trained with, such as a detector of keys.
    """
    for name, value in (("neurons", neurons), ("heads", heads)):
        if not 0 <= value < 1:
            raise MinitxError(
                f"prune_structure needs a share of {name} of at least 0 and below 1, not {value:g}."
            )
    texts, make = [], None
    if score == "activations" and (neurons or heads):
        from minitx.training.calibration import Moments, texts_for

        texts, make = texts_for("prune_structure", lm, stories), Moments

    def change(block, found):
        block = swap(block, FFN, lambda ffn: cut_neurons(ffn, neurons, found))
        return swap(block, Attention, lambda attn: cut_heads(attn, heads, heads_by, found))

    return with_sizes(block_by_block(lm, texts, make, change))


def with_sizes(lm):
    """The model with the configuration of what is left, which is the same in all blocks."""
    block = lm.model.stack.blocks[0]
    hidden = block.ffn.down.w.shape[0]
    sizes = dict(hidden=hidden, heads=block.attn.heads, kv_heads=block.attn.kv_heads)
    config = lm.model.config
    if all(getattr(config, name) == size for name, size in sizes.items()):
        return lm
    return replace(lm, model=replace(lm.model, config=replace(config, **sizes)))


# Neurons -----------------------------------------------------------------------------------------


def cut_neurons(ffn: FFN, share: float, found: dict) -> FFN:
    need(ffn.expand, SwiGLU, Activated)
    maps = {name: part for name, part in vars(ffn.expand).items() if isinstance(part, Part)}
    for linear in (*maps.values(), ffn.down):
        need(linear, Linear)
    size = len(ffn.down.w)
    count = min(share_of(size, share), size - 1)
    if not count:
        return ffn
    if found:
        scores = contributions(found[id(ffn.down)].gram, ffn.down.w, 1)
    else:
        scores = np.linalg.norm(ffn.down.w, axis=1)
        for linear in maps.values():
            scores = scores * np.linalg.norm(linear.w, axis=0)
    keep = largest(scores, size - count)
    expand = replace(ffn.expand, **{name: columns(part, keep) for name, part in maps.items()})
    return replace(ffn, expand=expand, down=rows(ffn.down, keep))


def contributions(gram, w, width: int):
    """The sum of |h_u W_u|^2 for each unit of ``width`` rows of w (in, out), from the sums
    gram (in, in) of h^T h: trace(W_u^T (h_u^T h_u) W_u)."""
    units = len(w) // width
    w = w.astype(np.float64).reshape(units, width, -1)
    own = np.arange(units)
    gram = gram.reshape(units, width, units, width)[own, :, own]  # (units, width, width)
    return np.einsum("uio,uij,ujo->u", w, gram, w, optimize=True)


def largest(scores, count: int):
    """The indices of the ``count`` largest scores, in rising order; of equal ones the last."""
    return np.sort(np.argsort(scores, kind="stable")[len(scores) - count :])


def columns(linear: Linear, keep) -> Linear:
    """Only these outputs."""
    return Linear(linear.w.take(keep, axis=1), None if linear.b is None else linear.b[keep])


def rows(linear: Linear, keep) -> Linear:
    """Only these inputs."""
    return replace(linear, w=linear.w[keep])


# Heads -------------------------------------------------------------------------------------------


def cut_heads(attn: Attention, share: float, by: str, found: dict) -> Attention:
    """Heads are kept as an array (K, G): group k's query heads are k G .. k G + G - 1."""
    need(attn.qkv, QKV)
    for linear in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
        need(linear, Linear)
    K, G = attn.kv_heads, attn.heads // attn.kv_heads
    of = K if by == "groups" else G
    count = min(share_of(of, share), of - 1)
    if not count:
        return attn
    heads = np.arange(K * G).reshape(K, G)
    scores = head_scores(attn, found).reshape(K, G)
    groups = np.arange(K)
    if by == "groups":
        groups = largest(scores.sum(1), K - count)
        heads = heads[groups]  # (K - count, G)
    else:
        best = np.stack([largest(row, G - count) for row in scores])
        heads = np.take_along_axis(heads, best, axis=1)  # (K, G - count)
    d = attn.out.w.shape[0] // attn.heads
    q, kv = of_heads(heads.ravel(), d), of_heads(groups, d)
    qkv = QKV(columns(attn.qkv.q, q), columns(attn.qkv.k, kv), columns(attn.qkv.v, kv))
    sizes = dict(heads=heads.size, kv_heads=len(groups))
    return replace(attn, qkv=qkv, out=rows(attn.out, q), **sizes)


def head_scores(attn: Attention, found: dict):
    """One for each query head (H,), in squares, so that those of a group can be added."""
    H, G = attn.heads, attn.heads // attn.kv_heads
    d = len(attn.out.w) // H
    if found:
        return contributions(found[id(attn.out)].gram, attn.out.w, d)
    values = (attn.qkv.v.w.astype(np.float64) ** 2).sum(0).reshape(-1, d).sum(1)  # (K,)
    return values.repeat(G) * (attn.out.w.astype(np.float64) ** 2).reshape(H, -1).sum(1)


def of_heads(heads, d: int):
    """The columns of these heads of width d."""
    return (heads[:, None] * d + np.arange(d)).ravel()
