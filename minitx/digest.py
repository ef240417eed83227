"""The digest of a model: equal for two models only if they compute the same, in any process.

For caches that outlive a sequence (of prefixes) or the process (of answers), and must not be used
with another model.
"""

import enum
import inspect
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache, partial
from hashlib import sha256
from pathlib import Path, PurePath
from types import BuiltinMethodType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from minitx.errors import MinitxError
from minitx.tree import Part, walk

PLAIN = (type(None), bool, int, float, complex, str, bytes, range, slice, type(...))
FOLDER = Path(__file__).parent
BY_DATACLASS = ("__init__", "__setattr__", "__delattr__", "__replace__")  # methods it writes
# Folders that do not change what a model computes.
NOT_MODELS = ("lab", "training", "checkpoints", "learn", "pictures")


def digest(root: Part) -> bytes:
    """sha256 over all parts below ``root``: their types, settings in full precision, and all
    arrays, including tables. The same numbers in another memory layout give another digest.

    A function is identified by its name, its byte code, the values that it has captured, and the
    numbers and functions that it uses by name: lambdas of one line, or two versions of a function
    in a notebook, differ. MinitxError for a value that cannot be identified (an open file, say)."""
    return _joined(_Pieces().of_tree(root))


@cache
def source_digest() -> bytes:
    """sha256 of minitx's own source files, as far as they compute: a model whose code was edited
    may answer differently, although its weights and settings are the same."""
    found = sha256()
    for path in sorted(FOLDER.rglob("*.py")):
        name = path.relative_to(FOLDER).as_posix()
        if name.split("/")[0] not in NOT_MODELS:
            content = path.read_bytes()
            found.update(f"{name} {len(content)} ".encode() + content)
    return found.digest()


class _Pieces:
    """What identifies values, as strings and bytes."""

    def __init__(self):
        self.arrays: dict[int, bytes] = {}  # digests by id: tied weights appear twice
        self.within: list[Any] = []  # the values that are being identified, from the outside in

    def of_tree(self, root: Part) -> Iterator[str | bytes]:
        for _, node in walk(root):
            yield from self.of_class(type(node))
            for f in fields(node):
                yield f.name
                yield from self.of_field(getattr(node, f.name))

    def of_field(self, value) -> Iterator[str | bytes]:
        """Of a part's field. ``walk`` visits the child parts."""
        if isinstance(value, Part):
            yield "part"
        elif type(value) is tuple:
            yield f"tuple of {len(value)}"
            for item in value:
                yield from ("part",) if isinstance(item, Part) else self.of(item)
        else:
            yield from self.of(value)

    def of(self, value) -> Iterator[str | bytes]:
        """Of any value."""
        if any(value is outer for outer in self.within):
            yield "itself"  # a function that calls itself, a list that contains itself
            return
        self.within.append(value)
        try:
            yield from self._of(value)
        finally:
            self.within.pop()

    def _of(self, value) -> Iterator[str | bytes]:
        kind = type(value)
        if isinstance(value, Part):
            yield from self.of_tree(value)
        elif kind is np.ndarray and not value.dtype.hasobject:
            if id(value) not in self.arrays:
                self.arrays[id(value)] = _of_array(value)
            yield self.arrays[id(value)]
        elif isinstance(value, np.generic | np.dtype):
            yield f"{kind.__name__} {getattr(value, 'dtype', value).str} {value!r}"
        elif kind in PLAIN:
            yield repr(value)
        elif isinstance(value, enum.Enum):
            yield from (*self.of_class(kind), value.name, *self.of(value.value))
        elif isinstance(value, PurePath):
            yield from ("path", str(value))
        elif isinstance(value, tuple | list):
            yield from (*self.of_class(kind), f"{len(value)} items")
            for item in value:
                yield from self.of(item)
        elif kind is dict:
            yield f"dict of {len(value)}"
            for item in value.items():
                yield from self.of(item)
        elif kind in (set, frozenset):
            yield f"set of {len(value)}"
            yield from sorted(_joined(self.of(item)) for item in value)
        elif isinstance(value, type):
            yield from ("class", *self.of_class(value))
        elif is_dataclass(value):
            yield from self.of_class(kind)
            for f in fields(value):
                yield from (f.name, *self.of(getattr(value, f.name)))
        elif hasattr(value, "token_bytes"):  # a tokenizer, which reads ids the same if these agree
            yield from (*self.of_class(kind), f"{len(value)} tokens")
            yield from (value.token_bytes(i, previous=i) for i in range(len(value)))
        elif callable(value):
            yield from self.of_function(value)
        else:
            raise unknown(value)

    def of_function(self, f) -> Iterator[str | bytes]:
        f = inspect.unwrap(f)
        is_function = isinstance(f, FunctionType)
        if is_function and f.__qualname__.isidentifier() and _is_library(f.__module__):
            yield from ("library", f.__module__, f.__qualname__)
        elif is_function:
            yield from ("function", f.__module__ or "", f.__qualname__, *self.of_code(f.__code__))
            yield from self.of((f.__defaults__, f.__kwdefaults__))
            for cell in f.__closure__ or ():
                yield from self.of(_contents(cell))
            if not _is_library(f.__module__):
                yield from self.of_globals(f)
        elif type(f) is partial:
            yield from ("partial", *self.of(f.func), *self.of((f.args, f.keywords)))
        elif isinstance(f, MethodType):
            yield from ("method", *self.of(f.__func__), *self.of(f.__self__))
        elif isinstance(f, np.ufunc):
            yield from ("ufunc", f.__name__)
        elif isinstance(f, BuiltinMethodType):  # such as len, or "abc".upper
            yield from ("builtin", f.__module__ or "", f.__qualname__)
            if not isinstance(f.__self__, ModuleType | type(None)):
                yield from self.of(f.__self__)
        else:
            raise unknown(f)

    def of_code(self, code: CodeType) -> Iterator[str | bytes]:
        """Of a function's code, without the file and the line where it stands."""
        yield from ("code", code.co_code, *code.co_names, "(", *code.co_varnames, ")")
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self.of_code(constant)
            else:
                yield from self.of(constant)

    def of_globals(self, f: FunctionType) -> Iterator[str | bytes]:
        """Of the plain values and arrays that a function uses by name, and of the functions of its
        own module."""
        for name in _names(f.__code__):
            value = f.__globals__.get(name)
            if isinstance(value, FunctionType) and value.__module__ != f.__module__:
                yield from (name, value.__module__ or "", value.__qualname__)
            elif name in f.__globals__ and isinstance(value, (*PLAIN, np.ndarray, FunctionType)):
                yield from (name, *self.of(value))

    def of_class(self, cls: type) -> Iterator[str | bytes]:
        """Its name; of a part outside minitx, which may be another under the same name tomorrow,
        also its methods."""
        yield from (cls.__module__, cls.__qualname__)
        for base in cls.__mro__:
            if issubclass(base, Part) and not _is_library(base.__module__):
                for name, method in sorted(vars(base).items()):
                    if isinstance(method, FunctionType) and name not in BY_DATACLASS:
                        yield from (name, *self.of(method))


def unknown(value) -> MinitxError:
    return MinitxError(
        f"A model that holds a {type(value).__module__}.{type(value).__qualname__} cannot be told "
        "from others, so nothing can be cached for it; use plain values, arrays, functions or "
        "dataclasses as fields of its parts."
    )


def _is_library(module: str | None) -> bool:
    """Does this module change only with the version of Python, NumPy or minitx? (The key of an
    answer has those, and the source of minitx.)"""
    top = (module or "").partition(".")[0]
    return top in ("minitx", "numpy") or top in sys.stdlib_module_names


def _names(code: CodeType) -> list[str]:
    """The names that a function and those inside it use."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return sorted({*code.co_names, *(name for names in inner for name in names)})


def _contents(cell):
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _joined(pieces: Iterator[str | bytes]) -> bytes:
    found = sha256()
    for piece in pieces:  # length-prefixed, so that they cannot be confused
        piece = piece if isinstance(piece, bytes) else piece.encode("utf-8", "backslashreplace")
        found.update(len(piece).to_bytes(8, "little") + piece)
    return found.digest()


def _of_array(array: np.ndarray) -> bytes:
    column_major = array.flags.f_contiguous and not array.flags.c_contiguous
    lies = array.T if column_major else np.ascontiguousarray(array)
    found = sha256(f"{array.dtype.str} {array.shape} {column_major} ".encode())
    found.update(lies.view(np.uint8) if lies.size else b"")
    return found.digest()
