"""``assert_same``: compare arrays, and say in a sentence where and how they differ.

rotated keys: the first difference is at position 3, column 5: expected 0.25, got -0.25.
"""

import numpy as np

from minitx.differences import TOKENS, decapitalized, describe


def assert_same(found, expected, what: str, axes=TOKENS, tolerance: float = 0.0, dtype=False):
    """Assert that two arrays are equal within ``tolerance`` times the largest number expected.

    what: the property in words, which begins the message ("rotated keys"). axes: names of the last
    axes. dtype: compare the dtypes, too.
    """
    __tracebackhide__ = True  # the failure is shown at the caller's line
    found, expected = np.asarray(found), np.asarray(expected)
    sentence = describe(found, expected, axes, tolerance)
    if sentence is None and dtype and found.dtype != expected.dtype:
        sentence = f"Expected the dtype {expected.dtype}, got {found.dtype}; the numbers agree."
    if sentence is not None:
        raise AssertionError(f"{what}: {decapitalized(sentence)}")
