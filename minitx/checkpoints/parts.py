"""Serialize a tree of parts into JSON entries and named arrays, and deserialize it.

    entries, arrays, indices = serialize(model=root, ...)
    parts = deserialize(path, entries, arrays)  # parts[indices["model"]] is the root

Each part is an entry ``{"part": "minitx.model:Linear", "fields": {...}}``, children before their
parents. A part that is shared, within a tree or between roots, has one entry. A field is a plain
value (null, boolean, number, string) or an object with one key: ``{"array": name}``,
``{"entry": index of a part}``, ``{"tuple": [fields]}``, ``{"config": {...}}``, or
``{"function": "minitx.ops:silu"}``.

A file can name only parts and functions of the modules below, with exactly the fields that the part
declares, so reading a file never runs code from it.
"""

import importlib
import inspect
import math
from dataclasses import asdict, fields
from typing import get_type_hints

import numpy as np

from minitx.checkpoints.common import abbreviate
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.technique import owner
from minitx.tree import Part
from minitx.values import has_type, type_name

MODULES = (
    "minitx.model",
    "minitx.ops",
    "minitx.decode",
)
PACKAGES = ("minitx.shared.", "minitx.precompute.", "minitx.skip.")

# ---------------------------------------------------------------------------------------- writing


def serialize(**roots: Part) -> tuple[list[dict], dict[str, np.ndarray], dict[str, int]]:
    """The entries of these trees, their arrays by name, and the entry index of each root.

    An array is named after the path of its first occurrence. Raises MinitxError if a field holds a
    value that cannot be serialized.
    """
    serializer = _Serializer()
    indices = {name: serializer.entry(root, name) for name, root in roots.items()}
    return serializer.entries, dict(serializer.arrays.values()), indices


class _Serializer:
    def __init__(self):
        self.entries: list[dict] = []
        self.indices: dict[int, int] = {}  # id of a part -> index of its entry
        self.arrays: dict[int, tuple[str, np.ndarray]] = {}  # id of an array -> (name, array)

    def entry(self, node: Part, path: str) -> int:
        """The index of the part's entry, which is added on first use."""
        if id(node) not in self.indices:
            values = {
                f.name: self.field(getattr(node, f.name), f"{path}.{f.name}", node)
                for f in fields(node)
            }
            self.entries.append({"part": _qualified_name(type(node)), "fields": values})
            self.indices[id(node)] = len(self.entries) - 1
        return self.indices[id(node)]

    def field(self, value, path: str, node: Part):
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float and math.isfinite(value):  # JSON has neither NaN nor Inf
            return value
        if isinstance(value, np.ndarray):
            return {"array": self.arrays.setdefault(id(value), (path, value))[0]}
        if isinstance(value, Part):
            return {"entry": self.entry(value, path)}
        if type(value) is tuple:
            return {"tuple": [self.field(v, f"{path}.{i}", node) for i, v in enumerate(value)]}
        if isinstance(value, Config):
            return {"config": asdict(value)}
        if inspect.isfunction(value):
            return {"function": _qualified_name(value)}
        raise MinitxError(
            f"The part at {path!r} holds a {type(value).__name__}, which cannot be written to a "
            f"file; leave out {owner(node)}, and apply it when the model is loaded."
        )


def _qualified_name(target) -> str:
    """``module:name`` of a function or of a part's class, checked to be importable."""
    name = f"{target.__module__}:{target.__qualname__}"
    try:
        found = _import("", name)
    except MinitxError:
        found = None
    if found is not target:
        raise MinitxError(
            f"{name} cannot be written to a file: expected a part or function defined at the top "
            "level of one of minitx's modules."
        )
    return name


# ---------------------------------------------------------------------------------------- reading


def deserialize(path, entries, arrays: dict[str, np.ndarray]) -> list[Part]:
    """The parts by entry index; ``path`` is the file of the entries, for error messages.

    Raises MinitxError if the entries are not valid output of ``serialize``.
    """
    if not isinstance(entries, list) or not entries:
        raise MinitxError(f"{path}: 'entries' is {abbreviate(entries)}; expected a list of parts.")
    deserializer = _Deserializer(path, arrays)
    for index, entry in enumerate(entries):
        deserializer.parts.append(deserializer.part(index, entry))
    return deserializer.parts


class _Deserializer:
    def __init__(self, path, arrays: dict[str, np.ndarray]):
        self.path, self.arrays = path, arrays
        self.parts: list[Part] = []

    def part(self, index: int, entry) -> Part:
        where = f"{self.path}: entry {index}"
        if not isinstance(entry, dict) or set(entry) != {"part", "fields"}:
            raise MinitxError(f"{where}: expected a part and its fields, got {abbreviate(entry)}.")
        cls = _import(where, entry["part"])
        if not inspect.isclass(cls):
            raise MinitxError(f"{where}: expected a part, got {abbreviate(entry['part'])}.")
        given = entry["fields"]
        hints = get_type_hints(cls)
        types = {f.name: hints[f.name] for f in fields(cls)}
        if not isinstance(given, dict) or set(given) != set(types):
            raise MinitxError(
                f"{where}: a {cls.__name__} must have the fields {', '.join(types) or 'none'}, "
                f"got {abbreviate(given)}."
            )
        values = {name: self.field(f"{where}, {name}", field) for name, field in given.items()}
        for name, value in values.items():
            if not has_type(value, types[name]):
                raise MinitxError(
                    f"{where}: {name!r} of a {cls.__name__} must be {type_name(types[name])}, "
                    f"got {abbreviate(given[name])}."
                )
        try:
            return cls(**values)
        except (TypeError, ValueError, ArithmeticError) as error:  # a part that checks its fields
            raise MinitxError(f"{where}: its fields do not fit together ({error}).") from None

    def field(self, where: str, field):
        if not isinstance(field, dict):
            if isinstance(field, list):
                raise MinitxError(f"{where}: expected a plain value or an object, got a list.")
            return field
        if len(field) != 1:
            raise MinitxError(f"{where}: expected an object with one key, got {abbreviate(field)}.")
        ((kind, value),) = field.items()
        if kind == "array" and isinstance(value, str) and value in self.arrays:
            return self.arrays[value]
        if kind == "entry" and type(value) is int and 0 <= value < len(self.parts):
            return self.parts[value]
        if kind == "tuple" and isinstance(value, list):
            return tuple(self.field(where, item) for item in value)
        if kind == "function" and inspect.isfunction(found := _import(where, value)):
            return found
        if kind == "config" and isinstance(value, dict):
            return self.config(where, value)
        raise MinitxError(
            f"{where}: expected an existing array, entry, tuple, function or config, "
            f"got {abbreviate(field)}."
        )

    def config(self, where: str, given: dict) -> Config:
        if set(given) != {f.name for f in fields(Config)} or type(given["eos"]) is not list:
            raise MinitxError(f"{where}: expected the fields of a Config, got {abbreviate(given)}.")
        try:
            return Config(**given | {"eos": tuple(given["eos"])})
        except MinitxError as error:
            raise MinitxError(f"{where}: {error}") from None


def _import(where: str, name):
    """The part class or function with the qualified name ``module:name``."""
    module, colon, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    found = None
    if colon and (module in MODULES or module.startswith(PACKAGES)):
        try:
            found = vars(importlib.import_module(module)).get(attribute)
        except ImportError:
            pass
    is_part = inspect.isclass(found) and issubclass(found, Part)
    if not (is_part or inspect.isfunction(found)) or found.__module__ != module:
        raise MinitxError(
            f"{where}: this version of minitx has no part or function {abbreviate(name)}; was the "
            "file written by another version?"
        )
    return found
