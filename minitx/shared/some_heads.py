"""Attention of one sequence in which tokens run only some of the heads."""

import numpy as np

from minitx import ops
from minitx.model import by_head


def attend_one_key_head(q, k, v, one: int, scale: float, mask):
    """Softmax attention of query heads q (heads, tokens, d) that all read the same key head: number
    ``one`` of k and v (K, S, d) -> (heads, tokens, d)."""
    its = slice(one, one + 1)
    mask = mask[..., its, :, :, :] if mask is not None and by_head(mask) else mask
    return ops.attention(q, k[its], v[its] if len(v) > 1 else v, scale, mask)


def mask_of_sequence(mask, b: tuple):
    """Of the mask of a batch, that of sequence b: only padding and eviction make it differ."""
    return mask[b] if mask is not None and mask.ndim > 4 else mask


def mask_of_tokens(mask, tokens, T: int, S: int):
    """The mask of some of the T newest of S tokens. mask: that of all, None for the causal one."""
    if mask is None:
        return np.arange(S) > (S - T + tokens)[:, None]
    return mask[..., tokens, :]
