"""separate_magnitudes: the rounding error of the rest, the memory, and plain rounding beside it."""

import literal_separate_magnitudes as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm, tiny_model

from minitx import fast
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.model import Linear
from minitx.precompute.separate_magnitudes import OutlierLinear, outliers, pack, unpack
from minitx.technique import apply, kinds
from minitx.tree import nbytes, walk

rng = np.random.default_rng(0)
W, B = rng.standard_t(3, (64, 10)), rng.normal(size=10)  # heavy tails
IDS = np.arange(20) * 7 % 258


def test_worked_example_by_hand():
    """A quarter of 4 weights is one: -100 stays in float. The rest reaches 7, and 4 bits reach 7 as
    well, so the scale is 1: -3.4 becomes -3 and 1.6 becomes 2. Without it the scale is 100 / 7, and
    1.6 is rounded to 0."""
    w = np.array([[7.0], [-100.0], [-3.4], [1.6]])
    part = OutlierLinear.of(Linear(w), 4, 0.25)
    assert part.rows.tolist() == [[1]] and part.values.tolist() == [[-100.0]]
    assert part.scale.tolist() == [1.0]
    assert part.w.tolist() == [[7.0], [-100.0], [-3.0], [2.0]]
    plain = OutlierLinear.of(Linear(w), 4, 0.0)
    assert plain.rows.shape == (0, 1) and plain.w[3, 0] == 0


@pytest.mark.parametrize("bits, share", [(4, 0.05), (2, 0.2), (8, 0.0), (3, 1.0)])
def test_separate_magnitudes_equals_the_literal_version(bits, share):
    part = OutlierLinear.of(Linear(W), bits, share)
    for o, column in enumerate(W.T.tolist()):
        _, scale, large = literal.separate(column, bits, share)
        assert dict(zip(part.rows[:, o].tolist(), part.values[:, o].tolist())) == large
        assert part.scale[o] == pytest.approx(scale)
        assert_same(part.w[:, o], literal.weights(column, bits, share), tolerance=1e-12)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
def test_rest_is_off_by_half_a_scale_at_most(bits, share):
    part, k = OutlierLinear.of(Linear(W), bits, share), outliers(64, share)
    assert k == {0.0: 0, 0.01: 1, 0.1: 6, 0.5: 32}[share]
    error = abs(part.w - W)
    assert (error <= part.scale / 2 + 1e-12).all()
    largest = np.sort(abs(W), axis=0)[64 - k :]
    assert_same(np.sort(abs(part.values), axis=0), largest)
    assert_same(np.take_along_axis(error, part.rows.astype(int), 0), 0)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("outputs", [1, 7, 8, 19])
def test_unpack_inverts_pack(bits, outputs):
    codes = rng.integers(0, 2**bits, (5, outputs))
    planes = pack(codes, bits)
    assert_same(unpack(planes, outputs), codes)
    assert planes.shape == (5, bits, -(-outputs // 8)) and planes.dtype == np.uint8


def test_pack_by_hand():
    planes = pack(np.array([[5, 1, 2]]), 3)  # 101, 001, 010
    assert planes.tolist() == [[[0b11000000], [0b00100000], [0b10000000]]]


def test_outputs_are_products_with_the_rebuilt_weights():
    part, x = OutlierLinear.of(Linear(W, B), 4, 0.05), rng.normal(size=(3, 5, 64))
    assert_same(part(x), x @ part.w + B, atol=1e-12)
    assert_same(part.outputs(x, slice(4, None)), part(x)[..., 4:])


def rounded(w, bits, groups):
    """Plain rounding, a scale for each of ``groups`` groups of inputs."""
    found = []
    for piece in np.array_split(w, groups):
        scale = abs(piece).max(0) / (2 ** (bits - 1) - 1)
        found.append(np.rint(piece / scale) * scale)
    return np.concatenate(found)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_heavy_tails_are_nearer_than_by_plain_rounding_at_the_same_memory(bits):
    """Nearer than groups that take as much memory, and those than a scale per output."""
    w = rng.standard_t(3, (256, 40))
    k = 5
    part = OutlierLinear.of(Linear(w), bits, k / 256)
    groups = round((32 + k * (32 + 8)) / 32)  # as much memory, see lab/costs
    errors = [np.linalg.norm(found - w) for found in (part.w, rounded(w, bits, groups))]
    assert errors[0] < errors[1] < np.linalg.norm(rounded(w, bits, 1) - w)
    assert_same(OutlierLinear.of(Linear(w), bits, 0).w, rounded(w, bits, 1), tolerance=1e-7)


def test_zero_weights_stay_zero_and_share_1_keeps_all():
    zero = OutlierLinear.of(Linear(np.zeros((4, 3), np.float32)), 4, 0.25)
    assert not zero.w.any() and zero.w.dtype == np.float32
    w = W.astype(np.float32)
    assert_same(OutlierLinear.of(Linear(w), 2, 1.0).w, w)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_counts_are_those_of_the_formula(family):
    dense = tiny_lm(family)
    expected, errors = dense.logits(IDS), []
    for share in (0.0, 0.1, 0.5, 1.0):
        lm = apply(dense, {"separate_magnitudes": {"bits": 4, "share": share}})
        found = lm.logits(IDS)
        assert found.dtype == np.float32
        errors.append(abs(found - expected).max())
        saved = nbytes(dense) - nbytes(lm)
        linears = [n.w.shape for _, n in walk(dense) if type(n) is Linear]
        predicted = [  # outputs fill whole bytes here, and rows have 8 bits
            outputs * (4 * inputs - inputs * 4 // 8 - 4 - outliers(inputs, share) * 5)
            for inputs, outputs in linears
            if share < 1  # which leaves every matrix as it is
        ]
        assert saved == sum(predicted)
        with counting(lm) as counts:
            lm.logits(IDS)
        with counting(dense) as plain:
            dense.logits(IDS)
        assert counts.total().multiply_adds == plain.total().multiply_adds
        assert plain.total().weight_bytes - counts.total().weight_bytes == saved
    assert errors[0] > errors[2] > errors[3] == 0


@pytest.mark.parametrize("share", [1.0, 0.98])
def test_matrix_that_keeps_every_weight_stays_as_it_is(share, monkeypatch):
    """Also in its layout: column-major products round differently. round(0.98 * 24) = 24."""
    monkeypatch.setattr(fast, "LARGE", 100)
    lm = to_column_major(tiny_lm(model=tiny_model(width=24, hidden=24, heads=3, kv_heads=3)))
    found = apply(lm, {"separate_magnitudes": {"share": share}})
    assert OutlierLinear not in kinds(found)
    assert_same(found.logits(IDS), lm.logits(IDS))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bits": 1}, "bits must be an integer, 2 to 8; got 1."),
        ({"bits": 9}, "bits must be an integer, 2 to 8; got 9."),
        ({"share": -0.1}, "share must be a number, 0 to 1; got -0.1."),
        ({"share": 1.5}, "share must be a number, 0 to 1; got 1.5."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=f"^separate_magnitudes: {message}"):
        apply(tiny_lm(), {"separate_magnitudes": options})
