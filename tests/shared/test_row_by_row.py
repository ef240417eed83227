"""Rows of a batch, run one after another: without their padding, each with its own state."""

import numpy as np
import pytest
from same import assert_same

from minitx.errors import MinitxError
from minitx.shared.row_by_row import row_by_row
from minitx.state import State
from minitx.tree import Part, part


@part
class FromMean(Part):
    """A stack that looks at the whole sequence: subtracts its mean. Records what it was given."""

    given: list

    def __call__(self, x, state: State):
        self.given.append((x.shape, state.tokens.array.tolist(), state.prompt))
        return x - x.mean(0)


def test_rows_run_alone_and_without_padding():
    # row 0: (1, 3), mean 2: (-1, 1). Row 1 begins at position 1: (5), mean 5: (0), padding (0).
    x = np.array([[[1.0], [3.0]], [[9.0], [5.0]]])
    state = State(1, 8, np.array([0, 1]), remember=False)
    state.prompt = 2
    stack = FromMean([])
    found = row_by_row(stack, x, state, "it")
    assert_same(found, [[[-1], [1]], [[0], [0]]], "a row saw another, or padding")
    assert stack.given == [((2, 1), [0, 1], 2), ((1, 1), [0], 1)]


def test_batch_of_two_dimensions_keeps_its_shape():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 5))
    found = row_by_row(FromMean([]), x, State(1, 8, remember=False), "it")
    assert_same(found, x - x.mean(-2, keepdims=True), tolerance=1e-7)


def test_batch_with_a_cache_is_refused_in_one_sentence():
    with pytest.raises(MinitxError) as caught:
        row_by_row(FromMean([]), np.zeros((2, 4, 5)), State(1, 8), "it keeps different tokens")
    assert str(caught.value) == (
        "it keeps different tokens and got a batch of shape (2, 4) with a KV cache; give one "
        "sequence, or use lm.generate, which decodes the prompts of a batch one by one."
    )
