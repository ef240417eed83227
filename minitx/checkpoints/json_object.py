"""Type-checked access to the fields of a JSON object."""

import math
from typing import Any

from minitx.checkpoints.common import abbreviate
from minitx.errors import MinitxError

REQUIRED = object()


class JsonObject:
    """The ``fields`` of one JSON object from the file ``path``.

    Every method takes a field name and a default for an absent or null field. Without a default an
    absent field raises MinitxError, as does a field of the wrong type.
    """

    def __init__(self, path, fields: dict):
        self.path = path
        self.fields = fields

    def positive_int(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, is_positive_int, "a positive integer")

    def positive_float(self, name: str, default: Any = REQUIRED):
        value = self.get(name, default, is_positive_number, "a positive number")
        return value if value is None else float(value)

    def boolean(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, lambda v: type(v) is bool, "true or false")

    def string(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, lambda v: type(v) is str, "a string")

    def object(self, name: str) -> "JsonObject":
        """The object in field ``name``; empty if absent."""
        return JsonObject(self.path, self.get(name, {}, lambda v: isinstance(v, dict), "an object"))

    def get(self, name: str, default, is_valid, expected: str):
        """The value, which must satisfy ``is_valid``; ``expected`` describes it in the error."""
        value = self.fields.get(name)
        if value is None:
            if default is REQUIRED:
                raise MinitxError(f"{self.path}: has no {name!r}; expected {expected}.")
            return default
        if not is_valid(value):
            raise MinitxError(f"{self.path}: {name!r} is {abbreviate(value)}; expected {expected}.")
        return value

    def reject(self, name: str, why: str, instead: str = "choose a checkpoint without it"):
        """Raises the error for a valid but unsupported value."""
        raise MinitxError(
            f"{self.path}: {name!r} is {abbreviate(self.fields.get(name))}, which {why}; {instead}."
        )


# In Python, JSON's true is an int, so types are compared exactly.


def is_positive_int(v) -> bool:
    return type(v) is int and 0 < v < 2**31


def is_positive_number(v) -> bool:
    return type(v) in (int, float) and 0 < v < math.inf


def is_integer(v) -> bool:
    return type(v) is int


def is_integer_or_integers(v) -> bool:
    return is_integer(v) or (isinstance(v, list) and all(map(is_integer, v)))
