"""Random queries, keys and values; attention over a growing KV cache, fed in chunks."""

import numpy as np
from tiny import stored

from minitx.state import Layer

IDS = np.random.default_rng(5).integers(0, 258, 40)


def random_qkv(seed=0, lead=(), H=4, K=2, S=30, d=8, dtype=np.float64):
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((*lead, H, S, d))
    k, v = rng.standard_normal((2, *lead, K, S, d))
    return q.astype(dtype), k.astype(dtype), v.astype(dtype)


def run(attend, q, k, v, sizes, layer=None):
    """Attention of all queries, in chunks of these sizes, over a growing KV cache."""
    layer = Layer(q.shape[-2], remember=True) if layer is None else layer
    found = []
    for size in sizes:
        new = slice(layer.tokens.end, layer.tokens.end + size)
        so_far = stored(layer, k[..., new, :], v[..., new, :])
        found.append(attend(q[..., new, :], *so_far, layer))
    return np.concatenate(found, -2)
