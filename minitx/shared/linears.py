"""Select weight matrices of a model: those of the FFNs, of attention, or both; join some to one."""

from collections.abc import Callable

import numpy as np

from minitx.model import FFN, Attention, Linear
from minitx.technique import NoSuchPart
from minitx.tree import Part, rebuild, walk


def linears(root: Part, matrices: str) -> dict[int, Linear]:
    """The ``Linear`` parts below ``root`` by their ids, in the order of the tree. ``matrices``:
    "ffn", "attention" or "all" (both; never the embedding or the head). Raises if there are none.
    """
    above = {"ffn": (FFN,), "attention": (Attention,), "all": (FFN, Attention)}[matrices]
    found = {
        id(node): node
        for _, owner in walk(root)
        if type(owner) in above
        for _, node in walk(owner)
        if type(node) is Linear
    }
    if not found:
        raise NoSuchPart(Linear, found=other_matrix(root, above))
    return found


MATRICES = ("q", "k", "v", "out", "gate", "up", "down")  # the fields that hold a matrix


def other_matrix(root: Part, above: tuple[type, ...]) -> Part | None:
    """The first part that another technique has put where a model has a matrix."""
    owners = (owner for _, owner in walk(root) if type(owner) in above)
    fields = (vars(node).get(name) for o in owners for _, node in walk(o) for name in MATRICES)
    return next((found for found in fields if isinstance(found, Part)), None)


def change_linears(root: Part, wanted: dict[int, Linear], make: Callable[[Linear], Part]) -> Part:
    """A copy of the tree with ``make(linear)`` instead of each wanted ``Linear``."""
    return rebuild(root, lambda node: make(node) if id(node) in wanted else None)


def side_by_side(*maps: Linear) -> Linear:
    """One linear map with the outputs of all of them, concatenated."""
    w = np.concatenate([m.w for m in maps], axis=1)
    if all(m.b is None for m in maps):
        return Linear(w)
    return Linear(w, np.concatenate([np.zeros_like(m.w[0]) if m.b is None else m.b for m in maps]))
