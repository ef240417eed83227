"""predictive_attention: the worked example, a literal twin, bounds that must hold, and counts."""

import literal_predictive_attention as literal
import numpy as np
import pytest
from qkv import IDS, random_qkv, run
from tiny import stored, tiny_lm

from minitx import fast, ops
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.predictive_attention import (
    IntegerCode,
    Keep,
    LeadingOne,
    Predict,
    PredictedKeys,
)
from minitx.state import Layer
from minitx.technique import apply

SETTINGS = {
    "default": dict(b=4, tau=0.05, rho=1.0, r_min=4),
    "coarse": dict(b=2, tau=0.5, rho=1.0, r_min=4),
    "share": dict(b=3, tau=0.0, rho=0.25, r_min=3),
    "both": dict(b=8, tau=0.1, rho=0.4, r_min=1),
    "leading one": dict(b=None, tau=0.0, rho=0.3, r_min=2),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def part(scale=0.5, b=4, tau=0.05, rho=1.0, r_min=4):
    code = LeadingOne() if b is None else IntegerCode(b)
    choose = PredictedKeys(Predict(code), Keep(tau, rho, r_min), scale)
    return SparseAttention(choose, scale)


# A worked example --------------------------------------------------------------------------------

Q = np.array([1.8, -0.8, 0.4, 1.4])
KEYS = np.array(
    [
        [1, -0.52, 0.2, 0.6],
        [-0.7, 0.9, 0.1, -0.4],
        [0.32, 0.08, -0.6, 1.4],
        [0.2, -1, 0.52, -0.3],
        [1.4, 0.2, -0.06, 0.88],
    ]
)
VALUES = np.array([[1, 0], [0, 1], [2, 0], [0, 2], [3, 1]], float)


def predicted(b, q=Q, keys=KEYS, scale=0.5):
    predict = part(b=b).selector.predict
    return (scale * predict(q[None, None], *predict.code(keys[None])))[0, 0, 0]


def example(**settings):
    """Output of the example's one query; the values are filled up to the width of the keys."""
    v = np.pad(VALUES, ((0, 0), (0, 2)))
    q = np.broadcast_to(Q, (1, 5, 4))  # five queries, of which the last sees all keys
    return run(part(**settings), q, KEYS[None], v[None], (4, 1))[0, -1, :2]


def test_codes_of_the_example():
    (qc,), (sq,) = IntegerCode(4)(Q[None])
    kc, sk = IntegerCode(4)(KEYS)
    assert qc.tolist() == [7, -3, 2, 5] and qc.dtype == np.int8
    assert kc.tolist() == [
        [7, -4, 1, 4],
        [-5, 7, 1, -3],
        [2, 0, -3, 7],
        [1, -7, 4, -2],
        [7, 1, 0, 4],
    ]
    np.testing.assert_allclose(sq, 0.257143, atol=1e-6)
    np.testing.assert_allclose(sk, [0.142857, 0.128571, 0.2, 0.142857, 0.2], atol=1e-6)
    assert (kc.astype(int) @ qc).tolist() == [83, -69, 43, 26, 66]


@pytest.mark.parametrize(
    "b, expected",
    [
        (4, [1.5245, -1.1406, 1.1057, 0.4776, 1.6971]),
        (2, [1.8, -0.81, 1.26, 0, 2.52]),
        (None, [0.8906, -0.4922, 0.5469, 0.25, 0.7148]),
    ],
)
def test_predictions_of_the_example(b, expected):
    np.testing.assert_allclose(predicted(b), expected, atol=5e-5)
    np.testing.assert_allclose(literal.predictions(Q, KEYS, 0.5, b), expected, atol=5e-5)


@pytest.mark.parametrize(
    "settings, kept, output",
    [
        (dict(b=4, tau=0.5), {0, 2, 4}, [2.0838, 0.4313]),
        (dict(b=4, tau=0.1), {0, 2, 3, 4}, [1.8666, 0.5948]),
        (dict(b=4, tau=0.05), {0, 1, 2, 3, 4}, [1.8325, 0.6022]),
        (dict(b=2, tau=0.1), {0, 2, 4}, [2.0838, 0.4313]),
        (dict(b=4, tau=0.0, rho=0.2, r_min=1), {4}, [3, 1]),
        (dict(b=4, tau=0.0, rho=0.2, r_min=2), {0, 4}, [2.1076, 0.5538]),
        (dict(b=None, tau=0.0, rho=0.4, r_min=1), {0, 4}, [2.1076, 0.5538]),
        (dict(b=None, tau=0.0, rho=0.2, r_min=1), {0}, [1, 0]),  # wrong: 4 has the larger score
    ],
)
def test_survivors_and_outputs_of_the_example(settings, kept, output):
    keep = part(**settings).selector.keep
    assert set(np.flatnonzero(keep(predicted(settings["b"]), np.array(5)))) == kept
    np.testing.assert_allclose(example(**settings), output, atol=5e-5)
    np.testing.assert_allclose(
        literal.one_query(Q, KEYS, VALUES, 0.5, **settings)[0], output, atol=5e-5
    )


# Against the twin, in every way that tokens may come ----------------------------------------------


@each_setting
@pytest.mark.parametrize("K", [1, 2, 4])
def test_it_is_the_literal_twin(settings, K):
    q, k, v = random_qkv(K=K)
    expected, _ = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, **settings)
    for sizes in ((30,), (1,) * 30, (7, 1, 1, 16, 5)):
        found = run(part(**settings), q, k, v, sizes)
        np.testing.assert_allclose(found, expected, atol=1e-12)


@each_setting
def test_more_rows_than_one_block(settings):
    """Three causal blocks; the last query of each against the twin."""
    S = 2 * fast.ROWS + 9
    q, k, v = random_qkv(3, S=S)
    found = run(part(**settings), q, k, v, (S,))
    np.testing.assert_allclose(found, run(part(**settings), q, k, v, (1,) * S), atol=1e-12)
    for end in (fast.ROWS, fast.ROWS + 1, S):
        last = q[:, end - 1 : end], k[:, :end], v[:, :end]
        expected, _ = literal.attention(*(x.tolist() for x in last), 0.5, **settings)
        np.testing.assert_allclose(found[:, end - 1 : end], expected, atol=1e-12)


@each_setting
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (2, 20, 1, 7)])
def test_a_ragged_batch_is_each_row_alone(settings, sizes):
    start = np.array([0, 4, 17])
    q, k, v = random_qkv(1, lead=(3,))
    found = run(part(**settings), q, k, v, sizes, Layer(30, start))
    assert np.isfinite(found).all()
    for i, first in enumerate(start):
        row = (x[i, :, first:].tolist() for x in (q, k, v))
        expected, _ = literal.attention(*row, 0.5, **settings)
        np.testing.assert_allclose(found[i, :, first:], expected, atol=1e-12)


def test_a_whole_model_generates_alike_in_a_batch_and_alone():
    lm = apply(tiny_lm(dtype=np.float64), {"predictive_attention": {"tau": 0.2}})
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    together = lm.generate(prompts, 20)
    assert together == [lm.generate(prompt, 20) for prompt in prompts]


def test_codes_follow_a_cache_that_was_filled_or_rewound_elsewhere():
    """A block may be skipped that still stores its keys, and what was rewound is coded anew."""
    q, k, v = random_qkv(2)
    attend, layer = part(tau=0.3), Layer(30)
    expected = run(attend, q, k, v, (30,))
    run(attend, q, k, v, (6,), layer)
    stored(layer, k[:, 6:11], v[:, 6:11])
    np.testing.assert_allclose(run(attend, q, k, v, (1, 8), layer), expected[:, 11:20], atol=1e-12)
    layer.rewind(9)
    run(attend, -q, -k, -v, (4,), layer)  # something else, to be forgotten
    layer.rewind(9)
    found = run(attend, q, k, v, (3, 1, 17), layer)
    np.testing.assert_allclose(found, expected[:, 9:], atol=1e-12)
    layer.rewind(9)
    stored(layer, k[:, 9:16] / 3, v[:, 9:16])  # skipped after a rewind: other keys
    k[:, 9:16] /= 3
    expected = run(attend, q, k, v, (30,))
    np.testing.assert_allclose(run(attend, q, k, v, (1, 13), layer), expected[:, 16:], atol=1e-12)


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_scores_of_thousands_do_not_overflow(sizes):
    q, k, v = random_qkv(9)
    expected, _ = literal.attention(q.tolist(), (1000 * k).tolist(), v.tolist(), 0.5)
    np.testing.assert_allclose(run(part(), q, 1000 * k, v, sizes), expected, atol=1e-12)


def test_a_later_key_changes_nothing_for_earlier_queries():
    """However large it is: neither the largest prediction nor the codes of others depend on it."""
    q, k, v = random_qkv(4)
    large = k.copy()
    large[:, -1] *= 1000
    for settings in SETTINGS.values():
        before, after = (run(part(**settings), q, x, v, (30,)) for x in (k, large))
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])


# What must hold ----------------------------------------------------------------------------------


def true_scores(q, keys, scale):
    return scale * keys @ q


def bound(q, keys, scale, b):
    """How far a prediction may be from its score."""
    _, sq = IntegerCode(b)(q[None])
    kc, sk = IntegerCode(b)(keys)
    coded = abs(kc * sk[:, None]).sum(-1)
    return scale * (abs(q).sum() * sk / 2 + coded * sq / 2)


@pytest.mark.parametrize("b", [2, 3, 4, 8])
def test_no_key_that_matters_is_missed_with_the_bounds_margin(b):
    rng = np.random.default_rng(b)
    t0, missed_without = 1.0, 0
    for _ in range(200):
        q, keys = 2 * rng.standard_normal(16), rng.standard_normal((40, 16))
        p, s, eps = predicted(b, q, keys, 0.25), true_scores(q, keys, 0.25), bound(q, keys, 0.25, b)
        assert (abs(p - s) <= eps * (1 + 1e-12)).all()
        near = s >= s.max() - t0
        kept = Keep(np.exp(-t0 - 2 * eps.max()), 1.0, 1)(p, np.array(40))
        assert kept[near].all()
        missed_without += (~Keep(np.exp(-t0), 1.0, 1)(p, np.array(40))[near]).sum()
    assert missed_without > 0  # so the margin is what does it


@pytest.mark.parametrize("b", [2, 4, 8])
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_a_threshold_that_all_keys_reach_is_dense_attention(b, sizes):
    """The exact vectors are weighed, not the codes: true of any b."""
    q, k, v = random_qkv(6)
    found = run(part(b=b, tau=5e-324), q, k, v, sizes)
    np.testing.assert_allclose(found, ops.attention(q, k, v, 0.5), atol=1e-12)


def test_neutral_is_dense_bit_for_bit_and_predicts_nothing():
    dense = tiny_lm()
    neutral = {"tau": 0.0, "rho": 1.0, "b": 2}
    lm = apply(dense, {"predictive_attention": neutral})
    states = lm.model.new_state(), dense.model.new_state()
    with counting(lm) as counts:
        found = [lm.model(ids, states[0]) for ids in (IDS[:9], IDS[9:10], IDS[10:12])]
    expected = [dense.model(ids, states[1]) for ids in (IDS[:9], IDS[9:10], IDS[10:12])]
    for a, b in zip(found, expected):
        np.testing.assert_array_equal(a, b)
    assert not counts.events and not states[0].layers[0].memory.kept


def test_survivors_are_nested():
    p = np.random.default_rng(0).standard_normal((50, 40))
    n = np.array(40)
    taus, rhos = (0.5, 0.2, 0.1, 0.05, 0.01, 0.0), (0.05, 0.2, 0.5, 0.9, 1.0)
    for kept in ([Keep(tau, 1.0, 1)(p, n) for tau in taus], [Keep(0.0, r, 1)(p, n) for r in rhos]):
        assert kept[0].any(-1).all() and kept[-1].all()
        for fewer, more in zip(kept, kept[1:]):
            assert (fewer <= more).all() and fewer.sum() < more.sum()


def test_how_many_are_kept_and_which_of_equals():
    p = np.array([[2.0, 1, 2, 1, 2, 1, 2]])
    kept = Keep(0.0, 0.4, 1)(p, np.array(7))  # ceil(2.8) = 3
    assert np.flatnonzero(kept).tolist() == [0, 2, 4]
    assert Keep(1.0, 1.0, 1)(p, np.array(7)).sum() == 4  # tau = 1: the largest and its equals
    many = np.arange(100.0)[None]
    assert Keep(0.0, 0.07, 1)(many, np.array(100)).sum() == 7  # 0.07 * 100 > 7 in floats
    assert Keep(0.0, 0.07, 9)(many, np.array(100)).sum() == 9
    assert Keep(0.0, 0.07, 9)(many[:, :5], np.array(5)).sum() == 5


def test_a_flat_row_keeps_all_and_a_zero_key_is_no_division_by_zero():
    zero = np.zeros((3, 4))
    codes, scales = IntegerCode(4)(zero)
    assert not codes.any() and (scales == 1).all()
    assert not LeadingOne()(zero)[0].any()
    assert Keep(0.9, 1.0, 1)(np.zeros((1, 5000)), np.array(5000)).all()


def test_scaling_and_permuting_keys():
    keys = KEYS.copy()
    keys[2] *= 8
    codes, scales = IntegerCode(4)(keys)
    np.testing.assert_array_equal(codes, IntegerCode(4)(KEYS)[0])
    assert scales[2] == 8 * IntegerCode(4)(KEYS)[1][2]
    np.testing.assert_allclose(predicted(4, keys=keys)[2], 8 * predicted(4)[2])
    order = np.array([3, 0, 4, 1, 2])
    keep = Keep(0.5, 0.6, 1)
    np.testing.assert_array_equal(
        keep(predicted(4)[order], np.array(5)), keep(predicted(4), np.array(5))[order]
    )


def test_scales_differ_so_integers_alone_would_rank_wrongly():
    integers = IntegerCode(4)(KEYS)[0].astype(int) @ IntegerCode(4)(Q[None])[0][0]
    assert integers.argmax() == 0 and predicted(4).argmax() == 4
    assert true_scores(Q, KEYS, 0.5).argmax() == 4


def test_leading_one_is_the_power_of_two_below():
    x = np.array([[1.0, -1.0, 0.0, 1.99, -2.0, 0.3, 1e-3, 100]], np.float32)
    codes, scales = LeadingOne()(x)
    assert codes.tolist() == [[1, -1, 0, 1, -2, 0.25, 2.0**-10, 64]]
    assert codes.dtype == scales.dtype == np.float32 and (scales == 1).all()


@pytest.mark.parametrize(
    "d, expected",
    [
        (64, {2: 0.66, 3: 0.86, 4: 0.88, 8: 0.89, None: 0.87}),
        (16, {2: 0.74, 3: 0.86, 4: 0.86, 8: 0.87, None: 0.86}),
    ],
)
def test_weight_held_by_a_quarter_of_the_keys(d, expected):
    """Known figures for normal keys and queries twice as large, within its rounding and
    the noise of 300 queries."""
    rng = np.random.default_rng(d)
    q, keys = 2 * rng.standard_normal((300, 1, d)), rng.standard_normal((300, 128, d))
    s = np.einsum("nad,nsd->ns", q, keys) / np.sqrt(d)
    weights = np.exp(s - s.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    for b, mass in expected.items():
        predict = part(b=b).selector.predict
        p = predict(q[:, None], *predict.code(keys[:, None]))[:, 0, 0, 0]
        kept = Keep(0.0, 0.25, 4)(p, np.array(128))
        assert abs((weights * kept).sum(-1).mean() - mass) < 0.025
