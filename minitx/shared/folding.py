"""Fold what a norm does to its input x after the division, gain and bias, into the next matrix."""

from dataclasses import replace

import numpy as np

from minitx.model import Head, Linear
from minitx.technique import need
from minitx.tree import Part


def fold_into(reader: Part, gain, bias, centered: bool = False) -> Part:
    """The reader with gain and bias (in,) in its matrix, or in every matrix of its children:

        (x * gain + bias) W + c  =  x (diag(gain) W)  +  (bias W + c)

    centered: with x - mean(x) instead of x. That is linear as well: subtract from each column of
    diag(gain) W its mean. Arithmetic is float64, rounded once."""
    if type(reader) in (Linear, Head):
        w = reader.w.astype(np.float64)
        b = reader.b
        if bias is not None:  # times the original W, not diag(gain) W
            b = (bias @ w + (0 if b is None else b)).astype(reader.w.dtype)
        w = gain[:, None] * w
        if centered:
            w -= w.mean(0)
        return replace(reader, w=w.astype(reader.w.dtype), b=b)
    maps = {name: child for name, child in vars(reader).items() if isinstance(child, Part)}
    for child in maps.values():
        need(child, Linear)  # any other part that reads the norm would miss its gain
    return replace(
        reader, **{name: fold_into(child, gain, bias, centered) for name, child in maps.items()}
    )
