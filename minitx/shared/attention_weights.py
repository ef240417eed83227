"""Attention that also hands out its softmax weights, for policies that look at them."""

from collections.abc import Iterator

from minitx import fast


def attend_in_blocks(q, k, v, scale: float, mask, out) -> Iterator[tuple]:
    """``ops.attention`` of q (..., H, T, d), written into ``out`` (..., H, T, n) a block of queries
    at a time. For each block it yields (a, b, end, p): the softmax weights p (..., K, G*(b - a),
    end) that the queries a .. b - 1 give to the keys before ``end``; they see no later one."""
    T, S = q.shape[-2], k.shape[-2]
    for a, b, end in fast.query_blocks(T, S, mask):
        block_mask = fast.newest_mask(b - a) if mask is None else mask[..., a:b, :end]
        queries, keys, values = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
        p = fast.unnormalized_weights(queries, keys, scale, block_mask)
        out[..., a:b, :] = fast.weighted_values(p, queries, keys, values)
        p /= p.sum(-1, keepdims=True)
        yield a, b, end, p
