"""Units of a block, such as neurons and heads: what each contributes, and a matrix without some.

A unit has some rows of the matrix that writes its output into the residual stream (W_down, W_o),
and some columns of those that read it.
"""

from dataclasses import replace

import numpy as np

from minitx.model import Linear


def contributions(gram, w, rows: int):
    """sum |h_u W_u|^2 for each unit u, which has ``rows`` rows of w (in, out), from the Gram matrix
    gram (in, in) = sum h^T h: it is trace(W_u^T gram_u W_u)."""
    units = len(w) // rows
    w = w.astype(np.float64).reshape(units, rows, -1)
    own = np.arange(units)
    # diagonal blocks: (units, rows, rows)
    gram = gram.reshape(units, rows, units, rows)[own, :, own]
    return np.einsum("uio,uij,ujo->u", w, gram, w, optimize=True)


def columns(linear: Linear, keep) -> Linear:
    """Only these outputs."""
    return Linear(linear.w.take(keep, axis=1), None if linear.b is None else linear.b[keep])


def rows(linear: Linear, keep) -> Linear:
    """Only these inputs."""
    return replace(linear, w=linear.w[keep])


def columns_of(heads, d: int):
    """The columns of these heads of width d."""
    return (heads[:, None] * d + np.arange(d)).ravel()
