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
)
def sink_window(
    lm,
    *,
    sinks: Annotated[int, "first tokens, which are never evicted", at_least(0)] = 4,
    window: Annotated[int, "recent tokens that a query sees, itself included", at_least(1)] = 124,
    positions: Annotated[
        Literal["cache", "original"] | None,
        "where the sinks are seen: right before the window, or at their original positions; "
        "default: cache in a rotary model",
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
    Online:    query p sees the rows  r < sinks  and  p - window < r <= p;
               before new keys and values are stored, rows that no new token sees are freed.
               positions=cache: positions are those within the cache, so a sink is at distance
               p - shift - r with shift = max(0, p - window + 1 - sinks).
    Saves:     cache rows: at most sinks + window + the new tokens. A decoded token takes
               2 H d (sinks + window) multiply-adds for attention instead of 2 H d S.
    In NumPy:  saves memory, not time: freeing rows and scoring the sinks separately takes longer
               than the attention that it saves, at all contexts of the shipped models (Notes).
    Not for:   tasks that need tokens outside the window. positions=cache in a model with learned
               positions, which are part of every key. Techniques that need a
               cache row for every token (elsa, a3, dota, ...).
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

    frees_rows = True
    inner: Part
    sinks: int
    window: int

    def store(self, k, v, layer: Layer):
        if layer.remember and layer.count:
            self.evict(layer)
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        return self.inner.read(layer)

    def evict(self, layer: Layer) -> None:
        first = int(layer.tokens.array[0])  # the first new token sees furthest back
        rows = layer.row_tokens()
        sink = (rows.own >= 0) & (rows.own < self.sinks)  # (S,), or (B, S) in a padded batch
        needed = sink.reshape(-1, layer.count).any(0) | (rows.array > first - self.window)
        if not needed.all():
            ledger.event("cache rows evicted", ~needed)
            layer.keep(np.flatnonzero(needed))
            # A rewind to position p needs the rows from p - window + 1 on, so p can be no earlier.
            layer.rewindable_to, layer.evicted_by = first, "sink_window"


@part
class WindowAttend(Part):
    """Softmax attention of each query over the sinks and its window."""

    scale: float  # 1 / sqrt(d)
    sinks: int
    window: int
    rope: Part  # NoRope: the sinks keep their original positions

    def __call__(self, q, k, v, layer: Layer):
        newest = int(layer.tokens.array[-1])
        if newest < self.sinks + self.window:  # every row is visible
            return ops.attention(q, k, v, self.scale, layer.mask())
        mask = self.mask(layer)
        if type(self.rope) is NoRope or not self.sinks:
            return ops.attention(q, k, v, self.scale, mask)
        near, out = self.nearer(q, layer), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        for a, b, end in fast.query_blocks(q.shape[-2], k.shape[-2], mask):
            rows, keys, values = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
            p = fast.attention_scores(rows, keys, self.scale)  # (..., K, G*T, S)
            self.score_sinks(p, near[..., a:b, :], keys, layer)
            p = fast.exponentials(p, mask[..., a:b, :end], b - a)
            out[..., a:b, :] = fast.weighted_values(p, rows, keys, values)
        return out  # (..., H, T, d)

    def mask(self, layer: Layer):
        """(T, S), or (B, 1, 1, T, S) in a padded batch: True for later tokens, for those between
        the sinks and the window, and for padding."""
        query, row = layer.tokens.own[..., :, None], layer.row_tokens().own[..., None, :]
        masked = (row > query) | (row >= self.sinks) & (row <= query - self.window) | (row < 0)
        return masked if masked.ndim == 2 else masked[:, None, None]

    def nearer(self, q, layer: Layer):
        """The queries (..., H, T, d) rotated back by the number of tokens between sinks and window,
        as if the sinks came right before the window. With RoPE a score depends only on the
        distance, so the keys need not be rotated again."""
        shift = np.maximum(0, layer.tokens.own - self.window + 1 - self.sinks)  # (T,) or (B, T)
        cos, sin = self.rope.cos[shift], self.rope.sin[shift]  # (T, width) or (B, T, width)
        if shift.ndim > 1:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, width)
        return ops.rotate(q, cos, -sin)

    def score_sinks(self, p, near, k, layer: Layer) -> None:
        """Write into the scores p (..., K, G*T, S) those of the sinks by the nearer queries."""
        own = layer.row_tokens().own[..., : k.shape[-2]]
        sink = (own >= 0) & (own < self.sinks)  # (S,), or (B, S) in a padded batch
        columns = np.flatnonzero(sink.reshape(-1, sink.shape[-1]).any(0))
        scores = fast.attention_scores(near, k[..., columns, :], self.scale)
        ledger.count(near.size * len(columns))
        sink = sink[..., columns] if sink.ndim == 1 else sink[:, None, None, columns]
        p[..., columns] = np.where(sink, scores, p[..., columns])


# Notes:
#
# - Rows are freed when the next step begins, not when this one ends. So all rows of the last
#   step are still there, and it can be undone in part: speculative decoding runs on top.
# - Figures on stories, 8 chains of 512 tokens, read and then 48 tokens continued
#   (minitx sweep sink-window window=252,124,60 --chains 8 --stories 20, and with sinks=0):
#
#       window    sinks    cache    loss above dense    1 / 2 / 3 hops
#       252       4        0.50x    -0.000              100 / 100 / 100 %
#       124       4        0.25x    +0.092               99 /  89 /  92 %
#       128       0        0.25x    +0.071               99 /  89 / 100 %
#        60       4        0.13x    +0.207               85 /  61 /  54 %
#        64       0        0.13x    +0.242               81 /  39 /  54 %
#
#   The models of the paper break down without sinks (perplexity 5158 instead of 5.40, quoted from
#   others' accounts of its table 1). This one does not: its stories are short, and a chain holds
#   several.
#   positions=original differs little: +0.074 and +0.243 where cache has +0.092 and +0.207.
# - Speed: decoding alone, with 440 to 500 tokens in the dense cache, 0.4x of dense, and 0.6x with
#   positions=original (one BLAS thread; the speed that sweep prints includes the prompt,
#   which is dense). Per layer and token, the few NumPy calls that free a row and score the sinks
#   take longer than this model's whole attention over 500 keys.
