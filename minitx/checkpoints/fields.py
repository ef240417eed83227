"""A JSON object whose fields are fetched with their types checked."""

import math
from typing import Any

from minitx.checkpoints.common import short
from minitx.errors import MinitxError

REQUIRED = object()


class Fields:
    """``fields``, as they were read from the file ``path``.

    Every method takes a field's name and what to give where it is absent or null; without that,
    an absent field is a MinitxError, as is a field of the wrong type.
    """

    def __init__(self, path, fields: dict):
        self.path = path
        self.fields = fields

    def count(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, is_count, "a positive integer")

    def number(self, name: str, default: Any = REQUIRED):
        value = self.get(name, default, is_positive, "a positive number")
        return value if value is None else float(value)

    def flag(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, lambda v: type(v) is bool, "true or false")

    def text(self, name: str, default: Any = REQUIRED):
        return self.get(name, default, lambda v: type(v) is str, "a text")

    def nested(self, name: str) -> "Fields":
        """The object in field ``name``, empty where it is absent."""
        return Fields(self.path, self.get(name, {}, lambda v: isinstance(v, dict), "an object"))

    def get(self, name: str, default, fits, expected: str):
        """A value for which ``fits(value)`` is true; ``expected`` describes it."""
        value = self.fields.get(name)
        if value is None:
            if default is REQUIRED:
                raise MinitxError(f"{self.path}: has no {name!r}; expected {expected}.")
            return default
        if not fits(value):
            raise MinitxError(f"{self.path}: {name!r} is {short(value)}; expected {expected}.")
        return value

    def refuse(self, name: str, why: str):
        """The error for a field whose value is understood but not supported."""
        raise MinitxError(
            f"{self.path}: {name!r} is {short(self.fields.get(name))}, which {why}; "
            "choose a checkpoint without it."
        )


# JSON's true is a Python int, so types are compared exactly.


def is_count(v) -> bool:
    return type(v) is int and 0 < v < 2**31


def is_positive(v) -> bool:
    return type(v) in (int, float) and 0 < v < math.inf


def is_token(v) -> bool:
    return type(v) is int and v >= 0


def is_token_or_tokens(v) -> bool:
    return is_token(v) or (isinstance(v, list) and all(map(is_token, v)))
