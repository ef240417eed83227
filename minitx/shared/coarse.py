"""Numbers rounded to 20 bits, for decisions that must not depend on the last bits of a float.

A search compares numbers that may be equal: keys of the same token, distances to boxes that two
trees share. One pass over a prompt and single tokens round differently (BLAS adds in another
order), so equal numbers come out in this order or that, and the search goes another way. With bits
that are far fewer than a float has, and far more than matter, equal numbers are equal.
"""

import numpy as np

BITS = 20  # float32 has 24, float64 has 53
ERROR = 2.0**-BITS  # at least |coarse(x) - x| / |x|, for vectors too


def coarse(x):
    """x (..., d) in float64, rounded to 20 significant bits. Numbers below 2^-20 of the largest in
    their vector get fewer, down to none: what should be 0 and is not quite becomes 0."""
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(x)
    _, of_largest = np.frexp(abs(x).max(-1, keepdims=True))
    unit = np.ldexp(1.0, np.maximum(exponent - BITS, of_largest - 2 * BITS))
    return np.rint(x / unit) * unit


def coarse_scales(scales):
    """Scales (...) of vectors of codes, each rounded to 20 significant bits, in their own dtype.
    Where codes are equal, estimates that are made of them should be equal too."""
    return coarse(scales[..., None])[..., 0].astype(scales.dtype)
