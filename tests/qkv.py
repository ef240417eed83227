"""Random queries, keys and values; attention over a growing KV cache, fed in chunks."""

import numpy as np
from tiny import stored

from minitx import fast
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


def check_long_prompt(attend, literal_attention):
    """A prompt of three blocks of queries equals token by token, and the literal version
    ``literal_attention(q, k, v)``, which takes lists, at the last query of each block."""
    S = 2 * fast.ROWS + 9
    q, k, v = random_qkv(3, S=S)
    found = run(attend, q, k, v, (S,))
    np.testing.assert_allclose(found, run(attend, q, k, v, (1,) * S), atol=1e-12)
    for end in (fast.ROWS, fast.ROWS + 1, S):
        last = q[:, end - 1 : end], k[:, :end], v[:, :end]
        expected = literal_attention(*(x.tolist() for x in last))
        message = f"the query at position {end - 1} differs from the literal version"
        np.testing.assert_allclose(found[:, end - 1 : end], expected, atol=1e-12, err_msg=message)


def check_padded_batch(attend, literal_attention, start):
    """Each sequence of a batch padded on the left up to ``start`` (3,), fed at once, token by token
    or in chunks, equals the literal version of that sequence alone."""
    q, k, v = random_qkv(1, lead=(3,))
    alone = [
        literal_attention(*(x[i, :, first:].tolist() for x in (q, k, v)))
        for i, first in enumerate(start)
    ]
    for sizes in ((30,), (1,) * 30, (2, 20, 1, 7)):
        found = run(attend, q, k, v, sizes, Layer(30, np.array(start)))
        assert np.isfinite(found).all(), "padding gave NaN or Inf"
        for i, first in enumerate(start):
            message = f"in chunks of {sizes} sequence {i} of the batch differs from itself alone"
            np.testing.assert_allclose(found[i, :, first:], alone[i], atol=1e-12, err_msg=message)
