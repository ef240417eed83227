"""Which matrices of a model are meant: those of the feed-forward networks, of attention, or all."""

from collections.abc import Callable

from minitx.model import FFN, Attention, Linear
from minitx.technique import NoSuchPart
from minitx.tree import Part, rebuild, walk


def linears(root: Part, matrices: str) -> dict[int, Linear]:
    """The ``Linear``s below ``root`` by their ids, in the order of the tree; ``matrices`` is
    "ffn", "attention" or "all". Raises if there are none. Embedding and head are none of them."""
    above = {"ffn": (FFN,), "attention": (Attention,), "all": (FFN, Attention)}[matrices]
    found = {
        id(node): node
        for _, owner in walk(root)
        if type(owner) in above
        for _, node in walk(owner)
        if type(node) is Linear
    }
    if not found:
        raise NoSuchPart(Linear)
    return found


def change_linears(root: Part, wanted: dict[int, Linear], make: Callable[[Linear], Part]) -> Part:
    """A copy of the tree with ``make(linear)`` for those that are wanted."""
    return rebuild(root, lambda node: make(node) if id(node) in wanted else None)
