"""SpAtten's progressive quantization: scores from the high bits of the keys first, then, where
attention is flat, from all bits.

The card and options, the attention that runs (online), how keys are coded, notes.
"""

from functools import partial
from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger
from minitx.model import Attend
from minitx.shared.coarse import coarse_scales
from minitx.shared.random_baseline import random_scores
from minitx.shared.sparse_attention import need_equal_groups, per_key
from minitx.shared.symmetric import quantize_to
from minitx.state import Layer
from minitx.technique import SEEDS, between, blocks_of, swap, technique, wrap
from minitx.tree import Part, part, table

QUERY_BITS = 8  # of a query, which is not read from the cache


@technique(
    level="scores",
    exact=False,
    neutral={"threshold": 1.0, "low": None},
    demo={"high": 3, "threshold": 0.5},
    event=("queries redone", "queries seen"),
    presets={
        "aggressive": {"high": 2, "low": 4, "threshold": 0.1, "choose": "peaked"},
        "twelve-bits": {"high": 8, "low": 4},
    },
)
def progressive_precision(
    lm,
    *,
    high: Annotated[int, "high bits of each number of a key, always read", between(2, 8)] = 4,
    low: Annotated[
        int | None,
        "low bits, read where scores are redone; None: the float key is read instead",
        between(1, 8),
    ] = 4,
    threshold: Annotated[
        float,
        "redo the scores of a query unless its largest attention weight is above this; 0: never, "
        "1: always",
        between(0, 1),
    ] = 0.1,
    choose: Annotated[
        Literal["flat", "peaked", "random"],
        "flat: the paper's rule, as above; peaked: redo if the largest weight is above the "
        "threshold; random: redo the share threshold of each head's queries, a baseline",
    ] = "flat",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Score keys by their high bits; read their low bits only where attention is flat (SpAtten).

    Paper:     Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and
               Head Pruning", HPCA 2021, arXiv 2012.09852 (progressive quantization).
    Fidelity:  the decision, and low bits of keys stored apart, as in the authors' code for their
               hardware; the rest is a reconstruction from summaries. Ours: a scale for each key,
               rounding, queries in 8 bits, values left alone, low=None, choose=peaked.
    Kind:      approximate; exact at threshold=1 low=None, which reads float keys. On stories the
               paper's rule is worse than redoing random queries, and 4 bits are enough (Notes).
    Idea:      Where one key has nearly all the weight, an error in the scores changes little. Where
               weights are flat it changes more. So read more bits of the keys there.
    Offline:   nothing.
    Online:    each key k (d,), once, when it is new:
                   scale = max|k| / m,   m = floor(((2^high - 1) 2^low - 1) / 2)
                   rint(k / scale) = 2^low * high part + low part    (both signed integers)
               each query, in 8 bits:
                   p = softmax(scores of the high parts)
                   if max(p) <= threshold: p = softmax(scores of both parts)
               out = sum of p_j v_j
    Saves:     bytes of keys: ``high`` of 32 bits are read, and ``low`` more for key heads with a
               redone query; a key's scale takes 4 bytes. No multiply-adds: 2 S d per query head and
               token, and S d more where redone; but scores multiply 8-bit integers (redone with
               low=None: floats).
    In NumPy:  slower: BLAS has no integer products, so all codes are converted to floats for every
               token.
    Not for:   prompts: of 64 queries that read keys together, at least one needs the low bits.
    Proof:     tests/skip/test_progressive_precision.py; literal version:
               tests/skip/literal_progressive_precision.py
    """
    if low is None and threshold == (0 if choose == "peaked" else 1):
        return lm  # the high parts would be read for nothing
    L, heads, context = len(blocks_of(lm)), lm.model.config.heads, lm.model.config.context
    drawn = random_scores(L * heads, context, seed).reshape(L, heads, context)

    def change(attn: Part, index: int) -> Part:
        need_equal_groups(attn)
        scores = [drawn[index]] if choose == "random" else []
        code, rule = KeyCode(high, low), RULES[choose](threshold, *scores)
        return swap(attn, Attend, lambda dense: ProgressiveAttend(code, dense.scale, rule))

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class ProgressiveAttend(Part):
    """Softmax attention whose scores come from the high bits of the keys, or from all bits."""

    needs_all_rows = True  # needs every token's cache row: codes are kept by row
    code: Part
    scale: float  # 1 / sqrt(d)
    rule: Part  # which queries to redo

    def __call__(self, q, k, v, layer: Layer):
        known = per_key(self, k, self.code, layer)
        T, S = q.shape[-2], k.shape[-2]
        mask, out = layer.mask(), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        # A block of t = b - a queries at a time: a .. b - 1, which see only rows before ``end``.
        for a, b, end in fast.query_blocks(T, S, mask):
            hidden = fast.newest_mask(b - a) if mask is None else mask[..., a:b, :end]
            queries = q[..., a:b, :].reshape(*k.shape[:-2], -1, q.shape[-1])  # (..., K, G*t, d)
            rule = partial(self.rule, layer=layer, a=a, b=b)
            keys, values = k[..., :end, :], v[..., :end, :]
            p = self.weights(queries, keys, known, hidden, b - a, rule)  # (..., K, G*t, end)
            work = queries.size // q.shape[-1] * end * v.shape[-1]
            ledger.count(work, cache_bytes=fast.cached_bytes(values, values))
            out[..., a:b, :] = fast.weighted_sum(p, values).reshape(out[..., a:b, :].shape)
        return out  # (..., H, T, d)

    def weights(self, q, k, known, hidden, t: int, rule):
        """Attention weights, not normalized, of the queries q (..., K, G*t, d) of one block."""
        end, d = k.shape[-2:]
        high, low, scales = known[0][..., :end, :], known[1][..., :end, :], known[2][..., :end]
        q_codes, q_scales = quantize_to(q, 2 ** (QUERY_BITS - 1) - 1)
        unit = self.scale * q_scales[..., None] * scales[..., None, :]  # of a product of codes
        ledger.count(q.size * end, 0, self.code.high_bytes(high, scales), bits=QUERY_BITS)
        # Multiplied as floats, since BLAS has no integers; the sums are exact.
        dots = q_codes @ high.astype(q.dtype).swapaxes(-1, -2) * self.code.step
        scores = dots * unit
        p = fast.exponentials(scores.copy(), hidden, t)
        redo = rule(coarse_scales(1 / p.sum(-1)))  # (..., K, G*t); the largest of p is 1
        ledger.event("queries seen", redo.size)
        ledger.event("queries redone", redo)
        if not redo.any():
            return p
        for h in np.ndindex(redo.shape[:-1]):  # each key head, of each sequence
            rows = np.flatnonzero(redo[h])
            if not rows.size:
                continue
            if self.code.low is None:
                scores[h][rows] = self.scale * q[h][rows] @ k[h].T
                ledger.count(rows.size * d * end, cache_bytes=k[h].nbytes)
            else:
                rest = q_codes[h][rows] @ low[h].astype(q.dtype).T
                scores[h][rows] = (dots[h][rows] + rest) * unit[h][rows]
                read = self.code.low_bytes(low[h])
                ledger.count(rows.size * d * end, cache_bytes=read, bits=QUERY_BITS)
        return fast.exponentials(scores, hidden, t)


# Online: which queries to redo -------------------------------------------------------------------


@part
class Flat(Part):
    """The paper's rule: those whose largest attention weight is at most the threshold."""

    threshold: float

    def __call__(self, largest, layer: Layer, a: int, b: int):
        """Booleans like the largest weights (..., K, G*t) of the queries a .. b - 1 of a step."""
        return largest <= self.threshold


@part
class Peaked(Flat):
    """The opposite: those whose largest attention weight is above it."""

    def __call__(self, largest, layer: Layer, a: int, b: int):
        return largest > self.threshold


@part
class AtRandom(Flat):
    """The baseline: a random share of the queries of each head."""

    scores: np.ndarray = table()  # (H, context)

    def __call__(self, largest, layer: Layer, a: int, b: int):
        positions = np.maximum(layer.tokens.own[..., a:b], 0)  # (t,) or (B, t)
        by_head = np.moveaxis(self.scores[:, positions], 0, -2)  # (..., H, t)
        by_head = by_head.reshape(*by_head.shape[:-2], *largest.shape[-2:])
        return np.broadcast_to(by_head, largest.shape) < self.threshold


RULES = {"flat": Flat, "peaked": Peaked, "random": AtRandom}


# How keys are coded ------------------------------------------------------------------------------


@part
class KeyCode(Part):
    """Integers of high + low bits, as their high and their low parts."""

    high: int
    low: int | None

    @property
    def step(self) -> int:
        """The weight of 1 in the high part."""
        return 2 ** (self.low or 0)

    @property
    def largest(self) -> int:
        """The largest code: its high part is 2^(high-1) - 1, its low part 2^(low-1) - 1."""
        return ((2**self.high - 1) * self.step - 1) // 2

    def __call__(self, k):
        """k (..., d) -> high and low parts (..., d) as int8, and scales (...). Parts are signed;
        without low bits the low part is empty (..., 0)."""
        codes, scales = quantize_to(k, self.largest)
        high = np.floor((codes + self.step // 2) / self.step)
        low = codes - high * self.step if self.low else codes[..., :0]
        return high.astype(np.int8), low.astype(np.int8), scales

    def high_bytes(self, high, scales) -> int:
        """Bytes of high parts and scales in memory, with the bits packed."""
        return packed_bytes(high, self.high) + scales.nbytes

    def low_bytes(self, low) -> int:
        return packed_bytes(low, self.low)


def packed_bytes(codes, bits: int) -> int:
    """Bytes of codes (..., d), ``bits`` bits each; a vector is padded to a full byte."""
    d = codes.shape[-1]
    return codes.size // d * -(-d * bits // 8)


# Notes:
#
# - In the authors' code low bits are 4, a query is redone if its largest weight is below the
#   threshold, and all of its key's bits are then multiplied again. Here the low parts alone are
#   multiplied and added. A weight of exactly the threshold counts as flat, so that threshold=1
#   redoes all; it is rounded to 20 bits (shared/coarse.py), so that of two equal keys each has 1/2.
# - The paper truncates the low bits; here the high part is the nearest multiple, so that errors of
#   the first pass have mean 0. The thresholds and the bits per task of the paper are unconfirmed.
# - Bytes per token and key head: S (d high/8 + 4) of codes and scales, S d low/8 more (or 4 S d of
#   float keys with low=None) if any of its query heads is redone, and 4 S d of values. Bits count
#   as packed; NumPy keeps each part in an int8. The float keys stay in the cache, and only low=None
#   reads them: hardware would drop them.
# - Figures on stories, one BLAS thread, at the same 4 low bits:
#       minitx sweep progressive-precision high=4,3,2 threshold=0 --stories 60
#       minitx sweep progressive-precision high=2 threshold=0.1 choose=flat,peaked --stories 60
#       minitx sweep progressive-precision high=2 threshold=0.5 choose=random --stories 60
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (dense: 99 / 93 / 100 %):
#
#       high    redone             multiply-adds    loss       1 / 2 / 3 hops      speed
#       4       none               1.00x            +0.0008     99 /  93 /  97 %   0.53x
#       4       flat (default)     1.01x            +0.0008     99 /  93 / 100 %   0.42x
#       3       none               1.00x            +0.0042     99 /  93 /  97 %   0.53x
#       2       none               1.00x            +0.1068     89 /  85 /  89 %   0.52x
#       2       flat               1.01x            +0.1063     90 /  84 /  86 %   0.45x
#       2       random half        1.01x            +0.0376     96 /  87 / 100 %   0.38x
#       2       peaked             1.02x            +0.0031     99 /  93 / 100 %   0.45x
#
#   Where some queries are redone, it is 40 to 60 % of them (in chains of 512 tokens 64 %). The idea
#   fails here: attention that looks up one word is peaked, and a wrong score looks up another word;
#   flat attention averages over many keys, and so over their errors. Besides, large errors make any
#   softmax look peaked. So the opposite rule is the better one; but 3 or 4 bits for all, which read
#   about as little, are as good. The rules rank the same on stories-relu.
# - KV cache bytes per token, in chains of 512 tokens (minitx compare --progressive-precision
#   --chains 2 --stories 10): 0.63x at the defaults; 0.58x with the high 4 bits alone (threshold=0),
#   0.55x with 2 bits (high=2 threshold=0).
