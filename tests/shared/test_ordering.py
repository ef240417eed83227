"""Orders of the terms of dot products, and sums of some of the terms."""

import numpy as np
import pytest
from same import assert_same

from minitx.ledger import counting
from minitx.model import NoNorm
from minitx.shared import ordering
from minitx.shared.ordering import by_output, few_at_a_time, partial_sums

W = np.array([[1.0, -2], [-3, 1], [2, 4]])  # (in, out)


def test_partial_sums_by_hand():
    """Output 0 reads its weights as -3 2 1, output 1 as 4 -2 1. With x = 1 10 100 the first two
    terms of output 0 are -3*10 + 2*100 = 170, those of output 1 are 4*100 - 2*1 = 398."""
    w, order = by_output(W, ordering.largest_first(W))
    assert w.tolist() == [[-3, 2, 1], [4, -2, 1]] and order.tolist() == [[1, 2, 0], [2, 0, 1]]
    x, both = np.array([[1.0, 10, 100]]), np.array([0, 1])
    with counting(NoNorm()) as counts:
        assert partial_sums(x, w, order, both * 0, both, 0, 2).tolist() == [170, 398]
    work = counts.total()
    assert (work.multiply_adds, work.weight_bytes) == (4, 4 * (8 + 1)), "a weight and its index"
    assert partial_sums(x, w, order, both * 0, both, 2, 5).tolist() == [1, 10], "the rest"


@pytest.mark.parametrize("order", ["positives_first", "largest_rows_first", "original"])
def test_all_terms_of_all_pairs_are_the_product(order):
    rng = np.random.default_rng(0)
    x, matrix = rng.standard_normal((4, 6)), rng.standard_normal((6, 5))
    w, order = by_output(matrix, getattr(ordering, order)(matrix))
    tokens, outputs = np.indices((4, 5)).reshape(2, -1)
    found = partial_sums(x, w, order, tokens, outputs, 0, 6).reshape(4, 5)
    assert_same(found, x @ matrix, atol=1e-13)


def test_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(ordering, "GATHERED", 10)
    x, sizes = np.arange(14.0).reshape(7, 1, 2), []
    found = few_at_a_time(lambda rows: (sizes.append(len(rows)), rows * 2)[1], x, 4)
    assert sizes == [2, 2, 2, 1]
    assert_same(found, x * 2)


def test_few_rows_at_a_time_accept_a_step_without_rows():
    for shape in ((0, 3), (2, 0, 3)):
        found = few_at_a_time(lambda rows: rows[:, :2] + 1, np.ones(shape), 1)
        assert found.shape == (*shape[:-1], 2)
