"""Products with some rows of a matrix: the others are neither read nor multiplied.

The matrix holds one input or neuron per row. Rows must be contiguous in memory: gathering columns,
or rows of a column-major matrix, takes some twenty times as long.

For one token only the active rows are used. Several tokens that run at once use the union of their
active rows, with 0 where a row is not active for a token: that is what is computed and counted. A
prompt of some ten tokens needs nearly all rows, so there it is a dense product. Or they run one by
one (``token_by_token``), each with its own rows: fewer multiply-adds, and much slower in NumPy.
"""

from collections.abc import Callable

import numpy as np

from minitx import ledger, ops
from minitx.tree import Part, part

# The help text of the option ``prompts``, for every technique that uses these products.
PROMPTS = (
    "when several tokens run at once. union: multiply all of them by the union of their rows, "
    "which is faster in NumPy; skip: each token only by its own rows, one after another"
)


def token_by_token(run: Callable, x):
    """``run(row)`` (out,) for each token x (..., n) -> (..., out)."""
    if not x.size:
        return run(x)  # a step without tokens
    found = [run(row) for row in x.reshape(-1, x.shape[-1])]
    return np.reshape(found, (*x.shape[:-1], -1))


def union_of(active):
    """The rows that at least one token needs, in ascending order: active (..., n) booleans."""
    if active.size == active.shape[-1]:  # one token
        return np.flatnonzero(active)
    return np.flatnonzero(active.reshape(-1, active.shape[-1]).any(0))


def at_rows(x, active, rows):
    """The numbers x (..., n) of these rows, 0 where one is not active: (..., len(rows))."""
    if x.size == x.shape[-1]:  # one token, so all of them are active
        return x[..., rows]
    return np.where(active, x, 0)[..., rows]


def gathered(w, rows):
    """``w[rows]`` (``take`` is a little faster); w itself if these are all rows."""
    return w if len(rows) == len(w) else w.take(rows, 0)


def sum_of_rows(x, w, rows, b=None):
    """The rows of w (n, out), weighted: ``x @ w[rows] + b`` for x (..., len(rows))."""
    w = gathered(w, rows)
    if x.size > len(rows):
        return ops.linear(x, w, b)
    ledger.product(x, w)
    y = x @ w  # w was just copied, so it is in the cache, where BLAS is fast (see fast.matmul)
    return y if b is None else y + b


def dot_with_rows(x, w, rows, b=None):
    """A dot product with each row of w (n, in): ``x @ w[rows].T + b[rows]`` -> (...,
    len(rows))."""
    return ops.linear(x, gathered(w, rows).T, None if b is None else b[rows])


@part
class NeuronRows(Part):
    """A matrix with one neuron per row, of which some are used."""

    matrix_layout = "row-major"
    w: np.ndarray  # (F, D)
    b: np.ndarray | None  # (F,) for ``dot``, (D,) for ``sum``

    def dot(self, x, rows):
        """The neurons' inputs: x (..., D) -> (..., len(rows))."""
        return dot_with_rows(x, self.w, rows, self.b)

    def sum(self, h, rows):
        """What the neurons h (..., len(rows)) write: (..., D)."""
        return sum_of_rows(h, self.w, rows, self.b)
