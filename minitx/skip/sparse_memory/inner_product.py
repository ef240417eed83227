"""Inner products as distances: one more coordinate, and the nearest key has the largest q . k.

lsh.py and kd_trees.py look for near points (a small angle, a small distance), but attention wants
large inner products, which also grow with the length of a key. Let R bound the length of all keys,
and add a coordinate that makes all of them equally long:

    key'   = [k, sqrt(R^2 - |k|^2)]    |key'| = R
    query' = [R q / |q|, 0]            |query'| = R
    |query' - key'|^2 = 2 R^2 - 2 (R / |q|) q . k

(Bachrach et al., RecSys 2014; known to us from summaries, the identity is tested.)
"""

import numpy as np

from minitx.model import Linear
from minitx.tree import Part, children, walk


def augment_keys(k, R):
    """[k, sqrt(R^2 - |k|^2)] (..., d + 1) for keys k (..., d) and bounds R (...). For a key that is
    longer than R by rounding, the new coordinate is 0."""
    rest = np.maximum(R * R - np.einsum("...d,...d->...", k, k), 0)
    return np.concatenate([k, np.sqrt(rest)[..., None]], -1)


def augment_queries(q, R):
    """[R q / |q|, 0] (..., d + 1) for queries q (..., d); zeros for q = 0. Scaling q does not
    change the order, but without it all keys are almost equally far away."""
    length = np.sqrt(np.einsum("...d,...d->...", q, q))
    scaled = q * (R / np.where(length > 0, length, 1))[..., None]
    return np.concatenate([scaled, np.zeros_like(scaled[..., :1])], -1)


def key_norm_bound(attn: Part, D: int | None = None) -> np.ndarray | None:
    """R (K,): no key of these heads is longer, for any token; None if the weights do not tell.

    A norm with gain g and bias c gives n = g x / rms(x) + c, with |x / rms(x)| <= sqrt(D). RoPE
    keeps lengths. So with keys n W_k + b
        |k| <= sqrt(D) ||diag(g) W_k||_2 + |c W_k + b|.

    D: the width of the model, where W_k has fewer rows (perforate); default: its rows.
    """
    norm = vars(attn.norm)
    known = norm.keys() <= {"gain", "bias", "eps"}  # only eps, if gain and bias are folded
    leaves = [node for _, node in walk(attn.qkv) if not list(children(node))]
    plain = all(type(leaf) is Linear for leaf in leaves)  # x W + b: not quantized, not a table
    if not known or not plain or not hasattr(attn.qkv, "kv"):
        return None
    D, dtype = D or len(leaves[0].w), leaves[0].w.dtype
    # W_k may be part of a fused matrix; the projections of the unit vectors are its rows anyway.
    b = attn.qkv.kv(np.zeros((1, D), dtype))[0].astype(np.float64)  # (1, K*d)
    w = attn.qkv.kv(np.eye(D, dtype=dtype))[0] - b  # (D, K*d)
    offset = (norm.get("bias", 0) * np.ones(D)) @ w + b[0]
    w = (norm.get("gain", 1) * np.ones(D))[:, None] * w
    by_head = w.reshape(D, attn.kv_heads, -1).swapaxes(0, 1)  # (K, D, d)
    R = np.sqrt(D) * np.linalg.norm(by_head, 2, (1, 2))
    R += np.linalg.norm(offset.reshape(attn.kv_heads, -1), axis=1)
    return (R * 1.0001).astype(dtype)  # slack for the model's rounding
