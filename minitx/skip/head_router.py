"""Mixture-of-Head attention (MoH): each token runs only some of the attention heads.

This file: the card and options, the attention and its routers (online), checks, notes.

Letters: T new tokens, S cached tokens, D width, H query heads of width d, K key heads, G = H / K.
"""

from dataclasses import fields
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Attend, Attention, Linear, split_heads
from minitx.shared.coarse import coarse
from minitx.shared.random_baseline import random_scores
from minitx.shared.share import share_of
from minitx.shared.some_heads import attend_one_key_head, mask_of_sequence, mask_of_tokens
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, between, blocks_of, need, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="attention",
    exact=False,
    neutral={"active": 1.0},
    demo={"active": 0.5, "first": 0},
    event=("heads run", "heads"),
    presets={
        "paper": {"shared": 0.5, "active": 0.75, "first": 0},
        "aggressive": {"active": 0.25},
    },
)
def head_router(
    lm,
    *,
    active: Annotated[
        float,
        "share of the heads that run for a token, shared ones included (rounded down, but at "
        "least one head)",
        between(0, 1),
    ] = 0.5,
    shared: Annotated[
        float, "share of the heads, the first ones, that run for every token", between(0, 1)
    ] = 0.0,
    first: Annotated[
        int | None, "first layers, in which all heads run; default: L // 2", at_least(0)
    ] = None,
    choose: Annotated[
        Literal["norm", "random"], "by the norms of the queries, or a random baseline"
    ] = "norm",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Run only the top-k attention heads of each token, selected by a router (MoH).

    Paper:     Jin et al., "MoH: Multi-Head Attention as Mixture-of-Head Attention", ICML 2025,
               arXiv 2410.11842; of it, the form for LLaMA3.
    Fidelity:  the authors' code (inference), without the training that goes with it. Ours: the
               dense first layers; heads that do not run are not computed (the authors compute all
               and mask some).
    Kind:      approximate; exact with active=1, where all heads run.
    Idea:      Attention adds up what its heads write: y = b_o + sum of ctx_h W_o,h over the heads
               h. For one token most of it comes from some heads, for the next from others. A long
               query makes sharp attention weights, a short one nearly equal ones: a plain average.
    Offline:   nothing.
    Online:    in each layer from ``first`` on, for each token:
                 q_h, k, v of all heads; keys and values are cached for all
                 score_h = |q_h|                           for each head that is not shared
                 run the shared heads, and of the others those with the highest scores, until
                 active * H heads run (ties go to the lower index)
                 y = b_o + sum over the heads h that run of ctx_h W_o,h;  their weight is 1
               (The paper divides the scores by their standard deviation and takes the softmax
               before the top-k; neither changes which are highest.)
    Saves:     2 S d + d D multiply-adds per token and head that does not run, less d for each score
               (S: cached tokens, d: head width). The scores need all of q, so all of W_q runs.
    In NumPy:  slower: generation 0.6x to 0.7x of dense on stories. Dense attention is one product
               for all heads; here those that run take several small ones, besides the router.
    Not for:   techniques that replace the attention of all heads (elsa, heavy_hitters, ...) or W_o
               (quantize, low_rank, ...). It saves nothing of the KV cache.
    Proof:     tests/skip/test_head_router.py; literal version: tests/skip/literal_head_router.py
    Tutorial:  tutorials/13_which_heads_matter.py
    """
    if active == 1:
        return lm
    L, context = len(blocks_of(lm)), lm.model.config.context
    first = L // 2 if first is None else first
    check_first(first, L)
    drawn = None
    if choose == "random":
        most = lm.model.config.heads
        drawn = random_scores(L * context, most, seed).reshape(L, context, most)

    def change(attn: Part, index: int) -> Part:
        if index < first:
            return attn
        need(attn, Attention)
        H = attn.heads  # head_prune may leave each layer another number
        always, running = share_of(H, shared), max(1, share_of(H, active))
        check_shares(H, always, running, shared, active)
        if running == H:
            return attn
        need(attn.attend, Attend)
        need(attn.out, Linear)
        router = NormRouter(H, always, running)
        if drawn is not None:
            router = RandomRouter(always, running, drawn[index, :, : H - always])
        parts = {f.name: getattr(attn, f.name) for f in fields(attn)}
        parts["attend"] = AttendOneKeyHead(attn.attend.scale)
        return RoutedAttention(**parts, router=router)

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class RoutedAttention(Attention):
    """Attention in which each token runs only the heads that the router selects for it."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True

    router: Part  # router(q, layer) returns booleans (..., T, H): which token runs which heads

    def read(self, q, layer: Layer):
        runs = self.router(q, layer)
        ledger.event("heads", runs.size)
        ledger.event("heads run", runs)
        q = self.rope(split_heads(q, self.heads), layer.tokens)  # (..., H, T, d)
        k, v = self.cache.read(layer)  # (..., K, S, d)
        mask = layer.mask()
        if q.ndim == 3:
            return self.one_sequence_of(q, k, v, runs, mask)
        rows = np.ndindex(q.shape[:-3])  # the sequences of a batch, which need different work
        found = [
            self.one_sequence_of(q[b], k[b], v[b], runs[b], mask_of_sequence(mask, b)) for b in rows
        ]
        return np.stack(found).reshape(*q.shape[:-3], *found[0].shape)

    def one_sequence_of(self, q, k, v, runs, mask):
        """y (T, D) for queries q (H, T, d), keys k and values v (K, S, d), and runs (T, H)."""
        H, T, w = self.heads, len(runs), self.out.w
        n = len(w) // H  # the width of a head's values: d, unless another technique widens them
        count = runs.sum(0).tolist()  # for each head, how many tokens run it
        y = np.zeros((T, w.shape[1]), q.dtype)
        if self.out.b is not None:
            y += self.out.b  # belongs to no head
        # Heads that all tokens run: those of a key head together, and adjacent ones of W_o. When a
        # single token is decoded, these are all that it runs.
        whole = [h for h in range(H) if count[h] == T]
        ctx = np.empty((T, H, n), q.dtype)
        for one in range(len(k)):
            if heads := [h for h in whole if h * len(k) // H == one]:
                ctx[:, heads] = self.attend(q[heads], k, v, one, mask).swapaxes(0, 1)
        for a, b in spans(whole):
            y += ops.linear(ctx[:, a:b].reshape(T, -1), w[a * n : b * n])
        # Each of the others on its own, with the tokens that run it.
        for h in (h for h in range(H) if 0 < count[h] < T):
            tokens = np.flatnonzero(runs[:, h])
            seen = mask_of_tokens(mask, tokens, T, k.shape[-2])
            ctx_h = self.attend(q[h : h + 1, tokens], k, v, h * len(k) // H, seen)[0]
            y[tokens] += ops.linear(ctx_h, w[h * n : (h + 1) * n])
        return y


@part
class AttendOneKeyHead(Part):
    """Softmax attention of query heads that all read the same key head."""

    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, one: int, mask):
        """q (heads, tokens, d), k and v (K, S, d), of which key head ``one`` is read -> (heads,
        tokens, d)."""
        return attend_one_key_head(q, k, v, one, self.scale, mask)


def spans(heads: list[int]):
    """(a, b): the stretches a .. b - 1 of adjacent heads in an ascending list."""
    first = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield heads[first], heads[i - 1] + 1
            first = i


@part
class NormRouter(Part):
    """The heads with the longest queries."""

    heads: int  # H
    shared: int  # the first heads, which always run
    running: int  # heads that run for each token, shared ones included

    def __call__(self, q, layer: Layer):
        of_head = q.reshape(*q.shape[:-1], self.heads, -1)[..., self.shared :, :]
        ledger.count(of_head.size)
        return highest(np.vecdot(of_head, of_head), self.shared, self.running)


@part
class RandomRouter(Part):
    """Random heads: a baseline. A token has the same scores whatever is run beside it."""

    shared: int
    running: int
    scores: np.ndarray = table()  # (context, H - shared), by position

    def __call__(self, q, layer: Layer):
        scores = self.scores[layer.tokens.lookup]  # (T, H - shared) or (B, T, H - shared)
        scores = np.broadcast_to(scores, (*q.shape[:-1], scores.shape[-1]))
        return highest(scores, self.shared, self.running)


def highest(scores, shared: int, running: int):
    """Booleans (..., T, H): the shared heads, and of the others those with the highest scores
    (..., T, H - shared), until ``running`` heads run. Ties go to the lower index."""
    order = np.argsort(-coarse(scores), axis=-1, kind="stable")
    rank = order.argsort(-1)  # 0: the highest
    runs = np.ones((*scores.shape[:-1], shared + scores.shape[-1]), bool)
    runs[..., shared:] = rank < running - shared
    return runs


# Checks ------------------------------------------------------------------------------------------


def check_shares(H: int, always: int, running: int, shared: float, active: float) -> None:
    if always > running:
        raise MinitxError(
            f"head_router: shared={shared:g} keeps {always} of {H} heads but active={active:g} "
            f"lets only {running} run; use a smaller shared or a larger active."
        )


def check_first(first: int, L: int) -> None:
    if first > L:
        raise MinitxError(
            f"head_router: first must be at most {L}, the number of layers; got {first}."
        )


# Notes:
#
# - Unlike in the paper nothing is trained, so the price is that of the selection alone. The deep
#   layers of stories hardly miss a head; the first ones do, hence ``first``. Figures on stories
#   (minitx sweep head-router active=0.5,0.25 choose=norm,random --stories 60, then with first=2
#   active=0.75,0.5 and with first=0 active=0.75 shared=0,0.5,0.75 choose=norm). Loss: above dense,
#   in nats per token. Hops: % of answers that are right, by the facts that they combine.
#
#       first  active  shared  choose   multiply-adds  loss       1 / 2 / 3 hops
#       dense                               1.000x     0.0000     99 / 93 / 100
#       4      0.5     0       norm         0.966x    +0.0008     99 / 93 / 100
#       4      0.5     0       random       0.966x    +0.0046     99 / 89 /  97
#       4      0.25    0       norm         0.949x    +0.0021     99 / 91 / 100
#       4      0.25    0       random       0.948x    +0.0070     99 / 91 /  86
#       2      0.75    0       norm         0.975x    +0.0035     99 / 93 / 100
#       2      0.75    0       random       0.974x    +0.0338     74 / 84 /  89
#       2      0.5     0       norm         0.949x    +0.0316     98 / 89 /  97
#       2      0.5     0       random       0.948x    +0.1014     56 / 69 /  53
#       0      0.75    0       norm         0.966x    +0.0233     99 / 91 / 100
#       0      0.75    0.5     norm         0.966x    +0.1661     84 / 84 /  83    the paper's form
#       0      0.75    0.75    (none)       0.966x    +0.5707     40 / 73 /  67    the same heads
#
#   A longer text has more to save: 0.92x at the default in chains of 512 tokens (--chains 2).
# - The same heads for every token (shared = active: the first ones) are no better than random ones;
#   nor were the three of four that write most on average (+0.54 in a trial). That tokens differ in
#   the heads that they need is what the router uses.
# - Shared heads are the first ones in the authors' code, and their training adapts to that.
#   Without it, fewer shared heads are better.
# - Not here: a linear gate on the queries, fitted by ridge regression to the norm of what each head
#   writes. With first=0 active=0.75 it cost +0.021 to +0.029 (16 to 64 calibration stories) where
#   the norms of the queries cost +0.025: not clearly better, and it needs calibration and H d
#   multiply-adds per head instead of d. Nor the weights of MoH-ViT, which need training.
# - A head that a token skips still caches its keys and values, so a later token may run it. With
#   grouped queries these are shared by the other heads of the group anyway.
