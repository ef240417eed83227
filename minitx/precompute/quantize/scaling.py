"""Activation-aware scaling: inputs that are large get their weights rounded more finely (AWQ).

Before rounding, the weights of input j are multiplied by c_j, and what comes in is divided by it.
That moves precision to the inputs with large c and away from the others of their group; how far it
pays is searched for, on the inputs that calibration text gives.
"""

import numpy as np

from minitx.precompute.quantize.groups import Codes

RATIOS = tuple(i / 20 for i in range(20))  # 0, 0.05, ..., 0.95


def search(w, read, keep) -> Codes:
    """The matrix w (in, out) kept with the best c: ``keep(c)`` gives it in few bits with c (in,),
    or with none; ``read`` (training.calibration.Moments) is what it reads.

    Best is the least mean squared error of the outputs on what it reads; c of ratio 0 (none) is
    among those tried and wins ties, so the result is never worse than without.
    """
    best, least = None, np.inf
    for ratio in RATIOS:
        found = keep(factors(read.absolute / read.count, ratio))
        error = output_error(w, found.floats(), read.gram)
        if error < least:
            best, least = found, error
    return best


def factors(a, ratio: float):
    """c (in,) = a^ratio, brought around 1; None for ratio 0. a (in,): mean |x| of each input."""
    if ratio == 0:
        return None
    c = np.maximum(a**ratio, 1e-4)
    return c / np.sqrt(c.max() * c.min())


def output_error(w, kept, gram) -> float:
    """Sum of the squared differences between x w and x kept, over the rows x that the Gram matrix
    (in, in) = sum x^T x is of."""
    off = w.astype(np.float64) - kept
    return float(np.einsum("io,io->", off, gram @ off))
