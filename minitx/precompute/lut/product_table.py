"""Whole numbers of few bits, and tables of what vectors of them give when multiplied.

Inputs become whole numbers of ``ba`` bits with a scale for each token, weights of ``bw`` bits with
a scale for each output. A group of d of them is packed into one code, the first in the low bits,
each as ``value + 2^(bits-1)`` so that it is not negative. Then a product with the matrix is

- ``TableLinear``: for each group and output, one read of a table that holds the dot product of
  every input code with every weight code. The table knows no weights, so all matrices share it;
- ``FoldedLinear``: for each group, one row of a table that holds the dot product of every input
  code with the real weights of every output;
- ``IntegerLinear``: the very numbers of ``TableLinear``, by BLAS. For proofs and for searching.
"""

import numpy as np

from minitx.shared.symmetric import quantize_symmetric
from minitx.shared.table_reads import as_rows, note, sum_entries, sum_rows
from minitx.tree import Part, part, table


def pack(x, bits: int, d: int):
    """Codes (n, S) of whole numbers x (n, D), d at a time; what is missing in the last group is the
    value 0. (Filling up with code 0 would mean the most negative value.)"""
    n, D = x.shape
    S = groups(D, d)
    digits = np.full((n, S * d), 1 << bits - 1, np.intp)
    digits[:, :D] += x.astype(np.intp)
    digits = digits.reshape(n, S, d)
    codes = digits[..., 0].copy()
    for j in range(1, d):
        codes += digits[..., j] << bits * j
    return codes


def unpack(bits: int, d: int):
    """The d whole numbers that each code stands for: (2^(bits d), d)."""
    codes = np.arange(1 << bits * d)[:, None]
    return (codes >> bits * np.arange(d)) % (1 << bits) - (1 << bits - 1)


def groups(D: int, d: int) -> int:
    """S: how many groups of d are needed for D inputs."""
    return -(-D // d)


def code_type(bits: int) -> np.dtype:
    """The smallest type for codes of so many bits."""
    return np.min_scalar_type((1 << bits) - 1)


# One table for all matrices ----------------------------------------------------------------------


def largest_entry(ba: int, bw: int, d: int) -> int:
    """The largest dot product of vectors that rounding really gives: -2^(bits-1) is a legal digit
    and never used."""
    return d * ((1 << ba - 1) - 1) * ((1 << bw - 1) - 1)


def entry_type(ba: int, bw: int, d: int) -> np.dtype:
    """The smallest type for the table's entries that are ever read."""
    return np.min_scalar_type(-largest_entry(ba, bw, d) - 1)


def table_bytes(ba: int, bw: int, d: int) -> int:
    return entry_type(ba, bw, d).itemsize << d * (ba + bw)


@part
class ProductTable(Part):
    """The dot product of every input code with every weight code.

    vertical: entries (input codes, weight codes), so that one input code's products lie together;
    horizontal: the transpose.
    """

    entries: np.ndarray = table()  # (2^(ba d), 2^(bw d)) or its transpose, small whole numbers
    ba: int = 0
    bw: int = 0
    d: int = 0
    layout: str = "vertical"

    @classmethod
    def of(cls, ba: int, bw: int, d: int, layout: str) -> "ProductTable":
        most = largest_entry(ba, bw, d)  # entries beyond it would not fit their type: never read
        a, w = unpack(ba, d).astype(np.float32), unpack(bw, d).astype(np.float32)
        first, second = (a, w) if layout == "vertical" else (w, a)
        entries = np.empty((len(first), len(second)), entry_type(ba, bw, d))
        for i in range(0, len(first), 1024):  # exact: whole numbers far below 2^24
            entries[i : i + 1024] = (first[i : i + 1024] @ second.T).clip(-most, most)
        return cls(entries, ba, bw, d, layout)

    def sums(self, ca, cw):
        """``acc[i, n]``, the sum over s of the products of codes ca (n, S) and cw (S, N): exact."""
        table, width = self.entries.reshape(-1), self.entries.shape[1]
        if self.layout == "vertical":
            return sum_entries(table, ca * width, cw, np.int32)
        return sum_entries(table, ca, cw.astype(np.intp) * width, np.int32)


@part
class TableLinear(Part):
    """x @ w + b with both rounded to few bits, by reading the shared table."""

    table: ProductTable
    codes: np.ndarray  # (S, N) weight codes
    scale: np.ndarray  # (N,) ws
    b: np.ndarray | None = None

    @classmethod
    def of(cls, shared: ProductTable, w, b) -> "TableLinear":
        """From a matrix w (D, N) and a bias (N,) or None."""
        wi, ws = rounded(w, shared.bw)
        codes = pack(wi.T, shared.bw, shared.d).T  # (S, N)
        narrow = np.ascontiguousarray(codes.astype(code_type(shared.bw * shared.d)))
        return cls(shared, narrow, ws.astype(w.dtype), b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        t, codes = self.table, self.codes[:, columns]
        rows = as_rows(x, x.shape[-1])
        xi, xs = rounded_inputs(rows, t.ba)
        acc = t.sums(pack(xi, t.ba, t.d), codes)
        reads = len(rows) * codes.size
        note(rows.size + 2 * acc.size, reads, codes.nbytes + reads * t.entries.itemsize)
        return scaled(acc, xs, self.scale[columns], self.b, columns, x)


def rounded_inputs(rows, bits: int):
    """Rows (n, D) as whole numbers (n, D) and a scale (n,) for each. A row with a number that is
    none becomes zeros, whose scale is none either: it has no code, and its results are NaN."""
    xi, xs = quantize_symmetric(rows, bits)
    good = np.isfinite(xs)
    if not good.all():
        xi[~good] = 0
    return xi, xs


def rounded(w, bits: int):
    """A matrix w (D, N) as whole numbers (D, N) and a scale (N,) for each column, in float64."""
    wi, ws = quantize_symmetric(np.asarray(w, np.float64).T, bits)
    return wi.T, ws


def scaled(acc, xs, ws, b, columns, x):
    """acc (n, N) times the scales xs (n,) and ws (N,), plus these columns of b, in the type and
    with the leading axes of x."""
    y = acc.astype(x.dtype) * (xs[:, None] * ws)
    if b is not None:
        y += b[columns]
    return y.reshape(*x.shape[:-1], len(ws))


# One table for each group of a matrix ------------------------------------------------------------


@part
class FoldedLinear(Part):
    """x @ w + b with x rounded to few bits, by reading rows of tables that hold the weights."""

    tables: np.ndarray  # (S, 2^(ba d), N)
    ba: int
    d: int
    b: np.ndarray | None = None

    @classmethod
    def of(cls, w, b, ba: int, d: int) -> "FoldedLinear":
        D, N = w.shape
        padded = np.zeros((groups(D, d) * d, N))
        padded[:D] = w
        tables = unpack(ba, d) @ padded.reshape(-1, d, N)  # (2^(ba d), d) @ (S, d, N), in float64
        return cls(tables.astype(w.dtype), ba, d, b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        rows = as_rows(x, x.shape[-1])
        xi, xs = rounded_inputs(rows, self.ba)
        acc = sum_rows(self.tables, pack(xi, self.ba, self.d), columns)
        reads = len(self.tables) * acc.size
        note(rows.size + acc.size, reads, reads * self.tables.itemsize)
        return scaled(acc, xs, np.ones(acc.shape[1], x.dtype), self.b, columns, x)


def folded_bytes(D: int, N: int, ba: int, d: int, entry: int) -> int:
    """Bytes of the tables of one matrix with entries of ``entry`` bytes."""
    return groups(D, d) * (N * entry << ba * d)


# The same numbers, by multiplying ----------------------------------------------------------------


@part
class IntegerLinear(Part):
    """What ``TableLinear`` gives, bit for bit: the product of whole numbers, then the scales."""

    w: np.ndarray  # (D, N) whole numbers, in float64, which holds all sums of them exactly
    scale: np.ndarray  # (N,)
    ba: int
    b: np.ndarray | None = None

    @classmethod
    def of(cls, w, b, ba: int, bw: int) -> "IntegerLinear":
        wi, ws = rounded(w, bw)
        return cls(wi, ws.astype(w.dtype), ba, b)

    def __call__(self, x):
        return self.outputs(x, slice(None))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        rows = as_rows(x, x.shape[-1])
        xi, xs = rounded_inputs(rows, self.ba)
        w = self.w[:, columns]
        acc = xi.astype(np.float64) @ w
        note(rows.size * acc.shape[1], 0, w.nbytes)
        return scaled(acc, xs, self.scale[columns], self.b, columns, x)
