"""Products by the nearest of a few prototypes, whose products are in a table.

An input is cut into C parts of V numbers, each part is replaced by the nearest of Kc prototypes of
its own, and what a prototype gives for every output is a row of a table.
"""

import numpy as np

from minitx.precompute.lut.kmeans import kmeans
from minitx.shared.table_reads import as_rows, note, sum_rows
from minitx.tree import Part, part

ROWS = 1024  # that prototypes are learned from, at most


@part
class Codebook(Part):
    """Prototypes for the inputs of a matrix."""

    prototypes: np.ndarray  # (C, Kc, V)
    half_squares: np.ndarray  # (C, Kc) half the squared length of each

    @classmethod
    def of(cls, rows, Kc: int, V: int, seed: int) -> "Codebook":
        """Learned from rows (n, D), ROWS of them if there are more, evenly spread; parts are filled
        up with zeros if V does not divide D."""
        C = -(-rows.shape[1] // V)
        some = rows[:: -(-len(rows) // ROWS)]
        cut = as_rows(some, C * V).reshape(-1, C, V)
        prototypes = kmeans(cut.swapaxes(0, 1), Kc, seed)
        half_squares = (prototypes**2).sum(-1) / 2
        return cls(prototypes.astype(rows.dtype), half_squares.astype(rows.dtype))

    def __call__(self, x):
        """The nearest prototype of each part: x (n, D) -> (n, C) numbers below Kc, the smaller of
        two that are equally near.

        |x - p|^2 is smallest where p.x - |p|^2 / 2 is largest. Added up column by column and not by
        BLAS, so that a token has the same code alone and among others.
        """
        C, _, V = self.prototypes.shape
        cut = as_rows(x, C * V).reshape(-1, C, V)
        near = np.repeat(-self.half_squares[None], len(cut), 0)  # (n, C, Kc)
        for v in range(V):
            near += cut[:, :, v, None] * self.prototypes[:, :, v]
        return near.argmax(-1)

    def reconstruct(self, x):
        """x (n, D) with each part replaced by its nearest prototype."""
        C, _, V = self.prototypes.shape
        chosen = self.prototypes[np.arange(C), self(x)]  # (n, C, V)
        return chosen.reshape(len(x), C * V)[:, : x.shape[1]]


@part
class CentroidLinear(Part):
    """x @ w + b with x replaced by prototypes, by reading rows of tables."""

    codebook: Codebook
    tables: np.ndarray  # (C, Kc, N)
    b: np.ndarray | None = None

    @classmethod
    def of(cls, codebook: Codebook, w, b) -> "CentroidLinear":
        C, Kc, V = codebook.prototypes.shape
        padded = np.zeros((C * V, w.shape[1]))
        padded[: len(w)] = w
        tables = codebook.prototypes.astype(np.float64) @ padded.reshape(C, V, -1)
        return cls(codebook, tables.astype(w.dtype), b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        rows = as_rows(x, x.shape[-1])
        y = sum_rows(self.tables, self.codebook(rows), columns)
        reads = len(self.tables) * y.size
        P = self.codebook.prototypes
        note(len(rows) * P.size, reads, P.nbytes + reads * self.tables.itemsize)
        if self.b is not None:
            y += self.b[columns]
        return y.reshape(*x.shape[:-1], y.shape[1])
