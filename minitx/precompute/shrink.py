"""Of two matrices in a row, a square block becomes the identity and is kept no more (MatShrink)."""

from dataclasses import replace
from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoRope, Rope
from minitx.shared.ordering import small
from minitx.technique import need, technique, wrap
from minitx.tree import Part, part, table


@technique(level="weights", exact=True, neutral=None, after=("fold_norms",))
def shrink(
    lm, *, choice: Literal["pivoted", "first"] = "pivoted", vo: bool = True, qk: bool = True
):
    """Turn a d x d block of every value head's W_o into the identity, and leave it out.

    Paper: MatShrink, by Nils Graef and others, a draft of May 2026 in the repository of
        "Transformer tricks"; marked there as work in progress.
    Kind: exact in real arithmetic; in float32 as far as the condition number of the block allows.
    Skips or precomputes: per layer and key/value head j the block M of W_o, d x d (vo); and where
        no rotation stands between queries and keys, a block of W_k, r x r, r being the columns of a
        head that are not rotated (qk): all d with learned positions, none with full rotary ones.
    Offline: vo: in group j, W_v,j (D, d) is followed by the slices O_g (d, D) of its G query heads.
        M = d columns p of the first slice; W_v,j* = W_v,j M, b_v,j* = b_v,j M, O_g* = M^-1 O_g. The
        first slice is then the identity in the columns p, and only the rest (d, D - d) is kept.
        qk: per key head, M = r rows p of W_k,j (D, r); W_k,j* = W_k,j M^-1, b_k,j* = b_k,j M^-1,
        and in every query head of the group W_q* = W_q M^T, b_q* = b_q M^T: q k^T stays as it was.
        The paper has the identity in W_q; it is in W_k here, of which each group has one.
        choice=pivoted takes columns by greedy pivoting: the longest, then the longest of what the
        chosen ones do not span, and so on; choice=first the first d as the paper's naive variant
        does. cond in the tree is the largest condition number of a layer's blocks M, which says how
        many digits may get lost. In float64 and rounded once.
    Online: u_j = softmax(..) v_j* (T, d);  out[p_j] += u_j;  out[other] += u_j O_j*[other];  the
        group's further heads as before.  k_j = x[p_j] + x[other] W_k,j*[other] + b_k,j*.
    Saves: K d^2 weights and multiply-adds a token and layer (vo), and K r^2 (qk): d / D of one
        matrix D x (K d). An order of columns, K D small numbers, is kept for each. NumPy loses time
        by it: each head has columns of its own, so that one product becomes one for every head with
        a gathering of columns behind it.
    Neutral: nothing to set.
    Not for: q and k columns that are rotated (a change of basis would not commute with the
        rotation: one complex number for each pair is all that does), a W_o or W_k that cannot be
        inverted in the chosen block (pruned weights), heads wider than the stream. Zeros of a
        pruned W_v and W_o are filled again by the change of basis. The paper also does it to the
        pairs of latent attention (MLA), which minitx does not have.
    """
    if not (vo or qk):
        raise MinitxError("shrink has nothing to do with vo=False and qk=False; leave one of them.")
    done = []

    def change(attn: Part, number: int) -> Part:
        need(attn, Attention)
        need(attn.qkv, QKV)
        need(attn.rope, Rope, NoRope)
        need(attn.cache, Cache)
        need(attn.attend, Attend)
        for linear in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
            need(linear, Linear)
        if qk and free_columns(attn):
            attn = shrink_keys(attn, choice, number)
            done.append(number)
        if vo:
            attn = shrink_output(attn, choice, number)
            done.append(number)
        return attn

    lm = wrap(lm, "attn", change)
    if not done:
        raise MinitxError(
            "shrink with vo=False needs columns of queries and keys that are not rotated, and this "
            "model rotates all of them; use vo=True."
        )
    return lm


# Offline -----------------------------------------------------------------------------------------

WORST = 1e6  # condition number beyond which float32 keeps no digit worth having


def free_columns(attn: Attention) -> int:
    """r, the last columns of each head that no rotation touches."""
    d = attn.qkv.k.w.shape[1] // attn.kv_heads
    return d if type(attn.rope) is NoRope else d - attn.rope.cos.shape[-1]


def shrink_output(attn: Attention, choice: str, number: int) -> Attention:
    w_v, w_o = attn.qkv.v.w.astype(np.float64), attn.out.w.astype(np.float64)
    D, K, G = w_o.shape[1], attn.kv_heads, attn.heads // attn.kv_heads
    d = w_v.shape[1] // K
    if d > D:
        raise MinitxError(
            f"shrink needs heads no wider than the stream; they are {d} and {D} wide."
        )
    w_v = w_v.reshape(-1, K, d)  # (D, K, d)
    b_v = None if attn.qkv.v.b is None else attn.qkv.v.b.astype(np.float64).reshape(K, d)
    w_o = w_o.reshape(K, G, d, D)
    orders = np.stack([order_of(w_o[j, 0], choice) for j in range(K)])  # (K, D)
    blocks = np.stack([w_o[j, 0][:, orders[j, :d]] for j in range(K)])  # (K, d, d)
    cond = worst(blocks, "W_o", number, choice)
    w_v = np.einsum("ijd,jde->ije", w_v, blocks)
    b_v = None if b_v is None else np.einsum("jd,jde->je", b_v, blocks)
    w_o = np.linalg.solve(blocks[:, None], w_o)
    rest = np.stack([w_o[j, 0][:, orders[j, d:]] for j in range(K)])  # (K, d, D - d)
    # Where in head j's [u, u rest] (all heads one after another) each column of the result stands.
    where = np.argsort(orders, axis=1) + D * np.arange(K)[:, None]  # (K, D)
    dtype = attn.out.w.dtype
    further = Linear(w_o[:, 1:].reshape(-1, D).astype(dtype)) if G > 1 else None
    bias = attn.out.b
    out = ShrunkOutput(rest.astype(dtype), small(where), further, bias, G, cond)
    v = Linear(
        w_v.reshape(-1, K * d).astype(dtype), None if b_v is None else b_v.ravel().astype(dtype)
    )
    return replace(attn, qkv=replace(attn.qkv, v=v), out=out)


def shrink_keys(attn: Attention, choice: str, number: int) -> Attention:
    r, K, H = free_columns(attn), attn.kv_heads, attn.heads
    q, k = attn.qkv.q, attn.qkv.k
    D, dtype = len(k.w), k.w.dtype
    if r > D:
        raise MinitxError(f"shrink needs heads no wider than the stream; {r} columns read {D}.")
    w_k = k.w.astype(np.float64).reshape(D, K, -1)  # (D, K, d), the last r columns of d are free
    d = w_k.shape[-1]
    free = w_k[:, :, d - r :].transpose(1, 0, 2)  # (K, D, r)
    orders = np.stack([order_of(free[j].T, choice) for j in range(K)])  # (K, D)
    blocks = np.stack([free[j][orders[j, :r]] for j in range(K)])  # (K, r, r)
    cond = worst(blocks, "W_k", number, choice)
    rest = np.stack([free[j][orders[j, r:]] for j in range(K)])  # (K, D - r, r)
    rest = divided(rest, blocks)
    bias = None
    if k.b is not None:
        bias = k.b.astype(np.float64).reshape(K, 1, d)
        bias = np.concatenate([bias[..., : d - r], divided(bias[..., d - r :], blocks)], axis=-1)
        bias = bias.ravel().astype(dtype)
    turned = Linear(k.w.reshape(D, K, d)[:, :, : d - r].reshape(D, -1)) if r < d else None
    keys = ShrunkKeys(turned, rest.astype(dtype), small(orders), bias, cond)

    def times(a):  # W_q or b_q (..., H d), its free columns times M^T of their group
        a = a.astype(np.float64).reshape(*a.shape[:-1], K, H // K, d)
        new = np.einsum("...jgr,jsr->...jgs", a[..., d - r :], blocks)
        return np.concatenate([a[..., : d - r], new], axis=-1).reshape(*a.shape[:-3], H * d)

    queries = Linear(*(None if a is None else times(a).astype(dtype) for a in (q.w, q.b)))
    return replace(attn, qkv=replace(attn.qkv, q=queries, k=keys))


def order_of(matrix, choice: str) -> np.ndarray:
    """An order (n,) of the columns of the matrix (r, n), n >= r: first the r that make the block
    that is to be inverted, then the others as they come.

    Greedy: of the columns the longest, which is then projected out of all of them (Gram-Schmidt
    with column pivoting, as in a QR decomposition that reveals the rank).
    """
    r, n = matrix.shape
    chosen = list(range(r))
    if choice == "pivoted":
        chosen, left = [], matrix.copy()
        for _ in range(r):
            lengths = np.einsum("rn,rn->n", left, left)
            lengths[chosen] = -1  # rounding may leave more of them than of columns like zero
            best = int(lengths.argmax())
            chosen.append(best)
            direction = left[:, best] / max(np.linalg.norm(left[:, best]), 1e-300)
            left = left - np.outer(direction, direction @ left)
    return np.concatenate([chosen, np.setdiff1d(np.arange(n), chosen)]).astype(np.int64)


def worst(blocks, name: str, number: int, choice: str) -> float:
    """The largest condition number of blocks (K, r, r); MinitxError if it is too large."""
    found = np.linalg.cond(blocks)
    cond = float(np.where(np.isfinite(found), found, np.inf).max())
    if not cond <= WORST:
        better = ", or use choice=pivoted" if choice == "first" else ""
        raise MinitxError(
            f"shrink cannot invert a block of {name} of block {number}: its condition number is "
            f"{cond:.0e}, more than {WORST:.0e}; leave shrink out for these weights{better}."
        )
    return cond


def divided(a, blocks):
    """``a M^-1`` for a (K, n, r) and M (K, r, r)."""
    return np.linalg.solve(blocks.swapaxes(1, 2), a.swapaxes(1, 2)).swapaxes(1, 2)


# Online ------------------------------------------------------------------------------------------


@part
class ShrunkOutput(Part):
    """The output projection, of which the first head of each group adds its numbers as they are to
    d columns of the result, and their product with ``rest`` to the others."""

    rest: np.ndarray  # (K, d, D - d)
    where: np.ndarray = table()  # (K, D) where each column stands in [u, u rest] of all heads
    further: Part | None = None  # the other heads of the groups, (H - K) d -> D
    b: np.ndarray | None = None  # (D,)
    group: int = 1  # G
    cond: float = 1.0  # the largest condition number of an inverted block

    def __call__(self, x):
        K, d, _ = self.rest.shape
        heads = x.reshape(*x.shape[:-1], K, self.group, d)
        u = heads[..., 0, :]  # (..., T, K, d)
        both = np.concatenate([u, per_head(u, self.rest)], axis=-1)  # (..., T, K, D)
        y = both.reshape(*x.shape[:-1], -1).take(self.where, axis=-1).sum(-2)  # (..., T, D)
        if self.further is not None:
            others = heads[..., 1:, :]
            y += self.further(others.reshape(*x.shape[:-1], -1))
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]


@part
class ShrunkKeys(Part):
    """The key projection, whose columns behind the rotated ones are r numbers of x as they are, and
    the product of the others with ``rest``, for each head."""

    turned: Part | None  # the columns that are rotated, D -> K (d - r)
    rest: np.ndarray  # (K, D - r, r)
    order: np.ndarray = table()  # (K, D) of the numbers of x
    b: np.ndarray | None = None  # (K d,)
    cond: float = 1.0  # the largest condition number of an inverted block

    def __call__(self, x):
        K, _, r = self.rest.shape
        x_j = x.take(self.order, axis=-1)  # (..., T, K, D)
        k = x_j[..., :r] + per_head(x_j[..., r:], self.rest)  # (..., T, K, r)
        if self.turned is not None:
            turned = self.turned(x)
            k = np.concatenate([turned.reshape(*x.shape[:-1], K, -1), k], axis=-1)
        k = k.reshape(*x.shape[:-1], -1)  # (..., T, K d)
        return k if self.b is None else k + self.b

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self(x)[..., columns]


def per_head(x, w):
    """x (..., T, K, n) times w (K, n, m), head by head -> (..., T, K, m)."""
    ledger.product(x, w)
    return (x.swapaxes(-3, -2) @ w).swapaxes(-3, -2)
