"""Gradient rules of the NumPy functions that models use.

Elementwise functions: a table of derivatives. Then matrix products, reductions, and functions that
only rearrange elements (reshape, indexing, ...). For the operations of ops.py see op_rules.py.
"""

import math

import numpy as np

from minitx.errors import MinitxError
from minitx.training.autograd.array import RULES, Traced, rule, value_of

# Elementwise functions -----------------------------------------------------------------------

# function -> for each argument, its gradient from (g, output, arguments), where g is the gradient
# with respect to the output.
ELEMENTWISE = {
    np.add: (lambda g, out, x, y: g, lambda g, out, x, y: g),
    np.subtract: (lambda g, out, x, y: g, lambda g, out, x, y: -g),
    np.multiply: (lambda g, out, x, y: g * y, lambda g, out, x, y: g * x),
    np.divide: (lambda g, out, x, y: g / y, lambda g, out, x, y: -g * out / y),
    np.power: (
        lambda g, out, x, y: g * y * x ** (y - 1),
        lambda g, out, x, y: g * out * np.log(x),
    ),
    np.maximum: (lambda g, out, x, y: g * (x > y), lambda g, out, x, y: g * (x <= y)),
    np.minimum: (lambda g, out, x, y: g * (x < y), lambda g, out, x, y: g * (x >= y)),
    np.negative: (lambda g, out, x: -g,),
    np.exp: (lambda g, out, x: g * out,),
    np.log: (lambda g, out, x: g / x,),
    np.sqrt: (lambda g, out, x: 0.5 * g / out,),
    np.square: (lambda g, out, x: 2 * g * x,),
    np.tanh: (lambda g, out, x: g * (1 - out * out),),
    np.absolute: (lambda g, out, x: g * np.sign(x),),
}


def _elementwise(ufunc, derivatives):
    def run(*args):
        values = [value_of(a) for a in args]
        out = ufunc(*values)

        def backward(g):
            for argument, derivative in zip(args, derivatives):
                if isinstance(argument, Traced):
                    yield argument, unbroadcast(derivative(g, out, *values), argument.shape)

        return Traced(out, backward)

    return run


RULES.update({ufunc: _elementwise(ufunc, d) for ufunc, d in ELEMENTWISE.items()})


def unbroadcast(g, shape: tuple):
    """Undo broadcasting: sum a gradient over the axes along which its array was broadcast."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    if extra and g.shape[extra:] == shape:  # a bias: all leading axes in one sum
        return g.reshape(-1, *shape).sum(0)
    g = g.sum(tuple(range(extra)))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(repeated, keepdims=True) if repeated else g


def _no_gradient(function):
    return lambda *args, **options: function(*map(value_of, args), **options)


for _f in (np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal):
    RULES[_f] = _no_gradient(_f)  # comparisons return plain booleans
for _f in (np.sign, np.isfinite, np.isnan, np.argmax, np.argmin, np.argsort):
    RULES[_f] = _no_gradient(_f)
for _f in (np.zeros_like, np.ones_like, np.empty_like, np.shape, np.ndim, np.size):
    RULES[_f] = _no_gradient(_f)


# Products ------------------------------------------------------------------------------------


@rule(np.matmul)
def matmul(x, y):
    a, b = value_of(x), value_of(y)

    def backward(g):
        rows, columns = np.atleast_2d(a), b if b.ndim > 1 else b[:, None]
        g = g if b.ndim > 1 else g[..., None]
        g = g if a.ndim > 1 else g[..., None, :]
        if isinstance(x, Traced):
            yield x, unbroadcast(g @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)
        if isinstance(y, Traced):
            if columns.ndim == 2 < rows.ndim:  # one large product instead of one per sequence
                rows, g = rows.reshape(-1, rows.shape[-1]), g.reshape(-1, g.shape[-1])
            yield y, unbroadcast(rows.swapaxes(-1, -2) @ g, columns.shape).reshape(b.shape)

    return Traced(a @ b, backward)


@rule(np.vecdot)
def vecdot(x, y):
    a, b = value_of(x), value_of(y)

    def backward(g):
        g = g[..., None]
        if isinstance(x, Traced):
            yield x, unbroadcast(g * b, a.shape)
        if isinstance(y, Traced):
            yield y, unbroadcast(g * a, b.shape)

    return Traced(np.vecdot(a, b), backward)


@rule(np.einsum)
def einsum(subscripts, *arrays):
    """Products of two arrays such as ``...d,...d->...``. Each index of one array must also be in
    the other array or in the result: the gradient of a sum over one array alone needs a broadcast,
    which einsum cannot express."""
    inputs, _, result = subscripts.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not _is_simple(names, result, subscripts) or len(arrays) != 2:
        raise MinitxError(
            f"numpy.einsum({subscripts!r}) has no gradient rule; use two arrays and '->', with "
            "each index once per array and also in the other array or the result."
        )
    a, b = map(value_of, arrays)

    def backward(g):
        if isinstance(arrays[0], Traced):
            yield (
                arrays[0],
                unbroadcast(np.einsum(f"{result},{names[1]}->{names[0]}", g, b), a.shape),
            )
        if isinstance(arrays[1], Traced):
            yield (
                arrays[1],
                unbroadcast(np.einsum(f"{result},{names[0]}->{names[1]}", g, a), b.shape),
            )

    return Traced(np.einsum(subscripts, a, b), backward)


def _is_simple(names: list[str], result: str, subscripts: str) -> bool:
    if len(names) != 2 or "->" not in subscripts:
        return False
    letters = [name.replace("...", "") for name in names]
    once = all(len(set(name)) == len(name) for name in letters)
    x, y = map(set, letters)
    return (
        once and subscripts.count("...") in (0, 3) and x <= y | set(result) and y <= x | set(result)
    )


# Reductions ----------------------------------------------------------------------------------


@rule(np.sum)
def sum_(x, axis=None, keepdims=False):
    def backward(g):
        yield x, np.broadcast_to(_restore_axes(g, x.ndim, axis, keepdims), x.shape)

    return Traced(x.value.sum(axis, keepdims=keepdims), backward)


@rule(np.mean)
def mean(x, axis=None, keepdims=False):
    value = x.value.mean(axis, keepdims=keepdims)
    repeats = x.size // max(value.size, 1)

    def backward(g):
        yield x, np.broadcast_to(_restore_axes(g / repeats, x.ndim, axis, keepdims), x.shape)

    return Traced(value, backward)


@rule(np.max)
def max_(x, axis=None, keepdims=False):
    """Tied maxima share the gradient equally."""
    value = x.value.max(axis, keepdims=keepdims)

    def backward(g):
        top = x.value == _restore_axes(value, x.ndim, axis, keepdims)
        share = g / top.sum(axis, keepdims=keepdims, dtype=x.dtype)
        yield x, top * _restore_axes(share, x.ndim, axis, keepdims)

    return Traced(value, backward)


def _restore_axes(g, ndim: int, axis, keepdims: bool):
    """Restore the axes that a reduction removed, with length 1."""
    if keepdims or g.ndim == ndim:
        return g
    return np.expand_dims(g, tuple(range(ndim)) if axis is None else axis)


# Rearranging elements ------------------------------------------------------------------------


@rule(np.reshape)
def reshape(x, shape):
    def backward(g):
        yield x, g.reshape(x.shape)

    return Traced(x.value.reshape(shape), backward)


@rule(np.swapaxes)
def swapaxes(x, a, b):
    def backward(g):
        yield x, g.swapaxes(a, b)

    return Traced(x.value.swapaxes(a, b), backward)


@rule(np.transpose)
def transpose(x, axes=None):
    def backward(g):
        yield x, g.transpose(None if axes is None else np.argsort(axes))

    return Traced(x.value.transpose(axes), backward)


@rule(np.expand_dims)
def expand_dims(x, axis):
    return reshape(x, np.expand_dims(x.value, axis).shape)


@rule(np.broadcast_to)
def broadcast_to(x, shape):
    def backward(g):
        yield x, unbroadcast(g, x.shape)

    return Traced(np.broadcast_to(x.value, shape), backward)


@rule(np.where)
def where(condition, x, y):
    mask = value_of(condition)

    def backward(g):
        if isinstance(x, Traced):
            yield x, unbroadcast(np.where(mask, g, 0), x.shape)
        if isinstance(y, Traced):
            yield y, unbroadcast(np.where(mask, 0, g), y.shape)

    return Traced(np.where(mask, value_of(x), value_of(y)), backward)


@rule(np.concatenate)
def concatenate(arrays, axis=0):
    values = [value_of(a) for a in arrays]

    def backward(g):
        ends = np.cumsum([v.shape[axis] for v in values])
        yield from zip(arrays, np.split(g, ends[:-1], axis))

    return Traced(np.concatenate(values, axis), backward)


@rule(np.stack)
def stack(arrays, axis=0):
    def backward(g):
        yield from zip(arrays, np.moveaxis(g, axis, 0))

    return Traced(np.stack([value_of(a) for a in arrays], axis), backward)


@rule("getitem")
def getitem(x, index):
    index = value_of(index)

    def backward(g):
        if isinstance(index, np.ndarray) and index.dtype.kind in "iu":
            yield x, scatter_add(g, index, x.shape)
            return
        out = np.zeros(x.shape, g.dtype)
        if _selects_each_entry_once(index):
            out[index] = g
        else:
            np.add.at(out, index, g)  # slow, but correct if an element is selected twice
        yield x, out

    return Traced(x.value[index], backward)


def _selects_each_entry_once(index) -> bool:
    """True if this index selects each element at most once: slices, integers, boolean masks."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        i is None
        or i is Ellipsis
        or isinstance(i, (slice, int, np.integer, bool, np.bool_))
        or (isinstance(i, np.ndarray) and i.dtype == bool)
        for i in items
    )


def scatter_add(g, index, shape: tuple):
    """The gradient of gathering rows: out[index[i]] += g[i], for ``out`` of the given shape.

    Rows are sorted by index and each run of equal indices is summed: many times faster than
    ``np.add.at``.
    """
    index = index.reshape(-1) % shape[0]  # negative indices count from the end
    g = g.reshape(index.size, math.prod(shape[1:]))
    out = np.zeros((shape[0], g.shape[1]), g.dtype)
    if index.size:
        order = np.argsort(index, kind="stable")
        index = index[order]
        first = np.flatnonzero(np.concatenate([[True], index[1:] != index[:-1]]))
        out[index[first]] = np.add.reduceat(g[order], first)
    return out.reshape(shape)
