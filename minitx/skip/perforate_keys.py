"""Loop perforation of attention: of the distant keys, only every s-th is attended to.

The card and options, the kept keys and the two forms of attention (online), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger, ops
from minitx.model import Attend
from minitx.shared.random_baseline import random_scores
from minitx.shared.sparse_attention import SparseAttention, Visible, need_equal_groups, top_k
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, swap, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="scores",
    exact=False,
    neutral={"stride": 1},
    demo={"sinks": 1, "window": 4, "stride": 3},
    event=("keys kept", "keys seen"),
    presets={"aggressive": {"window": 64, "stride": 4}, "values": {"form": "values"}},
)
def perforate_keys(
    lm,
    *,
    sinks: Annotated[int, "first keys, which every query keeps", at_least(0)] = 4,
    window: Annotated[int, "recent keys that a query keeps, its own included", at_least(1)] = 192,
    stride: Annotated[
        int, "of the keys between them, keep those at positions divisible by this", at_least(1)
    ] = 8,
    form: Annotated[
        Literal["skip", "values"],
        "skip: softmax over the kept keys only; values: softmax over all keys, then only the "
        "values of the kept ones, without renormalizing",
    ] = "skip",
    choose: Annotated[
        Literal["stride", "random"],
        "keep keys by position, or, as a baseline, as many at random",
    ] = "stride",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Perforate attention: keep the first keys, a window, and every s-th key in between.

    Paper:     none alone: loop perforation (Sidiroglou-Douskos et al., ESEC/FSE 2011) of the loop
               over keys. The kept keys are those of a strided sparse attention (Child et al.,
               arXiv 1904.10509), which is trained with it, and of StreamingLLM (2309.17453).
    Fidelity:  ours: the pattern is common practice; both forms and the defaults are our own.
    Kind:      approximate; exact at stride=1, which keeps every key.
    Idea:      The loop over keys runs only some of its iterations. Near keys and the first ones
               matter most and always run; of the others, every s-th represents its neighbours.
    Offline:   nothing.
    Online:    the query at position i keeps the keys j <= i with
                   j < sinks   or   j > i - window   or   j mod stride = 0
               skip:    softmax and weighted sum over the kept keys. No factor for the skipped ones:
                        the softmax normalizes itself, so a factor 2 at half of the keys would
                        double the output (tested).
               values:  p = softmax over all keys;  out = sum over the kept j of p_j v_j
    Saves:     2 r d instead of 2 S d multiply-adds per query head and decoded token, with
               r = sinks + window + (S - sinks - window) / stride of S cached keys; values: S d +
               r d. The kept keys are the same in all heads, and nearly the same for neighbouring
               queries, so prompts save too (unlike with elsa, a3, ...).
    In NumPy:  skip pays from about 2,000 cached keys: with a quarter of them kept, attention of one
               decoded token is 0.4x as fast as dense at 512 keys, 1.4x at 2,048, 1.5x at 4,096
               (Notes). values computes all scores and gains less.
    Not for:   saving memory: every row stays in the KV cache (Notes). sink_window keeps no keys in
               between, evicts them, and moves the sinks next to the window.
    Proof:     tests/skip/test_perforate_keys.py; literal version:
               tests/skip/literal_perforate_keys.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    if stride == 1 or sinks + window >= lm.model.config.context:
        return lm
    random = None
    if choose == "random":
        random = random_scores(len(blocks_of(lm)), lm.model.config.context, seed)

    def change(attn: Part, index: int) -> Part:
        need_equal_groups(attn)
        keys = KeysByPosition(sinks, window, stride)
        if random is not None:
            keys = RandomKeys(sinks, window, stride, random[index])

        def make(dense: Attend) -> Part:
            if form == "values":
                return PerforatedValues(keys, dense.scale)
            return SparseAttention(keys, dense.scale, arithmetic=AttendGatheredOnce())

        return swap(attn, Attend, make)

    return wrap(lm, "attn", change)


# Online: which keys ------------------------------------------------------------------------------


@part
class KeysByPosition(Part):
    """The selector (shared/sparse_attention.py): keeps keys by their positions alone."""

    sinks: int
    window: int
    stride: int

    def keeps_all(self, S: int) -> bool:
        return S <= self.sinks + self.window

    def remember(self, k, layer: Layer):
        return ()

    def __call__(self, q, k, known, visible: Visible):
        kept = self.kept(*own_positions(visible))  # (T, S), or (B, 1, 1, T, S) in a padded batch
        *lead, H, T, _ = q.shape
        K, S = k.shape[-3], k.shape[-2]
        return np.broadcast_to(kept, (*lead, K, H // K, T, S))

    def kept(self, i, j):
        """Booleans (..., T, S): does the query at position i (..., T, 1) keep the key at j (..., T,
        S)? Positions in padding are negative."""
        near = (j < self.sinks) | (j > i - self.window)
        return (near | (j % self.stride == 0)) & (j >= 0) & (j <= i)


@part
class RandomKeys(KeysByPosition):
    """The baseline: as many keys, at random positions; a query's own key is always one of them."""

    random: np.ndarray = table()  # (context,) a score for each position

    def kept(self, i, j):
        count = super().kept(i, j).sum(-1)  # (..., T)
        seen = (j >= 0) & (j <= i)
        scores = np.where(seen, self.random[np.where(seen, j, 0)], -1)
        return top_k(np.where(j == i, 2, scores), np.maximum(count, 1)) & seen


def own_positions(visible: Visible):
    """The positions of queries (..., T, 1) and of keys (..., T, S) in their own sequences: padding
    before the first key that a query sees has negative positions."""
    n = visible.count[..., None]  # how many keys each query sees
    first = visible.own[:, None] + 1 - n  # the row of the first one
    return n - 1, np.arange(visible.S) - first


# Online: attention over them ---------------------------------------------------------------------


@part
class AttendGatheredOnce(Part):
    """Softmax attention over the kept keys. They are gathered once for all heads and queries: what
    any of them keeps, and the mask tells which."""

    def __call__(self, q, k, v, scale, kept, floor):
        rows, hidden = any_kept(kept)
        if len(rows) < k.shape[-2]:
            k, v = k.take(rows, -2), v.take(rows, -2)
        return ops.attention(q, k, v, scale, hidden)


@part
class PerforatedValues(Part):
    """Softmax over all keys, then the weighted sum of the kept ones' values."""

    needs_all_rows = True  # looks at rows by position
    keys: KeysByPosition
    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, layer: Layer):
        positions, out = layer.tokens.array, np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        for a in range(0, len(positions), fast.ROWS):  # a block of queries at a time
            b = min(a + fast.ROWS, len(positions))
            end = int(positions[b - 1]) + 1  # no query of this block sees a later key
            visible = Visible(b - a, end, layer.start, positions[a:b])
            block = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
            out[..., a:b, :] = self.attend_block(*block, visible)
        return out

    def attend_block(self, q, k, v, visible: Visible):
        kept = self.keys(q, k, (), visible)  # (..., K, G, T, S)
        ledger.event("keys seen", lambda: visible.total(kept.shape[:-2]))
        ledger.event("keys kept", kept)
        p = fast.unnormalized_weights(q, k, self.scale, visible.mask)  # (..., K, G*T, S)
        p /= p.sum(-1, keepdims=True)
        rows, hidden = any_kept(kept)
        p = p.take(rows, -1)
        if hidden is not None:
            by_head = p.reshape(*kept.shape[:-1], len(rows))  # a view into p
            np.copyto(by_head, 0, where=hidden)
        v = v.take(rows, -2)
        scores, values = q.size * k.shape[-2], q.size // q.shape[-1] * v.shape[-1] * len(rows)
        ledger.count(scores + values, cache_bytes=k.nbytes + v.nbytes)
        return (p @ v).reshape(*q.shape[:-1], v.shape[-1])


def any_kept(kept):
    """The rows that any query keeps (n,), and the mask of those (..., 1, 1, T, n), True where a
    query does not keep one; None if each keeps all of them. kept (..., K, G, T, S) is the same for
    all heads."""
    kept = kept[..., :1, :1, :, :]
    rows = np.flatnonzero(kept.any(tuple(range(kept.ndim - 1))))
    hidden = ~kept.take(rows, -1)
    return rows, hidden if hidden.any() else None


# Notes:
#
# - Rows that no later query keeps (not a sink, not divisible by ``stride``, further back than the
#   window) could be evicted; here they stay, so that ``rewind`` reaches any position.
# - In a prompt, a block of 64 queries multiplies with every row that one of them keeps, at most 63
#   more than each by itself, and masks the others. That is counted.
# - Which form is better? skip gives the kept keys the weight of the skipped ones, which is right if
#   values are alike: on random queries and keys, values with a common mean are better with skip,
#   values of mean 0 with values (tested).
# - Figures on stories, 4 chains of 512 tokens (several stories joined), one BLAS thread:
#       minitx sweep perforate-keys window=192,128,64 stride=8,100000 --chains 4 --stories 20
#   and the same with window=64 stride=4,2, with choose=random, and with form=values. stride=100000
#   keeps nothing but sinks and window. Loss is above dense, in nats per token; the hops are right
#   answers to questions that need 1, 2 or 3 facts (dense: 100 / 100 / 100 %):
#
#       window  stride  form    choose  multiply-adds    loss      1 / 2 / 3 hops
#       192     8       skip    stride  0.93x            +0.010    100 / 100 / 100 %
#       192     -       skip    stride  0.92x            +0.016    100 / 100 / 100 %
#       128     8       skip    stride  0.90x            +0.074    100 /  78 / 100 %
#       128     -       skip    stride  0.88x            +0.098     98 /  78 / 100 %
#       64      2       skip    stride  0.92x            +0.067     90 /  78 /  86 %
#       64      4       skip    stride  0.88x            +0.137     88 /  33 /  86 %
#       64      8       skip    stride  0.85x            +0.191     88 /  22 / 100 %
#       64      -       skip    stride  0.83x            +0.275     75 /  22 /  71 %
#       192     8       values  stride  0.97x            +0.019    100 / 100 / 100 %
#       64      8       values  stride  0.93x            +0.247     81 /  11 /  71 %
#       192     8       skip    random  0.93x            +0.685     69 /  67 / 100 %
#       64      8       skip    random  0.85x            +2.040     38 /  78 /  86 %
#
#   Strided keys help at every window, but as many keys more in the window help more: stories are
#   shorter than 200 tokens, and few facts lie further back. The same with minitx frontier attention
#   --methods perforate-keys,predictive-attention,window,random --chains 4 --share 0.5,0.25: with
#   window=16 and the stride that keeps half of the keys, these have 64 % of the exact attention
#   mass and loss is +0.212 above dense; a plain window of as many keys has 73 % and +0.066, random
#   keys 65 % and +1.327, predicted ones 80 % and +0.001.
#   That command also times one decoded token at up to 4,096 keys.
# - Adding log(stride) to the scores of strided keys, so that each represents its neighbours too,
#   changed little in a trial, for the better or the worse. It is not here.
