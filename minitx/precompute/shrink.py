"""MatShrink: of two matrices multiplied one after the other, a square block of one becomes the
identity and is not stored.

The card and the options, the parts that run (online), the change of basis (offline), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoRope, Rope
from minitx.shared.ordering import small
from minitx.technique import need, technique, wrap
from minitx.tree import Part, part, table


@technique(level="weights", exact=True, neutral=None, after=("fold_norms",))
def shrink(
    lm,
    *,
    pairs: Annotated[
        Literal["possible", "vo", "qk"],
        "matrices to shrink: values and output, or queries and keys; possible: vo, and qk where "
        "not all columns are rotated",
    ] = "possible",
    columns: Annotated[
        Literal["pivoted", "first"],
        "which become the identity: those of greedy pivoting, or the first (the naive variant)",
    ] = "pivoted",
):
    """Turn a d x d block of each value head's W_o into the identity and leave it out.

    Paper:     MatShrink, by Graef and others, a draft of May 2026 in the repository of "Transformer
               tricks", marked there as work in progress.
    Fidelity:  the paper's text; it puts the identity into W_q, here it is in W_k, which a group of
               query heads shares.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               2e-6 of the largest one), more the worse the blocks are conditioned.
    Idea:      W_v W_o = (W_v block) (block^-1 W_o) for any invertible block. If it consists of d
               columns of W_o, these become the identity: nothing to store or to multiply.
    Offline:   vo: key/value head j of K has W_v,j (D, d), its query heads W_o,1 .. W_o,G (d, D);
               p are d columns of W_o,1, rest its others:
                   block  = W_o,1[:, p]
                   W_v,j* = W_v,j block,        W_o,g* = block^-1 W_o,g   for g = 1 .. G
               qk: here W_k,j (D, r) and W_q,g (D, r) are the columns that are not rotated (r = d
               with learned positions); p are r rows of W_k,j, rest its others:
                   block  = W_k,j[p]
                   W_k,j* = W_k,j block^-1,     W_q,g* = W_q,g block^T    for g = 1 .. G
               biases of v, k and q alike; b_o stays
    Online:    u_g: attention output of query head g
               out[p] += u_1;  out[rest] += u_1 W_o,1*[:, rest]
               the other heads as before: out += u_g W_o,g*
               k_j = x[p] + x[rest] W_k,j*[rest] + b_k,j*      x: the normalized input
    Saves:     K d^2 weights and multiply-adds per token and layer (vo), K r^2 (qk).
    In NumPy:  slower: decoding and prompts 0.85x to 0.95x on the shipped models. Each head has its
               own columns, so one product becomes one per head, with a gather after it.
    Not for:   columns that are rotated, since a change of basis does not commute with RoPE. Blocks
               that cannot be inverted (pruned weights). Heads wider than D.
    Proof:     tests/precompute/test_shrink.py; literal version: tests/precompute/literal_shrink.py
    """
    changed = False

    def change(attn: Part, number: int) -> Part:
        nonlocal changed
        check_parts(attn)
        if pairs != "vo" and unrotated_columns(attn):
            attn = shrink_keys(attn, columns, number)
            changed = True
        if pairs != "qk":
            attn = shrink_output(attn, columns, number)
            changed = True
        return attn

    lm = wrap(lm, "attn", change)
    if not changed:
        raise MinitxError(
            "shrink: pairs=qk needs columns of queries and keys that are not rotated, and this "
            "model rotates all of them; use pairs=vo."
        )
    return lm


# Online ------------------------------------------------------------------------------------------


@part
class ShrunkOutput(Part):
    """The output projection. The first query head u of each group is added to d output columns as
    it is; its product with ``rest`` goes to the other columns. ``gather[j, c]``: where the
    contribution of key/value head j to output column c is in the concatenated [u, u rest] of all
    heads."""

    rest: np.ndarray  # (K, d, D - d)
    gather: np.ndarray = table()  # (K, D)
    other_heads: Part | None = None  # the projection of the other query heads, (H - K) d -> D
    b: np.ndarray | None = None  # (D,)
    group: int = 1  # G
    condition: float = 1.0  # the largest condition number of an inverted block

    def __call__(self, x):
        K, d, _ = self.rest.shape
        heads = x.reshape(*x.shape[:-1], K, self.group, d)
        u = heads[..., 0, :]  # (..., T, K, d)
        both = np.concatenate([u, per_head(u, self.rest)], axis=-1)  # (..., T, K, D)
        y = both.reshape(*x.shape[:-1], -1).take(self.gather, axis=-1).sum(-2)  # (..., T, D)
        if self.other_heads is not None:
            others = heads[..., 1:, :]
            y += self.other_heads(others.reshape(*x.shape[:-1], -1))
        return y if self.b is None else y + self.b

    def outputs(self, x, columns):
        """Only these output columns: a slice, or an array of indices."""
        return self(x)[..., columns]


@part
class ShrunkKeys(Part):
    """The key projection. Per head, the columns that are not rotated are r numbers of x as they
    are, plus the product of the other numbers of x with ``rest``."""

    rotated: Part | None  # the projection to the rotated columns, D -> K (d - r)
    rest: np.ndarray  # (K, D - r, r)
    order: np.ndarray = table()  # (K, D): the numbers of x, those of the identity first
    b: np.ndarray | None = None  # (K d,)
    condition: float = 1.0  # the largest condition number of an inverted block

    def __call__(self, x):
        K, _, r = self.rest.shape
        x_j = x.take(self.order, axis=-1)  # (..., T, K, D)
        k = x_j[..., :r] + per_head(x_j[..., r:], self.rest)  # (..., T, K, r)
        if self.rotated is not None:
            rotated = self.rotated(x)
            k = np.concatenate([rotated.reshape(*x.shape[:-1], K, -1), k], axis=-1)
        k = k.reshape(*x.shape[:-1], -1)  # (..., T, K d)
        return k if self.b is None else k + self.b

    def outputs(self, x, columns):
        """Only these output columns: a slice, or an array of indices."""
        return self(x)[..., columns]


def per_head(x, w):
    """x (..., T, K, n) times w (K, n, m), head by head -> (..., T, K, m)."""
    ledger.product(x, w)
    return (x.swapaxes(-3, -2) @ w).swapaxes(-3, -2)


# Offline -----------------------------------------------------------------------------------------
# In float64, rounded once.

LARGEST_CONDITION = 1e6  # our choice: beyond it float32 keeps three digits or fewer


def shrink_output(attn: Attention, columns: str, number: int) -> Attention:
    """The attention of block ``number`` with W_v and W_o in the new basis."""
    w_v, w_o = attn.qkv.v.w.astype(np.float64), attn.out.w.astype(np.float64)
    D, K, G = w_o.shape[1], attn.kv_heads, attn.heads // attn.kv_heads
    d = w_v.shape[1] // K
    if d > D:
        raise MinitxError(
            f"shrink needs heads no wider than the hidden state; they are {d} wide and it is {D}."
        )
    w_v = w_v.reshape(-1, K, d)  # (D, K, d)
    b_v = None if attn.qkv.v.b is None else attn.qkv.v.b.astype(np.float64).reshape(K, d)
    w_o = w_o.reshape(K, G, d, D)
    orders = np.stack([column_order(w_o[j, 0], columns) for j in range(K)])  # (K, D)
    blocks = np.stack([w_o[j, 0][:, orders[j, :d]] for j in range(K)])  # (K, d, d)
    condition = largest_condition(blocks, "W_o", number, columns)
    w_v = np.einsum("ijd,jde->ije", w_v, blocks)
    b_v = None if b_v is None else np.einsum("jd,jde->je", b_v, blocks)
    w_o = np.linalg.solve(blocks[:, None], w_o)
    rest = np.stack([w_o[j, 0][:, orders[j, d:]] for j in range(K)])  # (K, d, D - d)
    # The inverse permutation, plus the offset of the head.
    gather = np.argsort(orders, axis=1) + D * np.arange(K)[:, None]  # (K, D)
    dtype = attn.out.w.dtype
    other_heads = Linear(w_o[:, 1:].reshape(-1, D).astype(dtype)) if G > 1 else None
    out = ShrunkOutput(rest.astype(dtype), small(gather), other_heads, attn.out.b, G, condition)
    b = None if b_v is None else b_v.ravel().astype(dtype)
    v = Linear(w_v.reshape(-1, K * d).astype(dtype), b)
    return replace(attn, qkv=replace(attn.qkv, v=v), out=out)


def shrink_keys(attn: Attention, columns: str, number: int) -> Attention:
    """The attention of block ``number`` with W_q and W_k in the new basis."""
    r, K, H = unrotated_columns(attn), attn.kv_heads, attn.heads
    q, k = attn.qkv.q, attn.qkv.k
    D, dtype = len(k.w), k.w.dtype
    if r > D:
        raise MinitxError(
            f"shrink needs heads no wider than the hidden state; {r} of their columns are not "
            f"rotated and it is {D} wide."
        )
    w_k = k.w.astype(np.float64).reshape(D, K, -1)  # (D, K, d); the last r of d are not rotated
    d = w_k.shape[-1]
    unrotated = w_k[:, :, d - r :].transpose(1, 0, 2)  # (K, D, r)
    orders = np.stack([column_order(unrotated[j].T, columns) for j in range(K)])  # (K, D)
    blocks = np.stack([unrotated[j][orders[j, :r]] for j in range(K)])  # (K, r, r)
    condition = largest_condition(blocks, "W_k", number, columns)
    rest = np.stack([unrotated[j][orders[j, r:]] for j in range(K)])  # (K, D - r, r)
    rest = times_inverse(rest, blocks)
    b = None
    if k.b is not None:
        b = k.b.astype(np.float64).reshape(K, 1, d)
        b = np.concatenate([b[..., : d - r], times_inverse(b[..., d - r :], blocks)], axis=-1)
        b = b.ravel().astype(dtype)
    rotated = Linear(k.w.reshape(D, K, d)[:, :, : d - r].reshape(D, -1)) if r < d else None
    keys = ShrunkKeys(rotated, rest.astype(dtype), small(orders), b, condition)

    def times_transpose(a):
        """W_q or b_q (..., H d), its columns that are not rotated times block^T of their group."""
        a = a.astype(np.float64).reshape(*a.shape[:-1], K, H // K, d)
        new = np.einsum("...jgr,jsr->...jgs", a[..., d - r :], blocks)
        return np.concatenate([a[..., : d - r], new], axis=-1).reshape(*a.shape[:-3], H * d)

    arrays = (None if a is None else times_transpose(a).astype(dtype) for a in (q.w, q.b))
    return replace(attn, qkv=replace(attn.qkv, q=Linear(*arrays), k=keys))


def column_order(matrix, columns: str) -> np.ndarray:
    """An order (n,) of the columns of the matrix (r, n), n >= r: the r columns of the block that
    is inverted, then the others as they come.

    Greedy pivoting takes the longest column, projects it out of all columns, and so on r times
    (Gram-Schmidt with column pivoting, as in a rank-revealing QR decomposition).
    """
    r, n = matrix.shape
    chosen = list(range(r))
    if columns == "pivoted":
        chosen, residual = [], matrix.copy()
        for _ in range(r):
            lengths = np.einsum("rn,rn->n", residual, residual)
            lengths[chosen] = -1  # rounding may leave them longer than columns that are zero
            best = int(lengths.argmax())
            chosen.append(best)
            direction = residual[:, best] / max(np.linalg.norm(residual[:, best]), 1e-300)
            residual = residual - np.outer(direction, direction @ residual)
    return np.concatenate([chosen, np.setdiff1d(np.arange(n), chosen)]).astype(np.int64)


def times_inverse(a, blocks):
    """``a block^-1`` for a (K, n, r) and blocks (K, r, r)."""
    return np.linalg.solve(blocks.swapaxes(1, 2), a.swapaxes(1, 2)).swapaxes(1, 2)


def largest_condition(blocks, name: str, number: int, columns: str) -> float:
    """The largest condition number of blocks (K, r, r); MinitxError if it is too large."""
    found = np.linalg.cond(blocks)
    condition = float(np.where(np.isfinite(found), found, np.inf).max())
    if not condition <= LARGEST_CONDITION:
        better = ", or use columns=pivoted" if columns == "first" else ""
        raise MinitxError(
            f"shrink cannot invert a block of {name} of block {number}: its condition number is "
            f"{condition:.0e}, expected at most {LARGEST_CONDITION:.0e}; leave shrink out for "
            f"these weights{better}."
        )
    return condition


def unrotated_columns(attn: Attention) -> int:
    """r: how many columns of each head, the last ones, are not rotated."""
    d = attn.qkv.k.w.shape[1] // attn.kv_heads
    return d if type(attn.rope) is NoRope else d - attn.rope.cos.shape[-1]


def check_parts(attn: Part) -> None:
    need(attn, Attention)
    need(attn.qkv, QKV)
    need(attn.rope, Rope, NoRope)
    need(attn.cache, Cache)
    need(attn.attend, Attend)
    for linear in (attn.qkv.q, attn.qkv.k, attn.qkv.v, attn.out):
        need(linear, Linear)


# Notes:
#
# - The savings are d / D of one matrix (D, K d). An order of columns, K D small integers, is kept
#   for each. Only the first query head of a group gets an identity; the others stay whole.
# - Scores stay the same (q k^T = W_q block^T block^-T W_k^T), though queries and keys do not.
# - The paper's prose and Algorithm 1 pivot the transpose, the rows of W_o,1: that permutes the rows
#   of the first d columns but chooses no other columns. Its experiments pivot the matrix itself, as
#   here (a test compares the three).
# - With full RoPE only one complex number per pair of columns commutes with the rotation.
# - The change of basis fills the zeros of a pruned W_v and W_o again.
# - The paper also shrinks the pairs of latent attention (MLA), which minitx does not have.
# - The condition numbers are in the tree: they tell how many digits float32 may lose.
# - Speed: minitx compare -m stories --shrink, and with stories-relu; one BLAS thread.
