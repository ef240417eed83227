"""The traced array: it computes like the array inside it and remembers how, for the way back.

Reverse-mode differentiation (Linnainmaa, 1970). NumPy asks an object that is not an array what to
do with it (the protocols ``__array_ufunc__`` and ``__array_function__``), so the model's own code
runs on traced arrays unchanged. Each result keeps one function, ``pull``, which turns the gradient
with respect to the result into gradients with respect to what it was made from. The rules that
make these functions are in rules.py and fused.py; nothing here knows any derivative.
"""

import heapq
from itertools import count

import numpy as np

from minitx.errors import MinitxError

RULES: dict = {}  # NumPy function, or operation of ops.py -> the rule that runs and traces it
_numbers = count()


def rule(*functions):
    """Decorator: the rule of these functions. It is called in their place, with their arguments
    (some of them traced), and returns a ``Traced`` (or an array, where nothing has a gradient)."""

    def register(f):
        RULES.update(dict.fromkeys(functions, f))
        return f

    return register


class Traced(np.lib.mixins.NDArrayOperatorsMixin):
    """An array, and where it came from.

    value: the array. pull: a function of the gradient with respect to this array (same shape) that
    yields pairs (argument, gradient with respect to that argument); an argument that is not traced
    is ignored. None for an array that was put in. grad: what ``backward`` has summed up so far.
    """

    __slots__ = ("value", "pull", "number", "grad", "owned")
    __hash__ = object.__hash__  # arrays compare by element, so a traced one is known by identity

    def __init__(self, value, pull=None):
        self.value = np.asarray(value)
        self.pull = pull
        self.number = next(_numbers)  # made later = higher: the order of the way back
        self.grad = None
        self.owned = False  # is grad ours to write into, or may it be shared?

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

    # How NumPy and ops.py ask ------------------------------------------------------------------

    def __array_ufunc__(self, ufunc, method, *args, out=None, **options):
        if out is not None:
            raise MinitxError(
                f"numpy.{ufunc.__name__} writes into an existing array, which would lose a "
                "gradient; write x = x + y instead of x += y, and leave out= away."
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
            "A traced array was put where a plain one is needed, which would lose its gradient; "
            "take x.value for its numbers, or keep to operations that have a gradient rule."
        )

    def __setitem__(self, index, new):
        raise MinitxError(
            "Writing into a traced array would lose a gradient; make a new array instead."
        )

    # The methods of arrays that the model uses -------------------------------------------------

    def __getitem__(self, index):
        return RULES["getitem"](self, index)

    def copy(self):
        return self  # it is never written into

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
        "minitx/training/rules.py."
    )


def plain(x):
    """The array in a traced array; anything else as it is. Looks into tuples, lists and dicts."""
    if isinstance(x, Traced):
        return x.value
    if type(x) in (tuple, list):
        return type(x)(plain(item) for item in x)
    if type(x) is dict:
        return {key: plain(item) for key, item in x.items()}
    return x


def backward(result: Traced) -> None:
    """Leave the gradient of ``result`` (a scalar) in ``grad`` of every array that was put in.

    Results are visited from the last made to the first, so each is complete before it is passed
    on; what it kept for that is let go at once. A graph can therefore be used once.
    """
    result.grad = np.ones_like(result.value)
    waiting = [(-result.number, result)]
    while waiting:
        node = heapq.heappop(waiting)[1]
        if node.pull is None:
            continue  # an array that was put in: its gradient stays
        pull, gradient = node.pull, node.grad
        node.pull = node.grad = None
        for argument, part in pull(gradient):
            if isinstance(argument, Traced):
                if argument.grad is None:
                    heapq.heappush(waiting, (-argument.number, argument))
                _add(argument, part)


def _add(node: Traced, part) -> None:
    """Add one part of a gradient. The first is kept as it comes, and may be shared with others, so
    the second makes a new array; the third is added in place."""
    assert part.shape == node.shape, f"a rule made {part.shape} for {node.shape}"
    if node.grad is None:
        node.grad = part
    elif node.owned:
        node.grad += part
    else:
        node.grad = node.grad + part
        node.owned = True
