"""Products with some rows of a matrix: the other rows are neither read nor counted."""

import numpy as np
import pytest
from same import assert_same

from minitx.ledger import counting
from minitx.shared.gathered_rows import (
    NeuronRows,
    at_rows,
    sum_of_rows,
    token_by_token,
    union_of,
)
from minitx.tree import Part, part

RNG = np.random.default_rng(2)


@part
class Summed(Part):
    """sum_of_rows as a part, so that its work is counted."""

    w: np.ndarray

    def __call__(self, x, active):
        rows = union_of(active)
        return sum_of_rows(at_rows(x, active, rows), self.w, rows)


def test_one_token_reads_its_active_rows_only():
    w = np.array([[1.0, 2], [np.nan, np.nan], [3, 4]])  # a row that must not be read
    x, active = np.array([[10.0, 5, 1]]), np.array([[True, False, True]])
    with counting(product := Summed(w)) as counts:
        assert product(x, active).tolist() == [[13, 24]]
    assert counts.total().multiply_adds == 2 * 2 and counts.total().weight_bytes == 2 * 2 * 8


def test_several_tokens_read_the_union_of_their_rows():
    w = np.array([[1.0, 2], [np.nan, np.nan], [3, 4], [5, 6]])
    x = np.array([[10.0, 7, 7, 1], [7, 7, 10, 1]])
    active = np.array([[True, False, False, False], [False, False, True, True]])
    with counting(product := Summed(w)) as counts:
        assert product(x, active).tolist() == [[10, 20], [35, 46]]
    assert counts.total().multiply_adds == 2 * 3 * 2 and counts.total().weight_bytes == 3 * 2 * 8


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3), (2, 1)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equals_the_product_with_zeros(shape, share):
    w, b = RNG.standard_normal((9, 5)), RNG.standard_normal(5)
    x = RNG.standard_normal((*shape, 9))
    active = RNG.random(x.shape) < share
    rows = union_of(active)
    found = NeuronRows(w, b).sum(at_rows(x, active, rows), rows)
    assert_same(found, (x * active) @ w + b, atol=1e-12)


def test_dot_products_are_those_of_the_rows():
    w, b, x = RNG.standard_normal((9, 5)), RNG.standard_normal(9), RNG.standard_normal((4, 5))
    rows = np.array([1, 2, 7])
    found = NeuronRows(w, b).dot(x, rows)
    assert_same(found, (x @ w.T + b)[:, rows], atol=1e-12)


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 3), (0,), (2, 0)])
def test_token_by_token_equals_all_at_once_also_without_tokens(shape):
    w, x = RNG.standard_normal((9, 5)), RNG.standard_normal((*shape, 9))
    found = token_by_token(lambda row: row @ w, x)
    assert found.shape == (*shape, 5)
    assert_same(found, x @ w, atol=1e-12)
