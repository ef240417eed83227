"""AWQ, activation-aware weight quantization: weights of large inputs are rounded more finely.

Before rounding, the weights of input i are multiplied by c[i]; online, x[i] is divided by c[i].
That rounds the weights of inputs with large c more finely, and those of the other inputs of their
group more coarsely. c = mean|x|^ratio, and the exponent ``ratio`` is searched for: the one with
the least error of the outputs on calibration text. Lin et al., 2023, arXiv 2306.00978.
"""

from collections.abc import Callable

import numpy as np

RATIOS = tuple(i / 20 for i in range(20))  # 0, 0.05, ..., 0.95


def best_channel_scales(w, moments, quantized: Callable):
    """The channel scales c (in,) of the ratio whose quantized matrix errs least; None for ratio 0.

    ``quantized(w, c)`` quantizes w (in, out); ``moments`` (``Moments`` of
    shared/observed_inputs.py) describes the inputs that the matrix reads. Ratio 0 is tried too
    and wins ties, so the result is never worse than without AWQ.
    """
    mean = moments.absolute / moments.count  # (in,) mean |x|
    best, least = None, np.inf
    for ratio in RATIOS:
        c = channel_scales(mean, ratio)
        error = output_error(w, quantized(w, c).dequantized(), moments.gram)
        if error < least:
            best, least = c, error
    return best


def channel_scales(mean, ratio: float):
    """c = mean^ratio (in,), at least 1e-4, normalized by sqrt(max c min c); None for ratio 0."""
    if ratio == 0:
        return None
    c = np.maximum(mean**ratio, 1e-4)
    return c / np.sqrt(c.max() * c.min())


def output_error(w, quantized, gram) -> float:
    """sum (x w - x quantized)^2 over calibration inputs x, from their Gram matrix
    gram (in, in) = sum x^T x: trace(E^T gram E) for the weight error E."""
    error = w - quantized
    gram = gram.astype(error.dtype)  # float32 takes half the time, and it is only compared
    return float(np.einsum("io,io->", error, gram @ error, dtype=np.float64))


# Notes:
#
# - The normalization cancels out of the codes (a factor of c is a factor of every scale); it keeps
#   scales of a similar size, which matters with half_scales.
# - Ours: every matrix of a block has its own c, judged by the matrix's own outputs, which the Gram
#   matrix gives without running the texts again. AWQ's code shares c between the matrices that
#   read the same input and compares the outputs of the whole block; and it folds 1 / c into the
#   norm before.
