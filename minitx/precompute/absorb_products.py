"""One matrix per head instead of W_q and W_k, and one instead of W_v and W_o.

The card and the option, the parts that run (online), the products (offline), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import (
    QKV,
    Attend,
    AttendUnequalGroups,
    Attention,
    Linear,
    NoRope,
    split_heads,
)
from minitx.state import Layer, Tokens
from minitx.technique import NoSuchPart, need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None, after=("fold_norms",))
def absorb_products(
    lm,
    *,
    pairs: Annotated[
        Literal["possible", "qk", "ov", "both"],
        "the products to make; possible: both, or only ov in a model with rotary positions",
    ] = "possible",
):
    """Multiply W_q W_k^T and W_v W_o of each head in advance.

    Paper:     Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021 (QK and OV
               circuits). DeepSeek-AI, "DeepSeek-V2", 2024, arXiv 2405.04434 (weight absorption).
    Fidelity:  a reconstruction from summaries; the algebra, with biases and shared heads, is ours.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               2e-6 of the largest one).
    Idea:      n is a token's normalized input, inputs (S, D) those of S tokens. In the scores
               n W_q W_k^T inputs^T  and in the output  p inputs W_v W_o  (p: attention weights)
               two matrices meet directly, so their product can be made in advance.
    Offline:   for query head i of H, whose key/value head of K is j = i // G,  G = H / K
               (W_q,i, W_k,j, W_v,j: the d columns of that head; W_o,i: its d rows):
                   QK_i = W_q,i W_k,j^T    (D, D)       c_i  = b_q,i W_k,j^T
                   OV_i = W_v,j W_o,i      (D, D)       b_o* = b_o + sum_i b_v,j W_o,i
    Online:    p_i = softmax((n QK_i + c_i) inputs^T / sqrt(d))      b_k cancels in the softmax
               out = sum_i (p_i inputs) OV_i + b_o*
               The inputs are cached, as one head that serves as keys and as values.
               pairs=qk: inputs serve as keys, values are cached as usual;
               pairs=ov: keys are cached as usual, inputs serve as values.
    Saves:     half of the cache if K d = D and positions are learned (stories-relu: cache 0.50x,
               but multiply-adds 1.44x, memory 1.27x). No multiply-adds or weights unless d > D/2,
               which means a single head; with rotary positions nothing (stories: multiply-adds
               1.28x, memory 1.20x, cache 1.50x).
               Per token 2 H D^2 + 2 S H D multiply-adds (S: cached tokens) instead of
               2 D (H + K) d + 2 S H d; 2 H D^2 weights instead of 2 D (H + K) d; D cached numbers
               (one pair: D + K d) instead of 2 K d.
    In NumPy:  slower: decoding 0.85x to 1.0x, prompts 0.7x to 0.9x on the shipped models.
    Not for:   W_q W_k^T with rotary positions, since RoPE stands between the two. Techniques that
               need the separate matrices (fuse_projections, slim_attention, shrink).
    Proof:     tests/precompute/test_absorb_products.py; literal version:
               tests/precompute/literal_absorb_products.py
    """

    def change(attn: Attention) -> Attention:
        need(attn.qkv, QKV)
        if type(attn.attend) is AttendUnequalGroups:  # head_prune
            raise NoSuchPart(Attend, found=attn.attend)
        for child in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
            need(child, Linear)
        rotary = type(attn.rope) is not NoRope
        if rotary and pairs in ("qk", "both"):
            raise MinitxError(
                "absorb_products cannot make W_q W_k^T one matrix in this model, whose rotary "
                "positions stand between the two; use pairs=ov."
            )
        return absorb(attn, qk=pairs != "ov" and not rotary, ov=pairs != "qk")

    return swap(lm, Attention, change)


# Online ------------------------------------------------------------------------------------------


@part
class InputQKV(Part):
    """Queries; and instead of keys or values the input that they are made from."""

    q: Part
    k: Part
    v: Part

    def __call__(self, n):
        return self.q(n), self.k(n), self.v(n)

    def kv(self, n):
        """Keys and values only."""
        return self.k(n), self.v(n)


@part
class Input(Part):
    """The normalized input itself."""

    def __call__(self, n):
        return n


@part
class NoValues(Part):
    """Values of width 0: the keys serve as values."""

    def __call__(self, n):
        return n[..., :0]


@part
class KeysAreValues(Part):
    """One head of keys, which are read as values too (pairs=both)."""

    inner: Part

    def store(self, k, v, layer: Layer):
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        k, _ = self.inner.read(layer)  # (..., 1, S, D)
        return k, k


@part
class OneKeyHead(Part):
    """One head of keys for K heads of values, which are cached side by side as one (pairs=qk)."""

    inner: Part
    heads: int  # K, of values

    def store(self, k, v, layer: Layer):
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        k, v = self.inner.read(layer)  # (..., 1, S, D), (..., 1, S, K*d)
        v = split_heads(v[..., 0, :, :], self.heads)  # (..., K, S, d)
        return np.broadcast_to(k, (*v.shape[:-1], k.shape[-1])), v


@part
class SplitThenRotate(Part):
    """RoPE for keys that come side by side as one head: split into heads first (pairs=ov). Only
    used if K > 1, so a single head can only mean keys that are not split yet."""

    rope: Part
    heads: int  # K, of keys

    def __call__(self, x, tokens: Tokens):
        if x.shape[-3] == 1:  # keys; the queries are in H >= K heads already
            x = split_heads(x[..., 0, :, :], self.heads)  # (..., K, T, d)
        return self.rope(x, tokens)


# Offline -----------------------------------------------------------------------------------------


def absorb(attn: Attention, qk: bool, ov: bool) -> Attention:
    """The attention with W_q W_k^T as one matrix per head, or W_v W_o, or both."""
    q, k, v = attn.qkv.q, attn.qkv.k, attn.qkv.v
    K, rope, cache, out = attn.kv_heads, attn.rope, attn.cache, attn.out
    if qk:
        q, k = qk_products(q, k, attn), Input()
    elif K > 1:
        rope = SplitThenRotate(rope, K)
    if not ov:
        cache = OneKeyHead(cache, K)
    elif qk:
        cache = KeysAreValues(cache)
    if ov:
        v, out = NoValues() if qk else Input(), ov_products(v, out, attn)
    # Attention splits keys and values into one head each, of whatever width they have; where there
    # are K heads, the parts above split them.
    return replace(attn, qkv=InputQKV(q, k, v), rope=rope, cache=cache, out=out, kv_heads=1)


def qk_products(q: Linear, k: Linear, attn: Attention) -> Linear:
    """n -> [n QK_1, ..., n QK_H], a matrix (D, H*D), and its bias. b_k is dropped: it adds the
    same to all scores of a query, which the softmax cancels."""
    w_q, b_q = by_head(q, attn.heads)  # (H, D, d), (H, 1, d)
    w_k, _ = by_head(k, attn.kv_heads)
    w_k = w_k.repeat(attn.heads // attn.kv_heads, axis=0).swapaxes(1, 2)  # (H, d, D)
    w = (w_q @ w_k).swapaxes(0, 1).reshape(len(q.w), -1)  # (H, D, D) -> (D, H*D)
    b = None if q.b is None else (b_q @ w_k).reshape(-1).astype(q.w.dtype)
    return Linear(w.astype(q.w.dtype), b)


def ov_products(v: Linear, out: Linear, attn: Attention) -> Linear:
    """[m_1, ..., m_H] -> sum_i m_i OV_i, a matrix (H*D, D), and its bias. b_v goes through W_o
    unchanged, because the attention weights sum to 1."""
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


# Notes:
#
# - With several heads this is a way to see what attention computes, not to compute it faster: a
#   head has 2 D d weights in two matrices (fewer if heads share keys) and D^2 in one.
# - It pays where a small latent is cached instead of n: in latent attention (DeepSeek-V2), and
#   there while decoding, not for a prompt. With a latent of 512 numbers:
#   minitx cost absorb-products latent=512 --config weights/stories/config.json
# - With a vocabulary smaller than D, n QK_i n^T of block 0 could be a table (V, V). Not built here.
# - fold_norms goes first, so the norm's gain is in W_q, W_k and W_v already. Arithmetic is float64,
#   rounded once.
# - Speed: minitx compare -m stories-relu --absorb-products, and with stories; one BLAS thread.
