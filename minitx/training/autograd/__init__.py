"""Reverse-mode automatic differentiation of the model's own forward pass.

Reading order: ``array`` (the traced array and the backward pass), ``numpy_rules`` (gradient rules
of NumPy functions), ``op_rules`` (those of the operations in minitx/ops.py).
"""

from collections.abc import Callable

import numpy as np

from minitx import tree
from minitx.errors import MinitxError
from minitx.training.autograd import (  # noqa: F401  (importing them registers the rules)
    numpy_rules,
    op_rules,
)
from minitx.training.autograd.array import Traced, backpropagate, value_of


def gradients(model, loss: Callable) -> tuple[float, dict[str, np.ndarray], object]:
    """The value of ``loss(model)`` and its gradient with respect to every weight of the model.

    ``loss`` is called with a copy of the model whose weights are traced. It returns a scalar, or a
    pair (scalar, extra). Returns (value, {path of the weight: gradient}, extra or None), with the
    paths of ``tree.weights``. The gradient of a tied weight is the sum over its uses; the gradient
    of an unused weight is zero. Gradients are freshly allocated and share no memory.
    """
    leaves: dict[int, Traced] = {}

    def trace(array):
        if array.dtype.kind != "f":
            return array
        leaves[id(array)] = Traced(array)
        return leaves[id(array)]

    result = loss(tree.map_weights(model, trace))
    result, extra = result if isinstance(result, tuple) else (result, None)
    _backpropagate_loss(result)
    found = {
        path: _gradient(leaves[id(array)])
        for path, array in tree.weights(model).items()
        if id(array) in leaves
    }
    return float(result.value), found, value_of(extra)


def grad_of(f: Callable, *arrays: np.ndarray) -> tuple[float, tuple[np.ndarray, ...]]:
    """The value of ``f(*arrays)`` (a scalar) and its gradient with respect to each array."""
    leaves = [Traced(a) for a in arrays]
    result = f(*leaves)
    _backpropagate_loss(result)
    return float(result.value), tuple(_gradient(leaf) for leaf in leaves)


def _backpropagate_loss(result) -> None:
    if not isinstance(result, Traced):
        raise MinitxError("The loss does not depend on any traced array, so it has no gradient.")
    if result.shape != ():
        raise MinitxError(
            f"The loss must be a scalar, got shape {result.shape}; take its sum or mean."
        )
    backpropagate(result)


def _gradient(leaf: Traced) -> np.ndarray:
    """A leaf's gradient as a new array, in the leaf's dtype and C-contiguous."""
    if leaf.grad is None:
        return np.zeros(leaf.shape, leaf.dtype)
    return np.array(leaf.grad, leaf.dtype, order="C")
