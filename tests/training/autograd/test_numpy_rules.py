"""Gradient rules of NumPy functions against central differences in float64, and the autograd
engine."""

import numpy as np
import pytest
from differences import check, draw

from minitx import ops
from minitx.errors import MinitxError
from minitx.training.autograd import grad_of, numpy_rules

A, B, P = draw(3, 4), draw(3, 4, seed=1), draw(3, 4, low=0.5)

# NumPy functions -----------------------------------------------------------------------------

ELEMENTWISE = {
    "add": (np.add, A, B),
    "subtract": (np.subtract, A, B),
    "multiply": (np.multiply, A, B),
    "divide": (np.divide, A, P),
    "power": (np.power, P, B),
    "maximum": (np.maximum, A, B),
    "minimum": (np.minimum, A, B),
    "negative": (np.negative, A),
    "exp": (np.exp, A),
    "log": (np.log, P),
    "sqrt": (np.sqrt, P),
    "square": (np.square, A),
    "tanh": (np.tanh, A),
    "absolute": (np.absolute, A),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_gradient(name):
    check(*ELEMENTWISE[name])


def test_every_elementwise_rule_is_tested():
    assert {case[0] for case in ELEMENTWISE.values()} == set(numpy_rules.ELEMENTWISE)


SHAPES = [((3, 4), (4,)), ((4,), (3, 4)), ((3, 1), (3, 4)), ((2, 3, 4), (3, 1)), ((1, 4), (3, 1))]
SHAPES += [
    ((), (2, 3)),
    ((2, 1, 4), (1, 3, 1)),
    ((1,), (2, 2)),
    ((2, 3, 4), (3, 4)),
    ((1, 1), (3, 4)),
]


@pytest.mark.parametrize("a,b", SHAPES)
@pytest.mark.parametrize("f", [np.add, np.subtract, np.multiply, np.divide, np.maximum, np.power])
def test_broadcast_gradient_is_summed(f, a, b):
    check(f, draw(*a, low=0.5), draw(*b, seed=1, low=0.6))


def test_scalars_and_plain_arrays_mix_with_traced_ones():
    check(lambda x: 2 * x - 3 + x / 2 + 1 / (2 + x * x) - (-x) + (5 - x), A)
    check(lambda x: B * x + B @ x.T @ B + B / (x * x + 1) + x**2 + x**3.0, A)
    check(lambda x: np.maximum(x, 0) + np.maximum(0.1, x), A)


MATMULS = [((3, 4), (4, 2)), ((4,), (4, 2)), ((3, 4), (4,)), ((4,), (4,)), ((2, 3, 4), (4, 2))]
MATMULS += [
    ((2, 3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (5, 4, 2)),
    ((3, 4), (2, 4, 5)),
    ((2, 3, 4), (4,)),
]
MATMULS += [((4,), (2, 4, 3)), ((1, 3, 4), (2, 4, 1))]


@pytest.mark.parametrize("a,b", MATMULS)
def test_matmul_gradient(a, b):
    check(lambda x, y: x @ y, draw(*a), draw(*b, seed=1))


VECDOTS = [((4,), (4,)), ((3, 4), (4,)), ((4,), (3, 4)), ((2, 3, 4), (2, 3, 4))]
VECDOTS += [((2, 1, 4), (3, 4)), ((1, 4), (2, 3, 4))]


@pytest.mark.parametrize("a,b", VECDOTS)
def test_vecdot_gradient(a, b):
    check(np.vecdot, draw(*a), draw(*b, seed=1))


EINSUMS = [("...d,...d->...", (2, 3, 4), (2, 3, 4)), ("...d,...d->...", (2, 3, 4), (3, 4))]
EINSUMS += [("nd,nd->n", (3, 4), (3, 4)), ("nd,de->ne", (3, 4), (4, 2)), ("i,j->ij", (3,), (4,))]
EINSUMS += [("bhtd, bhsd -> bhts", (2, 1, 3, 4), (2, 1, 5, 4))]


@pytest.mark.parametrize("subscripts,a,b", EINSUMS)
def test_einsum_gradient(subscripts, a, b):
    check(lambda x, y: np.einsum(subscripts, x, y), draw(*a), draw(*b, seed=1))
    if a == b:
        check(lambda x: np.einsum(subscripts, x, x), draw(*a))


BAD_EINSUMS = [("nd,nd", 2), ("nd,ne->n", 2), ("nn,nd->nd", 2), ("nd->n", 1), ("...d,...d->", 2)]
BAD_EINSUMS += [("...d,de->...e", 2)]


@pytest.mark.parametrize("subscripts,n", BAD_EINSUMS)
def test_einsum_without_a_rule_is_refused(subscripts, n):
    with pytest.raises(MinitxError, match="einsum"):
        grad_of(lambda x: np.einsum(subscripts, *[x] * n).sum(), draw(3, 3))


AXES = [None, 0, 1, -1, (0, 2), (1, -1), (0, 1, 2)]


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("f", [np.sum, np.mean, np.max])
def test_reduction_gradient(f, axis, keepdims):
    check(lambda x: f(x, axis=axis, keepdims=keepdims) * 2, draw(2, 3, 4))
    check(lambda x: getattr(x, f.__name__)(axis, keepdims=keepdims) * 2, draw(2, 3, 4))


def test_max_gradient_is_shared_by_ties():
    _, (g,) = grad_of(lambda x: np.max(x), np.array([1.0, 3.0, 3.0]))
    assert g.tolist() == [0, 0.5, 0.5]


MOVES = {
    "reshape": lambda x: x.reshape(4, 6) * 2 + x.reshape((4, 6)),
    "reshape -1": lambda x: x.reshape(-1, x.shape[-1]),
    "swapaxes": lambda x: x.swapaxes(0, -1),
    "T": lambda x: x.T,
    "transpose": lambda x: x.transpose(2, 0, 1),
    "transpose tuple": lambda x: np.transpose(x, (1, 2, 0)),
    "expand_dims": lambda x: np.expand_dims(x, 1) * np.expand_dims(x, (0, 3))[0],
    "broadcast_to": lambda x: np.broadcast_to(x, (5, 2, 3, 4)) * draw(5, 2, 3, 4),
    "concatenate": lambda x: np.concatenate([x, 2 * x, B.reshape(2, 3, 2)], -1),
    "concatenate 0": lambda x: np.concatenate([x, x * x]),
    "stack": lambda x: np.stack([x, x * x, np.ones((2, 3, 4))], 1),
    "where": lambda x: np.where(x > 0, x * x, x[:1] * 3),
    "where number": lambda x: np.where(np.arange(4) > 1, x, 0.5),
    "where plain": lambda x: np.where(x.shape[0] > 1, 2.0, x),
    "slice": lambda x: x[..., 1:3] * x[:, :1, ::2],
    "newaxis": lambda x: x[:, None] * x[0] + x[1, 2, 3] * x[-1],
    "mask": lambda x: x[draw(2, 3, 4, seed=7) > 0] * 2,
    "gather": lambda x: x[np.array([0, 1, 1, -1, 0])] * 2,
    "gather 2d": lambda x: x[np.array([[0, 1], [1, 1]])],
    "gather nothing": lambda x: x[np.array([], int)],
    "gather tuple": lambda x: x[np.array([0, 0, 1]), np.array([2, 2, 1])],
    "gather list": lambda x: x[[1, 1, 0]],
    "gather inside": lambda x: x[:, [2, 0, 2]] * x[..., np.array([1]), 0:1],
    "iteration": lambda x: sum(row * i for i, row in enumerate(x)),
}


@pytest.mark.parametrize("name", MOVES)
def test_rearranging_gradient(name):
    check(MOVES[name], draw(2, 3, 4))


def test_gather_gradient_accumulates_repeated_rows():
    index = np.random.default_rng(0).integers(-7, 7, (5, 30))
    g = draw(5, 30, 6)
    expected = np.zeros((7, 6))
    np.add.at(expected, index, g)
    assert np.allclose(numpy_rules.scatter_add(g, index, (7, 6)), expected, rtol=1e-13)


# The backward pass ---------------------------------------------------------------------------


def test_gradients_do_not_share_memory():
    """The backward pass through z gives x and y the same array; then x accumulates more."""

    def f(x, y):
        first = (x * x).sum() + (x * y).sum()
        z = x + y
        return first + (z * z).sum()

    x, y = draw(3), draw(3, seed=1)
    before = x.copy(), y.copy()
    _, (a, b) = grad_of(f, x, y)
    assert np.allclose(a, 4 * x + 3 * y) and np.allclose(b, 3 * x + 2 * y)
    _, (a, b) = grad_of(lambda x, y: (x + y).sum(), x, y)
    a *= 2
    assert b.tolist() == [1, 1, 1] and np.array_equal(x, before[0]) and np.array_equal(y, before[1])


def test_gradient_of_a_reused_array_accumulates():
    _, (g,) = grad_of(lambda x: ((x + x) + (x + x) + x).sum() + x[0] + (x * x).sum(), np.ones(2))
    assert g.tolist() == [8, 7]


def test_gradient_of_an_unused_weight_is_zero():
    value, (a, b) = grad_of(lambda x, y: (x * x).sum(), A, B)
    assert value == (A * A).sum() and not b.any() and b.shape == B.shape


# Refused operations ---------------------------------------------------------------------------


def add_in_place(x):
    y = x * 1
    y += x


def write(x):
    x[0] = 1


def write_into_plain(x):
    np.zeros((3, 4))[:] = x


REFUSED = {
    "in place": (add_in_place, "writes into"),
    "into a plain array": (lambda x: np.add(x, x, out=np.zeros((3, 4))), "writes into"),
    "setitem": (write, "Writing into"),
    "setitem of a plain array": (write_into_plain, "Expected a plain array"),
    "asarray": (np.asarray, "Expected a plain array"),
    "ufunc without a rule": (np.arctan, "numpy.arctan has no gradient rule"),
    "function without a rule": (np.cumsum, "numpy.cumsum has no gradient rule"),
    "reduce of a ufunc": (np.add.reduce, "numpy.add"),
    "where= of a ufunc": (lambda x: np.exp(x, where=np.ones((3, 4), bool)), "where="),
    "an operation without a rule": (ops.op(lambda x: x), "ops"),
    "a loss that is no scalar": (lambda x: x * 2, "sum or mean"),
    "a loss without gradient": (lambda x: 3.0, "does not depend"),
    "a loss out of a value": (lambda x: x.value.sum(), "does not depend"),
    "plain gate, traced up": (lambda x: ops.swiglu(B, x).sum(), "writes into"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_operation_that_loses_a_gradient_is_refused(name):
    f, message = REFUSED[name]
    with pytest.raises(MinitxError, match=message):
        grad_of(f, A)
