"""The cache holds keys alone, as they are before rotation, and values are made from them."""

from dataclasses import replace

import numpy as np

from minitx import fast, ledger, ops
from minitx.errors import MinitxError
from minitx.model import QKV, Attend, Attention, Linear, NoRope, split_heads
from minitx.state import Layer
from minitx.technique import NoSuchPart, need, technique, wrap
from minitx.tree import Part, children, part


@technique(level="attention", exact=True, neutral=None)
def slim_attention(lm, *, max_condition: float = 1e4):
    """Remember keys alone; where a value is needed, make it from the key of the same token.

    Paper: Nils Graef, Andrew Wasielewski and Matthew Clapp, 2025, "Slim attention: cut your context
        memory in half without loss", arXiv 2503.05840; with its appendix on biases.
    Kind: exact in real arithmetic. In float32 the values lose digits as cond(W_K) grows: they are
        off by some 4e-7 of their size at 1e2, 2e-5 at 1e4, 1e-3 at 1e6, where W_V gives 2e-7.
    Skips or precomputes: the values in the cache, and W_V.
    Offline: in float64, W_KV = W_K^-1 W_V, or the solution of least norm (the right inverse) where
        keys are wider than the stream: H d > D. cond(W_K) stands in the tree, layer by layer.
        b_V - b_K W_KV goes through W_O into the output's bias, since the weights of a softmax sum
        to 1; b_K stays in the keys, or is dropped where nothing is rotated (it adds the same to all
        scores of a query). W_Q and W_K become one product, and W_V is left out.
    Online: K = n W_K, cached as it is: one head of width H d. q' = rope(q) at its own position,
        K' = rope(K) at theirs, all of them, in each step; p_i = softmax(q'_i K'_i^T / sqrt(d)).
        Few new tokens on many keys: u_i = p_i K (all H d columns), o_i = u_i W_KV,i. Many (a
        prompt): V_i = K W_KV,i for all keys, o_i = p_i V_i. Whichever takes fewer multiply-adds,
        which was chosen here; the paper has one for prompts and one for single tokens.
    Saves: H d of 2 H d numbers of cache for each token and layer, and as much of what a step reads
        of it, if the keys stay in the CPU's cache between their two products (as the ledger counts
        it). No multiply-add: with E = H d, a token on S keys takes (H + 1) S E in the place of
        2 S E, and E^2 for W_KV in the place of D E for W_V. The same memory for weights (E = D). In
        NumPy no time is gained: about none is lost with learned positions, and with rotary ones the
        more the longer the text is, as all keys are rotated anew for each token.
    Neutral: nothing to set.
    Not for: grouped keys, or H d < D: they hold less than the stream. A W_K whose condition number
        is above max_condition, which was set here so that float32 keeps at least four digits of a
        value. Trained models can be far beyond: the paper's authors found a median of 1e7 in a
        large Whisper. Weights that are kept in another form than a matrix (level matrices), and
        attention that chooses its keys (level scores). With a cache in few bits, what keys are off
        by comes back in the values multiplied, as from all inexact keys.
    """

    def change(attn: Part, index: int) -> Part:
        need(attn, Attention)
        return slim(attn, index, max_condition)

    return wrap(lm, "attn", change)


# Offline -----------------------------------------------------------------------------------------


def slim(attn: Attention, number: int, max_condition: float) -> Attention:
    """The attention of layer ``number`` with keys alone in its cache."""
    if type(attn.attend) is not Attend:
        raise NoSuchPart(Attend)
    need(attn.out, Linear)
    w, b = projections(attn)  # (D, 3*E), (3*E,)
    E = w.shape[1] // 3  # H * d
    (_, w_k, w_v), (_, b_k, b_v) = np.split(w, 3, axis=1), np.split(b, 3)
    w_kv, condition = solve(w_k, w_v)
    if not condition <= max_condition:
        raise MinitxError(
            f"slim_attention cannot make values from the keys of layer {number}: the condition "
            f"number of its W_K is {condition:.2g}, above max_condition={max_condition:g}, and "
            "values would be off by that many times the rounding of a number; leave it out, or "
            "raise max_condition."
        )
    if type(attn.rope) is NoRope:
        b_k = np.zeros_like(b_k)
        b[E : 2 * E] = 0
    dtype = attn.out.w.dtype
    b_out = (b_v - b_k @ w_kv) @ attn.out.w.astype(np.float64)
    if attn.out.b is not None:
        b_out += attn.out.b
    bias = b[: 2 * E].astype(dtype) if b[: 2 * E].any() else None
    return replace(
        attn,
        qkv=QueriesAndKeys(Linear(np.ascontiguousarray(w[:, : 2 * E], dtype), bias), E),
        rope=NoRope(),  # what is cached is not rotated
        attend=AttendKeys(
            attn.rope,
            np.ascontiguousarray(split_heads(w_kv, attn.heads), dtype),
            attn.attend.scale,
            float(f"{condition:.3g}"),
        ),
        out=replace(attn.out, b=b_out.astype(dtype) if b_out.any() else None),
        kv_heads=1,  # one head of keys H*d wide, since each head's values are made from all of it
    )


def projections(attn: Attention) -> tuple[np.ndarray, np.ndarray]:
    """[W_Q, W_K, W_V] (D, 3*H*d) and their biases (3*H*d,) in float64, whether it is three matrices
    side by side or one; refused if it is anything else."""
    maps = [child for _, child in children(attn.qkv)]
    for child in maps:
        if type(child) is not Linear and type(attn.qkv) is QKV:
            need(child, Linear)
    if not maps or any(type(child) is not Linear for child in maps):
        raise NoSuchPart(QKV, found=attn.qkv)
    D, E = len(maps[0].w), len(attn.out.w)
    if attn.kv_heads != attn.heads:
        raise MinitxError(
            "slim_attention needs keys for each query head, to make the values from; this model "
            f"has {attn.kv_heads} for {attn.heads} query heads, which hold too little of the "
            f"stream but make the cache {attn.heads // attn.kv_heads} times smaller already: "
            "leave slim_attention out."
        )
    if E < D:
        raise MinitxError(
            f"slim_attention needs keys at least as wide as the stream, to make the values from; "
            f"this model's are {E} wide and its stream {D}: leave slim_attention out."
        )
    w = np.concatenate([m.w for m in maps], axis=1).astype(np.float64)
    b = [np.zeros(m.w.shape[1]) if m.b is None else m.b for m in maps]
    return w, np.concatenate(b).astype(np.float64)


def solve(w_k, w_v) -> tuple[np.ndarray, float]:
    """W_KV (E, E) with W_K W_KV = W_V, that of least norm if there are several (W_K is (D, E) with
    E >= D); and the condition number of W_K."""
    try:
        w_kv, _, _, singular = np.linalg.lstsq(w_k, w_v, rcond=0)
    except np.linalg.LinAlgError:  # there are numbers in it that are not finite
        return w_v, float("nan")
    return w_kv, float(singular[0] / singular[-1]) if singular[-1] else float("inf")


# Online ------------------------------------------------------------------------------------------


@part
class QueriesAndKeys(Part):
    """Queries and keys in one product, split by columns, and no values (values of width 0)."""

    both: Part
    q_width: int  # H * d

    def __call__(self, x):
        y = self.both(x)  # (..., T, 2*H*d)
        return y[..., : self.q_width], y[..., self.q_width :], x[..., :0]

    def q(self, x):
        """Queries alone, from their columns."""
        return self.both.outputs(x, slice(self.q_width))

    def kv(self, x):
        """Keys alone, from their columns."""
        return self.both.outputs(x, slice(self.q_width, None)), x[..., :0]


@part
class AttendKeys(Part):
    """Softmax attention of the queries over all keys so far, and over values made from them."""

    rope: Part
    w_kv: np.ndarray  # (H, H*d, d)
    scale: float  # 1 / sqrt(d)
    condition: float  # of W_K

    def __call__(self, q, raw, v, layer: Layer):
        """q (..., H, T, d), raw keys (..., 1, S, H*d), v of width 0 -> (..., H, T, d)"""
        H, E, _ = self.w_kv.shape
        T, S = q.shape[-2], raw.shape[-2]
        q = self.rope(q, layer.tokens)
        k = split_heads(raw[..., 0, :, :], H)  # (..., H, S, d)
        k = self.rope(k, layer.row_tokens())
        mask = layer.mask()
        rebuilt, in_order = S * E * E + T * S * E, T * E * E + H * T * S * E
        if T <= fast.ROWS and in_order < rebuilt:
            return self.mixed_keys(q, k, raw, fast.newest_mask(T) if mask is None else mask)
        return ops.attention(q, k, self.values(raw), self.scale, mask)

    def mixed_keys(self, q, k, raw, mask):
        """First the mean of the raw keys, then the values: u_i = p_i K, u_i W_KV,i."""
        p = fast.attention_weights(q, k, self.scale, mask)  # (..., H, T, S)
        *lead, H, T, S = p.shape
        # the rotated keys are no cache, but made of it a moment ago
        work = p.size * (q.shape[-1] + raw.shape[-1])
        ledger.count(work, cache_bytes=raw.nbytes)
        u = fast.weighted_sum(p.reshape(*lead, 1, H * T, S), raw)  # all heads in one product
        return self.values(u.reshape(*lead, H, T, raw.shape[-1]))

    def values(self, x):
        """x W_KV,i for each head i: x (..., H or 1, n, H*d) -> (..., H, n, d)"""
        values = x @ self.w_kv
        ledger.count(values.size * x.shape[-1], self.w_kv.nbytes)
        return values
