"""Vectors in few bits: small whole numbers, and a scale for each vector."""

import numpy as np


def quantize_symmetric(x, bits: int):
    """x (..., n) as whole numbers (..., n) of so many bits, symmetric around 0 and in the type of
    x, and scales (...). Each vector has its own: one for all would change when a larger comes, and
    old codes with it."""
    largest = 2 ** (bits - 1) - 1
    scale = abs(x).max(-1) / largest
    scale[scale == 0] = 1
    return np.rint(x / scale[..., None]).clip(-largest, largest), scale
