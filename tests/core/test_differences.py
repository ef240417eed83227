"""Every sentence about two arrays that differ is said when it is true (minitx/differences.py)."""

import numpy as np
import pytest
from same import assert_same

from minitx.differences import describe, named_factor

RNG = np.random.default_rng(3)
X = RNG.normal(size=(4, 6))  # 4 tokens, 6 columns
NOISE = RNG.normal(size=(4, 6))


def changed(where, value=None):
    """X, with other numbers somewhere."""
    y = X.copy()
    y[where] = NOISE[where] if value is None else value
    return y


FIRST = f"The first difference is at token 0, column 0: expected {X[0, 0]:.4g}, got "

SENTENCES = {
    "factor": (X * 8**0.5, "All are off by the factor 2.828 = sqrt(8)."),
    "inverse": (X / 8, "All are off by the factor 0.125 = 1/8."),
    "odd factor": (X * 1.2345, "All are off by the factor 1.234."),
    "zero": (X * 0, "Everything is 0."),
    "sign": (-X, "The sign is wrong, everywhere."),
    "some signs": (X * [1, 1, 1, -1, -1, -1], "Only signs are wrong. Column 3 and all later colu"),
    "shift from before": (np.roll(X, 1, 0), "Each token holds what belongs to the token before it"),
    "shift from after": (np.roll(X, -1, 0), "Each token holds what belongs to the token after it"),
    "column shift": (np.roll(X, 1, 1), "Each column holds what belongs to the column before it"),
    "halves": (np.roll(X, 3, 1), "The two halves of the columns are swapped."),
    "reverse": (X[::-1], "The tokens are in reverse order."),
    "order": (
        X[[0, 3, 2, 1]],
        "The tokens are the expected ones in another order: token 1 holds what belongs to token 3.",
    ),
    "columns": (X[:, [0, 2, 1, 3, 4, 5]], "column 1 holds what belongs to column 2."),
    "row factors": (X * [[2], [4], [3], [5]], "off by a factor of its own: 2 at token 0, 4 at"),
    "column factors": (X * [2, 1, 3, 1, 1, 1], "of its own: 2 at column 0, 3 at column 2."),
    "offset": (X + 0.5, "All are too large by 0.5."),
    "less": (X - 0.5, "All are too small by 0.5."),
    "later": (changed(np.s_[2:]), "Token 2 and all later tokens differ; tokens 0 to 1 agree."),
    "all but the first": (changed(np.s_[1:]), "Token 1 and all later tokens differ; token 0 agr"),
    "one row": (changed(2), "Only token 2 differs."),
    "some rows": (changed(np.s_[1:3]), "Only tokens 1 to 2 differ."),
    "every second": (changed(np.s_[:, ::2]), "Only every second column differs, from column 0 on."),
    "all but one": (changed(np.s_[:, [0, 1, 3, 4, 5]]), "All columns but column 2 differ."),
    "scattered": (changed(np.s_[:, [0, 2, 3]]), "Only columns 0, 2, 3 differ."),
    "factor of some": (X * [[1], [2], [2], [1]], "Only tokens 1 to 2 differ. There, all are off b"),
    "scattered numbers": (changed(np.eye(4, 6) + np.eye(4, 6, 2) > 0), "8 of 24 numbers differ."),
    "nan": (changed(np.s_[:, 1], np.nan), "4 of 24 numbers are NaN: only column 1 differs."),
    "infinite": (changed(np.s_[3], np.inf), "6 of 24 numbers are NaN or infinite: only token 3"),
    "small": (X + 1e-7 * NOISE, "of the largest number, but only 1e-09 is allowed: perhaps a step"),
    "transposed": (X.T, "Expected the shape (4, 6), got (6, 4): it is transposed."),
    "other way round": (NOISE.T, "got (6, 4): rows and columns are swapped."),
    "too few": (X[:3], "Expected the shape (4, 6), got (3, 6): 1 too few along axis 0."),
    "flat": (X.ravel(), "got (24,): as many numbers, in another shape."),
    "other": (X[0], "Expected the shape (4, 6), got (6,)."),
    "booleans": (X > 0, "Expected the dtype float64, got bool."),
    "complex": (X * 1j, "Expected the dtype float64, got complex128."),
}


@pytest.mark.parametrize("found, sentence", SENTENCES.values(), ids=SENTENCES)
def test_difference_is_said_in_a_sentence(found, sentence):
    said = describe(found, X)
    assert said is not None and sentence in said, said
    if found.shape == X.shape and found.dtype == X.dtype and abs(found - X)[0, 0] > 1e-3:
        assert said.startswith(FIRST + f"{found[0, 0]:.4g}.")


def test_equal_arrays_have_no_difference():
    assert describe(X, X) is None
    assert describe(X + 1e-12, X) is None
    assert describe(X + 1e-12, X, tolerance=1e-13) is not None
    bad = changed(0, np.nan)
    assert describe(bad, bad) is None, "NaN in the same place"
    assert describe(bad, changed(0, np.inf)) is not None
    assert describe(X[:0], X[:0]) is None
    assert describe([1, 2], [1.0, 2.0]) is None


def test_tolerance_is_relative_to_the_largest_number_expected():
    assert describe(1e6 * X + 1e-4, 1e6 * X) is None
    assert describe(1e-6 * X + 1e-14, 1e-6 * X) is not None


def test_only_difference_is_not_described_twice():
    assert describe(changed((1, 2), 5), X) == (
        f"The only difference is at token 1, column 2: expected {X[1, 2]:.4g}, got 5."
    )
    assert describe([1, 2, 3], [1, 2, 4]) == (
        "The only difference is at index 2: expected 4, got 3."
    )


def test_one_number_is_off_by_a_factor_only_if_the_factor_has_a_name():
    assert describe(0.0, 0.3) == "Expected 0.3, got 0."
    assert describe(0.31, 0.3) == "Expected 0.3, got 0.31."
    assert describe(0.3 * 8**0.5, 0.3).endswith("It is off by the factor 2.828 = sqrt(8).")
    assert describe(-0.3, 0.3) == "Expected 0.3, got -0.3. The sign is wrong."


def test_one_number_may_be_0_or_huge():
    for found in (0.0, 1e-200, 1e200):
        assert describe(np.array(found), np.array(3.0)) == f"Expected 3, got {found:.4g}."
    assert describe(np.zeros(3), np.array([0, 3.0, 0])).startswith("The only difference")


def test_axes_name_the_place():
    heads = RNG.normal(size=(2, 4, 6))
    other = heads.copy()
    other[1, 2:] += 1 + NOISE[2:]
    said = describe(other, heads, axes=("head", "position", "column"))
    assert "at head 1, position 2, column 0:" in said
    assert "Only head 1 differs." in describe(other, heads, ("head", "position", "column"))
    assert "at axis 0 index 1, token 2, column 0:" in describe(other, heads)
    assert "at row 2, column 0:" in describe(other[1], heads[1], axes=None)
    assert "Query 1 and all later queries differ; query 0 agrees." in describe(
        changed(np.s_[1:]), X, axes=("query", "key")
    )


def test_booleans_and_words_are_compared():
    assert "True and False are exchanged." in describe(X <= 0, X > 0)
    assert "Only token 2 differs." in describe(np.where(np.eye(4)[2:3].T, X <= 0, X > 0), X > 0)
    assert describe(["a", "b"], ["a", "c"]) == (
        "The only difference is at index 1: expected c, got b."
    )


def test_two_rows_are_swapped_and_equal_rows_are_not_moved():
    assert "The two tokens are swapped." in describe(X[[1, 0]], X[:2])
    equal = np.ones((4, 1)) * X[0]
    for row in (0, 3):
        other = equal.copy()
        other[row] = NOISE[row]
        assert describe(other, equal).endswith(f"Only token {row} differs."), "no shift by one"


def test_numbers_whose_squares_overflow_are_described():
    assert describe(X * -1e300, X * 1e300).endswith("Only signs are wrong.")


def test_axis_with_the_smaller_share_is_named():
    said = describe(changed(np.s_[1:3, 0]), X)
    assert said.endswith("Only column 0 differs.")  # 1 of 6 columns, 2 of 4 tokens


def test_single_numbers_do_not_count_as_factors_of_their_rows():
    said = describe(np.diag([2.0, 3, 4, 5]), np.eye(4))
    assert said.endswith("4 of 16 numbers differ.")


@pytest.mark.parametrize(
    "factor, words",
    [(3, "3"), (-2, "-2"), (0.5, "0.5 = 1/2"), (2**0.5, "1.414 = sqrt(2)"), (1.0001, "1.0001")]
    + [(8**-0.5, "0.3536 = 1/sqrt(8)"), (-(8**0.5), "-2.828 = -sqrt(8)"), (1e-9, "1e-09")],
)
def test_factor_gets_its_name(factor, words):
    assert named_factor(factor) == words


def test_assert_same_begins_with_the_property():
    assert_same(X, X, "rotated keys")
    with pytest.raises(AssertionError) as error:
        assert_same(-X, X, "rotated keys", axes=("position", "column"))
    assert str(error.value) == (
        f"rotated keys: the first difference is at position 0, column 0: expected {X[0, 0]:.4g}, "
        f"got {-X[0, 0]:.4g}. The sign is wrong, everywhere."
    )


def test_assert_same_compares_exactly_unless_told_otherwise():
    assert_same(X + 1e-9, X, "x", tolerance=1e-8)
    with pytest.raises(
        AssertionError, match="^x: .* small, at most 3.0e-10 of the largest number.$"
    ):
        assert_same(X + 1e-9, X, "x")


def test_assert_same_names_the_test_that_runs():
    with pytest.raises(
        AssertionError, match="^assert same names the test that runs: expected 2, g"
    ):
        assert_same(1, 2)


def test_assert_same_adds_an_absolute_tolerance():
    assert_same([1e-9, 100], [0, 100], "x", atol=1e-8)
    with pytest.raises(AssertionError, match="^x: the only difference is at index 0"):
        assert_same([1e-7, 100], [0, 100], "x", atol=1e-8)
    assert_same([1e-9], [0.0], "x", atol=1e-8)


def test_assert_same_takes_one_number_for_all():
    assert_same(np.zeros((2, 3)), 0, "x")
    with pytest.raises(
        AssertionError, match="^x: the only difference is at row 1, column 2: expec"
    ):
        assert_same([[0, 0, 0], [0, 0, 1]], 0, "x")


def test_assert_same_compares_dtypes_if_asked():
    single = X.astype(np.float32)
    assert_same(single, single.astype(np.float64), "x")
    with pytest.raises(AssertionError, match="x: expected the dtype float64, got float32"):
        assert_same(single, single.astype(np.float64), "x", dtype=True)


def test_nearly_equal_numbers_are_shown_with_more_digits():
    assert describe(X * (1 + 1e-15), X, tolerance=0).endswith("of the largest number.")
    assert describe(0.25000001, 0.25).startswith("Expected 0.25, got 0.25000001.")
