"""How results are compared, and what a student is told whose result has another form."""

from types import SimpleNamespace

import numpy as np
import pytest

from minitx.learn.check import judge
from minitx.learn.exercise import find_exercise
from minitx.learn.in_model import demonstration
from minitx.learn.outcomes import same

X = np.array([1.0, -2.0, 3.0])


@pytest.mark.parametrize(
    "found, expected, equal",
    [
        (X + 1e-12, X, True),
        (X + 1e-6, X, False),
        (1e6 * X + 1e-6, 1e6 * X, True),  # relative to the largest number
        ([1, np.nan, np.inf], [1, np.nan, np.inf], True),
        ([1, np.nan, np.inf], [1, np.nan, -np.inf], False),
        ([1, np.nan, 3], [1, 2, 3], False),
        ([1, 2, 3], [1, np.inf, 3], False),
        (X[:2], X, False),
        (X > 0, X > 0, True),
        (X > 0, np.array([1, 0, 1]), False),  # booleans are no numbers
        ((X, 1), [X, 1], True),
        ({"a": X}, {"b": X}, False),
    ],
)
def test_results_are_the_same_within_rounding(found, expected, equal):
    assert same(found, expected) is equal


def test_function_that_returns_too_few_values_is_told_so():
    e = find_exercise(10)
    answer = SimpleNamespace(quantize=lambda W, bits, group: W, dequantize=e.solution.dequantize)
    verdict = judge(e, answer)
    assert verdict.kind == "form"
    assert verdict.message == "quantize must return 2 values: codes, scales."


def test_error_inside_numpy_is_shown_at_the_student_s_line():
    def fold(gain, bias, W, b):
        return np.vstack([gain, W]), np.linalg.inv(np.ones((2, 3)))

    message = judge(find_exercise(7), SimpleNamespace(fold=fold)).message
    assert "return np.vstack" in message and "LinAlgError" in message


def test_answer_is_shown_in_the_model_of_the_exercise():
    e = find_exercise(7)
    said = demonstration(e, e.solution)
    assert "With your fold inside, the model `stories-relu` writes:\n\nOnce upon a time" in said
    assert "That is the text that minitx's own code writes." in said


def test_answer_as_lists_is_shown_in_the_model_too():
    e = find_exercise(7)
    answer = SimpleNamespace(fold=lambda *case: tuple(x.tolist() for x in e.solution.fold(*case)))
    assert "That is the text that minitx's own code writes." in demonstration(e, answer)
