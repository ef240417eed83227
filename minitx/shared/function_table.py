"""A function of one number as a table over every 16-bit floating point number."""

from collections.abc import Callable

import numpy as np

from minitx import ledger
from minitx.tree import Part, part, table


@part
class FunctionTable(Part):
    """f(x) for x rounded to float16: the bits of x, taken as a whole number, are the place of its
    result. Results are in the model's own type.

    What is beyond 65,504, the largest float16, counts as infinite; below 6e-8, as 0.
    """

    values: np.ndarray = table()  # (65536,)
    of: str = ""  # the name of f

    @classmethod
    def make(cls, f: Callable, dtype) -> "FunctionTable":
        every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(dtype)
        values, numbers = every.copy(), ~np.isnan(every)  # NaN stays what it is
        with np.errstate(all="ignore"):  # exp of large numbers, infinity / infinity
            values[numbers] = f(every[numbers])
        return cls(values, f.__name__)

    def __call__(self, x):
        ledger.count(weight_bytes=x.size * self.values.itemsize)
        ledger.event("function table reads", x.size)
        return self.values[x.astype(np.float16).view(np.uint16)].astype(x.dtype, copy=False)
