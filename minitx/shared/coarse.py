"""Vectors rounded to a grid, for decisions that must not depend on the last bits of a float.

A search compares numbers that may be equal: keys of the same token, distances to boxes that two
trees share. One pass over a prompt and single tokens round differently (BLAS adds in another
order), so equal numbers come out in this order or that, and the search goes another way. On a grid
far coarser than rounding errors and far finer than what matters, equal numbers are equal.
"""

import numpy as np

BITS = 20  # of the largest coordinate; float32 has 24, float64 has 53


def coarse(x):
    """x (..., d) in float64, each vector rounded to multiples of 2^-20 of the power of two above
    its largest coordinate. Squares and dot products of vectors on one grid are exact."""
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(abs(x).max(-1, keepdims=True))
    unit = np.ldexp(1.0, exponent - BITS)
    return np.rint(x / unit) * unit


def coarse_error(d: int) -> float:
    """A bound on ``|coarse(x) - x| / |x|`` for vectors of width d."""
    return 2.0**-BITS * d**0.5
