"""The modules that the checker computes with. An answer that changes one (``np.abs = ...``) changes
the checker, too: a wrong result might pass, or a right one fail. So it is found, and undone."""

import builtins
import copy
import json
import math
from types import ModuleType

import numpy as np

MODULES = (np, np.linalg, np.random, builtins, math, json, copy)


def contents() -> list[dict]:
    """What the modules contain now."""
    return [dict(vars(module)) for module in MODULES]


def restore(before: list[dict]) -> str | None:
    """Undo what has been changed since ``before`` was taken, and return the name of one such thing:
    ``numpy.abs``. None: nothing was changed. (New names do no harm.)"""
    first = None
    for module, old in zip(MODULES, before):
        for name, value in old.items():
            if callable(value) and vars(module).get(name) is not value:
                setattr(module, name, value)
                first = first or full_name(module, name)
    return first


def full_name(module: ModuleType, name: str) -> str:
    return name if module is builtins else f"{module.__name__}.{name}"
