"""predictive_attention: the worked example, the literal version, error bounds, and costs."""

import literal_predictive_attention as literal
import numpy as np
import pytest
from qkv import IDS, check_long_prompt, check_padded_batch, random_qkv, run
from same import assert_same
from tiny import check_close, in_chunks, stored, tiny_lm

from minitx import ops
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.predictive_attention import (
    IntegerCode,
    LeadingOne,
    PredictedKeys,
    Predictor,
    survivors,
)
from minitx.state import Layer
from minitx.technique import apply, find

SETTINGS = {
    "default": dict(bits=4, threshold=0.05, share=1.0, min_keys=4),
    "coarse": dict(bits=2, threshold=0.5, share=1.0, min_keys=4),
    "share": dict(bits=3, threshold=0.0, share=0.25, min_keys=3),
    "both": dict(bits=8, threshold=0.1, share=0.4, min_keys=1),
    "leading one": dict(bits=None, threshold=0.0, share=0.3, min_keys=2),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def part(scale=0.5, bits=4, threshold=0.05, share=1.0, min_keys=4):
    """bits=None: leading-one codes."""
    code = LeadingOne() if bits is None else IntegerCode(bits)
    selector = PredictedKeys(Predictor(code), scale, threshold, share, min_keys)
    return SparseAttention(selector, scale)


def keep(p, n, threshold=0.0, share=1.0, min_keys=1):
    return survivors(p, np.array(n), threshold, share, min_keys)


# The worked example: one query, five keys of d = 4, scale 1/2 -----------------------------------

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


def predicted(bits, q=Q, keys=KEYS, scale=0.5):
    predictor = part(bits=bits).selector.predictor
    return (scale * predictor(q[None, None], *predictor.code(keys[None])))[0, 0, 0]


def example(**settings):
    """The output of the query; the values are padded with zeros to the width of the keys."""
    v = np.pad(VALUES, ((0, 0), (0, 2)))
    q = np.broadcast_to(Q, (1, 5, 4))  # five equal queries, of which the last sees all keys
    return run(part(**settings), q, KEYS[None], v[None], (4, 1))[0, -1, :2]


def test_worked_example_codes_at_4_bits():
    """m = 7. The query's scale is 1.8 / 7 = 0.257143: 1.8, -0.8, 0.4 and 1.4 are 7, -3.1, 1.6 and
    5.4 of it, so 7, -3, 2, 5. Key 0 has the scale 1 / 7 and becomes 7, -4, 1, 4. Their product is
    49 + 12 + 2 + 20 = 83."""
    (q_codes,), (q_scale,) = IntegerCode(4)(Q[None])
    codes, scales = IntegerCode(4)(KEYS)
    assert q_codes.tolist() == [7, -3, 2, 5] and q_codes.dtype == np.int8
    assert codes.tolist() == [
        [7, -4, 1, 4],
        [-5, 7, 1, -3],
        [2, 0, -3, 7],
        [1, -7, 4, -2],
        [7, 1, 0, 4],
    ]
    assert_same(q_scale, 0.257143, atol=1e-6)
    assert_same(scales, [0.142857, 0.128571, 0.2, 0.142857, 0.2], atol=1e-6)
    assert (codes.astype(int) @ q_codes).tolist() == [83, -69, 43, 26, 66]


@pytest.mark.parametrize(
    "bits, expected",
    [
        (4, [1.5245, -1.1406, 1.1057, 0.4776, 1.6971]),
        (2, [1.8, -0.81, 1.26, 0, 2.52]),
        (None, [0.8906, -0.4922, 0.5469, 0.25, 0.7148]),
    ],
)
def test_worked_example_predicted_scores(bits, expected):
    """At 4 bits key 0: 0.5 * 0.257143 * 0.142857 * 83 = 1.5245 (the exact score is 1.568)."""
    assert_same(predicted(bits), expected, atol=5e-5)
    assert_same(literal.predictions(Q, KEYS, 0.5, bits), expected, atol=5e-5)


@pytest.mark.parametrize(
    "settings, kept, output",
    [
        (dict(bits=4, threshold=0.5), {0, 2, 4}, [2.0838, 0.4313]),
        (dict(bits=4, threshold=0.1), {0, 2, 3, 4}, [1.8666, 0.5948]),
        (dict(bits=4, threshold=0.05), {0, 1, 2, 3, 4}, [1.8325, 0.6022]),
        (dict(bits=2, threshold=0.1), {0, 2, 4}, [2.0838, 0.4313]),
        (dict(bits=4, threshold=0.0, share=0.2, min_keys=1), {4}, [3, 1]),
        (dict(bits=4, threshold=0.0, share=0.2, min_keys=2), {0, 4}, [2.1076, 0.5538]),
        (dict(bits=None, threshold=0.0, share=0.4, min_keys=1), {0, 4}, [2.1076, 0.5538]),
        # key 4 has the larger score, but leading ones rank key 0 first
        (dict(bits=None, threshold=0.0, share=0.2, min_keys=1), {0}, [1, 0]),
    ],
)
def test_worked_example_kept_keys_and_output(settings, kept, output):
    """At 4 bits and threshold 0.5 a key survives from 1.6971 - ln 2 = 1.0040 on: 0, 2 and 4."""
    rules = {name: value for name, value in settings.items() if name != "bits"}
    assert set(np.flatnonzero(keep(predicted(settings["bits"]), 5, **rules))) == kept
    assert_same(example(**settings), output, atol=5e-5)
    assert_same(literal.one_query(Q, KEYS, VALUES, 0.5, **settings)[0], output, atol=5e-5)


# Equals the literal version, in every way that tokens may come ------------------------------------


@each_setting
@pytest.mark.parametrize("K", [1, 2, 4])
def test_prompts_chunks_and_single_tokens_equal_the_literal_version(settings, K):
    q, k, v = random_qkv(K=K)
    expected, _ = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, **settings)
    for sizes in ((30,), (1,) * 30, (7, 1, 1, 16, 5)):
        found = run(part(**settings), q, k, v, sizes)
        assert_same(found, expected, atol=1e-12)


@each_setting
def test_long_prompt_in_blocks_equals_the_literal_version(settings):
    check_long_prompt(
        part(**settings), lambda q, k, v: literal.attention(q, k, v, 0.5, **settings)[0]
    )


@each_setting
def test_padded_batch_equals_the_literal_version_of_each_sequence(settings):
    def literal_attention(q, k, v):
        return literal.attention(q, k, v, 0.5, **settings)[0]

    check_padded_batch(part(**settings), literal_attention, (0, 4, 17))


def test_model_generates_the_same_in_a_batch_and_alone():
    lm = apply(tiny_lm(dtype=np.float64), {"predictive_attention": {"threshold": 0.2}})
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    together = lm.generate(prompts, 20)
    assert together == [lm.generate(prompt, 20) for prompt in prompts]


def test_codes_follow_a_cache_that_was_backfilled_or_rewound():
    """A skipped block still stores its keys, and keys after a rewind are coded again."""
    q, k, v = random_qkv(2)
    attend, layer = part(threshold=0.3), Layer(30)
    expected = run(attend, q, k, v, (30,))
    run(attend, q, k, v, (6,), layer)
    stored(layer, k[:, 6:11], v[:, 6:11])
    assert_same(run(attend, q, k, v, (1, 8), layer), expected[:, 11:20], atol=1e-12)
    layer.rewind(9)
    run(attend, -q, -k, -v, (4,), layer)  # something else, to be forgotten
    layer.rewind(9)
    found = run(attend, q, k, v, (3, 1, 17), layer)
    assert_same(found, expected[:, 9:], atol=1e-12)
    layer.rewind(9)
    stored(layer, k[:, 9:16] / 3, v[:, 9:16])  # skipped after a rewind: other keys
    k[:, 9:16] /= 3
    expected = run(attend, q, k, v, (30,))
    assert_same(run(attend, q, k, v, (1, 13), layer), expected[:, 16:], atol=1e-12)


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_scores_in_the_thousands_do_not_overflow(sizes):
    q, k, v = random_qkv(9)
    expected, _ = literal.attention(q.tolist(), (1000 * k).tolist(), v.tolist(), 0.5)
    assert_same(run(part(), q, 1000 * k, v, sizes), expected, atol=1e-12)


def test_later_key_changes_nothing_for_earlier_queries():
    """However large: neither the maximum of a row nor the codes of other keys depend on it."""
    q, k, v = random_qkv(4)
    large = k.copy()
    large[:, -1] *= 1000
    for settings in SETTINGS.values():
        before, after = (run(part(**settings), q, x, v, (30,)) for x in (k, large))
        assert_same(before[:, :-1], after[:, :-1])


# Error bounds and selection ----------------------------------------------------------------------


def true_scores(q, keys, scale):
    return scale * keys @ q


def error_bound(q, keys, scale, bits):
    """How far a prediction may be from its score: half a step of every number."""
    _, q_scale = IntegerCode(bits)(q[None])
    codes, k_scales = IntegerCode(bits)(keys)
    dequantized = abs(codes * k_scales[:, None]).sum(-1)
    return scale * (abs(q).sum() * k_scales / 2 + dequantized * q_scale / 2)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_predictions_are_within_the_error_bound_and_a_margin_misses_no_key(bits):
    """If every |p - s| <= eps, all keys with s >= max(s) - gap have p >= max(p) - gap - 2 eps."""
    rng = np.random.default_rng(bits)
    gap, missed_without_margin = 1.0, 0
    for _ in range(200):
        q, keys = 2 * rng.standard_normal(16), rng.standard_normal((40, 16))
        p, s = predicted(bits, q, keys, 0.25), true_scores(q, keys, 0.25)
        eps = error_bound(q, keys, 0.25, bits)
        assert (abs(p - s) <= eps * (1 + 1e-12)).all(), "beyond the error bound"
        near = s >= s.max() - gap
        assert keep(p, 40, threshold=np.exp(-gap - 2 * eps.max()))[near].all(), "missed a key"
        missed_without_margin += (~keep(p, 40, threshold=np.exp(-gap))[near]).sum()
    assert missed_without_margin > 0, "the margin makes no difference here"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_threshold_that_all_keys_reach_is_dense_at_any_bits(bits, sizes):
    """Codes only select: the weights come from the exact vectors."""
    q, k, v = random_qkv(6)
    found = run(part(bits=bits, threshold=5e-324), q, k, v, sizes)
    assert_same(found, ops.attention(q, k, v, 0.5), atol=1e-12)


def test_threshold_0_and_share_1_are_bitwise_dense_and_predict_nothing():
    dense = tiny_lm()
    neutral = {"threshold": 0.0, "share": 1.0, "bits": 2}
    lm = apply(dense, {"predictive_attention": neutral})
    states = lm.model.new_state(), dense.model.new_state()
    with counting(lm) as counts:
        found = [lm.model(ids, states[0]) for ids in (IDS[:9], IDS[9:10], IDS[10:12])]
    expected = [dense.model(ids, states[1]) for ids in (IDS[:9], IDS[9:10], IDS[10:12])]
    for a, b in zip(found, expected):
        assert_same(a, b)
    assert not counts.events and not states[0].layers[0].memory.kept


def test_lower_threshold_or_larger_share_keeps_every_key_kept_before():
    p = np.random.default_rng(0).standard_normal((50, 40))
    by_threshold = [keep(p, 40, threshold=t) for t in (0.5, 0.2, 0.1, 0.05, 0.01, 0.0)]
    by_share = [keep(p, 40, share=share) for share in (0.05, 0.2, 0.5, 0.9, 1.0)]
    for kept in (by_threshold, by_share):
        assert kept[0].any(-1).all() and kept[-1].all()
        for fewer, more in zip(kept, kept[1:]):
            assert (fewer <= more).all() and fewer.sum() < more.sum()


def test_share_rounds_up_min_keys_holds_and_ties_go_to_the_lower_index():
    p = np.array([[2.0, 1, 2, 1, 2, 1, 2]])
    assert np.flatnonzero(keep(p, 7, share=0.4)).tolist() == [0, 2, 4]  # ceil(2.8) = 3 of four 2s
    assert keep(p, 7, threshold=1.0).sum() == 4, "threshold 1 keeps all that tie for the largest"
    many = np.arange(100.0)[None]
    assert keep(many, 100, share=0.07).sum() == 7, "0.07 * 100 is above 7 in floats"
    assert keep(many, 100, share=0.07, min_keys=9).sum() == 9
    assert keep(many[:, :5], 5, share=0.07, min_keys=9).sum() == 5


def test_flat_row_keeps_all_keys():
    assert keep(np.zeros((1, 5000)), 5000, threshold=0.9).all()


def test_codes_of_zeros_are_zeros_without_dividing_by_zero():
    zero = np.zeros((3, 4))
    codes, scales = IntegerCode(4)(zero)
    assert not codes.any() and (scales == 1).all()
    assert not LeadingOne()(zero)[0].any()


def test_scaled_key_scales_its_prediction_and_permuted_keys_permute_the_selection():
    keys = KEYS.copy()
    keys[2] *= 8
    codes, scales = IntegerCode(4)(keys)
    assert_same(codes, IntegerCode(4)(KEYS)[0])
    assert scales[2] == 8 * IntegerCode(4)(KEYS)[1][2]
    assert_same(predicted(4, keys=keys)[2], 8 * predicted(4)[2], tolerance=1e-7)
    order, rules = np.array([3, 0, 4, 1, 2]), {"threshold": 0.5, "share": 0.6}
    assert_same(keep(predicted(4)[order], 5, **rules), keep(predicted(4), 5, **rules)[order])


def test_integers_without_scales_would_rank_wrongly():
    integers = IntegerCode(4)(KEYS)[0].astype(int) @ IntegerCode(4)(Q[None])[0][0]
    assert integers.argmax() == 0 and predicted(4).argmax() == 4
    assert true_scores(Q, KEYS, 0.5).argmax() == 4


def test_leading_one_rounds_toward_zero_to_a_power_of_two():
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
def test_attention_mass_on_the_predicted_quarter_of_random_keys(d, expected):
    """Figures measured once for normal keys and queries twice as large, within their rounding and
    the noise of 300 queries."""
    rng = np.random.default_rng(d)
    q, keys = 2 * rng.standard_normal((300, 1, d)), rng.standard_normal((300, 128, d))
    s = np.einsum("nad,nsd->ns", q, keys) / np.sqrt(d)
    weights = np.exp(s - s.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    for bits, mass in expected.items():
        predictor = part(bits=bits).selector.predictor
        p = predictor(q[:, None], *predictor.code(keys[:, None]))[:, 0, 0, 0]
        kept = keep(p, 128, share=0.25, min_keys=4)
        found = (weights * kept).sum(-1).mean()
        assert abs(found - mass) < 0.025, f"{bits} bits: {found:.3f}, expected {mass}"


# Costs -------------------------------------------------------------------------------------------


def counted(lm, ids, state):
    """The costs of predicting and of exact attention in block 0, and the events of all blocks."""
    with counting(lm) as counts:
        lm.model(ids, state)
    path = "model.stack.blocks.0.attn.attend"
    return counts.entries[path + ".selector.predictor"], counts.entries[path], counts.events


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("codes, code_bytes", [("integer", 1), ("leading-one", 4)])
def test_decoded_token_costs_what_the_card_says(family, codes, code_bytes):
    options = {"codes": codes, "share": 0.25, "threshold": 0.0}
    lm = apply(tiny_lm(family), {"predictive_attention": options})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d = c.heads, c.kv_heads, c.head_width
    lm.model(IDS[:29], state)
    S, r = 30, 8  # ceil(0.25 * 30)
    predictor, exact, events = counted(lm, IDS[29:30], state)
    assert predictor.multiply_adds == H * S * d
    assert predictor.cache_bytes == K * S * (code_bytes * d + 4)
    assert exact.multiply_adds == H * 2 * r * d
    assert exact.cache_bytes == H * 8 * r * d
    assert events == {"keys seen": c.layers * H * S, "keys kept": c.layers * H * r}

    dense, state = tiny_lm(family), lm.model.new_state()
    dense.model(IDS[:29], state)
    with counting(dense) as counts:
        dense.model(IDS[29:30], state)
    before = counts.entries["model.stack.blocks.0.attn.attend"]
    assert before.multiply_adds == H * 2 * S * d and before.cache_bytes == K * 8 * S * d


def test_costs_follow_the_number_of_kept_keys():
    """Of all heads together, as the literal version selects from the same queries and keys."""
    q, k, v = random_qkv(7, S=33)
    settings = dict(bits=4, threshold=0.1, share=1.0, min_keys=4)
    attend, layer = part(**settings), Layer(33)
    run(attend, q, k, v, (32,), layer)
    last = q[:, 32:], k, v
    _, kept = literal.attention(*(x.tolist() for x in last), 0.5, **settings)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    r = np.array(kept).sum()
    assert len({tuple(row) for row in kept}) > 1  # heads differ in how many they keep
    assert counts.entries[""].multiply_adds == 2 * r * 8
    assert counts.entries["selector.predictor"].multiply_adds == 4 * 33 * 8
    assert counts.events == {"keys seen": 4 * 33, "keys kept": r}


def test_prompt_saves_nothing_and_counts_what_it_could():
    lm = apply(tiny_lm(), {"predictive_attention": True})
    c = lm.model.config
    predictor, exact, events = counted(lm, IDS[:30], lm.model.new_state())
    rectangle = c.heads * 30 * 30 * c.head_width
    assert predictor.multiply_adds == rectangle and exact.multiply_adds == 2 * rectangle
    assert events["keys seen"] == c.layers * c.heads * 30 * 31 // 2
    assert c.layers * c.heads * 30 <= events["keys kept"] < events["keys seen"]


def test_padding_counts_as_one_key():
    """A padding query sees itself alone, in a prompt and token by token."""
    q, k, v = random_qkv(8, lead=(2,), S=6)
    for sizes in ((6,), (1,) * 6):
        attend = part(threshold=1e-9)
        with counting(attend) as counts:
            run(attend, q, k, v, sizes, Layer(6, np.array([0, 4])))
        seen = 4 * (21 + (4 + 3))
        assert counts.events == {"keys seen": seen, "keys kept": seen}


# Refusals and the card ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"bits": 1}, "bits must be an integer, 2 to 8; got 1."),
        ({"bits": 9}, "bits must be an integer, 2 to 8; got 9."),
        ({"threshold": -0.1}, "threshold must be a number, 0 to 1; got -0.1."),
        ({"threshold": 1.5}, "threshold must be a number, 0 to 1; got 1.5."),
        ({"share": 0.0}, "share must be a number, above 0 and at most 1; got 0.0."),
        ({"share": 1.1}, "share must be a number, above 0 and at most 1; got 1.1."),
        ({"min_keys": 0}, "min_keys must be an integer, at least 1; got 0."),
        (
            {"codes": "leading-one", "threshold": 0.0, "share": 1.0},
            "codes=leading-one needs threshold=0 and a share below 1, got threshold=0 share=1",
        ),
        (
            {"codes": "leading-one"},
            "codes=leading-one needs threshold=0 and a share below 1, got threshold=0.05 "
            "share=0.25",
        ),
    ],
)
def test_bad_option_is_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"predictive_attention": options})
    text = str(refused.value)
    assert text.startswith("predictive_attention: ") and words in text and "\n" not in text


def test_tree_shows_the_settings():
    drawn = repr(apply(tiny_lm(), {"predictive_attention": {"threshold": 0.1}}).model)
    assert "code: IntegerCode(bits=4)" in drawn
    assert "threshold=0.1, share=0.25, min_keys=4)" in drawn


def test_card_says_that_it_is_a_reconstruction():
    sections = find("predictive_attention").card.sections
    assert "unconfirmed" in sections["Fidelity"] and "only the abstract" in sections["Fidelity"]
    assert "5.7" not in str(sections) and "1%" not in str(sections), "no figure of the paper's"


def test_few_tokens_again_and_again_are_selected_alike_in_all_steps():
    """Half of a head's columns are not rotated: keys of a token have equal codes often, and equal
    scales but for the last bits, which one product of many rows and many of one row differ in."""
    options = {"bits": 2, "threshold": 0.0, "share": 0.2, "min_keys": 1}
    for family, ids in (("gpt_neox", np.arange(40) % 3 + 5), ("skipless", np.arange(40) % 3 + 5)):
        lm = apply(tiny_lm(family, dtype=np.float64), {"predictive_attention": options})
        whole = lm.logits(ids)
        for sizes in ((12, *[1] * 28), (1,) * 40):
            check_close(in_chunks(lm, ids, sizes), whole, 1e-10, f"in steps of {sizes[:2]}")
