"""``minitx cost NAME``: what a technique saves on a model of any size, by its paper's formulas.

The sizes are read from a ``config.json`` (shape.py), the formulas stand in ``costs/``.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from functools import cache

from minitx.lab.shape import read_shape
from minitx.technique import Technique

PACKAGE = "minitx.lab.costs"


@cache
def names() -> tuple[str, ...]:
    """The techniques that have formulas: ``("first_layer", ...)``."""
    found = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    return tuple(sorted(module.name for module in found))


def cost(name: str, path, words: Sequence[str] = (), parallel: bool = False):
    """What the technique costs and saves on the model of the ``config.json`` at ``path``; words:
    ``option=value``. Gives an object with ``as_dict()`` and a text; MinitxError for bad input."""
    module = importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    # Its options are those of a technique: read from the signature, checked and refused alike.
    formulas = Technique(f"cost {name}", "weights", True, None, module.cost)
    options = formulas.read(words)
    shape = read_shape(path, parallel, getattr(module, "ENCODERS", False))
    return module.cost(shape, **options)
