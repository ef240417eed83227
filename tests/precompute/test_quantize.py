"""Weights in few bits: worked examples, a literal twin, four ways to multiply, counts, refusals."""

import literal_quantize as literal
import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm, tiny_model

import minitx
from minitx.checkpoints.llama2c import Llama2cHeader, decode_values
from minitx.errors import MinitxError
from minitx.lab.compare import log_softmax
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.quantize import Integers, Loaded, Streamed
from minitx.precompute.quantize.groups import (
    asymmetric_codes,
    group_size,
    in_groups,
    symmetric_codes,
)
from minitx.precompute.quantize.scaling import output_error, search
from minitx.shared import packing
from minitx.technique import apply, swap
from minitx.training.calibration import Moments, calibration_texts

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 258, 24)
WAYS = ("stream", "cast", "load", "integers")


# Worked examples ---------------------------------------------------------------------------------


def one_group(numbers):
    return np.array(numbers)[None, :, None]  # (n, G, out)


def test_symmetric_worked_example():
    codes, scales, zeros = symmetric_codes(one_group([0.5, -1, 0.25, 0.1]), 8)
    assert codes.ravel().tolist() == [64, -127, 32, 13] and zeros is None
    assert scales.item() == 1 / 127
    found = (codes * scales).ravel()
    np.testing.assert_allclose(found, [0.50394, -1, 0.25197, 0.10236], atol=5e-6)
    assert literal.symmetric([0.5, -1, 0.25, 0.1], 8)[0] == [64, -127, 32, 13]


def test_asymmetric_worked_example():
    codes, scales, zeros = asymmetric_codes(one_group([-0.2, 0, 0.6, 1]), 8)
    assert (codes.ravel() + 128).tolist() == [0, 43, 171, 255]
    assert round(scales.item(), 7) == 0.0047059
    # -low / s is 42.5 in real numbers, and a hair more or less in floats: either is its rounding.
    assert zeros.item() + 128 == 43 == literal.asymmetric([-0.2, 0, 0.6, 1], 8)[2]


def test_a_range_without_zero_is_widened():
    codes, scales, zeros = asymmetric_codes(one_group([10, 10.4, 11]), 4)
    found = (codes - zeros[:, None]) * scales
    assert abs(found.ravel() - [10, 10.4, 11]).max() <= scales.item() / 2  # and not 1.0 throughout


def test_groups_of_zeros_and_the_ends_of_the_range():
    kept = in_groups(np.zeros((8, 2), np.float32), 8, 4)
    assert (kept.floats() == 0).all() and (kept.scales == 1).all()
    kept = in_groups(np.zeros((8, 2), np.float32), 4, 4, symmetric=False)
    assert (kept.floats() == 0).all()
    kept = in_groups(np.array([[-1.0], [0.3]], np.float32), 8, None)
    assert kept.codes.min() == -127  # never -128: as far down as up


def test_packing_worked_example_and_round_trip():
    packed = packing.pack_rows(np.array([-8, -1, 0, 7]))
    assert packed.tolist() == [248, 112] == literal.two_in_a_byte([-8, -1, 0, 7])
    assert packed.dtype == np.uint8
    pairs = np.array([(a, b) for a in range(-8, 8) for b in range(-8, 8)])
    np.testing.assert_array_equal(packing.unpack_rows(packing.pack_rows(pairs)), pairs)
    assert packing.pack_rows(pairs).ravel().tolist() == literal.two_in_a_byte(
        pairs.ravel().tolist()
    )
    with pytest.raises(MinitxError, match="must be even"):
        packing.pack_rows(np.zeros(3, np.int8))


def test_groups_are_of_one_size():
    assert group_size(128, 64, 8) == (2, 64)
    assert group_size(172, 64, 8) == (3, 58)  # where llama2.c's product uses 128 of 172
    assert group_size(352, 64, 4) == (6, 60)  # whole bytes
    assert group_size(24, None, 8) == group_size(24, 100, 8) == (1, 24)


# Against the twin --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 6, 7, 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_kept_is_what_the_twin_keeps(bits, group, symmetric):
    w = RNG.normal(size=(20, 3)) + 0.3
    c = RNG.uniform(0.5, 2, 20)
    for factors in (None, c):
        kept = in_groups(w, bits, group, symmetric, c=factors)
        expected = literal.kept(
            w.tolist(), bits, group or 20, symmetric, None if factors is None else c.tolist()
        )
        np.testing.assert_allclose(kept.floats(), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("half", [False, True])
def test_the_error_is_at_most_half_a_scale(bits, dtype, half):
    w = (RNG.normal(size=(50, 11)) ** 3).astype(dtype)
    for symmetric in (True, False):
        kept = in_groups(w, bits, 16, symmetric, half)
        step = np.repeat(kept.scales.astype(np.float64), kept.group, 0)[:50]
        # Scales rounded to float16 may cut off the largest by a little.
        slack = 2 ** (bits - 1) * 2.0**-11 if half else 1e-4
        slack = max(slack, 0.5 if not symmetric else 0)  # the zero is rounded too
        assert (abs(kept.floats() - w) <= step * (0.5 + slack)).all()


def test_numbers_on_the_grid_are_kept_exactly():
    w = RNG.integers(-127, 128, (32, 5)).astype(np.float32) / 64
    w[0], w[16] = 127 / 64, -127 / 64
    np.testing.assert_array_equal(in_groups(w, 8, 16).floats(), w)


def test_llama2c_groups_are_these_where_they_divide():
    """What version 2 of its files holds, of a matrix (out, in), gives the same numbers."""
    w = RNG.normal(size=(3, 128)).astype(np.float32)
    kept = in_groups(w.T, 8, 64)
    codes = kept.codes.transpose(2, 0, 1).tobytes() + kept.scales.T.astype("<f4").tobytes()
    found = decode_values(Llama2cHeader(2, None, 64), "head.w", codes, np.float32).reshape(3, 128)
    np.testing.assert_array_equal(found, kept.floats().T)
    expected = literal.kept(w.T.tolist(), 8, 64)
    np.testing.assert_allclose(found.T, expected, atol=1e-6)


# Four ways to multiply ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_products(bits, symmetric, T):
    w, b = RNG.normal(size=(30, 12)), RNG.normal(size=12)
    kept = in_groups(w, bits, 8, symmetric, c=RNG.uniform(0.5, 2, 30))
    x = RNG.normal(size=(2, T, 30))
    expected = x @ kept.floats() + b
    for product in (Streamed(kept, b, 200), Streamed(kept, b, 10**6), Loaded(kept, b)):
        np.testing.assert_allclose(product(x), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            product.outputs(x, slice(5, None)), expected[..., 5:], rtol=1e-12, atol=1e-12
        )
    rounded = Integers(kept, b)(x)
    assert 1e-6 < abs(rounded - expected).max() / abs(expected).max() < 0.05
    np.testing.assert_array_equal(Integers(kept, b)(x[1]), rounded[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_integers_are_the_twin(bits):
    w, x = RNG.normal(size=(20, 3)), RNG.normal(size=20)
    x[:5] = 0  # a group of nothing
    found = Integers(in_groups(w, bits, 5), None)(x[None])[0]
    expected = literal.times_in_integers(x.tolist(), w.tolist(), bits, 5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_whole_number_sums_in_float32_are_exact():
    """At the largest group that is allowed, and where all products have the same sign."""
    G = 1040
    codes, w = np.full((1, G), 127, np.float32), np.full((G, 1), 127, np.float32)
    assert (codes @ w).item() == G * 127 * 127 < 1 << 24
    q, p = RNG.integers(-127, 128, (2, 50, G))
    exact = (q[:, None, :] @ p[:, :, None]).ravel()
    found = q.astype(np.float32)[:, None, :] @ p.astype(np.float32)[:, :, None]
    np.testing.assert_array_equal(found.ravel(), exact)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("which", ["blocks", "all"])
def test_models_compute_with_the_matrices_that_are_kept(family, which):
    """Streamed, cast and loaded models are the dense model with other numbers in it; batches and
    chunks give what one pass gives."""
    lm = tiny_lm(family, dtype=np.float64)
    options = {"bits": 4, "group": 6, "which": which}
    found = {run: apply(lm, {"quantize": options | {"run": run}}) for run in WAYS}
    if which == "blocks":
        twin = swap(lm, Linear, lambda m: Linear(in_groups(m.w, 4, 6).floats(), m.b))
        expected = twin.logits(IDS)
    else:
        expected = found["load"].logits(IDS)
    for run, changed in found.items():
        whole = changed.logits(IDS)
        if run != "integers":
            np.testing.assert_allclose(whole, expected, atol=1e-11 * abs(expected).max())
        batch = changed.logits(np.array([IDS[:10], IDS[10:20]]))
        np.testing.assert_allclose(batch[0], whole[:10], atol=1e-10 * abs(whole).max())
        state = changed.model.new_state()
        pieces = [changed.model(ids, state) for ids in (IDS[:9], IDS[9:10], IDS[10:])]
        np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-10 * abs(whole).max())
        assert changed.generate(IDS[:5], 5) is not None


def test_what_is_built_on_top_uses_what_is_kept():
    """Early exits fill caches, tables of the first layer are made, norms are folded before."""
    lm = tiny_lm(dtype=np.float64)
    inner = {"fold_norms": True, "fuse_projections": True, "quantize": {"bits": 4, "group": 6}}
    expected = apply(lm, inner).logits(IDS)
    found = apply(lm, inner | {"first_layer": True, "early_exit": {"threshold": 1.1}}).logits(IDS)
    np.testing.assert_allclose(found, expected, atol=1e-12 * abs(expected).max())


# Scaling by activations --------------------------------------------------------------------------


def moments(rows) -> Moments:
    found = Moments()
    found.add(rows)
    return found


def test_the_search_is_the_twins():
    w, rows = RNG.normal(size=(12, 3)), RNG.normal(size=(15, 12))
    rows[:, 3] *= 30
    rows[:, 7] = 0  # never active
    read = moments(rows)
    found = search(w, read, lambda c: in_groups(w, 4, 6, c=c))
    ratio, error, plain = literal.best_ratio(w.tolist(), rows.tolist(), 4, 6)
    assert ratio > 0
    assert output_error(w, found.floats(), read.gram) == pytest.approx(error, rel=1e-9)
    assert output_error(w, in_groups(w, 4, 6).floats(), read.gram) == pytest.approx(plain, rel=1e-9)


def test_few_large_inputs_are_worth_scaling():
    """3 of 768 inputs 50 times as large, 4 bits: the error is about halved."""
    rng = np.random.default_rng(0)
    w, rows = rng.normal(size=(768, 64)), rng.normal(size=(200, 768))
    rows[:, [5, 300, 700]] *= 50
    read = moments(rows)
    found = search(w, read, lambda c: in_groups(w, 4, 128, c=c))
    total = (rows @ w).ravel() @ (rows @ w).ravel()
    plain, best = (
        (output_error(w, kept.floats(), read.gram) / total) ** 0.5
        for kept in (in_groups(w, 4, 128), found)
    )
    assert 0.08 < plain < 0.15 and 0.35 < best / plain < 0.65


def test_the_search_is_never_worse_than_nothing():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        w, rows = rng.normal(size=(16, 4)), rng.normal(size=(30, 16)) * rng.uniform(0.9, 1.1, 16)
        read = moments(rows)
        found = search(w, read, lambda c: in_groups(w, 8, 8, c=c))  # noqa: B023
        plain = output_error(w, in_groups(w, 8, 8).floats(), read.gram)
        assert output_error(w, found.floats(), read.gram) <= plain


def test_scaling_a_model():
    lm = tiny_lm(dtype=np.float64)
    options = {"bits": 4, "group": 8, "scaling": True, "stories": 1}
    found = [apply(lm, {"quantize": options | {"run": run}}).logits(IDS) for run in WAYS[:3]]
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=1e-11 * abs(found[0]).max())


# Counts and refusals -----------------------------------------------------------------------------


@pytest.mark.parametrize("run", WAYS)
def test_bytes_read_are_those_kept(run):
    lm = tiny_lm()
    changed = apply(lm, {"quantize": {"run": run, "group": 8}})
    reads = {}
    for name, one in (("dense", lm), ("changed", changed)):
        with counting(one) as counts:
            one.logits(IDS[:1])
        reads[name] = counts.total("model.stack")
    assert reads["changed"].multiply_adds == reads["dense"].multiply_adds
    dense = reads["dense"].weight_bytes
    expected = dense if run == "load" else dense * (1 + 4 / 8) / 4
    assert reads["changed"].weight_bytes == expected


def test_scales_in_float16_stay_in_float32_arithmetic():
    for run in WAYS:
        options = {"half_scales": True, "bits": 4, "which": "all", "run": run}
        changed = apply(tiny_lm(), {"quantize": options})
        assert changed.logits(IDS).dtype == np.float32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 1}, "group is 1; it must be at least 2"),
        ({"stories": 0}, "stories is 0"),
        ({"bits": 3}, "must be one of 8, 4, 32"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(MinitxError, match=words):
        apply(tiny_lm(), {"quantize": options})


def wide(hidden):
    return tiny_lm(model=tiny_model(hidden=hidden))


def test_refusals_of_models():
    with pytest.raises(MinitxError, match="exact up to 1040"):
        apply(wide(1041), {"quantize": {"run": "integers", "group": None}})
    apply(wide(1040), {"quantize": {"run": "integers", "group": None}})
    with pytest.raises(MinitxError, match="quantize learns from calibration stories"):
        apply(tiny_lm(tokenizer=None), {"quantize": {"scaling": True}})
    large = swap(tiny_lm(), Linear, lambda m: Linear(m.w * np.float32(1e9)))
    with pytest.raises(MinitxError, match="half_scales=false"):
        apply(large, {"quantize": {"half_scales": True}})


def test_on_shipped_weights_eight_bits_are_hardly_seen_and_four_are():
    """Loosely, since the weights are trained anew now and then."""
    lm = minitx.load("stories")
    texts = calibration_texts(lm, 2)

    def divergence(options):
        changed, found = apply(lm, {"quantize": options | {"run": "load"}}), []
        for ids in texts:
            p, q = (log_softmax(one.logits(ids)) for one in (lm, changed))
            found.append((np.exp(p) * (p - q)).sum(-1).mean())
        return np.mean(found)

    eight, four = divergence({}), divergence({"bits": 4})
    assert 0 < eight < 1e-3 and 10 * eight < four < 0.2
    assert divergence({"bits": 32}) == 0
