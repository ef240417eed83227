"""A transformer in NumPy, small enough to read, on which skipping and precomputing are shown.

import minitx
lm = minitx.load("stories")
print(lm.generate("Once upon a time"))
print(lm.model)
"""

from minitx.errors import MinitxError
from minitx.lm import LM, load

__version__ = "0.1.0"
__all__ = ["LM", "MinitxError", "load"]
