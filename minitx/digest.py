"""The digest of a model: equal for two models only if they compute the same.

For caches that outlive a sequence (of prefixes, say) and must not be used with another model.
"""

from collections.abc import Iterator
from dataclasses import fields
from hashlib import sha256

import numpy as np

from minitx.tree import Part, walk


def digest(root: Part) -> bytes:
    """sha256 over all parts below ``root``: their types, settings in full precision, and all
    arrays, including tables. The same numbers in another memory layout give another digest."""
    found, arrays = sha256(), {}
    for _, node in walk(root):
        cls = type(node)
        for piece in (cls.__module__, cls.__qualname__, *_fields(node, arrays)):
            piece = piece if isinstance(piece, bytes) else piece.encode()
            found.update(
                len(piece).to_bytes(8, "little") + piece
            )  # length-prefixed, so that pieces cannot be confused
    return found.digest()


def _fields(node: Part, arrays: dict[int, bytes]) -> Iterator[str | bytes]:
    for f in fields(node):
        yield f.name
        yield from _pieces(getattr(node, f.name), arrays)


def _pieces(value, arrays: dict[int, bytes]) -> Iterator[str | bytes]:
    """What identifies a value. Child parts are visited by the caller."""
    if isinstance(value, np.ndarray):
        if id(value) not in arrays:  # tied weights appear twice
            arrays[id(value)] = _of_array(value)
        yield arrays[id(value)]
    elif isinstance(value, tuple | list):
        yield f"{len(value)} items"
        for item in value:
            yield from _pieces(item, arrays)
    elif not isinstance(value, Part):
        yield repr(value)  # of a function: its address, the same in all models of one process


def _of_array(array: np.ndarray) -> bytes:
    column_major = array.flags.f_contiguous and not array.flags.c_contiguous
    lies = array.T if column_major else np.ascontiguousarray(array)
    found = sha256(f"{array.dtype.str} {array.shape} {column_major} ".encode())
    found.update(lies.view(np.uint8) if lies.size else b"")
    return found.digest()
