"""SpAtten's cascade head pruning: a head that has written little so far is skipped in later layers.

This file: the card and options, the attention that runs (online), its state, notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import QKV, Attend, Attention, Linear, merge_heads, split_heads
from minitx.shared.coarse import coarse
from minitx.shared.random_baseline import random_scores
from minitx.shared.share import share_of
from minitx.shared.units import columns_of
from minitx.state import Layer, Tokens
from minitx.technique import SEEDS, at_least, between, blocks_of, need, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="attention",
    exact=False,
    neutral={"start": 0.0, "end": 0.0},
    demo={"start": 0.5, "end": 0.5},
    event="heads skipped",
    presets={"aggressive": {"unpruned": 0.3}},
)
def head_cascade(
    lm,
    *,
    start: Annotated[
        float,
        "share of the alive heads that is pruned after the first pruning layer",
        at_least(0, below=1),
    ] = 0.25,
    end: Annotated[
        float, "the same after the second-to-last layer; linear in between", at_least(0, below=1)
    ] = 0.25,
    unpruned: Annotated[
        float,
        "share of the layers, from the first on, that run all heads (rounded down, at least one "
        "layer); the last of them is the first pruning layer",
        between(0, 1),
    ] = 0.5,
    choose: Annotated[
        Literal["output", "random"],
        "accumulated |output| of the heads, or a random baseline, drawn anew in each step",
    ] = "output",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Skip attention heads in later layers that had small outputs so far (SpAtten cascade).

    Paper:     Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and
               Head Pruning", HPCA 2021, arXiv 2012.09852.
    Fidelity:  a reconstruction from a review of the paper. The linear schedule is unconfirmed (from
               memory: the first 30 % of the layers unpruned). Ours: keys and values of all heads
               are computed and cached; at least one head stays.
    Kind:      approximate; exact at start=0 end=0. On ``stories`` the heads with large outputs are
               hardly better than random ones (Notes).
    Idea:      A head whose outputs are small changes the hidden state little. Add up how large the
               outputs of head m were, in all layers and steps so far, and let the next layers run
               without the heads that have the smallest sums. Head m of one layer and head m of the
               next are treated as one head, although they share no weights.
    Offline:   nothing.
    Online:    s = zeros(H), for the whole sequence. In each step (the tokens that run together):
               alive = all H heads; for each layer l:
                 run the alive heads only: their columns of W_q, scores, softmax, values, rows of
                 W_o; E_m (T, d): the output of head m before W_o
                 s[m] += sum |E_m|, for the alive m
                 from the last unpruned layer on: alive = those max(1, floor(|alive| (1 - p_l)))
                 with the largest s (ties go to the lower index); none returns in this step
    Saves:     2 D d + 2 d S multiply-adds per token, layer and skipped head (width D, heads of
               width d, S cached tokens). It adds d for each head that runs.
    In NumPy:  slower, 0.5x of dense: each step gathers columns and rows of the heads that run.
    Not for:   attention whose matrices are not plain (quantize, fuse_projections, ...), or that
               selects keys or rows itself (elsa, heavy_hitters, ...).
    Proof:     tests/skip/test_head_cascade.py; literal version: tests/skip/literal_head_cascade.py
    Tutorial:  tutorials/13_which_heads_matter.py
    """
    L = len(blocks_of(lm))
    first = max(1, share_of(L, unpruned))  # layers that run all heads
    ratios = pruning_ratios(L, first, start, end)
    if not any(ratios):
        return lm
    attns = [attention_of(block) for block in blocks_of(lm)]
    H = attns[0].heads
    if any(attn.heads != H for attn in attns):
        counts = ", ".join(str(attn.heads) for attn in attns)
        raise MinitxError(
            "head_cascade follows each head through all layers and needs equally many in each; "
            f"this model has {counts} (head_prune removes heads): use one of the two."
        )
    random = random_scores(lm.model.config.context, H, seed) if choose == "random" else None

    def change(attn: Attention, index: int) -> Part:
        plain = replace(attn, attend=AttendHeads(attn.attend.scale))
        return CascadeAttention(plain, ratios[index], random)

    return wrap(lm, "attn", change)


def pruning_ratios(L: int, first: int, start: float, end: float) -> list[float]:
    """(L,): p_l, the share of the alive heads that goes after each layer. The last one prunes
    nothing: no layer follows it."""
    pruning = L - first  # layers first - 1 .. L - 2
    if pruning < 1:
        return [0.0] * L
    return [0.0] * (first - 1) + np.linspace(start, end, pruning).tolist() + [0.0]


# Online ------------------------------------------------------------------------------------------


@part
class CascadeAttention(Part):
    """Attention of the heads that are alive; afterwards some of them may be pruned."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True
    decides = "step"  # all tokens of a step together select the heads
    has_history = True  # the accumulated outputs

    attn: Part
    ratio: float  # p_l: the share of the alive heads that is pruned afterwards
    random: np.ndarray | None = table(default=None)  # (context, H) scores of the baseline

    @property
    def one_sequence(self) -> bool:
        """True: no batches of different lengths. Random scores are by the step's first position,
        which differs between the sequences of a padded batch."""
        return self.random is not None

    def __call__(self, x, layer: Layer):
        n = self.attn.norm(x)
        self.attn.store(*self.attn.qkv.kv(n), layer)
        return self.read(n, layer)

    def backfill(self, x, layer: Layer):
        """Keys and values of all heads, for tokens x that skip this layer."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Attention from tokens x whose keys and values are already cached."""
        return self.read(self.attn.norm(x), layer)

    def read(self, n, layer: Layer):
        """From the normalized hidden states n (..., T, D). The sequences of a batch prune different
        heads, so they run one by one."""
        k, v = self.attn.cache.read(layer)  # (..., K, S, d)
        mask, tokens = layer.mask(), layer.tokens
        sequences = head_scores(layer, self.attn.heads, n.shape[:-2])
        if n.ndim == 2:
            return self.run(n, k, v, mask, tokens, tokens.array, sequences[()])
        out = np.empty_like(n)
        for b in np.ndindex(n.shape[:-2]):
            real, own, seen = tokens.array, tokens, mask
            if tokens.start is not None:
                own = Tokens(np.maximum(tokens.own[b], 0))
                real, seen = np.where(tokens.own[b] < 0, PADDING, tokens.array), mask[b]
            out[b] = self.run(n[b], k[b], v[b], seen, own, real, sequences[b])
        return out

    def run(self, n, k, v, mask, tokens: Tokens, positions, scores: "HeadScores"):
        """One sequence: n (T, D), k and v (K, S, d) -> (T, D)."""
        attn, heads = self.attn, scores.alive
        d = len(attn.out.w) // attn.heads
        columns = columns_of(heads, d) if len(heads) < attn.heads else slice(None)
        q = split_heads(attn.qkv.q.outputs(n, columns), len(heads))
        q = attn.rope(q, tokens)  # (alive, T, d)
        e = attn.attend(q, k, v, mask, heads // (attn.heads // attn.kv_heads))
        scores.add(abs(e).sum(-1), positions)
        ledger.count(e.size)
        ledger.event("heads skipped", (attn.heads - len(heads)) * len(n))
        if self.ratio:
            scores.prune(self.ratio, self.random)
        return ops.linear(merge_heads(e), attn.out.w[columns], attn.out.b)


@part
class AttendHeads(Part):
    """Softmax attention of some of the query heads, one key head after another."""

    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, mask, key_head):
        """q (n, T, d) of n query heads in ascending order, k and v (K, S, d), key_head (n,): the
        key head of each -> (n, T, d)."""
        out = np.empty_like(q)
        for j in np.unique(key_head):
            own = slice(*np.searchsorted(key_head, (j, j + 1)))
            out[own] = ops.attention(q[own], k[j : j + 1], v[j : j + 1], self.scale, mask)
        return out


# State -------------------------------------------------------------------------------------------

PADDING = -1  # the position of a token that does not count


def head_scores(layer: Layer, H: int, batch: tuple) -> np.ndarray:
    """The ``HeadScores`` of each sequence of the batch, at the beginning of a step if it is one:
    (*batch) objects, which all layers share."""
    scores = layer.shared.recall(BatchScores, lambda: BatchScores(batch, layer.capacity, H))
    if scores.step != layer.shared.step:
        scores.step = layer.shared.step
        for one in scores.sequences.flat:
            one.begin(scores.step)
    return scores.sequences


class BatchScores:
    """``HeadScores`` of each sequence; step: the position at which this step began."""

    def __init__(self, batch: tuple, capacity: int, H: int):
        self.sequences = np.empty(batch, object)
        for b in np.ndindex(batch):
            self.sequences[b] = HeadScores(capacity, H)
        self.step: int | None = None

    def rewind(self, position: int) -> None:
        self.step = None  # the next tokens begin a new one
        for one in self.sequences.flat:
            one.by_token[position:] = 0


class HeadScores:
    """The accumulated outputs of the heads, for one sequence.

    by_token (capacity, H): what each token has added. total (H,): the sum, s in the paper. alive:
    the heads that run in the next layer, ascending.
    """

    def __init__(self, capacity: int, H: int):
        self.by_token = np.zeros((capacity, H))
        self.begin(0)

    def begin(self, step: int) -> None:
        """A step begins at this position: all heads are alive again."""
        self.step = step
        self.total = self.by_token[:step].sum(0)
        self.alive = np.arange(len(self.total))

    def add(self, amounts, positions) -> None:
        """amounts (alive, T): sum |E_m| over the features, of tokens at these positions (T,)."""
        real = positions != PADDING
        amounts = amounts[:, real].astype(np.float64)
        self.by_token[positions[real][:, None], self.alive] += amounts.T
        self.total[self.alive] += amounts.sum(1)

    def prune(self, ratio: float, random=None) -> None:
        """Keep the heads with the largest totals (or random scores)."""
        count = max(1, share_of(len(self.alive), 1 - ratio))
        scores = coarse(self.total if random is None else random[self.step])[self.alive]
        self.alive = np.sort(self.alive[np.argsort(-scores, kind="stable")[:count]])


# Checks ------------------------------------------------------------------------------------------


def attention_of(block: Part) -> Attention:
    """The attention of a block, if it is made of plain parts."""
    attn = block.attn
    need(attn, Attention)
    need(attn.qkv, QKV)
    need(attn.attend, Attend)
    for linear in (attn.qkv.q, attn.out):
        need(linear, Linear)
    return attn


# Notes:
#
# - The review gives floor(|alive| (1 - p_l)) per layer. With few heads the floor makes most of the
#   decision: of 4 heads, p = 0.25 leaves 3, 2, 1, 1 in the layers after the unpruned ones, and
#   p = 0.01 leaves 3, 2, 1, 1 too. So ``unpruned`` sets how much runs, in steps of a layer.
# - Why keys and values of all heads: a head that a later step runs would lack those of the tokens
#   whose steps skipped it. What SpAtten does about that is unconfirmed.
# - Sums go on over steps, so they soon outweigh what one step adds: in three stories, 32 tokens in
#   the first step and 449 single ones, the head that is left in the last layer was not once another
#   one than after the first step.
# - Nothing says that head m of one layer has to do with head m of the next, whose outputs have
#   another scale too: the first layers, which all heads run, rank them for all later ones.
# - Undone tokens (state.rewind) are taken out of the sums again; each token's share is kept for
#   that, H numbers, in float64. s is compared rounded to 20 bits (shared/coarse.py).
# - Figures on stories (60 of them; 32 tokens in the first step, then one by one), one BLAS thread:
#       minitx sweep head-cascade unpruned=0.3,0.5,0.7 --stories 60
#       minitx sweep head-cascade unpruned=0.5 choose=random --stories 60
#       minitx sweep head-cascade unpruned=0.3 choose=random seed=0,1 --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (dense: 99 / 93 / 100 %):
#
#       unpruned  choose          multiply-adds  loss     1 / 2 / 3 hops     speed
#       0.7       output          0.96x          +0.003   99 / 93 / 100 %    0.49x
#       0.5       output          0.94x          +0.005   99 / 89 /  97 %    0.52x
#       0.5       random, seed 0  0.94x          +0.005   99 / 91 /  94 %    0.51x
#       0.3       output          0.90x          +0.056   80 / 71 /  39 %    0.51x
#       0.3       random, seed 0  0.90x          +0.067   66 / 71 /  50 %    0.51x
#       0.3       random, seed 1  0.90x          +0.074   68 / 73 /  53 %    0.52x
