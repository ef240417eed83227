"""The arithmetic of table lookup: worked examples, the literal twin, and exactness bit for bit."""

import literal_lut as literal
import numpy as np
import pytest

from minitx.precompute.lut import bit_serial
from minitx.precompute.lut.bit_serial import (
    BitSerialLinear,
    bit_serial_sums,
    in_codes,
    planes,
    signed_sums,
)
from minitx.precompute.lut.centroid_table import CentroidLinear, Codebook
from minitx.precompute.lut.kmeans import kmeans
from minitx.precompute.lut.product_table import (
    FoldedLinear,
    IntegerLinear,
    ProductTable,
    TableLinear,
    folded_bytes,
    pack,
    rounded,
    table_bytes,
    unpack,
)
from minitx.shared import table_reads
from minitx.shared.symmetric import quantize_symmetric

RNG = np.random.default_rng(3)
X = np.array([[0.9, -0.4, 0.2, 0.6]])
W = np.array([[0.5, -1], [1, 0.25], [-0.5, 0.75], [0.25, 1]])
BITS = [(8, 8, 1), (4, 4, 1), (4, 4, 2), (3, 4, 2), (3, 3, 3), (2, 2, 4), (3, 2, 2), (5, 2, 1)]


def every_kind(w, b, rows):
    """One part of every kind for a matrix w (D, N)."""
    half = [BitSerialLinear.of(w, b, 3, 4, half) for half in (True, False)]
    book = Codebook.of(rows, 8, 3, 0)
    tables = [
        TableLinear.of(ProductTable.of(4, 3, 2, layout), w, b)
        for layout in ("vertical", "horizontal")
    ]
    others = [FoldedLinear.of(w, b, 4, 2), CentroidLinear.of(book, w, b)]
    return [*tables, *others, *half, IntegerLinear.of(w, b, 4, 3)]


# Products of whole numbers -----------------------------------------------------------------------


def test_worked_example_of_three_and_two_bits():
    xi, xs = quantize_symmetric(X, 3)
    wi, ws = rounded(W, 2)
    np.testing.assert_allclose(xs, [0.3])
    np.testing.assert_array_equal(xi, [[3, -1, 1, 2]])
    np.testing.assert_array_equal(ws, [1, 1])
    np.testing.assert_array_equal(wi, [[0, -1], [1, 0], [0, 1], [0, 1]])
    table = ProductTable.of(3, 2, 2, "vertical")
    part = TableLinear.of(table, W, None)
    ca = pack(xi, 3, 2)
    np.testing.assert_array_equal(ca, [[31, 53]])
    np.testing.assert_array_equal(part.codes, [[14, 9], [10, 15]])
    np.testing.assert_array_equal(table.entries[ca[0][:, None], part.codes], [[-1, -3], [0, 3]])
    np.testing.assert_array_equal(table.sums(ca, part.codes), [[-1, 0]])
    np.testing.assert_allclose(part(X), [[-0.3, 0]])
    np.testing.assert_allclose(X @ W, [[0.1, -0.25]])


def test_worked_example_of_four_bits():
    xi, _ = quantize_symmetric(X, 4)
    wi, _ = rounded(W, 4)
    np.testing.assert_array_equal(xi, [[7, -3, 2, 5]])
    np.testing.assert_array_equal(wi, [[4, -7], [7, 2], [-4, 5], [2, 7]])
    part = TableLinear.of(ProductTable.of(4, 4, 2, "vertical"), W, None)
    np.testing.assert_array_equal(part.table.sums(pack(xi, 4, 2), part.codes), [[9, -10]])
    np.testing.assert_allclose(part(X), [[0.16531, -0.18367]], atol=5e-6)


@pytest.mark.parametrize("layout", ["vertical", "horizontal"])
@pytest.mark.parametrize("ba, bw, d", BITS)
def test_reads_are_the_integer_product_bit_for_bit(ba, bw, d, layout):
    """17 inputs, which no d above 1 divides; the largest digits that rounding makes are there."""
    a, w = (1 << ba - 1) - 1, (1 << bw - 1) - 1
    xi = RNG.integers(-a, a + 1, (40, 17))
    wi = RNG.integers(-w, w + 1, (17, 23))
    xi[0], wi[:, 0], xi[1] = a, w, -a
    table = ProductTable.of(ba, bw, d, layout)
    cw = pack(wi.T, bw, d).T.astype(np.uint32)
    np.testing.assert_array_equal(table.sums(pack(xi, ba, d), cw), xi @ wi)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ba, bw, d", BITS)
def test_the_part_is_the_integer_part_bit_for_bit(ba, bw, d, dtype):
    x, w, b = (RNG.normal(size=s).astype(dtype) for s in ((3, 5, 17), (17, 23), (23,)))
    found = TableLinear.of(ProductTable.of(ba, bw, d, "vertical"), w, b)
    expected = IntegerLinear.of(w, b, ba, bw)
    assert found(x).dtype == dtype
    np.testing.assert_array_equal(found(x), expected(x))


@pytest.mark.parametrize("bits, d", [(2, 3), (3, 2), (4, 2), (8, 1)])
def test_codes_stand_for_their_numbers(bits, d):
    every = unpack(bits, d)
    assert every.min() == -(1 << bits - 1) and every.max() == (1 << bits - 1) - 1
    np.testing.assert_array_equal(pack(every, bits, d)[:, 0], np.arange(1 << bits * d))


def test_what_is_missing_in_a_group_is_the_value_0():
    np.testing.assert_array_equal(pack(np.array([[1]]), 4, 2), [[9 + (8 << 4)]])


@pytest.mark.parametrize(
    "bits, size",
    [((4, 4, 1), 256), ((4, 4, 2), 64 << 10), ((3, 4, 2), 16 << 10), ((3, 3, 3), 256 << 10)]
    + [((2, 2, 4), 64 << 10), ((8, 8, 1), 128 << 10), ((4, 4, 3), 32 << 20)],
)
def test_table_sizes(bits, size):
    """The last two take 16 bits an entry: they reach 127 * 127 and 3 * 7 * 7 = 147."""
    assert table_bytes(*bits) == size
    if size < 1 << 20:
        assert ProductTable.of(*bits, "vertical").entries.nbytes == size


def test_entries_that_are_never_read_do_not_overflow():
    """(-8)(-8) 2 = 128 is no int8; -8 is a legal digit that rounding never makes."""
    entries = ProductTable.of(4, 4, 2, "vertical").entries
    assert entries.dtype == np.int8 and entries.max() == 98 and entries.min() == -98


def test_twin_of_product_and_folded():
    for ba, bw, d in ((3, 2, 2), (2, 2, 3), (4, 4, 1)):
        x, w = RNG.normal(size=7), RNG.normal(size=(7, 4))
        y, acc, ca, codes, _ = literal.product(x.tolist(), w.tolist(), ba, bw, d)
        part = TableLinear.of(ProductTable.of(ba, bw, d, "horizontal"), w, None)
        xi, _ = quantize_symmetric(x[None], ba)
        np.testing.assert_array_equal(pack(xi, ba, d)[0], ca)
        np.testing.assert_array_equal(part.codes.T, codes)
        np.testing.assert_array_equal(part.table.sums(pack(xi, ba, d), part.codes)[0], acc)
        np.testing.assert_allclose(part(x), y, rtol=1e-14)
        found = FoldedLinear.of(w, None, ba, d)(x)
        np.testing.assert_allclose(found, literal.folded(x.tolist(), w.tolist(), ba, d), rtol=1e-12)


def test_folded_is_the_product_with_the_rounded_input():
    x, w, b = RNG.normal(size=(6, 17)), RNG.normal(size=(17, 9)), RNG.normal(size=9)
    xi, xs = quantize_symmetric(x, 4)
    for d in (1, 2, 3):
        part = FoldedLinear.of(w, b, 4, d)
        np.testing.assert_allclose(part(x), (xi * xs[:, None]) @ w + b, atol=1e-13)
        assert part.tables.nbytes == folded_bytes(17, 9, 4, d, 8)
    assert folded_bytes(768, 3072, 4, 2, 1) == 288 << 20
    assert folded_bytes(768, 3072, 4, 1, 1) == 36 << 20


def test_more_bits_are_nearer():
    x, w = RNG.normal(size=(20, 32)), RNG.normal(size=(32, 16))
    parts = [TableLinear.of(ProductTable.of(b, b, 1, "vertical"), w, None) for b in (2, 4, 6, 8)]
    errors = [abs(part(x) - x @ w).max() for part in parts]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.05 * errors[0]


def test_an_outlier_token_does_not_touch_the_others():
    x, w = RNG.normal(size=(5, 32)), RNG.normal(size=(32, 16))
    part = TableLinear.of(ProductTable.of(4, 4, 2, "vertical"), w, None)
    before = part(x)
    x[2] *= 1000
    np.testing.assert_array_equal(np.delete(part(x), 2, 0), np.delete(before, 2, 0))


def test_zeros():
    for part in every_kind(np.zeros((5, 3)), None, RNG.normal(size=(9, 5))):
        np.testing.assert_array_equal(part(np.ones((2, 5))), np.zeros((2, 3)))
    part = TableLinear.of(ProductTable.of(4, 4, 2, "vertical"), W, np.ones(2))
    np.testing.assert_array_equal(part(np.zeros((1, 4))), [[1, 1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_numbers_that_are_none_are_not_hidden(bad):
    x, w = RNG.normal(size=(3, 5)), RNG.normal(size=(5, 4))
    table, folded, _, *bits, integer = every_kind(w, None, x)[1:]
    for part in (table, folded, *bits, integer):
        right = part(x)
        damaged = x.copy()
        damaged[1, 2] = bad
        found = part(damaged)
        assert not np.isfinite(found[1]).any()
        np.testing.assert_array_equal(found[::2], right[::2])


# Bit by bit --------------------------------------------------------------------------------------


def test_worked_example_of_bits():
    x, u = np.array([[3.0, -1, 2, 5]]), np.array([[3], [0], [2], [1]])
    L = [-9, -3, -11, -5, -5, 1, -7, -1, 1, 7, -1, 5, 5, 11, 3, 9]
    np.testing.assert_array_equal(signed_sums(x, 4, False), [[L]])
    np.testing.assert_array_equal(signed_sums(x, 4, True), [[L[:8]]])
    index = planes(u, 2, 4)
    np.testing.assert_array_equal(index[:, 0, 0], [9, 5])
    assert (L[9], L[5]) == (7, 1)
    for half in (True, False):
        assert bit_serial_sums(x, index, 4, half) == 18
        part = BitSerialLinear(index, np.ones(1), np.full(1, 2.0), 4, half)
        assert part(x) == 0
    y, tables, places = literal.bit_serial(x[0].tolist(), u.tolist(), [2], [1], 2, 4)
    assert (y, tables, places) == ([0], [L], [[[9]], [[5]]])


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("g", [1, 2, 4])
@pytest.mark.parametrize("b", [1, 2, 3, 4])
def test_bits_give_the_integer_product_bit_for_bit(b, g, half):
    """18 inputs, which 4 does not divide, and a zero point for each output."""
    x = RNG.integers(-100, 101, (7, 18)).astype(np.float64)
    u, zero = RNG.integers(0, 2**b, (18, 11)), RNG.integers(0, 2**b, 11).astype(np.float64)
    part = BitSerialLinear(planes(u, b, g), np.ones(11), zero, g, half)
    np.testing.assert_array_equal(part(x), x @ (u - zero))


def test_bits_with_real_inputs_are_the_rounded_matrix():
    x, w, b = RNG.normal(size=(6, 18)), RNG.normal(size=(18, 9)), RNG.normal(size=9)
    u, scale, zero = in_codes(w, 3)
    assert u.min() == 0 and u.max() == 7
    expected = x @ (scale * (u - zero)) + b
    np.testing.assert_allclose(BitSerialLinear.of(w, b, 3, 4, True)(x), expected, atol=1e-13)
    for row, y in zip(x, expected):
        twin, _, _ = literal.bit_serial(row.tolist(), u.astype(int).tolist(), zero, scale, 3, 4)
        np.testing.assert_allclose(twin + b, y, atol=1e-13)
    assert abs(scale * (u - zero) - w).max() <= scale.max()


# Prototypes --------------------------------------------------------------------------------------


def test_worked_example_of_prototypes():
    P = np.array([[[1.0, 0], [0, 1], [-1, -1]]])
    book = Codebook(P, (P**2).sum(-1) / 2)
    w, x = np.array([[2.0, 1], [1, -3]]), np.array([[0.8, 0.3]])
    part = CentroidLinear.of(book, w, None)
    np.testing.assert_array_equal(part.tables, [[[2, 1], [1, -3], [-3, 2]]])
    np.testing.assert_array_equal(book(x), [[0]])
    np.testing.assert_array_equal(part(x), [[2, 1]])
    np.testing.assert_allclose(x @ w, [[1.9, -0.1]])
    assert literal.centroid([0.8, 0.3], w.tolist(), P.tolist()) == ([2, 1], [0])
    np.testing.assert_array_equal(book(np.array([[0.5, 0.5]])), [[0]])  # equally near: the smaller


def test_the_whole_error_is_that_of_the_reconstruction():
    """80 inputs, two parts of 3: fewer errors with more prototypes, none with one for each."""
    x, w = RNG.normal(size=(80, 6)), RNG.normal(size=(6, 5))
    errors = []
    for Kc in (2, 8, 32, 80):
        book = Codebook.of(x, Kc, 3, 0)
        y = CentroidLinear.of(book, w, None)(x)
        np.testing.assert_allclose(y, book.reconstruct(x) @ w, atol=1e-12)
        errors.append(((y - x @ w) ** 2).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < errors[0] / 4 and errors[3] < 1e-20


def test_twin_of_prototypes():
    rows, w = RNG.normal(size=(50, 7)), RNG.normal(size=(7, 4))
    part = CentroidLinear.of(Codebook.of(rows, 4, 3, 0), w, None)
    for x in rows[:10]:
        y, codes = literal.centroid(x.tolist(), w.tolist(), part.codebook.prototypes.tolist())
        np.testing.assert_array_equal(part.codebook(x[None])[0], codes)
        np.testing.assert_allclose(part(x), y, atol=1e-12)


def test_kmeans_finds_clusters_and_is_the_same_each_time():
    centres = np.array([[[0.0, 0], [9, 0], [0, 9]], [[5, 5], [-5, 5], [5, -5]]])
    points = centres[:, RNG.integers(0, 3, 60)] + RNG.normal(0, 0.1, (2, 60, 2))
    found = kmeans(points, 3, 0)
    assert found.shape == (2, 3, 2)
    np.testing.assert_array_equal(found, kmeans(points, 3, 0))
    for one, right in zip(found, centres):
        distance = abs(one[:, None] - right).max(-1)
        assert (distance.min(0) < 0.2).all()


def test_kmeans_of_few_different_points_is_these_points():
    points = np.repeat(RNG.normal(size=(2, 5, 3)), 7, axis=1)
    found = kmeans(points, 8, 1)
    for one, given in zip(found, points):
        assert abs(one[None] - given[:, None]).max(-1).min(1).max() < 1e-15


# What all kinds keep to --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("kind", range(7))
@pytest.mark.parametrize("N", [1, 9, 64])
def test_a_token_alone_among_others_and_in_a_batch(kind, dtype, N, monkeypatch):
    x, w, b = (RNG.normal(size=s).astype(dtype) for s in ((4, 25, 22), (22, N), (N,)))
    part = every_kind(w, b, x.reshape(-1, 22))[kind]
    whole = part(x)
    assert whole.shape == (4, 25, N) and whole.dtype == dtype
    single = [part(x[i, t]) for i in range(4) for t in range(25)]
    np.testing.assert_array_equal(single, whole.reshape(100, N))
    np.testing.assert_array_equal(part(x[2]), whole[2])
    strided = np.concatenate([x, x], -1)[..., :22]  # not in one piece of memory
    np.testing.assert_array_equal(part(strided), whole)
    for first in {0, N // 2}:
        np.testing.assert_allclose(
            part.outputs(x, slice(first, None)), whole[..., first:], rtol=1e-4, atol=1e-5
        )
    for module in (table_reads, bit_serial):  # a few tokens, or a few columns, at a time
        monkeypatch.setattr(module, "READS", 300)
    np.testing.assert_allclose(part(x), whole, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal([part(row) for row in x[0]], part(x)[0])
