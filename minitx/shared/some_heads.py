"""Attention of one sequence in which tokens run only some of the heads."""

import numpy as np

from minitx import ops
from minitx.model import by_head


def attend_one_key_head(q, k, v, key_head: int, scale: float, mask):
    """Softmax attention of query heads q (heads, tokens, d) that all read the same one of the key
    heads k and v (K, S, d) -> (heads, tokens, d)."""
    one = slice(key_head, key_head + 1)
    mask = mask[..., one, :, :, :] if mask is not None and by_head(mask) else mask
    return ops.attention(q, k[one], v[one] if len(v) > 1 else v, scale, mask)


def mask_of_sequence(mask, b: tuple):
    """The mask of sequence b of a batch. Masks differ only by padding and eviction."""
    return mask[b] if mask is not None and mask.ndim > 4 else mask


def mask_of_tokens(mask, tokens, T: int, S: int):
    """The mask for some of the T newest of S tokens, whose indices are ``tokens``. mask: that for
    all T; None: the causal mask."""
    if mask is None:
        return np.arange(S) > (S - T + tokens)[:, None]
    return mask[..., tokens, :]
