"""How a product with a quantized matrix is computed: dequantize tile by tile (run=stream), all at
once for each product (cast), once at load time (load), or multiply integers (integers).

``matrix`` is always a QuantizedMatrix of this folder's ``__init__.py``: n groups of g inputs. A
tile is a few of these groups, for all outputs.
"""

from functools import cached_property

import numpy as np

from minitx import fast, ledger, ops
from minitx.errors import MinitxError
from minitx.shared.symmetric import quantize_symmetric
from minitx.tree import Part, part

TILE = 1 << 17  # weights dequantized at a time: 512 KB of float32, which fit in the CPU's cache


def quantized_linear(matrix: Part, b, run: str) -> Part:
    """The part that computes ``x @ matrix + b`` in the way that ``run`` names."""
    if run == "load":
        return DequantizedLinear(matrix, b)
    if run == "integers":
        check_exact_sums(matrix)
        return IntegerSumLinear(matrix, b)
    whole = matrix.group_size * len(matrix.codes) * matrix.width
    return StreamedLinear(matrix, b, TILE if run == "stream" else whole)


@part
class StreamedLinear(Part):
    """``x @ matrix + b``, dequantizing ``tile`` weights at a time (at least one group)."""

    matrix: Part
    b: np.ndarray | None
    tile: int

    def __call__(self, x):
        m = self.matrix
        count(x, m)
        rows = m.grouped(x)  # (T, n, g)
        T, n, g = rows.shape
        y = np.zeros((T, m.width), x.dtype)
        # Groups in a tile. T // g: a tile gets about T inputs or more, so that adding its results
        # (T, out) to y costs less than dequantizing its weights.
        step = max(1, self.tile // (g * m.width), T // g)
        for a in range(0, n, step):
            groups = slice(a, a + step)
            w, scales = m.codes_of(groups, x.dtype), m.scales[groups]  # (step, g, out), (step, out)
            if T < g:  # fewer results than weights: scale the results
                sums = rows[:, groups].swapaxes(0, 1) @ w  # (step, T, out)
                sums *= scales[:, None]
                y += sums[0] if len(sums) == 1 else sums.sum(0)
            else:
                w *= scales[:, None]
                y += rows[:, groups].reshape(T, -1) @ w.reshape(-1, m.width)
        if m.zero_points is not None:  # sum x scale (code - zero) = sum x scale code - ...
            y -= rows.sum(-1) @ (m.zero_points * m.scales.astype(x.dtype))
        return with_bias(y, x, self.b)

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self(x)[..., columns]


@part
class DequantizedLinear(Part):
    """``x @ matrix + b`` with weights that are dequantized once and then kept."""

    matrix: Part
    b: np.ndarray | None

    @cached_property  # a part is frozen, but this follows from its fields alone
    def w(self) -> np.ndarray:
        w = self.matrix.dequantized()
        # column-major is faster for large matrices: see memory_layout.py
        return np.asfortranarray(w) if w.size > fast.LARGE else w

    def __call__(self, x):
        return ops.linear(x, self.w, self.b)

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return ops.linear(x, self.w[:, columns], None if self.b is None else self.b[columns])


@part
class IntegerSumLinear(Part):
    """``x @ matrix + b`` with x quantized to int8 by groups: integer sums, which are then scaled.

    BLAS multiplies the codes as floats. That is exact, because float32 holds every integer up to
    2^24 and ``check_exact_sums`` refuses groups whose sums could be larger.
    """

    matrix: Part
    b: np.ndarray | None

    def __call__(self, x):
        m = self.matrix
        count(x, m, bits=8)  # of x; the codes have 8 or 4
        codes, x_scales = quantize_symmetric(m.grouped(x), 8)  # (T, n, g), (T, n)
        T, n, g = codes.shape
        y = np.zeros((T, m.width), x.dtype)
        step = max(1, TILE // (max(T, g) * m.width))  # groups in a tile
        for a in range(0, n, step):
            groups = slice(a, a + step)
            x_codes = codes[:, groups].swapaxes(0, 1)  # (step, T, g)
            sums = x_codes @ m.codes_of(groups, x.dtype)  # (step, T, out) integers
            if m.zero_points is not None:
                sums -= x_codes.sum(-1)[..., None] * m.zero_points[groups, None]
            sums *= m.scales[groups, None]
            sums *= x_scales[:, groups].T[..., None]
            y += sums.sum(0)
        return with_bias(y, x, self.b)

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self(x)[..., columns]


def check_exact_sums(matrix: Part) -> None:
    """Refuse groups whose integer sums could pass 2^24, beyond which float32 rounds integers."""
    symmetric = matrix.zero_points is None
    largest = 2 ** (matrix.bits - symmetric) - 1  # of |code|, or of |code - zero point|
    longest = ((1 << 24) - 1) // (largest * 127)
    if matrix.group_size > longest:
        raise MinitxError(
            f"quantize: run=integers is exact for groups of at most {longest} inputs; got "
            f"{matrix.group_size}. Set a smaller group_size."
        )


def count(x, matrix: Part, bits: int | None = None) -> None:
    ledger.count(x.size * matrix.width, matrix.stored_bytes, bits=bits)


def with_bias(y, x, b):
    """y (T, out) in the shape of x (..., in), plus the bias."""
    y = y.reshape(*x.shape[:-1], y.shape[-1])
    return y if b is None else y + b


# Embedding and head ------------------------------------------------------------------------------


@part
class QuantizedEmbedding(Part):
    """Dequantizes the rows of the tokens that are looked up."""

    matrix: Part  # (D, V)

    def __call__(self, ids, where):
        m = self.matrix
        ledger.count(weight_bytes=np.size(ids) * m.stored_bytes // m.width)
        return m.columns(ids)  # (..., T, D)


@part
class QuantizedHead(Part):
    """Logits from a quantized table."""

    product: Part

    def __call__(self, x):
        return self.product(x)  # (..., V)

    def argmax(self, x) -> int:
        """The token with the largest logit for one row x (D,)."""
        return ops.argmax_token(self(x))
