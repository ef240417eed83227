"""A tree of parts as data, so that it can stand in a file: entries in JSON, arrays by name.

    entries, arrays, numbers = describe(model=root, ...)
    parts = restore(path, entries, arrays)  # parts[numbers["model"]] is the root

Each part is an entry ``{"part": "minitx.model:Linear", "fields": {...}}``, children before their
parents; a part that stands in two places, or below two roots, has one entry. A field is
plain (null, true, a number, a text) or an object with one key: ``{"array": its name}``,
``{"entry": number of a part}``, ``{"tuple": [fields]}``, ``{"config": {...}}``, or
``{"function": "minitx.ops:silu"}``.

A file can name nothing but parts and functions of the modules below, and its fields have to be
those of the part: reading one runs no code that stands in it.
"""

import importlib
import inspect
from dataclasses import asdict, fields
from types import UnionType
from typing import get_args

import numpy as np

from minitx.checkpoints.common import short
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.tree import Part

MODULES = (
    "minitx.model",
    "minitx.ops",
    "minitx.decode",
)
PACKAGES = ("minitx.shared.", "minitx.precompute.", "minitx.skip.")

# ---------------------------------------------------------------------------------------- writing


def describe(**roots: Part) -> tuple[list[dict], dict[str, np.ndarray], dict[str, int]]:
    """The entries of these trees, their arrays, and each root's entry. An array is named after the
    first place where it stands. MinitxError if a field holds anything that a file cannot."""
    writer = _Writer()
    numbers = {name: writer.entry(root, name) for name, root in roots.items()}
    return writer.entries, {name: array for name, array in writer.named.values()}, numbers


class _Writer:
    def __init__(self):
        self.entries: list[dict] = []
        self.numbers: dict[int, int] = {}  # id of a part -> its entry
        self.named: dict[int, tuple[str, np.ndarray]] = {}  # id of an array -> its name, and it

    def entry(self, node: Part, path: str) -> int:
        """The number of the part's entry, made the first time."""
        if id(node) not in self.numbers:
            found = {
                f.name: self.field(getattr(node, f.name), f"{path}.{f.name}") for f in fields(node)
            }
            self.entries.append({"part": _name(node, type(node)), "fields": found})
            self.numbers[id(node)] = len(self.entries) - 1
        return self.numbers[id(node)]

    def field(self, value, path: str):
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, np.ndarray):
            return {"array": self.named.setdefault(id(value), (path, value))[0]}
        if isinstance(value, Part):
            return {"entry": self.entry(value, path)}
        if type(value) is tuple:
            return {"tuple": [self.field(item, f"{path}.{i}") for i, item in enumerate(value)]}
        if isinstance(value, Config):
            return {"config": asdict(value)}
        if inspect.isfunction(value):
            return {"function": _name(value, value)}
        raise MinitxError(
            f"The part at {path!r} holds a {type(value).__name__}, which cannot be written to a "
            "file; leave out the technique that put it there."
        )


def _name(value, known) -> str:
    """``module:name`` of a function, or of a part's class, that can be found again by it."""
    name = f"{known.__module__}:{known.__qualname__}"
    try:
        found = _find("", name)
    except MinitxError:
        found = None
    if found is not known:
        raise MinitxError(
            f"{name} cannot be written to a file: only what stands at the top of minitx's own "
            "modules can be found again."
        )
    return name


# ---------------------------------------------------------------------------------------- reading


def restore(path, entries, arrays: dict[str, np.ndarray]) -> list[Part]:
    """The parts that were described, by number; ``path`` is the file that the entries are from, for
    messages. MinitxError if they are anything that ``describe`` does not give."""
    if not isinstance(entries, list) or not entries:
        raise MinitxError(f"{path}: 'entries' is {short(entries)}; expected a list of parts.")
    reader = _Reader(path, arrays)
    for number, entry in enumerate(entries):
        reader.made.append(reader.part(number, entry))
    return reader.made


class _Reader:
    def __init__(self, path, arrays: dict[str, np.ndarray]):
        self.path, self.arrays = path, arrays
        self.made: list[Part] = []

    def part(self, number: int, entry) -> Part:
        where = f"{self.path}: entry {number}"
        if not isinstance(entry, dict) or set(entry) != {"part", "fields"}:
            raise MinitxError(f"{where} is {short(entry)}; expected a part and its fields.")
        cls = _find(where, entry["part"])
        if not inspect.isclass(cls):
            raise MinitxError(f"{where} names {short(entry['part'])}, which is not a part.")
        given = entry["fields"]
        known = {f.name: f.type for f in fields(cls)}
        if not isinstance(given, dict) or set(given) != set(known):
            raise MinitxError(
                f"{where}, a {cls.__name__}, has the fields {short(given)}; expected "
                f"{', '.join(known) or 'none'}."
            )
        values = {name: self.field(f"{where}, {name}", field) for name, field in given.items()}
        for name, value in values.items():
            if not _fits(value, known[name]):
                raise MinitxError(
                    f"{where}: {name!r} of a {cls.__name__} cannot be {short(given[name])}."
                )
        return cls(**values)

    def field(self, where: str, field):
        if not isinstance(field, dict):
            if isinstance(field, list):
                raise MinitxError(f"{where} is a list; expected an object that says of what.")
            return field
        if len(field) != 1:
            raise MinitxError(f"{where} is {short(field)}; expected an object with one key.")
        ((kind, value),) = field.items()
        if kind == "array" and isinstance(value, str) and value in self.arrays:
            return self.arrays[value]
        if kind == "entry" and type(value) is int and 0 <= value < len(self.made):
            return self.made[value]
        if kind == "tuple" and isinstance(value, list):
            return tuple(self.field(where, item) for item in value)
        if kind == "function" and inspect.isfunction(found := _find(where, value)):
            return found
        if kind == "config" and isinstance(value, dict):
            return self.config(where, value)
        raise MinitxError(f"{where} is {short(field)}, which stands for nothing that is there.")

    def config(self, where: str, given: dict) -> Config:
        if set(given) != {f.name for f in fields(Config)} or not isinstance(given["eos"], list):
            raise MinitxError(f"{where} has not the fields of a configuration: {short(given)}.")
        try:
            return Config(**given | {"eos": tuple(given["eos"])})
        except MinitxError as error:
            raise MinitxError(f"{where}: {error}") from None


def _find(where: str, name):
    """The part's class or the function that ``module:name`` means."""
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
            f"{where} names {short(name)}, which this minitx does not have; was it written by "
            "another version?"
        )
    return found


def _fits(value, kind) -> bool:
    """Is the value of the type that the field was declared with, as far as that says anything?"""
    if isinstance(kind, UnionType):
        return any(_fits(value, one) for one in get_args(kind))
    if kind in (bool, int, str, tuple):
        return type(value) is kind
    if kind is float:
        return type(value) in (int, float)
    if inspect.isclass(kind):
        return isinstance(value, kind)
    return True
