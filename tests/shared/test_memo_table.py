"""The memo table: which key is nearest, how far it is, and which inputs are worth storing."""

import numpy as np
import pytest
from same import assert_same

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.shared.memo_table import MemoTable, cover, principal, within

RNG = np.random.default_rng(2)


def test_nearest_key_and_its_relative_distance_by_hand():
    # keys (2, 0) and (0, 1); x = (1.7, 0.4) is sqrt(0.09 + 0.16) = 0.5 from the first: 0.25 of its
    # length. (0, 1) itself is at distance 0.
    found = MemoTable.of(np.array([[2.0, 0.0], [0.0, 1.0]]), np.eye(2))
    entry, distance = found.nearest(np.array([[1.7, 0.4], [0.0, 1.0]]))
    assert entry.tolist() == [0, 1] and distance.tolist() == [0.25, 0.0]


def test_nearest_is_searched_by_the_basis_and_measured_in_full():
    # By the first coordinate alone, x = (1, 5) is nearest to (1, 0), not to (2, 5).
    keys, basis = np.array([[1.0, 0.0], [2.0, 5.0]]), np.array([[1.0], [0.0]])
    entry, distance = MemoTable.of(keys, basis).nearest(np.array([1.0, 5.0]))
    assert entry == 0 and distance == 5.0


def test_nearest_of_some_keys_looks_at_no_others():
    keys = RNG.standard_normal((20, 6))
    found = MemoTable.of(keys, principal(keys, 6))
    for first, end in ((0, 20), (5, 9), (19, 20)):
        entry, distance = found.nearest_of(keys[7] + 0.01, first, end)
        assert entry == first + abs(keys[first:end] - keys[7] - 0.01).__pow__(2).sum(1).argmin()
        away = np.linalg.norm(keys[entry] - keys[7] - 0.01) / np.linalg.norm(keys[entry])
        assert distance == pytest.approx(away, abs=1e-6)


def test_distance_of_tiny_float32_keys_is_not_0():
    keys = (1e-25 * RNG.standard_normal((20, 6))).astype("f4")  # squares: 0
    found = MemoTable.of(keys, principal(keys, 6))
    assert found.nearest(2 * keys)[1].min() > 0.1


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_keys_that_are_not_finite_are_refused(number):
    keys = RNG.standard_normal((9, 4))
    keys[3, 1] = number
    with pytest.raises(MinitxError, match="NaN or Inf; check the model's weights"):
        principal(keys, 2)


def test_counted_work_of_a_lookup():
    keys = RNG.standard_normal((20, 6))
    found = MemoTable.of(keys, principal(keys, 3))
    with counting(found) as counts:
        found.nearest(RNG.standard_normal((4, 6)))
    assert counts.total().multiply_adds == 4 * (6 * 3 + 20 * 3 + 6), "T (D r + N r + D)"


def test_principal_directions_are_orthonormal_and_vary_most():
    keys = RNG.standard_normal((200, 4)) * [1, 9, 3, 0.1] + 50
    basis = principal(keys, 2)
    assert_same(basis.T @ basis, np.eye(2), atol=1e-12)
    assert abs(basis[1, 0]) > 0.95 and abs(basis[2, 1]) > 0.95, "the widest come first"
    assert principal(keys, 99).shape == (4, 4)


def test_cover_takes_the_key_that_most_others_are_near_first():
    # On a line with radius 0.1 of the key: 10 has 9.5 and 11 near, 9.5 only 10, 5 only itself.
    keys = np.array([[5.0], [9.5], [10.0], [11.0]])
    assert within(keys, 0.1)[:, 2].tolist() == [False, True, True, True]
    assert cover(keys, 0.1, 9).tolist() == [2, 0] and cover(keys, 0.1, 1).tolist() == [2]
    assert cover(keys, 0.0, 9).tolist() == [0, 1, 2, 3], "ties go to the lower index"


def test_cover_stores_equal_keys_once():
    keys = np.repeat(RNG.standard_normal((3, 5)), 4, axis=0)
    assert sorted(cover(keys, 0.0, 99).tolist()) == [0, 4, 8]


def test_distances_in_blocks_equal_those_at_once(monkeypatch):
    keys = RNG.standard_normal((30, 5))
    whole = within(keys, 1.2)
    monkeypatch.setattr("minitx.shared.memo_table.BLOCK", 7)
    assert_same(within(keys, 1.2), whole)
    away = np.linalg.norm(keys[:, None] - keys, axis=-1) / np.linalg.norm(keys, axis=1)
    assert_same(whole, away <= 1.2)
