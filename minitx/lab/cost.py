"""``minitx cost NAME``: predict what a technique saves on a model of any size, by its paper's
formulas.

The sizes come from a ``config.json`` (shape.py), the formulas from ``costs/``.
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
    """The techniques that have cost formulas: ``("first_layer", ...)``."""
    found = pkgutil.iter_modules(importlib.import_module(PACKAGE).__path__)
    return tuple(sorted(module.name for module in found))


def cost(name: str, path, words: Sequence[str] = (), parallel: bool = False):
    """The cost of a technique on the model of the ``config.json`` at ``path``; words are
    ``option=value``. Returns an object with ``as_dict()`` and ``str``; MinitxError for bad
    input."""
    module = importlib.import_module(f"{PACKAGE}.{name.replace('-', '_')}")
    # Options are declared, parsed and checked like those of a technique.
    formulas = Technique(f"cost {name}", "weights", True, None, module.cost)
    options = formulas.read(words)
    shape = read_shape(path, parallel, getattr(module, "ENCODERS", False))
    return module.cost(shape, **options)
