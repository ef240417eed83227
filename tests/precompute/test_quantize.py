"""quantize: rounding by groups, int4 packing, four ways to compute a product, AWQ, counts."""

import literal_quantize as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, in_chunks, tiny_lm, tiny_model

import minitx
from minitx.calibration import calibration_ids
from minitx.checkpoints.llama2c import Llama2cHeader, decode_values
from minitx.errors import MinitxError
from minitx.lab.compare import log_softmax
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.quantize import (
    QuantizedMatrix,
    dequantize,
    equal_groups,
    quantize_groups_asymmetric,
    quantize_groups_symmetric,
    quantize_matrix,
)
from minitx.precompute.quantize.awq import best_channel_scales, channel_scales, output_error
from minitx.precompute.quantize.products import (
    DequantizedLinear,
    IntegerSumLinear,
    StreamedLinear,
    quantized_linear,
)
from minitx.shared import int4
from minitx.shared.observed_inputs import Moments
from minitx.technique import apply, swap
from minitx.tree import walk

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 258, 24)
RUNS = ("stream", "cast", "load", "integers")


# Scale, round, dequantize ------------------------------------------------------------------------


def one_group(numbers):
    return np.array(numbers)[None, :, None]  # (n, g, out)


def test_quantize_symmetric_by_hand():
    """The largest magnitude is 1, so scale = 1/127 and w / scale is

     0.5       -1      0.25    0.1
    63.5     -127     31.75   12.7     rounded (63.5 to the even 64):
    64       -127     32      13       and times 1/127:
     0.50394   -1      0.25197  0.10236
    """
    codes, scales, zero_points = quantize_groups_symmetric(one_group([0.5, -1, 0.25, 0.1]), 8)
    assert codes.ravel().tolist() == [64, -127, 32, 13]
    assert scales.item() == 1 / 127 and zero_points is None
    found = dequantize(codes, scales, zero_points).ravel()
    assert_same(found, [0.50394, -1, 0.25197, 0.10236], atol=5e-6)
    assert literal.symmetric([0.5, -1, 0.25, 0.1], 8)[0] == [64, -127, 32, 13]


def test_quantize_asymmetric_by_hand():
    """The range is -0.2 to 1, so scale = 1.2 / 255 = 0.0047059, and

        w                   -0.2    0    0.6    1
        w / scale          -42.5    0  127.5  212.5
        rounded            -43      0  128    213      plus the zero point rint(0.2 / scale) = 43:
        code                 0     43  171    255      (256 is clipped; stored less 128, as int8)

    In floats 42.5 is 42.5 and a hair, which rounds to 43 and not to the even 42; so is 212.5."""
    codes, scales, zero_points = quantize_groups_asymmetric(one_group([-0.2, 0, 0.6, 1]), 8)
    assert (codes.ravel() + 128).tolist() == [0, 43, 171, 255]
    assert round(scales.item(), 7) == 0.0047059
    assert zero_points.item() + 128 == 43 == literal.asymmetric([-0.2, 0, 0.6, 1], 8)[2]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 6, 7, 20])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_matrix_equals_the_literal_version(bits, group_size, symmetric):
    w = RNG.normal(size=(20, 3)) + 0.3
    c = RNG.uniform(0.5, 2, 20)
    for scales in (None, c):
        found = quantize_matrix(w, bits, group_size, symmetric, channel_scales=scales)
        listed = None if scales is None else c.tolist()
        expected = literal.quantized(w.tolist(), bits, group_size or 20, symmetric, listed)
        what = "dequantized weights"
        assert_same(found.dequantized(), expected, what, tolerance=1e-12, atol=1e-14)


def test_asymmetric_range_without_zero_is_widened():
    """10 .. 11 becomes 0 .. 11. Otherwise the zero point is clipped and all weights become 1."""
    w = one_group([10, 10.4, 11])
    codes, scales, zero_points = quantize_groups_asymmetric(w, 4)
    error = abs(dequantize(codes, scales, zero_points) - w).max()
    assert error <= scales.item() / 2, "each weight is off by at most half a scale"


def test_group_of_zeros_has_scale_1_and_stays_zero():
    found = quantize_matrix(np.zeros((8, 2), np.float32), 8, 4)
    assert (found.dequantized() == 0).all() and (found.scales == 1).all()
    found = quantize_matrix(np.zeros((8, 2), np.float32), 4, 4, symmetric=False)
    assert_same(found.dequantized(), 0)


def test_symmetric_codes_never_reach_minus_128():
    found = quantize_matrix(np.array([[-1.0], [0.3]], np.float32), 8, None)
    assert found.codes.min() == -127, "the range is symmetric"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("half", [False, True])
def test_error_is_at_most_half_a_scale(bits, dtype, half):
    w = (RNG.normal(size=(50, 11)) ** 3).astype(dtype)
    for symmetric in (True, False):
        found = quantize_matrix(w, bits, 16, symmetric, half)
        scale = np.repeat(found.scales.astype(np.float64), found.group_size, 0)[:50]
        # A scale rounded down to float16 clips the largest weight a little.
        slack = 2 ** (bits - 1) * 2.0**-11 if half else 1e-4
        slack = max(slack, 0.5 if not symmetric else 0)  # the zero point is rounded too
        assert (abs(found.dequantized() - w) <= scale * (0.5 + slack)).all()


def test_weights_on_the_grid_are_exact():
    w = RNG.integers(-127, 128, (32, 5)).astype(np.float32) / 64
    w[0], w[16] = 127 / 64, -127 / 64
    assert_same(quantize_matrix(w, 8, 16).dequantized(), w)


def test_group_sizes_are_equal_and_even_for_int4():
    assert equal_groups(128, 64, 8) == (2, 64)
    assert equal_groups(172, 64, 8) == (3, 58)  # where llama2.c's product uses 128 of 172
    assert equal_groups(352, 64, 4) == (6, 60)  # two codes to a byte
    assert equal_groups(24, None, 8) == equal_groups(24, 100, 8) == (1, 24)


def test_int4_groups_with_an_odd_group_size_are_not_larger_than_it():
    """At most 59 inputs and an even number: at most 58. 352 inputs make 7 groups of 51, or 52."""
    assert equal_groups(352, 59, 4) == (7, 52)
    for inputs in range(2, 60):
        for group_size in range(2, 20):
            n, g = equal_groups(inputs, group_size, 4)
            assert g <= group_size and g % 2 == 0, f"{inputs} inputs, group_size={group_size}"
            assert (n - 1) * g < inputs <= n * g, "no group is padding alone"


def test_groups_equal_llama2c_q8_0_where_group_size_divides():
    """What a version 2 file of llama2.c holds of a matrix (out, in) gives the same numbers."""
    w = RNG.normal(size=(3, 128)).astype(np.float32)
    ours = quantize_matrix(w.T, 8, 64)
    data = ours.codes.transpose(2, 0, 1).tobytes() + ours.scales.T.astype("<f4").tobytes()
    found = decode_values(Llama2cHeader(2, None, 64), "head.w", data, np.float32).reshape(3, 128)
    assert_same(found, ours.dequantized().T)
    expected = literal.quantized(w.T.tolist(), 8, 64)
    assert_same(found.T, expected, atol=1e-6)


# 4-bit integers ----------------------------------------------------------------------------------


def test_int4_packing_by_hand_and_round_trip():
    """-8 is 8 in two's complement, -1 is 15: 8 + 16 * 15 = 248. Then 0 + 16 * 7 = 112."""
    packed = int4.pack_int4(np.array([-8, -1, 0, 7]))
    assert packed.tolist() == [248, 112] == literal.pack_int4([-8, -1, 0, 7])
    assert packed.dtype == np.uint8
    pairs = np.array([(a, b) for a in range(-8, 8) for b in range(-8, 8)])
    assert_same(int4.unpack_int4(int4.pack_int4(pairs)), pairs)
    expected = literal.pack_int4(pairs.ravel().tolist())
    assert int4.pack_int4(pairs).ravel().tolist() == expected
    with pytest.raises(MinitxError, match="even number of 4-bit integers.*got 3"):
        int4.pack_int4(np.zeros(3, np.int8))


# Four ways to compute a product ------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("T", [1, 5, 40])
def test_products_equal_that_of_the_dequantized_matrix(bits, symmetric, T):
    w, b = RNG.normal(size=(30, 12)), RNG.normal(size=12)
    matrix = quantize_matrix(w, bits, 8, symmetric, channel_scales=RNG.uniform(0.5, 2, 30))
    x = RNG.normal(size=(2, T, 30))
    expected = x @ matrix.dequantized() + b
    streamed = StreamedLinear(matrix, b, 200), StreamedLinear(matrix, b, 10**6)
    for part in (*streamed, DequantizedLinear(matrix, b)):
        assert_same(part(x), expected, tolerance=1e-12, atol=1e-12)
        assert_same(part.outputs(x, slice(5, None)), expected[..., 5:], tolerance=1e-12, atol=1e-12)
    integers = IntegerSumLinear(matrix, b)
    error = abs(integers(x) - expected).max() / abs(expected).max()
    assert 1e-6 < error < 0.05, "the inputs are rounded to int8"
    assert_same(integers(x[1]), integers(x)[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_product_equals_the_literal_version(bits):
    w, x = RNG.normal(size=(20, 3)), RNG.normal(size=20)
    x[:5] = 0  # a whole group of zeros
    found = IntegerSumLinear(quantize_matrix(w, bits, 5), None)(x[None])[0]
    expected = literal.integer_product(x.tolist(), w.tolist(), bits, 5)
    assert_same(found, expected, tolerance=1e-12)


def test_integer_sums_in_float32_are_exact_up_to_1040_inputs():
    g = 1040  # 1040 * 127 * 127 = 16,774,160 < 2^24 = 16,777,216
    x, w = np.full((1, g), 127, np.float32), np.full((g, 1), 127, np.float32)
    assert (x @ w).item() == g * 127 * 127 < 1 << 24
    a, b = RNG.integers(-127, 128, (2, 50, g))
    exact = (a[:, None, :] @ b[:, :, None]).ravel()
    found = a.astype(np.float32)[:, None, :] @ b.astype(np.float32)[:, :, None]
    assert_same(found.ravel(), exact)


def test_asymmetric_integer_sums_in_float32_are_exact_up_to_518_inputs():
    """Weights from 0 to 255 have the zero point -128, so code - zero point is up to 255, and
    518 * 255 * 127 = 16,775,430 < 2^24 = 16,777,216. The codes alone would allow 1,032 inputs."""
    w = np.full((518, 1), 255, np.float32)
    matrix = quantize_matrix(w, 8, None, symmetric=False)
    assert matrix.codes.max() == 127 and matrix.zero_points.item() == -128
    x = np.full((1, 518), 127, np.float32)  # both scales are 1, so y is the sum of the codes
    assert quantized_linear(matrix, None, "integers")(x).item() == 518 * 255 * 127
    for bits, longest in ((8, 518), (4, 8806)):
        w = np.ones((longest + 1, 1), np.float32)
        quantized_linear(quantize_matrix(w[1:], bits, None, symmetric=False), None, "integers")
        matrix = quantize_matrix(w, bits, None, symmetric=False)
        with pytest.raises(MinitxError, match=f"groups of at most {longest} inputs"):
            quantized_linear(matrix, None, "integers")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("embeddings", [False, True])
def test_quantized_models_are_dense_models_with_rounded_weights(family, embeddings):
    """Whatever way products are computed; batches and chunks give what one pass gives."""
    lm = tiny_lm(family, dtype=np.float64)
    options = {"bits": 4, "group_size": 6, "embeddings": embeddings}
    models = {run: apply(lm, {"quantize": options | {"run": run}}) for run in RUNS}
    if embeddings:
        expected = models["load"].logits(IDS)
    else:
        rounded = swap(lm, Linear, lambda m: Linear(quantize_matrix(m.w, 4, 6).dequantized(), m.b))
        expected = rounded.logits(IDS)
    for run, changed in models.items():
        whole = changed.logits(IDS)
        largest = abs(whole).max()
        if run != "integers":
            assert_same(whole, expected, atol=1e-11 * abs(expected).max())
        batch = changed.logits(np.array([IDS[:10], IDS[10:20]]))
        assert_same(batch[0], whole[:10], atol=1e-10 * largest)
        chunks = in_chunks(changed, IDS, (9, 1, 14))
        assert_same(chunks, whole, atol=1e-10 * largest)
        assert changed.generate(IDS[:5], 5) is not None


def test_techniques_on_top_use_the_quantized_weights():
    """Early exits backfill caches, first-layer tables are made, norms are folded before."""
    lm = tiny_lm(dtype=np.float64)
    inner = {"fold_norms": True, "fuse_projections": True}
    inner["quantize"] = {"bits": 4, "group_size": 6}
    expected = apply(lm, inner).logits(IDS)
    found = apply(lm, inner | {"first_layer": True, "early_exit": {"threshold": 1.1}}).logits(IDS)
    assert_same(found, expected, atol=1e-12 * abs(expected).max())


# AWQ ---------------------------------------------------------------------------------------------


def moments_of(rows) -> Moments:
    found = Moments()
    found.add(rows)
    return found


def awq_quantized(w, moments, bits, group_size):
    def quantized(w, c):
        return quantize_matrix(w, bits, group_size, channel_scales=c)

    return quantized(w, best_channel_scales(w, moments, quantized))


def test_awq_channel_scales_by_hand():
    """Mean |x| of 1, 16 and 0 at ratio 1/2: c = 1, 4 and 1e-4, the least allowed; divided by
    sqrt(4 * 1e-4) = 0.02 they are 50, 200 and 0.005, whose largest times smallest is 1."""
    c = channel_scales(np.array([1.0, 16, 0]), 0.5)
    assert_same(c, [50, 200, 0.005], tolerance=1e-7)
    assert channel_scales(np.array([1.0, 16, 0]), 0) is None, "ratio 0 is plain rounding"


def test_awq_search_equals_the_literal_version():
    w, rows = RNG.normal(size=(12, 3)), RNG.normal(size=(15, 12))
    rows[:, 3] *= 30
    rows[:, 7] = 0  # never active
    moments = moments_of(rows)
    found = output_error(w, awq_quantized(w, moments, 4, 6).dequantized(), moments.gram)
    without = output_error(w, quantize_matrix(w, 4, 6).dequantized(), moments.gram)
    ratio, error, plain = literal.best_awq_ratio(w.tolist(), rows.tolist(), 4, 6)
    assert ratio > 0, "the example is one where scaling helps"
    assert found == pytest.approx(error, rel=1e-9)
    assert without == pytest.approx(plain, rel=1e-9)


def test_awq_halves_the_error_where_few_inputs_are_large():
    """3 of 768 inputs 50 times as large, 4 bits: the error is about halved."""
    rng = np.random.default_rng(0)
    w, rows = rng.normal(size=(768, 64)), rng.normal(size=(200, 768))
    rows[:, [5, 300, 700]] *= 50
    moments = moments_of(rows)
    total = (rows @ w).ravel() @ (rows @ w).ravel()
    plain, best = (
        (output_error(w, matrix.dequantized(), moments.gram) / total) ** 0.5
        for matrix in (quantize_matrix(w, 4, 128), awq_quantized(w, moments, 4, 128))
    )
    assert 0.08 < plain < 0.15 and 0.35 < best / plain < 0.65


def test_awq_is_never_worse_than_plain_rounding():
    for seed in range(5):
        rng = np.random.default_rng(seed)
        w, rows = rng.normal(size=(16, 4)), rng.normal(size=(30, 16)) * rng.uniform(0.9, 1.1, 16)
        moments = moments_of(rows)
        plain = output_error(w, quantize_matrix(w, 8, 8).dequantized(), moments.gram)
        found = output_error(w, awq_quantized(w, moments, 8, 8).dequantized(), moments.gram)
        assert found <= plain


def test_awq_in_a_model_gives_the_same_however_products_are_computed():
    lm = tiny_lm(dtype=np.float64)
    options = {"bits": 4, "group_size": 8, "awq": True, "stories": 1}
    found = [apply(lm, {"quantize": options | {"run": run}}).logits(IDS) for run in RUNS[:3]]
    for other in found[1:]:
        assert_same(other, found[0], atol=1e-11 * abs(found[0]).max())


# Counts, types, messages -------------------------------------------------------------------------


@pytest.mark.parametrize("run", RUNS)
def test_bytes_read_are_those_of_codes_and_scales(run):
    lm = tiny_lm()
    changed = apply(lm, {"quantize": {"run": run, "group_size": 8}})
    reads = {}
    for name, one in (("dense", lm), ("changed", changed)):
        with counting(one) as counts:
            one.logits(IDS[:1])
        reads[name] = counts.total("model.stack")
    assert reads["changed"].multiply_adds == reads["dense"].multiply_adds
    dense = reads["dense"].weight_bytes
    expected = dense if run == "load" else dense * (1 + 4 / 8) / 4
    assert reads["changed"].weight_bytes == expected


def test_float16_scales_are_computed_with_in_float32():
    for run in RUNS:
        options = {"half_scales": True, "bits": 4, "embeddings": True, "run": run}
        changed = apply(tiny_lm(), {"quantize": options})
        assert changed.logits(IDS).dtype == np.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_float64_model_with_float16_scales_computes_in_float64(bits):
    """A step of one row and a step of many read the same embedding rows, to the last bits."""
    options = {"half_scales": True, "bits": bits, "embeddings": True}
    lm = apply(tiny_lm("gpt2", dtype=np.float64), {"quantize": options})
    for _, node in walk(lm):
        if type(node) is QuantizedMatrix:
            w = node.dequantized()
            codes = node.codes_of(slice(None), np.float64)
            exact = dequantize(codes, node.scales.astype(np.float64), node.zero_points)
            assert_same(w, exact.reshape(-1, node.width)[: node.inputs])
            assert w.dtype == node.columns([1, 2]).dtype == np.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 1}, "group_size must be an integer, at least 2, or None; got 1"),
        ({"stories": 0}, "stories must be an integer, at least 1; got 0"),
        ({"bits": 3}, "bits must be one of 8, 4, 32; got 3"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"quantize": options})


def test_integers_with_groups_too_long_for_exact_sums_are_refused():
    def quantized(hidden):
        lm = tiny_lm(model=tiny_model(hidden=hidden))
        return apply(lm, {"quantize": {"run": "integers", "group_size": None}})

    quantized(1040)
    with pytest.raises(MinitxError, match="exact for groups of at most 1040 inputs; got 1041"):
        quantized(1041)


def test_awq_without_a_tokenizer_is_refused():
    with pytest.raises(MinitxError, match="quantize learns from calibration text"):
        apply(tiny_lm(tokenizer=None), {"quantize": {"awq": True}})


def test_weights_too_large_for_float16_scales_are_refused():
    large = swap(tiny_lm(), Linear, lambda m: Linear(m.w * np.float32(1e9)))
    with pytest.raises(MinitxError, match="scales do not fit float16.*half_scales=false"):
        apply(large, {"quantize": {"half_scales": True}})


def test_on_stories_int8_is_hardly_visible_and_int4_is():
    """KL divergence from the dense model; wide bounds, since the weights are retrained at times."""
    lm = minitx.load("stories")
    texts = calibration_ids("test", lm, 2)

    def divergence(options):
        changed, found = apply(lm, {"quantize": options | {"run": "load"}}), []
        for ids in texts:
            p, q = (log_softmax(one.logits(ids)) for one in (lm, changed))
            found.append((np.exp(p) * (p - q)).sum(-1).mean())
        return np.mean(found)

    int8, int4_ = divergence({}), divergence({"bits": 4})
    assert 0 < int8 < 1e-3 and 10 * int8 < int4_ < 0.2
    assert divergence({"bits": 32}) == 0
