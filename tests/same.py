"""``assert_same``: compare arrays, and say in a sentence where and how they differ.

rotated keys: the first difference is at position 3, column 5: expected 0.25, got -0.25.
"""

import os
from collections.abc import Sequence

import numpy as np

from minitx.differences import decapitalized, describe, scale_of


def assert_same(
    found,
    expected,
    what: str | None = None,
    axes: Sequence[str] | None = None,
    tolerance: float = 0.0,
    atol: float = 0.0,
    dtype: bool = False,
) -> None:
    """Assert that two arrays are equal, or differ by at most ``tolerance`` times the largest number
    expected, plus ``atol``.

    what: the property in words, which begins the message ("rotated keys"); None: the name of the
    test that runs, in words. axes: names of the last axes; None: "row" and "column". expected may
    be one number, for all. dtype: compare the dtypes, too.
    """
    __tracebackhide__ = True  # the failure is shown at the caller's line
    found, expected = np.asarray(found), np.asarray(expected)
    if expected.ndim == 0:
        expected = np.broadcast_to(expected, found.shape)
    if atol:
        tolerance += atol / scale_of(expected)
    sentence = describe(found, expected, axes, tolerance)
    if sentence is None and dtype and found.dtype != expected.dtype:
        sentence = f"Expected the dtype {expected.dtype}, got {found.dtype}; the numbers agree."
    if sentence is not None:
        raise AssertionError(f"{what or name_of_the_test()}: {decapitalized(sentence)}")


def name_of_the_test() -> str:
    """The name of the running test in words: test_mask_hides_later_keys -> mask hides later keys"""
    running = os.environ.get("PYTEST_CURRENT_TEST", "the result")  # "file.py::test_x[y] (call)"
    name = running.split("::")[-1].split("[")[0].split(" (")[0]
    return name.removeprefix("test_").replace("_", " ")
