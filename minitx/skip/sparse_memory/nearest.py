"""Nearest keys: three kinds of index that name the keys worth scoring for a query.

An index looks for near points, attention for large inner products. One coordinate more makes these
the same (``augmented_keys``), if the length of keys has a bound, which the weights give
(``longest_key``). Candidates are all that an index gives: whoever asks scores them exactly, so that
an index may miss a key but never weigh one wrongly. k-d trees are in kd_trees.py.

An index has
- ``history``: does what it finds depend on the order in which keys came and went?
- ``remember(k)``: a tuple of arrays (..., K, n, any), what it knows of each key by itself;
- ``__call__(q, k, facts, held)``: candidates (..., K, G, T, S) for q (..., K, G, T, d), k
  (..., K, S, d) and what it knows of these keys, ``held`` being what it has built of them
  (trees); None if all keys are candidates.
"""

import numpy as np

from minitx import fast, ledger
from minitx.model import Linear as Matrix
from minitx.shared.sparse_attention import Visible, top_k
from minitx.tree import Part, children, part, table, walk

# Inner products as distances ----------------------------------------------------------------------


def augmented_keys(k, R):
    """k^ = [k, sqrt(R^2 - |k|^2)] (..., d + 1) for keys k (..., d) no longer than R (...): all of
    the length R. Of a longer one, which only rounding may bring about, the root is 0."""
    rest = np.maximum(R * R - np.einsum("...d,...d->...", k, k), 0)
    return np.concatenate([k, np.sqrt(rest)[..., None]], -1)


def augmented_queries(q, R):
    """q^ = [R q / |q|, 0] (..., d + 1) for queries q (..., d), 0 for 0. |q^ - k^|^2 is then
    2 R^2 - 2 (R / |q|) q.k: the nearest key has the largest product. Without the scaling the order
    is the same, but all keys are about as far away."""
    length = np.sqrt(np.einsum("...d,...d->...", q, q))
    scaled = q * (R / np.where(length > 0, length, 1))[..., None]
    return np.concatenate([scaled, np.zeros_like(scaled[..., :1])], -1)


def longest_key(attn: Part) -> np.ndarray | None:
    """R (K,): no key of these heads is longer, whatever the token; None if the weights do not tell.

    A norm gives n = diag(g) x / rms(x) + c with |x / rms(x)| <= sqrt(D), and rotation leaves
    lengths as they are, so |k| <= sqrt(D) ||diag(g) W_k||_2 + |c W_k + b|.
    """
    norm = vars(attn.norm)
    known = norm.keys() <= {"gain", "bias", "eps"}  # one with the gain folded has eps alone
    leaves = [node for _, node in walk(attn.qkv) if not list(children(node))]
    plain = all(type(leaf) is Matrix for leaf in leaves)  # not in few bits, no tables: x W + b
    if not known or not plain or not hasattr(attn.qkv, "kv"):
        return None
    D, dtype = len(leaves[0].w), leaves[0].w.dtype
    # Projections may stand side by side in one matrix; the unit vectors find out W_k all the same.
    b = attn.qkv.kv(np.zeros((1, D), dtype))[0].astype(np.float64)  # (1, K*d)
    w = attn.qkv.kv(np.eye(D, dtype=dtype))[0] - b  # (D, K*d)
    offset = (norm.get("bias", 0) * np.ones(D)) @ w + b[0]
    w = (norm.get("gain", 1) * np.ones(D))[:, None] * w
    by_head = w.reshape(D, attn.kv_heads, -1).swapaxes(0, 1)  # (K, D, d)
    R = np.sqrt(D) * np.linalg.norm(by_head, 2, (1, 2))
    R += np.linalg.norm(offset.reshape(attn.kv_heads, -1), axis=1)
    return (R * 1.0001).astype(dtype)  # room for what the model rounds


# All keys ----------------------------------------------------------------------------------------


@part
class Linear(Part):
    """Looks at all keys: the paper's "SAM linear"."""

    history = False

    def remember(self, k) -> tuple:
        return ()

    def __call__(self, q, k, facts, held=None) -> None:
        return None


# Locality-sensitive hashing ----------------------------------------------------------------------


@part
class LSH(Part):
    """Looks at keys that fall into the query's bucket in one table at least.

    The bucket of a point x in a table is the signs of b random projections of it: two points
    have one sign in common with probability 1 - angle / pi. Without R, keys are not
    augmented: their directions alone count then, and not how long they are.
    """

    planes: np.ndarray = table()  # (L * b, d + 1)
    R: np.ndarray | None = table()  # (K,)
    b: int  # bits in each table
    L: int  # tables

    history = False

    def remember(self, k) -> tuple:
        """Buckets (..., K, n, L) of keys k (..., K, n, d)"""
        if self.R is None:
            return (self.buckets(k),)
        return (self.buckets(augmented_keys(k, self.R[:, None])),)

    def __call__(self, q, k, facts, held=None):
        (of_keys,) = facts  # (..., K, S, L)
        of_queries = self.buckets(q)  # (..., K, G, T, L); a query's last coordinate is 0
        ledger.count(cache_bytes=of_keys.nbytes)
        same = np.zeros((*of_queries.shape[:-1], of_keys.shape[-2]), bool)  # (..., K, G, T, S)
        for i in range(self.L):  # not over keys; all L at once would need L times the room
            column = of_keys[..., None, None, :, i]  # (..., K, 1, 1, S)
            same |= of_queries[..., i, None] == column
        return same

    def buckets(self, x):
        """Bits of x (..., d) or (..., d + 1), one whole number a table: (..., L)"""
        planes = self.planes[:, : x.shape[-1]]
        ledger.count(x.size * len(planes), planes.nbytes)
        bits = (x @ planes.T > 0).reshape(*x.shape[:-1], self.L, self.b)
        packed = np.packbits(bits, axis=-1)  # (..., L, 1 or 2) bytes
        return np.ascontiguousarray(packed).view(f"u{packed.shape[-1]}")[..., 0]


def random_lsh(d: int, b: int, L: int, R, seed: int, dtype) -> LSH:
    """Tables with planes drawn evenly in all directions of d + 1 coordinates."""
    planes = np.random.default_rng(seed).standard_normal((L * b, d + 1))
    return LSH(planes.astype(dtype), R, b, L)


# Candidates --------------------------------------------------------------------------------------


def fill_up(candidates, many: int, visible, order=None):
    """Candidates (..., T, n), of which rows with fewer than ``many`` get the latest others too, as
    far as there are visible ones (..., T, n). Latest: with the largest ``order`` (..., n), or the
    last."""
    short = many - candidates.sum(-1, keepdims=True)  # (..., T, 1)
    if (short <= 0).all():
        return candidates
    free = visible & ~candidates
    if order is not None:
        by_age = order.argsort(-1)[..., None, None, :]  # (..., 1, 1, n)
        by_age = np.broadcast_to(by_age, free.shape)
        free = np.take_along_axis(free, by_age, -1)
    free &= free[..., ::-1].cumsum(-1)[..., ::-1] <= short
    if order is None:
        return candidates | free
    found = candidates.copy()
    np.put_along_axis(found, by_age, free | np.take_along_axis(found, by_age, -1), -1)
    return found


def best(index: Part, K: int, q, k, facts, visible: Visible, held=None, order=None):
    """(kept, scores), both (..., K, G, T, n): the K best of the candidates that the index finds for
    q (..., K, G, T, d) in k (..., K, n, d), of equals the earlier. If there are fewer, the latest
    others make up for them (see ``fill_up``). Scores of what is no candidate are MASKED."""
    candidates = index(q, k, facts, held)
    if candidates is not None:
        visible = visible.hide(np.ones_like(candidates), False)
        candidates = fill_up(candidates & visible, K, visible, order)
        ledger.event("candidates", candidates)
    p = visible.hide(scores(q, k, candidates))
    kept = top_k(p, min(K, k.shape[-2]))
    if candidates is not None or visible.mask is not None:
        kept &= p > fast.MASKED  # where there are fewer than K
    return kept, p


def scores(q, k, candidates):
    """q (..., K, G, T, d) times k (..., K, n, d): (..., K, G, T, n), MASKED for all but candidates.

    For one row the others are not even multiplied; for many the product of all is faster.
    """
    *lead, G, T, d = q.shape
    n = k.shape[-2]
    if candidates is None or T > 1:
        p = (q.reshape(*lead, G * T, d) @ k.swapaxes(-1, -2)).reshape(*lead, G, T, n)
        if candidates is not None:
            p[~candidates] = fast.MASKED
        ledger.count(q.size * n, cache_bytes=k.nbytes)
        return p
    *head, member, row, key = np.nonzero(candidates)  # each (pairs,)
    keys = k[(*head, key)]  # (pairs, d)
    p = np.full((*lead, G, T, n), fast.MASKED, q.dtype)
    p[candidates] = np.einsum("nd,nd->n", q[(*head, member, row)], keys)
    ledger.count(keys.size, cache_bytes=keys.nbytes)
    return p
