"""Symmetric quantization: each vector becomes integers around 0 and one scale."""

import numpy as np


def quantize_symmetric(x, bits: int):
    """x (..., n) -> integers (..., n) from -L to L, in the dtype of x, and scales (...).

        scale = max|x| / L,  L = 2^(bits-1) - 1;    x ~ integers * scale

    Each vector has a scale of its own. One scale for all would change when a larger vector arrives,
    and with it the integers of those before. A vector of zeros has the scale 1.
    """
    return quantize_to(x, 2 ** (bits - 1) - 1)


def quantize_to(x, largest: int):
    """``quantize_symmetric`` to integers from -largest to largest."""
    scale = abs(x).max(-1) / largest
    scale[scale == 0] = 1
    return np.rint(x / scale[..., None]).clip(-largest, largest), scale
