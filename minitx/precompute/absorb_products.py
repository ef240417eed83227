"""Pairs of matrices with nothing between them become one: W_Q W_K^T and W_V W_O of each head."""

from dataclasses import replace
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import QKV, Attention, Linear, NoRope, split_heads
from minitx.state import Layer, Tokens
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None, after=("fold_norms",))
def absorb_products(lm, *, pairs: Literal["possible", "qk", "ov", "both"] = "possible"):
    """Compare and mix the attention's input itself, by one matrix a head for each pair of two.

    Paper: Nelson Elhage et al., 2021, "A Mathematical Framework for Transformer Circuits", which
        reads attention so (its QK and OV circuits). In use for latent attention: DeepSeek-AI, 2024,
        "DeepSeek-V2", arXiv 2405.04434, which states in words that W_UK goes into W_Q, and W_UV
        into W_O. The algebra was written out here.
    Kind: exact in real arithmetic; float32 rounds differently.
    Skips or precomputes: keys (qk) and values (ov), which are not made: the cache holds the
        attention's normalised input n, one head of width D, for all query heads and, with both, as
        keys and as values.
    Offline: for each query head i, whose keys and values are those of head j = i // G:
        QK_i = W_Q,i W_K,j^T (D, D), with the bias b_Q,i W_K,j^T. What b_K adds is the same for all
        scores of a query, which a softmax does not notice: b_K is dropped. OV_i = W_V,j W_O,i
        (D, D), with b_O + sum_i b_V,j W_O,i, as the weights of a softmax sum to 1. In float64 and
        rounded once.
    Online: q*_i = n QK_i + b;  p_i = softmax(q*_i n^T / sqrt(d));  out = sum_i (p_i n) OV_i + b.
        pairs=qk and pairs=ov do one of the two; pairs=possible what the positions allow.
    Saves: nothing, for several heads of d < D: this is a way to see what attention does. A pair
        takes 2 D d weights of a query head apart (fewer where heads share keys) and D^2 as one:
        less if d > D / 2, which means a single head, H = 1, when a score and a mix take
        D multiply-adds in the place of d. For a token on S cached ones, both: 2 H D^2 + 2 S H D, in
        the place of 2 D (H + K) d + 2 S H d. The cache holds D numbers a token (both; qk: D + K d;
        ov: K d + D) in the place of 2 K d: half of it with a full set of heads (K d = D). It
        pays where what is shared is small: latent attention, where a latent of few numbers stands
        in the place of n (and then while decoding, not for a prompt); or a vocabulary smaller than
        D, for which n QK n^T of block 0 may be a table (V, V), which is not built here.
    Neutral: nothing to set.
    Not for: W_Q W_K^T with rotary positions, which stand between the two. Wall time: for several
        heads NumPy gains none by it and mostly loses some, if less than the multiply-adds would
        have it. fold_norms, fuse_projections and shrink, which look for the three matrices that are
        gone.
    """

    def change(attn: Attention) -> Attention:
        need(attn.qkv, QKV)
        for child in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
            need(child, Linear)
        free = type(attn.rope) is NoRope
        if not free and pairs in ("qk", "both"):
            raise MinitxError(
                "absorb_products cannot make W_Q W_K^T one matrix in this model, whose rotary "
                "positions stand between the two; use pairs=ov."
            )
        return absorbed(attn, free and pairs != "ov", pairs != "qk")

    return swap(lm, Attention, change)


# Offline -----------------------------------------------------------------------------------------


def absorbed(attn: Attention, qk: bool, ov: bool) -> Attention:
    """The attention with W_Q W_K^T as one matrix a head, or W_V W_O, or both."""
    q, k, v = attn.qkv.q, attn.qkv.k, attn.qkv.v
    K, rope, cache, out = attn.kv_heads, attn.rope, attn.cache, attn.out
    if qk:
        q, k = scores_of_input(q, k, attn), Input()
    else:
        rope = PerHead(rope, K) if K > 1 else rope
    if ov:
        v, out = Nothing() if qk else Input(), output_of_input(v, out, attn)
        cache = KeysAreValues(cache) if qk else cache
    else:
        cache = OneKeyHead(cache, K)
    # One head of keys and one of values, as wide as they are; K heads come about behind it.
    return replace(attn, qkv=InputQKV(q, k, v), rope=rope, cache=cache, out=out, kv_heads=1)


def scores_of_input(q: Linear, k: Linear, attn: Attention) -> Linear:
    """n -> [n QK_1, ..., n QK_H] (D, H*D), with what b_Q adds."""
    w_q, b_q = by_head(q, attn.heads)  # (H, D, d), (H, 1, d)
    w_k, _ = by_head(k, attn.kv_heads)
    w_k = w_k.repeat(attn.heads // attn.kv_heads, axis=0).swapaxes(1, 2)  # (H, d, D)
    w = (w_q @ w_k).swapaxes(0, 1).reshape(len(q.w), -1)  # (H, D, D) -> (D, H*D)
    b = None if q.b is None else (b_q @ w_k).reshape(-1).astype(q.w.dtype)
    return Linear(w.astype(q.w.dtype), b)


def output_of_input(v: Linear, out: Linear, attn: Attention) -> Linear:
    """[m_1, ..., m_H] -> sum_i m_i OV_i (H*D, D), with what b_V adds."""
    w_v, b_v = by_head(v, attn.kv_heads)  # (K, D, d), (K, 1, d)
    G = attn.heads // attn.kv_heads
    w_v, b_v = w_v.repeat(G, axis=0), b_v.repeat(G, axis=0)
    w_o = out.w.astype(np.float64).reshape(attn.heads, -1, out.w.shape[1])  # (H, d, D)
    w = (w_v @ w_o).reshape(-1, out.w.shape[1])
    if v.b is None and out.b is None:
        return Linear(w.astype(out.w.dtype))
    b = (b_v @ w_o).sum((0, 1)) + (0 if out.b is None else out.b)
    return Linear(w.astype(out.w.dtype), b.astype(out.w.dtype))


def by_head(m: Linear, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """The matrix (heads, D, d) and bias (heads, 1, d) of each head, in float64."""
    b = np.zeros(m.w.shape[1]) if m.b is None else m.b
    return tuple(split_heads(a.astype(np.float64), heads) for a in (m.w, b[None]))


# Online ------------------------------------------------------------------------------------------


@part
class InputQKV(Part):
    """Queries, and in the place of keys or values what they would have been made from."""

    q: Part
    k: Part
    v: Part

    def __call__(self, n):
        return self.q(n), self.k(n), self.v(n)

    def kv(self, n):
        """Keys and values alone."""
        return self.k(n), self.v(n)


@part
class Input(Part):
    """The normalised input itself."""

    def __call__(self, n):
        return n


@part
class Nothing(Part):
    """Values of width 0: what the keys are is enough."""

    def __call__(self, n):
        return n[..., :0]


@part
class KeysAreValues(Part):
    """One head of keys, which are the values too."""

    inner: Part

    def store(self, k, v, layer: Layer):
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        k, _ = self.inner.read(layer)  # (..., 1, S, D)
        return k, k


@part
class OneKeyHead(Part):
    """One head of keys for several heads of values, which come side by side as one."""

    inner: Part
    heads: int  # K, of values

    def store(self, k, v, layer: Layer):
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        k, v = self.inner.read(layer)  # (..., 1, S, D), (..., 1, S, K*d)
        v = split_heads(v[..., 0, :, :], self.heads)  # (..., K, S, d)
        return np.broadcast_to(k, (*v.shape[:-1], k.shape[-1])), v


@part
class PerHead(Part):
    """Keys that come side by side as one head, split into heads and then rotated."""

    rope: Part
    heads: int  # K, of keys

    def __call__(self, x, tokens: Tokens):
        if x.shape[-3] == 1:  # keys; queries are split already, into at least as many heads
            x = split_heads(x[..., 0, :, :], self.heads)  # (..., K, T, d)
        return self.rope(x, tokens)
