"""Gradients of anything that is computed by the model's own forward. See traced.py for how."""

from collections.abc import Callable

import numpy as np

from minitx import tree
from minitx.errors import MinitxError
from minitx.training import fused, rules  # noqa: F401  (importing them registers the rules)
from minitx.training.traced import Traced, backward, plain


def gradients(model, loss: Callable) -> tuple[float, dict[str, np.ndarray], object]:
    """The value of ``loss(model)`` and its gradient with respect to every weight of the model.

    ``loss`` gets a copy of the model whose weights are traced, and returns a scalar, or a pair
    (scalar, extra). Returns (value, {path of the weight: gradient}, extra or None), with the paths
    of ``tree.weights``; an array that two parts share gets the sum of both uses. The gradients are
    new arrays that nothing else refers to; a weight that the loss does not use gets zeros.
    """
    leaves: dict[int, Traced] = {}

    def trace(array):
        if array.dtype.kind != "f":
            return array
        leaves[id(array)] = Traced(array)
        return leaves[id(array)]

    result = loss(tree.map_weights(model, trace))
    result, extra = result if isinstance(result, tuple) else (result, None)
    _run_back(result)
    found = {
        path: _gradient(leaves[id(array)])
        for path, array in tree.weights(model).items()
        if id(array) in leaves
    }
    return float(result.value), found, plain(extra)


def grad_of(f: Callable, *arrays: np.ndarray) -> tuple[float, tuple[np.ndarray, ...]]:
    """The value of ``f(*arrays)`` (a scalar) and its gradient with respect to each array."""
    leaves = [Traced(a) for a in arrays]
    result = f(*leaves)
    _run_back(result)
    return float(result.value), tuple(_gradient(leaf) for leaf in leaves)


def _run_back(result) -> None:
    if not isinstance(result, Traced):
        raise MinitxError("The loss does not depend on any traced array, so it has no gradient.")
    if result.shape != ():
        raise MinitxError(
            f"The loss has shape {result.shape}; expected one number: take its sum or mean."
        )
    backward(result)


def _gradient(leaf: Traced) -> np.ndarray:
    """A leaf's gradient as an array of its own, in its type and in C order."""
    if leaf.grad is None:
        return np.zeros(leaf.shape, leaf.dtype)
    return np.array(leaf.grad, leaf.dtype, order="C")
