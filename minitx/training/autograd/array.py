"""The autograd array: computes like the array it wraps and records the graph for the backward pass.

Reverse-mode differentiation (Linnainmaa, 1970). NumPy dispatches functions of objects that are not
arrays to these objects (``__array_ufunc__`` and ``__array_function__``), so the model's own code
runs on traced arrays unchanged. Each result stores one function, ``backward``, which maps the
gradient with respect to the result to gradients with respect to its inputs. The rules that create
these functions are in numpy_rules.py and op_rules.py; no derivative is defined here.
"""

import heapq
from itertools import count

import numpy as np

from minitx.errors import MinitxError

RULES: dict = {}  # NumPy function, or operation of ops.py -> its gradient rule
_node_ids = count()


def rule(*functions):
    """Decorator: register the gradient rule of these functions. It is called instead of them, with
    the same arguments (some of them traced), and returns a ``Traced`` (or a plain array if the
    result has no gradient)."""

    def register(f):
        RULES.update(dict.fromkeys(functions, f))
        return f

    return register


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """A node of the computation graph: an array and how its gradient propagates to its inputs.

    value: the array. backward: maps the gradient with respect to this array (same shape) to pairs
    (input, gradient with respect to that input); inputs that are not traced are ignored. None for a
    leaf. grad: the gradient that ``backpropagate`` has accumulated so far.
    """

    __slots__ = ("value", "backward", "id", "grad", "owned")
    __hash__ = object.__hash__  # == compares elements, so nodes hash by identity

    def __init__(self, value, backward=None):
        self.value = np.asarray(value)
        self.backward = backward
        self.id = next(_node_ids)  # increases: inputs have lower ids than results
        self.grad = None
        self.owned = False  # may grad be written into, or does it share memory?

    shape = property(lambda self: self.value.shape)
    ndim = property(lambda self: self.value.ndim)
    size = property(lambda self: self.value.size)
    dtype = property(lambda self: self.value.dtype)
    flags = property(lambda self: self.value.flags)
    T = property(lambda self: self.transpose())

    def __repr__(self) -> str:
        return f"Traced({self.value!r})"

    def __len__(self) -> int:
        return len(self.value)

    # Dispatch of NumPy functions and operations of ops.py ---------------------------------------

    def __array_ufunc__(self, ufunc, method, *args, out=None, **options):
        if out is not None:
            raise MinitxError(
                f"numpy.{ufunc.__name__} writes into an existing array, which would lose a "
                "gradient; write x = x + y instead of x += y, and do not use out=."
            )
        if method != "__call__" or options:
            found = "".join(f", {name}=" for name in options)
            raise _no_rule(f"numpy.{ufunc.__name__} ({method}{found})")
        return _rule_of(ufunc, f"numpy.{ufunc.__name__}")(*args)

    def __array_function__(self, function, types, args, options):
        return _rule_of(function, f"numpy.{function.__name__}")(*args, **options)

    def __op__(self, op, *args):
        return _rule_of(op, f"ops.{op.__name__}")(*args)

    def __array__(self, *args, **options):
        raise MinitxError(
            "Expected a plain array, got a traced one: converting it would lose its gradient. Use "
            "x.value where you need no gradient, or only operations that have a gradient rule."
        )

    def __setitem__(self, index, new):
        raise MinitxError(
            "Writing into a traced array would lose a gradient; create a new array instead."
        )

    # Array methods that the model uses ----------------------------------------------------------

    def __getitem__(self, index):
        return RULES["getitem"](self, index)

    def copy(self):
        return self  # never written into

    def reshape(self, *shape):
        return np.reshape(self, shape[0] if len(shape) == 1 else shape)

    def swapaxes(self, a, b):
        return np.swapaxes(self, a, b)

    def transpose(self, *axes):
        return np.transpose(self, (axes[0] if len(axes) == 1 else axes) or None)

    def sum(self, axis=None, keepdims=False):
        return np.sum(self, axis=axis, keepdims=keepdims)

    def mean(self, axis=None, keepdims=False):
        return np.mean(self, axis=axis, keepdims=keepdims)

    def max(self, axis=None, keepdims=False):
        return np.max(self, axis=axis, keepdims=keepdims)


def _rule_of(function, name: str):
    if function not in RULES:
        raise _no_rule(name)
    return RULES[function]


def _no_rule(name: str) -> MinitxError:
    return MinitxError(
        f"{name} has no gradient rule; use operations that have one, or add a rule to "
        "minitx/training/autograd/numpy_rules.py."
    )


def value_of(x):
    """The plain array of a traced one, also inside tuples, lists and dicts; others unchanged."""
    if isinstance(x, Traced):
        return x.value
    if type(x) in (tuple, list):
        return type(x)(value_of(item) for item in x)
    if type(x) is dict:
        return {key: value_of(item) for key, item in x.items()}
    return x


def backpropagate(result: Traced) -> None:
    """The backward pass: accumulate the gradient of ``result`` (a scalar) in ``grad`` of every
    leaf.

    Nodes are visited in reverse order of creation, so the gradient of each is complete before it is
    propagated. What a node stored for its backward is freed at once, so a graph can be used once.
    """
    result.grad = np.ones_like(result.value)
    queue = [(-result.id, result)]
    while queue:
        node = heapq.heappop(queue)[1]
        if node.backward is None:
            continue  # a leaf keeps its gradient
        backward, gradient = node.backward, node.grad
        node.backward = node.grad = None
        for input, part in backward(gradient):
            if isinstance(input, Traced):
                if input.grad is None:
                    heapq.heappush(queue, (-input.id, input))
                _accumulate(input, part)


def _accumulate(node: Traced, part) -> None:
    """Add a contribution to a gradient. The first is stored without a copy and may share memory, so
    the second allocates a new array; later ones are added in place."""
    assert part.shape == node.shape, f"expected a gradient of shape {node.shape}, got {part.shape}"
    if node.grad is None:
        node.grad = part
    elif node.owned:
        node.grad += part
    else:
        node.grad = node.grad + part
        node.owned = True
