"""Early exit: confidences by hand, a loop-written twin, both ways to settle the cache, counts.

The contract tests (test_contract.py) run on models of two layers; here there are six, and settings
at which tokens leave after different layers.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from literal_early_exit import run as twin
from literal_early_exit import teacher_forced
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Block, Stack
from minitx.shared.confidence import Drawn, Limit, Probe, Saturation, sigmoid, top_two_gap
from minitx.technique import apply, swap
from minitx.training.exit_probe import examples, logistic, train_probe
from minitx.tree import Part, part, weights

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
SOFTMAX = dict(threshold=0.2, warm_up=3)
SOME = {
    "softmax": SOFTMAX,
    "sparse": dict(threshold=0.25, first=2, every=2, tau=4.0, N=20),
    "saturation": dict(measure="saturation", threshold=0.8),
    "random": dict(measure="random", threshold=0.7, warm_up=2),
    "static": dict(measure="random", threshold=0.0, first=4),
}
family = pytest.mark.parametrize("family", FAMILIES)
both_fills = pytest.mark.parametrize("fill", ["copy", "deferred"])
each_choice = pytest.mark.parametrize("options", SOME.values(), ids=SOME)


def models(family="llama", dtype=np.float64, **options):
    """(dense, leaving early) with six layers."""
    lm = LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)
    return lm, apply(lm, {"early_exit": options})


def left_after(lm, ids):
    """How many layers each token ran (T,), and its multiply-adds (T,), token by token."""
    state, depths, cost = lm.model.new_state(), [], []
    for t in range(len(ids)):
        with counting(lm) as counts:
            lm.model(ids[t : t + 1], state)
        depths.append(L - counts.events["layers skipped"])
        cost.append(counts.total().multiply_adds)
    return np.array(depths), np.array(cost)


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, atol=tolerance * abs(b).max())


# By hand -----------------------------------------------------------------------------------------


def test_the_gap_by_hand():
    found = top_two_gap(np.array([[2.0, 1, 0], [0, 2, 1], [1, 1, 0]]))
    np.testing.assert_allclose(found, [0.42051, 0.42051, 0], atol=5e-6)
    assert top_two_gap(np.array([[0, 200]], np.float32))[0] == 1  # saturated, and no NaN
    assert top_two_gap(np.array([[0, 1e30]], np.float32)).dtype == np.float32


def test_the_threshold_decays_by_hand():
    t = np.array([-1, 0, 50, 100])
    np.testing.assert_allclose(
        Limit(0.9, 4.0, 100, 0)(t), [np.inf, 0.91, 0.82353, 0.81183], atol=1e-5
    )
    np.testing.assert_array_equal(Limit(0.9, None, 100, 50)(t), [np.inf, np.inf, 0.9, 0.9])
    assert Limit(1.0, 0.0, 100, 0)(t)[1:].max() == 1  # clipped
    assert np.isinf(Limit(1.1, 4.0, 100, 0)(t)).all()  # but for the one that means never


def test_saturation_is_a_cosine():
    x, before = np.array([[3.0, 4], [1, 0], [0, 0]]), np.array([[4.0, 4], [0, 2], [1, 1]])
    np.testing.assert_allclose(Saturation()(x, before, 2, None), [28 / 5 / 32**0.5, 0, 0])


@pytest.mark.parametrize("z", [0.0, 1.0, -1.0, 3.5, -20.0])
def test_sigmoid_is_one_over_one_plus_exp_of_minus_z(z):
    expected = 1 / (1 + math.exp(-z))
    found = sigmoid(np.array(z))
    assert found == pytest.approx(expected, abs=1e-15), f"sigmoid({z}): {expected}, got {found}"


def test_sigmoid_at_zero_is_one_half():
    assert sigmoid(np.zeros(1))[0] == 0.5, "zero is as likely as not, exactly"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_far_out_is_zero_or_one_without_overflow(dtype):
    with np.errstate(all="raise"):
        found = sigmoid(np.array([-1000, 1000], dtype))
    assert found.tolist() == [0, 1], f"expected 0 at -1000 and 1 at 1000, got {found}"
    assert found.dtype == dtype, f"expected {np.dtype(dtype)}, got {found.dtype}"


@pytest.mark.parametrize("z", [0.0, 1.0, -2.0])
def test_sigmoid_slope_is_s_times_one_minus_s(z):
    """1/4 at 0, its largest."""
    low, high = sigmoid(np.array([z - 1e-5, z + 1e-5]))
    s = 1 / (1 + math.exp(-z))
    found, expected = (high - low) / 2e-5, s * (1 - s)
    assert found == pytest.approx(expected, rel=1e-6), f"slope at {z}: {expected}, got {found}"


def test_probe_by_hand():
    """[1 2 3] . [1/2 -1 1/4] = 1/2 - 2 + 3/4 = -3/4, and with the bias 1/4: -1/2.
    [0 -1 1] . [1/2 -1 1/4] = 1 + 1/4 = 5/4, and with the bias: 3/2."""
    probe = Probe(np.array([0.5, -1, 0.25]), 0.25)
    x = np.array([[1.0, 2, 3], [0, -1, 1]])
    with counting(probe) as counts:
        found = probe(x, None, 2, None)  # what it was before, depth and position do not matter
    expected = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))]
    np.testing.assert_allclose(found, expected, rtol=1e-14, err_msg="sigmoid(x . w + b)")
    entry = counts.total()
    assert (entry.multiply_adds, entry.weight_bytes) == (6, 24), (
        f"expected one multiply-add for each of 6 numbers and 3 weights of 8 bytes, got {entry}"
    )


def test_chance_belongs_to_the_depth_and_the_position():
    u = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(Drawn(u)(None, None, 1, np.array([2, 0])), [5, 3])


# Copying the state -------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("name", ["softmax", "sparse", "saturation"])
def test_copying_is_what_the_slow_loops_do(family, name):
    dense, lm = models(family, **SOME[name])
    settings = dict(measure="softmax", threshold=0, tau=None, N=48, first=1, every=1, warm_up=0)
    logits, depths = twin(dense.model, IDS, **settings | SOME[name])
    assert len(set(depths)) >= 3, "tokens leave after different layers"
    close(in_chunks(lm, IDS, (1,) * 40), logits)
    np.testing.assert_array_equal(left_after(lm, IDS)[0], depths)


@family
@both_fills
@each_choice
def test_pieces_and_rewinding_do_not_matter(family, fill, options):
    _, lm = models(family, fill=fill, **options)
    whole = lm.logits(IDS)
    state = lm.model.new_state()
    for sizes in ((40,), (7, 20, 13), (1,) * 40, (13, 1, 1, 25)):
        close(in_chunks(lm, IDS, sizes), whole)
    in_chunks(lm, IDS[:30], (30,), state)
    for back in (25, 11, 2):
        in_chunks(lm, OTHER[:8], (5, 1, 2), state)
        state.rewind(back)
    close(in_chunks(lm, IDS[2:], (1, 30, 7), state), whole[2:])


@family
@both_fills
@each_choice
def test_rows_of_a_ragged_batch_are_what_they_are_alone(family, fill, options):
    _, lm = models(family, fill=fill, **options)
    start = np.array([0, 9, 4])
    ids = np.stack([IDS, OTHER, np.roll(IDS, 5)])
    for sizes in ((40,), (12, 1, 1, 26), (10, *(1,) * 30)):
        found = in_chunks(lm, ids, sizes, lm.model.new_state(start))
        for row, first, got in zip(ids, start, found):
            close(got[first:], lm.logits(row[first:]))
    close(lm.logits(ids)[1], lm.logits(ids[1]))  # and a batch that is not ragged
    one = in_chunks(lm, ids[1:2], (12, 1, 27), lm.model.new_state(start[1:2]))
    close(one[0, 9:], lm.logits(ids[1, 9:]))


@family
@both_fills
def test_settings_at_which_nobody_leaves(family, fill):
    for options in (
        dict(threshold=1.1),
        dict(threshold=1.1, tau=4.0),
        dict(threshold=0.0, first=L),
        dict(threshold=0.0, warm_up=40),
        dict(measure="random", threshold=1.0),  # asked, but never
    ):
        dense, lm = models(family, np.float32, fill=fill, **options)
        np.testing.assert_array_equal(lm.logits(IDS), dense.logits(IDS))
        for sizes in ((1,) * 40, (13, 27)):
            np.testing.assert_array_equal(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))


# Deferring ---------------------------------------------------------------------------------------


@family
@each_choice
def test_deferred_keys_and_values_are_the_dense_ones(family, options):
    dense, lm = models(family, fill="deferred", **options)
    depths, _ = left_after(lm, IDS)
    assert depths.min() < L
    expected = teacher_forced(dense.model, IDS, depths)
    for sizes in ((40,), (1,) * 40, (5, 30, 5)):
        close(in_chunks(lm, IDS, sizes), expected, 1e-13)
    _, copying = models(family, **options)
    if len(set(depths)) > 1:  # somebody looked at a layer that another had not run
        assert abs(copying.logits(IDS) - expected).max() > 1e-3 * abs(expected).max()


def test_deferring_runs_each_layer_at_most_once():
    dense, lm = models(fill="deferred", measure="random", threshold=0.7)
    with counting(lm) as counts:
        in_chunks(lm, IDS, (1,) * 40)
    with counting(dense) as full:
        in_chunks(dense, IDS, (1,) * 40)
    owed = counts.events["layers skipped"] - counts.events["layers made up for"]
    a_layer = dense.model.stack.blocks[0].ffn
    per_token = 3 * a_layer.down.w.size  # gate, up, down
    ffn, all_ffn = (c.by_group()["blocks.ffn"].multiply_adds for c in (counts, full))
    assert 0 < owed < 40 * L and ffn == all_ffn - owed * per_token


# What is counted ---------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("name", ["saturation", "random", "softmax"])
def test_predicted_savings_are_the_counted_ones(family, name):
    dense, lm = models(family, **SOME[name])
    depths, cost = left_after(lm, IDS)
    full = left_after(dense, IDS)[1]
    c = dense.model.config
    D, q, kv = c.width, c.heads * c.head_width, c.kv_heads * c.head_width
    gate = family == "llama"
    block = D * (2 * q + 2 * kv) + (2 + gate) * D * c.hidden  # without scores
    t = np.arange(40)
    passed = block + 2 * (t + 1) * q - 2 * D * kv
    warm_up, first = SOME[name].get("warm_up", 0), 2 if name == "saturation" else 1
    check = {"saturation": 3 * D, "random": 0, "softmax": D * c.vocab_size}[name]
    checks = np.where(t < warm_up, 0, np.minimum(depths, L - 1) - first + 1)
    np.testing.assert_array_equal(full - cost, (L - depths) * passed - checks * check)


def test_one_pass_does_the_work_of_those_who_go_on_and_padding_asks_for_none():
    """Feed-forward networks of a ragged batch: those of every column in which a row goes on."""
    dense, lm = models(**SOME["random"])
    ran = np.zeros((2, L, 40), bool)  # row, layer, column
    for row, first in zip(ran, (0, 18)):
        depths = left_after(lm, IDS[first:])[0]
        row[:, first:] = np.arange(L)[:, None] < depths
    ran[:, 0] = True  # before anyone is asked, padding is run like all else
    per_token = 3 * dense.model.stack.blocks[0].ffn.down.w.size  # gate, up, down
    for rows, start in ((ran[:1], None), (ran, np.array([0, 18]))):
        batch = IDS if start is None else np.stack([IDS, IDS])
        with counting(lm) as counts:
            lm.model(batch, lm.model.new_state(start))
        columns = rows.any(0).sum() * len(rows)
        assert counts.by_group()["blocks.ffn"].multiply_adds == columns * per_token


def test_events_say_who_left_where():
    _, lm = models(**SOME["random"])
    depths, _ = left_after(lm, IDS)
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["layers that may be skipped"] == 38 * (L - 1)
    assert counts.events["layers skipped"] == (L - depths).sum()
    for depth in range(1, L):
        assert counts.events[f"tokens that left after {depth}"] == (depths == depth).sum()


# Beside other techniques -------------------------------------------------------------------------


@both_fills
@pytest.mark.parametrize(
    "other",
    [
        dict(fold_norms=True),
        dict(fuse_projections=True),
        dict(first_layer=True),
        dict(predictive_attention={"tau": 0.2}),
        dict(ffn_skip={"threshold": 0.8, "warm_up": 2, "cold_start": 1}),
        dict(exact_head=True),
    ],
    ids=lambda o: next(iter(o)),
)
def test_other_techniques_work_inside(fill, other):
    dense = LM(tiny_model(dtype=np.float64, layers=L), TOKENIZER)
    lm = apply(dense, {"early_exit": SOFTMAX | {"fill": fill}} | other)
    assert left_after(lm, IDS)[0].min() < L
    whole = lm.logits(IDS)
    for sizes in ((1,) * 40, (7, 20, 13)):
        close(in_chunks(lm, IDS, sizes), whole)
    if set(other) <= {"fold_norms", "fuse_projections", "first_layer", "exact_head"}:
        close(whole, apply(dense, {"early_exit": SOFTMAX | {"fill": fill}}).logits(IDS), 1e-9)


def test_speculative_decoding_gives_the_text_of_the_model_that_leaves_early():
    _, lm = models(**SOFTMAX)
    drafted = apply(lm, {"speculative": {"draft": "lookup"}})
    assert drafted.generate(IDS[:5], 25) == lm.generate(IDS[:5], 25)
    with pytest.raises(MinitxError, match="early_exit"):
        apply(lm, {"speculative": {"draft": "self"}})


def test_norm_and_head_are_the_models_own():
    dense, lm = models("gpt_neox")
    assert lm.model.stack.measure.head is lm.model.head
    assert lm.model.stack.measure.norm is lm.model.norm
    ours, theirs = (list(map(id, weights(m).values())) for m in (lm, dense))
    assert sorted(ours) == sorted(theirs)


# The probe ---------------------------------------------------------------------------------------


def test_logistic_regression_finds_what_made_the_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 3)) * [1, 5, 0.2] + [0, 3, 0]
    w, b = np.array([1.0, -0.3, 2.0]), 0.9
    y = rng.random(len(x)) < 1 / (1 + np.exp(-(x @ w + b)))
    found, constant = logistic(x, y)
    np.testing.assert_allclose(found, w, rtol=0.1, atol=0.02)
    p = 1 / (1 + np.exp(-(x @ found + constant)))
    weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    assert abs((weight * (p - y)).mean()) < 1e-9  # balanced, so b is not 0.9 but at the minimum


def test_the_probe_is_better_than_chance_and_the_same_each_time():
    dense = LM(tiny_model(layers=L), TOKENIZER)
    texts = np.random.default_rng(5).integers(0, 258, (60, 30)).tolist()
    w, b = train_probe(dense, texts[:50])
    again = train_probe(dense, texts[:50])
    assert w.dtype == np.float32 and np.array_equal(w, again[0]) and b == again[1]
    h, same = examples(dense, texts[50:])
    assert h.shape == (10 * 30 * (L - 1), 16)
    expected = []
    for ids in texts[50:]:
        last = dense.logits(ids).argmax(-1)
        x = dense.model.embed(np.array(ids), slice(0, 30))
        state = dense.model.new_state()
        state.take(30)
        for depth in range(L - 1):
            x = dense.model.stack.run(x, state, depth, depth + 1)
            expected.append(dense.model.head(dense.model.norm(x)).argmax(-1) == last)
    np.testing.assert_array_equal(same, np.concatenate(expected))
    sure = h @ w + b > 0
    assert (sure[same].mean() + (~sure[~same]).mean()) / 2 > 0.55


def test_the_probe_is_asked():
    _, lm = models(measure="probe", threshold=0.5)
    assert lm.model.stack.measure.w.shape == (16,)
    close(in_chunks(lm, IDS, (1,) * 40), lm.logits(IDS))
    depths, _ = left_after(lm, IDS)
    assert depths.min() < L


# Refusals ----------------------------------------------------------------------------------------


@part
class Mute(Part):
    """A block that cannot make keys and values alone."""

    block: Block

    def __call__(self, x, layer):
        return self.block(x, layer)


def test_blocks_that_cannot_fill_are_refused_where_they_would_have_to():
    lm = LM(tiny_model(layers=L), TOKENIZER)
    mute = swap(lm, Block, Mute)
    with pytest.raises(MinitxError, match="early_exit .* Mute .* fill=deferred"):
        apply(mute, {"early_exit": True})
    apply(mute, {"early_exit": {"fill": "deferred"}})
    first = replace(
        lm.model.stack, blocks=(Mute(lm.model.stack.blocks[0]), *lm.model.stack.blocks[1:])
    )
    apply(swap(lm, Stack, lambda stack: first), {"early_exit": True})  # block 0 always runs


@pytest.mark.parametrize(
    "options, match",
    [
        (dict(threshold=-0.1), "threshold"),
        (dict(first=0), "first"),
        (dict(every=0), "every"),
        (dict(warm_up=-1), "warm_up"),
        (dict(tau=-1.0), "tau"),
        (dict(N=0), "N"),
        (dict(seed=-1), "seed"),
        (dict(measure="gap"), "one of"),
    ],
)
def test_bad_options_are_refused(options, match):
    with pytest.raises(MinitxError, match=match) as refused:
        models(**options)
    assert "early_exit" in str(refused.value) and "\n" not in str(refused.value)


def test_the_probe_needs_a_tokenizer_and_two_outcomes():
    without = LM(tiny_model(layers=L))
    with pytest.raises(MinitxError, match="early_exit.*tokenizer"):
        apply(without, {"early_exit": {"measure": "probe"}})
    for texts, match in (([], "nothing"), ([[5]], "early_exit")):
        with pytest.raises(MinitxError, match=match):
            train_probe(LM(tiny_model(layers=2), TOKENIZER), texts)
