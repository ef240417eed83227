"""StreamingLLM: cache only the attention sinks and a recent window.

This file: the card and options, the two parts that run (online), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger, ops
from minitx.errors import MinitxError
from minitx.model import Attend, Attention, NoRope, Rope
from minitx.state import Layer
from minitx.technique import at_least, need, technique, wrap
from minitx.tree import Part, part


@technique(
    level="attention",
    exact=False,
    neutral={"window": 1 << 40},
    after=("quantize_cache",),
    demo={"sinks": 2, "window": 6},
    event="cache rows evicted",
    presets={"aggressive": {"window": 124}},
)
def sink_window(
    lm,
    *,
    sinks: Annotated[int, "first tokens, which are never evicted", at_least(0)] = 4,
    window: Annotated[int, "recent tokens that a query sees, itself included", at_least(1)] = 252,
    positions: Annotated[
        Literal["cache", "original"] | None,
        "where the sinks seem to be; cache: right before the window (default with RoPE); original: "
        "where they were (default without)",
    ] = None,
):
    """Cache only the first few tokens and a recent window of the KV cache.

    Paper:     Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR 2024,
               arXiv 2309.17453.
    Fidelity:  the authors' code for the cached rows and their positions. Ours: queries of one step
               see the same rows as one by one; rows are evicted at the start of a step.
    Kind:      approximate; exact while a text is no longer than sinks + window.
    Idea:      Softmax weights sum to 1, so a head that needs no token parks its attention on the
               first ones: evict those and a model breaks down. Keep them, and the latest tokens.
    Offline:   nothing.
    Online:    before the keys and values of new tokens are stored: free the cache rows of tokens
               that no new token will see.
               the token at position p sees the tokens  r < sinks  and  p - window < r <= p
               shift = max(0, p - window + 1 - sinks)   tokens evicted between sinks and window
               positions=cache: the sinks are scored with the query rotated to p - shift, all other
               tokens with the query at p.
    Saves:     cache rows: at most sinks + window + the new tokens (0.50x on stories of 512 tokens).
               A decoded token takes 2 H d (sinks + window) multiply-adds for attention instead of
               2 H d S (H query heads of width d, S cached tokens).
    In NumPy:  saves memory, not time: freeing rows and scoring the sinks separately takes longer
               than the attention that it saves, at all contexts of the shipped models (Notes).
    Not for:   tasks that need tokens outside the window. positions=cache in a model with learned
               positions, which are part of every key. Techniques that need a cache row for every
               token (elsa, a3, dota, ...).
    Proof:     tests/skip/test_sink_window.py; literal version: tests/skip/literal_sink_window.py
    """
    if sinks + window >= lm.model.config.context:
        return lm

    def change(attn: Part, index: int) -> Part:
        need(attn, Attention)
        need(attn.attend, Attend)
        need(attn.rope, Rope, NoRope)
        rotary = type(attn.rope) is Rope
        if positions == "cache" and not rotary:
            raise MinitxError(
                "sink_window cannot move the sinks in this model, whose positions are learned and "
                "part of every key; use positions=original."
            )
        rope = attn.rope if rotary and positions != "original" else NoRope()
        return replace(
            attn,
            cache=WindowCache(attn.cache, sinks, window),
            attend=WindowAttend(attn.attend.scale, sinks, window, rope),
        )

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class WindowCache(Part):
    """Frees the rows that no later token will see, then stores the new ones."""

    frees_rows = True  # declared for technique.apply: not with a part that needs every row

    inner: Part  # the KV cache
    sinks: int
    window: int

    def store(self, k, v, layer: Layer):
        if layer.remember and layer.count:
            self.evict(layer)
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        return self.inner.read(layer)

    def evict(self, layer: Layer) -> None:
        # The new token that sees furthest back; or where the step began, if this layer runs only
        # some of its tokens (mixture_of_depths): after a rewind to there, others may come.
        first = min(int(layer.tokens.array[0]), layer.shared.step)
        rows = layer.row_tokens()
        # own: a token's position in its own sequence; array: in the batch, padding included.
        sink = (rows.own >= 0) & (rows.own < self.sinks)  # (S,), or (B, S) in a padded batch
        sink = sink.reshape(-1, layer.count).any(0)  # (S,): a row stays if any sequence needs it
        needed = sink | (rows.array > first - self.window)
        if not needed.all():
            ledger.event("cache rows evicted", ~needed)
            layer.keep(np.flatnonzero(needed))
            # After a rewind to position p, token p needs the rows from p - window + 1 on. They are
            # all there only if p is not before ``first``.
            layer.rewindable_to, layer.evicted_by = first, "sink_window"


@part
class WindowAttend(Part):
    """Softmax attention of each query over the sinks and its window."""

    scale: float  # 1 / sqrt(d)
    sinks: int
    window: int
    rope: Part  # moves the sinks; NoRope: they keep their original positions

    def __call__(self, q, k, v, layer: Layer):
        newest = int(layer.tokens.array[-1])
        if newest < self.sinks + self.window:  # every row is visible
            return ops.attention(q, k, v, self.scale, layer.mask())
        mask = self.mask(layer)
        if type(self.rope) is NoRope or not self.sinks:
            return ops.attention(q, k, v, self.scale, mask)
        moved, out = self.moved_queries(q, layer), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        # A block of queries at a time: a .. b - 1, which see only rows before ``end``.
        for a, b, end in fast.query_blocks(q.shape[-2], k.shape[-2], mask):
            queries, keys, values = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
            scores = fast.attention_scores(queries, keys, self.scale)  # (..., K, G*(b-a), end)
            self.score_sinks(scores, moved[..., a:b, :], keys, layer)
            p = fast.exponentials(scores, mask[..., a:b, :end], b - a)
            out[..., a:b, :] = fast.weighted_values(p, queries, keys, values)
        return out  # (..., H, T, d)

    def mask(self, layer: Layer):
        """(T, S), or (B, 1, 1, T, S) in a padded batch: True for later tokens, for those between
        the sinks and the window, and for padding."""
        query, row = layer.tokens.own[..., :, None], layer.row_tokens().own[..., None, :]
        masked = (row > query) | (row >= self.sinks) & (row <= query - self.window) | (row < 0)
        return masked if masked.ndim == 2 else masked[:, None, None]

    def moved_queries(self, q, layer: Layer):
        """The queries (..., H, T, d) rotated back from p to p - shift, as if the sinks came right
        before the window. With RoPE a score depends only on the distance, so the keys of the sinks
        need not be rotated again."""
        shift = np.maximum(0, layer.tokens.own - self.window + 1 - self.sinks)  # (T,) or (B, T)
        cos, sin = self.rope.cos[shift], self.rope.sin[shift]  # (T, width) or (B, T, width)
        if shift.ndim > 1:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, width)
        return ops.rotate(q, cos, -sin)

    def score_sinks(self, scores, moved, k, layer: Layer) -> None:
        """Overwrite the sinks' columns of the scores (..., K, G*t, S) of t queries with those of
        the moved queries (..., H, t, d)."""
        own = layer.row_tokens().own[..., : k.shape[-2]]
        sink = (own >= 0) & (own < self.sinks)  # (S,), or (B, S) in a padded batch
        columns = np.flatnonzero(sink.reshape(-1, sink.shape[-1]).any(0))  # sinks of any sequence
        of_moved = fast.attention_scores(moved, k[..., columns, :], self.scale)
        ledger.count(moved.size * len(columns))
        sink = sink[..., columns] if sink.ndim == 1 else sink[:, None, None, columns]
        scores[..., columns] = np.where(sink, of_moved, scores[..., columns])


# Notes:
#
# - Rows are freed when the next step begins, not when this one ends. So all rows of the last
#   step are still there, and it can be undone in part: speculative decoding runs on top.
# - Figures on stories, 8 chains of 512 tokens, read and then 48 tokens continued. A chain: several
#   stories joined to 512 tokens. Hops: how many facts an answer has to combine.
#   The models of the paper break down without sinks (perplexity 5158 instead of 5.40, quoted from
#   others' accounts of its table 1). This one does not: its stories are short, and a chain holds
#   several. (minitx sweep sink-window window=252,124,60 --chains 8 --stories 20, then with
#   sinks=0 window=128,64.)
#
#       window    sinks    cache    loss above dense    1 / 2 / 3 hops
#       252       4        0.50x    -0.000              100 / 100 / 100 %
#       124       4        0.25x    +0.092               99 /  89 /  92 %
#       128       0        0.25x    +0.071               99 /  89 / 100 %
#        60       4        0.13x    +0.207               85 /  61 /  54 %
#        64       0        0.13x    +0.242               81 /  39 /  54 %
#
#   positions=original differs little: +0.074 and +0.243 where cache has +0.092 and +0.207.
# - Speed: decoding alone, with 440 to 500 tokens in the dense cache, 0.4x of dense, and 0.6x with
#   positions=original (one BLAS thread; the speed that sweep prints includes the prompt,
#   which is dense). Per layer and token, the few NumPy calls that free a row and score the sinks
#   take longer than this model's whole attention over 500 keys.
