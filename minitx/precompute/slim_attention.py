"""Slim attention: a cache of keys, from which the values are computed.

The card and the option, the parts that run (online), W_kv and the biases (offline), notes.
"""

from dataclasses import replace
from typing import Annotated

import numpy as np

from minitx import fast, ledger, ops
from minitx.errors import MinitxError
from minitx.model import QKV, Attend, Attention, Linear, NoRope, split_heads
from minitx.state import Layer
from minitx.technique import NoSuchPart, at_least, need, technique, wrap
from minitx.tree import Part, children, part


@technique(level="attention", exact=True, neutral=None)
def slim_attention(
    lm,
    *,
    max_condition: Annotated[
        float, "refuse the model if a W_k has a larger condition number", at_least(1)
    ] = 1e4,
):
    """Cache keys only and compute each value from the key of the same token.

    Paper:     Graef, Wasielewski and Clapp, "Slim attention: cut your context memory in half
               without loss", 2025, arXiv 2503.05840, with its appendix on biases.
    Fidelity:  the paper's text. Choosing the order of the two products by their multiply-adds is
               ours; the paper has one for prompts and one for single tokens.
    Kind:      exact in real arithmetic; float32 rounds differently, more the worse W_k is
               conditioned (measured: values are off by 4e-7 at a condition number of 1e2, 2e-5 at
               1e4, 1e-3 at 1e6; values computed with W_v itself by 2e-7).
    Idea:      A square W_k can be inverted: the keys  n W_k  of a normalized input n give n back,
               and so the values  n W_v = keys W_k^-1 W_v.
    Offline:   W_kv = W_k^-1 W_v       (H d, H d); if H d > D, the solution of least norm
               b_o* = b_o + (b_v - b_k W_kv) W_o
               for H heads of width d, hidden states of width D
    Online:    keys = n W_k + b_k      (S, H d) for S tokens, cached before rotation (no b_k with
                                       learned positions); keys_i, W_kv,i: the d columns of head i
               p_i = softmax(rope(q_i) rope(keys_i)^T / sqrt(d))      rotates all keys in each step
               o_i = (p_i keys) W_kv,i   or   p_i (keys W_kv,i),   whichever is less work
               out = [o_1, ..., o_H] W_o + b_o*
    Saves:     half of the KV cache: H d numbers per token instead of 2 H d. It costs multiply-adds:
               a token takes (H + 1) S H d instead of 2 S H d, and (H d)^2 for W_kv instead of D H d
               for W_v.
    In NumPy:  no faster: decoding 1.0x with learned positions (stories-relu, which the default
               refuses: max_condition=1e5), 0.8x with RoPE (stories-parallel); prompts 1.0x.
    Not for:   shared keys (K < H) or H d < D, which hold less than the input; an ill-conditioned
               W_k; weights that are no plain matrices; attention that selects its keys.
    Proof:     tests/precompute/test_slim_attention.py; literal version:
               tests/precompute/literal_slim_attention.py
    """

    def change(attn: Part, index: int) -> Part:
        need(attn, Attention)
        return slim(attn, index, max_condition)

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class QueriesAndKeys(Part):
    """Queries and keys from one product, split by columns; the values have width 0."""

    both: Part
    q_width: int  # H * d

    def __call__(self, x):
        y = self.both(x)  # (..., T, 2*H*d)
        return y[..., : self.q_width], y[..., self.q_width :], x[..., :0]

    def q(self, x):
        """Queries only, from their columns."""
        return self.both.outputs(x, slice(self.q_width))

    def kv(self, x):
        """Keys only, from their columns."""
        return self.both.outputs(x, slice(self.q_width, None)), x[..., :0]


@part
class AttendKeys(Part):
    """Softmax attention of the queries over the cached keys and over values computed from them."""

    rope: Part
    w_kv: np.ndarray  # (H, H*d, d)
    scale: float  # 1 / sqrt(d)
    condition: float  # of W_k

    def __call__(self, q, raw, v, layer: Layer):
        """q (..., H, T, d), raw keys (..., 1, S, H*d), v of width 0 -> (..., H, T, d)"""
        H, inner, _ = self.w_kv.shape  # inner = H * d
        T, S = q.shape[-2], raw.shape[-2]
        q = self.rope(q, layer.tokens)
        k = split_heads(raw[..., 0, :, :], H)  # (..., H, S, d)
        k = self.rope(k, layer.row_tokens())
        mask = layer.mask()
        values_first = S * inner * inner + T * S * inner  # keys W_kv, then p_i times these values
        keys_first = H * T * S * inner + T * inner * inner  # p_i keys, then times W_kv
        if T <= fast.ROWS and keys_first < values_first:
            # No mask means causal attention of the T newest tokens. ops.attention makes that mask
            # itself, block by block; sum_keys_first is one block and has to be given it.
            return self.sum_keys_first(q, k, raw, fast.newest_mask(T) if mask is None else mask)
        return ops.attention(q, k, self.values(raw), self.scale, mask)

    def sum_keys_first(self, q, k, raw, mask):
        """u_i = p_i keys, the weighted sum of the raw keys; then u_i W_kv,i."""
        p = fast.unnormalized_weights(q, k, self.scale, mask)  # (..., H, T, S)
        *lead, H, T, S = p.shape
        work = p.size * (q.shape[-1] + raw.shape[-1])
        ledger.count(work, cache_bytes=raw.nbytes)  # k is made from raw, not read from the cache
        u = fast.weighted_sum(p.reshape(*lead, 1, H * T, S), raw)  # all heads in one product
        return self.values(u.reshape(*lead, H, T, raw.shape[-1]))

    def values(self, x):
        """x W_kv,i for each head i: x (..., H or 1, n, H*d) -> (..., H, n, d)"""
        values = x @ self.w_kv
        ledger.count(values.size * x.shape[-1], self.w_kv.nbytes)
        return values


# Offline -----------------------------------------------------------------------------------------


def slim(attn: Attention, number: int, max_condition: float) -> Attention:
    """The attention of layer ``number`` with only keys in its cache."""
    if type(attn.attend) is not Attend:
        raise NoSuchPart(Attend)
    need(attn.out, Linear)
    w, b = projections(attn)  # (D, 3*inner), (3*inner,)
    inner = w.shape[1] // 3  # H * d
    (_, w_k, w_v), (_, b_k, b_v) = np.split(w, 3, axis=1), np.split(b, 3)
    w_kv, condition = solve(w_k, w_v)
    if not condition <= max_condition:
        raise MinitxError(
            f"slim_attention cannot compute values from the keys of layer {number}: the condition "
            f"number of its W_k is {condition:.2g}, expected at most max_condition="
            f"{max_condition:g}, since it multiplies rounding errors; leave slim_attention out, or "
            "raise max_condition."
        )
    if type(attn.rope) is NoRope:
        b_k = np.zeros_like(b_k)  # dropped without RoPE: see Notes
        b[inner : 2 * inner] = 0
    dtype = attn.out.w.dtype
    b_out = (b_v - b_k @ w_kv) @ attn.out.w.astype(np.float64)
    if attn.out.b is not None:
        b_out += attn.out.b
    bias = b[: 2 * inner].astype(dtype) if b[: 2 * inner].any() else None
    return replace(
        attn,
        qkv=QueriesAndKeys(Linear(np.ascontiguousarray(w[:, : 2 * inner], dtype), bias), inner),
        rope=NoRope(),  # keys are cached before rotation
        attend=AttendKeys(
            attn.rope,
            np.ascontiguousarray(split_heads(w_kv, attn.heads), dtype),
            attn.attend.scale,
            float(f"{condition:.3g}"),  # for the tree, which shows it
        ),
        out=replace(attn.out, b=b_out.astype(dtype) if b_out.any() else None),
        kv_heads=1,  # one head of keys, H*d wide: the values of each head come from all of it
    )


def projections(attn: Attention) -> tuple[np.ndarray, np.ndarray]:
    """[W_q, W_k, W_v] (D, 3*H*d) and their biases (3*H*d,) in float64. QKV has three Linears, the
    FusedQKV of fuse_projections has one; anything else is refused."""
    maps = [child for _, child in children(attn.qkv)]
    for child in maps:
        if type(child) is not Linear and type(attn.qkv) is QKV:
            need(child, Linear)
    if not maps or any(type(child) is not Linear for child in maps):
        raise NoSuchPart(QKV, found=attn.qkv)
    D, inner = len(maps[0].w), len(attn.out.w)
    kv_width = inner // attn.heads * attn.kv_heads
    if sum(m.w.shape[1] for m in maps) != inner + 2 * kv_width:  # one was removed (InputIsQ)
        raise NoSuchPart(QKV, found=attn.qkv)
    if attn.kv_heads != attn.heads:
        raise MinitxError(
            "slim_attention needs one key head per query head, from which to compute the values; "
            f"this model has {attn.kv_heads} for {attn.heads} query heads, so its cache is "
            f"{attn.heads // attn.kv_heads} times smaller already: leave slim_attention out."
        )
    if inner < D:
        raise MinitxError(
            "slim_attention needs keys at least as wide as the hidden state, from which to compute "
            f"the values; this model's keys are {inner} wide and its hidden state {D}: leave "
            "slim_attention out."
        )
    w = np.concatenate([m.w for m in maps], axis=1).astype(np.float64)
    b = [np.zeros(m.w.shape[1]) if m.b is None else m.b for m in maps]
    return w, np.concatenate(b).astype(np.float64)


def solve(w_k, w_v) -> tuple[np.ndarray, float]:
    """W_kv (H*d, H*d) with W_k W_kv = W_v, the one of least norm if there are several (H*d > D);
    and the condition number of W_k."""
    try:
        w_kv, _, _, singular = np.linalg.lstsq(w_k, w_v, rcond=0)
    except np.linalg.LinAlgError:  # NaN or Inf in it
        return w_v, float("nan")
    return w_kv, float(singular[0] / singular[-1]) if singular[-1] else float("inf")


# Notes:
#
# - The errors of values on the card are checked by
#   test_slim_attention_value_errors_grow_with_the_condition_number (d = D = 128).
# - max_condition=1e4 is our choice: float32 then keeps at least four digits of a value. Trained
#   models may be far beyond: the authors found a median of 1e7 in a large Whisper. The condition
#   number of each W_k is in the tree.
# - b_k stays in the keys. Without rotation it is dropped instead: it adds the same to all scores of
#   a query, which the softmax cancels. b_v and b_k W_kv go through W_o into its bias, because
#   attention weights sum to 1.
# - W_q and W_k are one matrix here (QueriesAndKeys), also if fuse_projections has made them one.
# - The ledger (which counts multiply-adds and bytes read) counts a read of the cache once if the
#   keys serve both products: they stay in the CPU's caches between them.
# - With quantize_cache the rounding errors of the keys return in the values, multiplied by up to
#   the condition number.
# - Speed: minitx compare -m stories-relu --slim-attention max_condition=1e5; with stories-parallel;
#   one BLAS thread. The longer the text, the slower with RoPE, which rotates all keys again for
#   each token. For stories-relu the command prints "approximate", since rounding flips an argmax
#   here and there (KL divergence 6e-9 nats per token).
