"""Gradient rules of NumPy's own functions, as far as models use them.

Element by element: a table of derivatives. Then products, sums, and everything that only moves
numbers about. The operations of ops.py have rules of their own, in fused.py.
"""

import math

import numpy as np

from minitx.errors import MinitxError
from minitx.training.traced import RULES, Traced, plain, rule

# Element by element --------------------------------------------------------------------------

# function -> for each argument, its gradient from (g, result, arguments): g is the gradient with
# respect to the result.
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
        values = [plain(a) for a in args]
        out = ufunc(*values)

        def pull(g):
            for argument, derivative in zip(args, derivatives):
                if isinstance(argument, Traced):
                    yield argument, fit(derivative(g, out, *values), argument.shape)

        return Traced(out, pull)

    return run


RULES.update({ufunc: _elementwise(ufunc, d) for ufunc, d in ELEMENTWISE.items()})


def fit(g, shape: tuple):
    """Undo broadcasting: sum a gradient over the axes along which its array was repeated."""
    if g.shape == shape:
        return g
    extra = g.ndim - len(shape)
    if extra and g.shape[extra:] == shape:  # a bias: all leading axes at once
        return g.reshape(-1, *shape).sum(0)
    g = g.sum(tuple(range(extra)))
    repeated = tuple(i for i, n in enumerate(shape) if n == 1 and g.shape[i] != 1)
    return g.sum(repeated, keepdims=True) if repeated else g


def _no_gradient(function):
    return lambda *args, **options: function(*map(plain, args), **options)


for _f in (np.greater, np.greater_equal, np.less, np.less_equal, np.equal, np.not_equal):
    RULES[_f] = _no_gradient(_f)  # comparisons give plain booleans
for _f in (np.sign, np.isfinite, np.isnan, np.argmax, np.argmin, np.argsort):
    RULES[_f] = _no_gradient(_f)
for _f in (np.zeros_like, np.ones_like, np.empty_like, np.shape, np.ndim, np.size):
    RULES[_f] = _no_gradient(_f)


# Products ------------------------------------------------------------------------------------


@rule(np.matmul)
def matmul(x, y):
    a, b = plain(x), plain(y)

    def pull(g):
        rows, columns = np.atleast_2d(a), b if b.ndim > 1 else b[:, None]
        g = g if b.ndim > 1 else g[..., None]
        g = g if a.ndim > 1 else g[..., None, :]
        if isinstance(x, Traced):
            yield x, fit(g @ columns.swapaxes(-1, -2), rows.shape).reshape(a.shape)
        if isinstance(y, Traced):
            if columns.ndim == 2 < rows.ndim:  # one large product, not one per row of the batch
                rows, g = rows.reshape(-1, rows.shape[-1]), g.reshape(-1, g.shape[-1])
            yield y, fit(rows.swapaxes(-1, -2) @ g, columns.shape).reshape(b.shape)

    return Traced(a @ b, pull)


@rule(np.vecdot)
def vecdot(x, y):
    a, b = plain(x), plain(y)

    def pull(g):
        g = g[..., None]
        if isinstance(x, Traced):
            yield x, fit(g * b, a.shape)
        if isinstance(y, Traced):
            yield y, fit(g * a, b.shape)

    return Traced(np.vecdot(a, b), pull)


@rule(np.einsum)
def einsum(subscripts, *arrays):
    """Any product of two arrays such as ``...d,...d->...``; each letter of one array must be in the
    other or in the result, since a sum over one array alone would have to be spread out again."""
    inputs, _, result = subscripts.replace(" ", "").partition("->")
    names = inputs.split(",")
    if not _is_simple(names, result, subscripts) or len(arrays) != 2:
        raise MinitxError(
            f"numpy.einsum({subscripts!r}) has no gradient rule; write it with two arrays and "
            "'->', each letter once in an array and again in the other array or the result."
        )
    a, b = map(plain, arrays)

    def pull(g):
        if isinstance(arrays[0], Traced):
            yield arrays[0], fit(np.einsum(f"{result},{names[1]}->{names[0]}", g, b), a.shape)
        if isinstance(arrays[1], Traced):
            yield arrays[1], fit(np.einsum(f"{result},{names[0]}->{names[1]}", g, a), b.shape)

    return Traced(np.einsum(subscripts, a, b), pull)


def _is_simple(names: list[str], result: str, subscripts: str) -> bool:
    if len(names) != 2 or "->" not in subscripts:
        return False
    letters = [name.replace("...", "") for name in names]
    once = all(len(set(name)) == len(name) for name in letters)
    x, y = map(set, letters)
    return (
        once and subscripts.count("...") in (0, 3) and x <= y | set(result) and y <= x | set(result)
    )


# Sums ----------------------------------------------------------------------------------------


@rule(np.sum)
def sum_(x, axis=None, keepdims=False):
    def pull(g):
        yield x, np.broadcast_to(_spread(g, x.ndim, axis, keepdims), x.shape)

    return Traced(x.value.sum(axis, keepdims=keepdims), pull)


@rule(np.mean)
def mean(x, axis=None, keepdims=False):
    value = x.value.mean(axis, keepdims=keepdims)
    repeats = x.size // max(value.size, 1)

    def pull(g):
        yield x, np.broadcast_to(_spread(g / repeats, x.ndim, axis, keepdims), x.shape)

    return Traced(value, pull)


@rule(np.max)
def max_(x, axis=None, keepdims=False):
    """Entries that share the maximum share its gradient."""
    value = x.value.max(axis, keepdims=keepdims)

    def pull(g):
        top = x.value == _spread(value, x.ndim, axis, keepdims)
        share = g / top.sum(axis, keepdims=keepdims, dtype=x.dtype)
        yield x, top * _spread(share, x.ndim, axis, keepdims)

    return Traced(value, pull)


def _spread(g, ndim: int, axis, keepdims: bool):
    """Put back, as axes of length 1, the axes that a sum took away."""
    if keepdims or g.ndim == ndim:
        return g
    return np.expand_dims(g, tuple(range(ndim)) if axis is None else axis)


# Moving numbers about ------------------------------------------------------------------------


@rule(np.reshape)
def reshape(x, shape):
    def pull(g):
        yield x, g.reshape(x.shape)

    return Traced(x.value.reshape(shape), pull)


@rule(np.swapaxes)
def swapaxes(x, a, b):
    def pull(g):
        yield x, g.swapaxes(a, b)

    return Traced(x.value.swapaxes(a, b), pull)


@rule(np.transpose)
def transpose(x, axes=None):
    def pull(g):
        yield x, g.transpose(None if axes is None else np.argsort(axes))

    return Traced(x.value.transpose(axes), pull)


@rule(np.expand_dims)
def expand_dims(x, axis):
    return reshape(x, np.expand_dims(x.value, axis).shape)


@rule(np.broadcast_to)
def broadcast_to(x, shape):
    def pull(g):
        yield x, fit(g, x.shape)

    return Traced(np.broadcast_to(x.value, shape), pull)


@rule(np.where)
def where(condition, x, y):
    chosen = plain(condition)

    def pull(g):
        if isinstance(x, Traced):
            yield x, fit(np.where(chosen, g, 0), x.shape)
        if isinstance(y, Traced):
            yield y, fit(np.where(chosen, 0, g), y.shape)

    return Traced(np.where(chosen, plain(x), plain(y)), pull)


@rule(np.concatenate)
def concatenate(arrays, axis=0):
    values = [plain(a) for a in arrays]

    def pull(g):
        ends = np.cumsum([v.shape[axis] for v in values])
        yield from zip(arrays, np.split(g, ends[:-1], axis))

    return Traced(np.concatenate(values, axis), pull)


@rule(np.stack)
def stack(arrays, axis=0):
    def pull(g):
        yield from zip(arrays, np.moveaxis(g, axis, 0))

    return Traced(np.stack([plain(a) for a in arrays], axis), pull)


@rule("getitem")
def getitem(x, index):
    index = plain(index)

    def pull(g):
        if isinstance(index, np.ndarray) and index.dtype.kind in "iu":
            yield x, add_rows(g, index, x.shape)
            return
        out = np.zeros(x.shape, g.dtype)
        if _is_plain(index):
            out[index] = g
        else:
            np.add.at(out, index, g)  # slow, but right where an entry is taken twice
        yield x, out

    return Traced(x.value[index], pull)


def _is_plain(index) -> bool:
    """Does this index take each entry at most once? Slices, numbers and boolean masks do."""
    items = index if isinstance(index, tuple) else (index,)
    return all(
        i is None
        or i is Ellipsis
        or isinstance(i, (slice, int, np.integer, bool, np.bool_))
        or (isinstance(i, np.ndarray) and i.dtype == bool)
        for i in items
    )


def add_rows(g, index, shape: tuple):
    """Sum the gradients of gathered rows: out[index[i]] += g[i], out of the given shape.

    Rows are sorted by their index and each run of equal ones is summed: ``np.add.at`` takes many
    times as long.
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
