"""Early exit: confidences by hand, equality with the literal version, the KV cache, counts.

The contract tests (test_contract.py) run on models of two layers. Here there are six, and settings
at which tokens exit after different layers.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from literal_early_exit import dense_after, run_deferred
from literal_early_exit import run as literal
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_lm, tiny_model

from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Block, Stack
from minitx.skip.early_exit import ExitingStack, exit_probe
from minitx.skip.early_exit.confidence import (
    ExitProbe,
    RandomConfidence,
    Saturation,
    SoftmaxGap,
    ThresholdSchedule,
    sigmoid,
    softmax_gap,
)
from minitx.skip.early_exit.exit_probe import examples, logistic_regression, train_exit_probe
from minitx.skip.early_exit.kv_fill import CopyExitState
from minitx.state import State
from minitx.technique import apply, swap
from minitx.tree import Part, part, weights

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
# The head of the small models costs more than their layers, which is said (test_checks_that...).
pytestmark = pytest.mark.filterwarnings("ignore:early_exit.*measure=softmax")
SOFTMAX = dict(measure="softmax", first=1, threshold=0.2, warm_up=3)
SETTINGS = {
    "softmax": SOFTMAX,
    "decay": dict(threshold=0.25, first=2, every=2, decay=4.0, horizon=20),
    "saturation": dict(measure="saturation", threshold=0.8),
    "saturation every=2": dict(measure="saturation", threshold=0.8, first=1, every=2),
    "random": dict(measure="random", threshold=0.7, warm_up=2),
    "all after layer 4": dict(measure="random", threshold=0.0, first=4),
}
family = pytest.mark.parametrize("family", FAMILIES)
each_fill = pytest.mark.parametrize("kv_fill", ["copy", "deferred"])
each_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


def models(family="llama", dtype=np.float64, **options):
    """(dense, with early exit), with six layers, after each of which a token may exit."""
    lm = LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)
    return lm, apply(lm, {"early_exit": {"measure": "softmax", "first": 1} | options})


def depths_and_cost(lm, ids):
    """How many layers each token ran (T,), and its multiply-adds (T,), token by token."""
    state, skipped, cost = lm.model.new_state(), [0], [0]
    with counting(lm) as counts:
        for t in range(len(ids)):
            lm.model(ids[t : t + 1], state)
            skipped.append(counts.events["layers skipped"])
            cost.append(counts.total().multiply_adds)
    return L - np.diff(skipped), np.diff(cost)


def close(a, b, message="", tolerance=1e-10):
    assert_same(a, b, message, atol=tolerance * abs(b).max())


# By hand -----------------------------------------------------------------------------------------


@part
class Rotate(Part):
    """A toy block: turns the hidden state (1, 2) by an angle, and notes what it was called for."""

    degrees: float
    calls: list

    def __call__(self, x, layer):
        self.calls.append("run")
        a = math.radians(self.degrees)
        return x @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])

    def backfill(self, x, layer):
        self.calls.append("backfill")


@pytest.mark.parametrize(
    "threshold, angle, expected",
    [
        (0.80, 90, ["run", "run", "backfill", "backfill"]),
        (0.95, 100, ["run", "run", "run", "backfill"]),
        (0.99, 150, ["run", "run", "run", "run"]),
    ],
)
def test_worked_example_by_hand(threshold, angle, expected):
    """Four layers turn the hidden state (1, 0) by 60, 30, 10 and 50 degrees. The saturation is the
    cosine of the last turn:

        after layer 2: cos(30) = 0.866    after layer 3: cos(10) = 0.985    (layer 4 is the last)

    So at 0.80 the token exits after layer 2, at 60 + 30 = 90 degrees, and layers 3 and 4 are
    backfilled; at 0.95 after layer 3, at 100 degrees; at 0.99 it runs all layers, to 150.
    """
    calls = [[], [], [], []]
    blocks = Stack(tuple(map(Rotate, (60, 30, 10, 50), calls)))
    schedule = ThresholdSchedule(threshold, None, 10, 0)
    stack, state = ExitingStack(blocks, Saturation(), schedule, CopyExitState(), 2, 1), State(4, 10)
    state.take(1)
    found = stack(np.array([[1.0, 0.0]]), state)
    a = math.radians(angle)
    assert_same(found, [[math.cos(a), math.sin(a)]], atol=1e-15)
    assert sum(calls, []) == expected, "what each layer did"


def test_softmax_gap_by_hand():
    """softmax(2, 1, 0) = (e^2, e, 1) / (e^2 + e + 1) = (7.389, 2.718, 1) / 11.107
    = (0.66524, 0.24473, 0.09003), so the gap is 0.42051. Two equal logits: 0."""
    found = softmax_gap(np.array([[2.0, 1, 0], [0, 2, 1], [1, 1, 0]]))
    assert_same(found, [0.42051, 0.42051, 0], atol=5e-6)


def test_softmax_gap_of_a_saturated_softmax_is_one_and_finite():
    assert softmax_gap(np.array([[0, 200]], np.float32))[0] == 1
    assert softmax_gap(np.array([[0, 1e30]], np.float32)).dtype == np.float32


def test_threshold_decays_by_hand():
    """0.9 * 0.9 + 0.1 exp(-4 t / 100): 0.81 + 0.1 at t = 0, 0.81 + 0.01353 at 50, 0.81 + 0.00183 at
    100. Padding (t = -1) never exits."""
    t = np.array([-1, 0, 50, 100])
    found = ThresholdSchedule(0.9, 4.0, 100, 0)(t)
    assert_same(found, [np.inf, 0.91, 0.82353, 0.81183], atol=1e-5)


def test_threshold_without_decay_is_constant_after_the_warm_up():
    t = np.array([-1, 0, 50, 100])
    found = ThresholdSchedule(0.9, None, 100, 50)(t)
    assert_same(found, [np.inf, np.inf, 0.9, 0.9])


def test_threshold_is_clipped_to_one_but_above_one_means_never():
    """The formula would bring 1.1 down to 1, which a saturated softmax reaches."""
    t = np.array([0, 50, 100])
    assert ThresholdSchedule(1.0, 0.0, 100, 0)(t).max() == 1, "0.9 + 0.1 exp(0)"
    for decay in (None, 0.0, 4.0):
        assert np.isinf(ThresholdSchedule(1.1, decay, 100, 0)(t)).all(), f"decay={decay}"


def test_saturation_is_the_cosine_of_two_hidden_states():
    """(3, 4) . (4, 4) = 28 over 5 sqrt(32); (1, 0) . (0, 2) = 0; a zero vector gives 0."""
    h, previous = np.array([[3.0, 4], [1, 0], [0, 0]]), np.array([[4.0, 4], [0, 2], [1, 1]])
    assert_same(Saturation()(h, previous, 2, None), [28 / 5 / 32**0.5, 0, 0], tolerance=1e-7)


@pytest.mark.parametrize("z", [0.0, 1.0, -1.0, 3.5, -20.0])
def test_sigmoid_is_one_over_one_plus_exp_of_minus_z(z):
    expected = 1 / (1 + math.exp(-z))
    found = sigmoid(np.array(z))
    assert found == pytest.approx(expected, abs=1e-15), f"sigmoid({z}): {expected}, got {found}"


def test_sigmoid_at_zero_is_one_half():
    assert sigmoid(np.zeros(1))[0] == 0.5


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sigmoid_of_large_numbers_is_zero_or_one_without_overflow(dtype):
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


def test_exit_probe_by_hand():
    """[1 2 3] . [1/2 -1 1/4] = 1/2 - 2 + 3/4 = -3/4, and with the bias 1/4: -1/2.
    [0 -1 1] . [1/2 -1 1/4] = 1 + 1/4 = 5/4, and with the bias: 3/2."""
    probe = ExitProbe(np.array([0.5, -1, 0.25]), 0.25)
    h = np.array([[1.0, 2, 3], [0, -1, 1]])
    with counting(probe) as counts:
        found = probe(h, None, 2, None)  # the previous state, depth and position do not matter
    expected = [1 / (1 + math.exp(0.5)), 1 / (1 + math.exp(-1.5))]
    assert_same(found, expected, "sigmoid(h . w + b)", tolerance=1e-14)
    entry = counts.total()
    assert (entry.multiply_adds, entry.weight_bytes) == (6, 24), (
        f"expected one multiply-add for each of 6 numbers and 3 weights of 8 bytes, got {entry}"
    )


def test_random_confidence_depends_on_depth_and_position_alone():
    scores = np.arange(6.0).reshape(2, 3)
    assert_same(RandomConfidence(scores)(None, None, 1, np.array([2, 0])), [5, 3])


# Equal to the literal version --------------------------------------------------------------------


@family
@pytest.mark.parametrize("name", ["softmax", "decay", "saturation", "saturation every=2"])
def test_equals_the_literal_version(family, name):
    dense, lm = models(family, **SETTINGS[name])
    defaults = dict(
        measure="softmax", threshold=0, decay=None, horizon=48, first=1, every=1, warm_up=0
    )
    logits, depths = literal(dense.model, IDS, **defaults | SETTINGS[name])
    assert len(set(depths)) >= 3, "tokens should exit after different layers"
    close(in_chunks(lm, IDS, (1,) * 40), logits, "logits")
    assert_same(depths_and_cost(lm, IDS)[0], depths, "layers run per token")


@family
@each_fill
@each_setting
def test_chunks_and_rewinding_do_not_matter(family, kv_fill, options):
    """Single tokens take the path without masks, so this also says that both paths agree."""
    _, lm = models(family, kv_fill=kv_fill, **options)
    whole = lm.logits(IDS)
    state = lm.model.new_state()
    for sizes in ((7, 20, 13), (*(1,) * 16, 24), (13, 1, 1, 25)):
        close(in_chunks(lm, IDS, sizes), whole, f"chunks of {sizes}")
    in_chunks(lm, IDS[:30], (30,), state)
    for back in (25, 11, 2):
        in_chunks(lm, OTHER[:8], (5, 1, 2), state)
        state.rewind(back)
    close(in_chunks(lm, IDS[2:], (1, 30, 7), state), whole[2:], "after rewinding to 2")


@family
@each_fill
@each_setting
def test_a_row_of_a_padded_batch_equals_the_row_alone(family, kv_fill, options):
    _, lm = models(family, kv_fill=kv_fill, **options)
    start = np.array([0, 9, 4])
    ids = np.stack([IDS, OTHER, np.roll(IDS, 5)])
    for sizes in ((40,), (12, 1, 1, 26), (26, *(1,) * 5, 9)):
        found = in_chunks(lm, ids, sizes, lm.model.new_state(start))
        for row, first, got in zip(ids, start, found):
            close(got[first:], lm.logits(row[first:]), f"row that starts at {first}")
    close(lm.logits(ids)[1], lm.logits(ids[1]), "a batch without padding")
    one = in_chunks(lm, ids[1:2], (12, 1, 27), lm.model.new_state(start[1:2]))
    close(one[0, 9:], lm.logits(ids[1, 9:]), "a padded batch of one")


@family
@each_fill
@pytest.mark.parametrize(
    "options",
    [
        dict(threshold=1.1),
        dict(threshold=1.1, decay=4.0),
        dict(threshold=0.0, first=L),
        dict(threshold=0.0, warm_up=40),
        dict(measure="random", threshold=1.0),  # measured, and never reached
    ],
    ids=str,
)
def test_settings_without_exits_equal_the_dense_model_bit_for_bit(family, kv_fill, options):
    dense, lm = models(family, np.float32, kv_fill=kv_fill, **options)
    assert_same(lm.logits(IDS), dense.logits(IDS))
    for sizes in ((*(1,) * 12, 28), (13, 27)):
        assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))


# Deferred layers ---------------------------------------------------------------------------------


@family
@each_setting
def test_deferred_keys_and_values_are_those_of_the_dense_model(family, options):
    """So the logits are what the dense model gives after as many layers; copying differs."""
    dense, lm = models(family, kv_fill="deferred", **options)
    depths, _ = depths_and_cost(lm, IDS)
    assert depths.min() < L, "no token exited"
    expected = dense_after(dense.model, IDS, depths)
    for sizes in ((40,), (*(1,) * 20, 20), (5, 30, 5)):
        close(in_chunks(lm, IDS, sizes), expected, f"chunks of {sizes}", 1e-13)
    _, copying = models(family, **options)
    if len(set(depths)) > 1:  # a token attended to others in a layer that those had skipped
        error = abs(copying.logits(IDS) - expected).max()
        assert error > 1e-3 * abs(expected).max(), "copied exit states should differ from dense"


@family
@each_setting
def test_deferred_equals_the_literal_version(family, options):
    """Logits, and how many skipped layers ran later, because a later token entered them."""
    dense, lm = models(family, kv_fill="deferred", **options)
    depths, _ = depths_and_cost(lm, IDS)
    logits, ran = run_deferred(dense.model, IDS, depths)
    with counting(lm) as counts:
        close(in_chunks(lm, IDS, (1,) * 40), logits, "logits")
    assert counts.events["deferred layers run"] == sum(map(len, ran)) - depths.sum()


def test_deferred_layers_run_at_most_once():
    dense, lm = models(kv_fill="deferred", measure="random", threshold=0.7)
    with counting(lm) as counts:
        in_chunks(lm, IDS, (1,) * 40)
    with counting(dense) as full:
        in_chunks(dense, IDS, (1,) * 40)
    never_run = counts.events["layers skipped"] - counts.events["deferred layers run"]
    per_token = 3 * dense.model.stack.blocks[0].ffn.down.w.size  # gate, up, down
    ffn, all_ffn = (c.by_group()["blocks.ffn"].multiply_adds for c in (counts, full))
    assert 0 < never_run < 40 * L
    assert ffn == all_ffn - never_run * per_token, "multiply-adds of the FFNs that ran"


# What is counted ---------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("name", ["saturation", "random", "softmax"])
def test_counted_savings_are_those_on_the_card(family, name):
    dense, lm = models(family, **SETTINGS[name])
    depths, cost = depths_and_cost(lm, IDS)
    full = depths_and_cost(dense, IDS)[1]
    c = dense.model.config
    D, q, kv = c.width, c.heads * c.head_width, c.kv_heads * c.head_width
    gate = family == "llama"
    layer = D * (2 * q + 2 * kv) + (2 + gate) * D * c.hidden  # without attention scores
    t = np.arange(40)
    skipped_layer = layer + 2 * (t + 1) * q - 2 * D * kv
    warm_up, first = SETTINGS[name].get("warm_up", 0), 2 if name == "saturation" else 1
    check = {"saturation": 3 * D, "random": 0, "softmax": D * c.vocab_size}[name]
    checks = np.where(t < warm_up, 0, np.minimum(depths, L - 1) - first + 1)
    assert_same(full - cost, (L - depths) * skipped_layer - checks * check)


@pytest.mark.parametrize("first, depths", [(1, {2, 4}), (2, {2, 4}), (3, {3, 5})])
def test_saturation_is_first_measured_after_two_layers(first, depths):
    """first=1 every=2 checks after 2 and 4 of six layers, not after 3 and 5."""
    _, lm = models(measure="saturation", threshold=0.8, first=first, every=2)
    with counting(lm) as counts:
        lm.logits(IDS)
    found = {n for n in range(1, L) if counts.events[f"tokens exited after {n} layers"]}
    assert found == depths, f"first={first}: tokens exited after layers {found}"


def test_ffns_run_for_the_columns_with_a_live_row_and_padding_is_not_live():
    dense, lm = models(**SETTINGS["random"])
    ran = np.zeros((2, L, 40), bool)  # row, layer, column
    for row, first in zip(ran, (0, 18)):
        depths = depths_and_cost(lm, IDS[first:])[0]
        row[:, first:] = np.arange(L)[:, None] < depths
    ran[:, 0] = True  # every token runs layer 0, padding too
    per_token = 3 * dense.model.stack.blocks[0].ffn.down.w.size  # gate, up, down
    for rows, start in ((ran[:1], None), (ran, np.array([0, 18]))):
        batch = IDS if start is None else np.stack([IDS, IDS])
        with counting(lm) as counts:
            lm.model(batch, lm.model.new_state(start))
        columns = rows.any(0).sum() * len(rows)
        assert counts.by_group()["blocks.ffn"].multiply_adds == columns * per_token


def test_events_count_the_tokens_that_exited_after_each_layer():
    _, lm = models(**SETTINGS["random"])
    depths, _ = depths_and_cost(lm, IDS)
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["skippable layers"] == 38 * (L - 1)
    assert counts.events["layers skipped"] == (L - depths).sum()
    for depth in range(1, L):
        assert counts.events[f"tokens exited after {depth} layers"] == (depths == depth).sum()


# With other techniques ---------------------------------------------------------------------------


@each_fill
@pytest.mark.parametrize(
    "other",
    [
        dict(fold_norms=True),
        dict(fuse_projections=True),
        dict(first_layer=True),
        dict(predictive_attention={"threshold": 0.2}),
        dict(ffn_skip={"threshold": 0.8, "warm_up": 2, "cold_start": 1}),
        dict(exact_head=True),
    ],
    ids=lambda o: next(iter(o)),
)
def test_other_techniques_work_inside(kv_fill, other):
    dense = LM(tiny_model(dtype=np.float64, layers=L), TOKENIZER)
    lm = apply(dense, {"early_exit": SOFTMAX | {"kv_fill": kv_fill}} | other)
    assert depths_and_cost(lm, IDS)[0].min() < L, "no token exited"
    whole = lm.logits(IDS)
    for sizes in ((1,) * 40, (7, 20, 13)):
        close(in_chunks(lm, IDS, sizes), whole, f"chunks of {sizes}")
    if set(other) <= {"fold_norms", "fuse_projections", "first_layer", "exact_head"}:
        alone = apply(dense, {"early_exit": SOFTMAX | {"kv_fill": kv_fill}})
        close(whole, alone.logits(IDS), "an exact technique changed the logits", 1e-9)


def test_speculative_decoding_gives_the_text_of_the_model_with_early_exit():
    _, lm = models(**SOFTMAX)
    drafted = apply(lm, {"prompt_lookup": {}})
    assert drafted.generate(IDS[:5], 25) == lm.generate(IDS[:5], 25)
    with pytest.raises(MinitxError, match="early_exit"):
        apply(lm, {"speculative": {"draft": "self"}})


def test_softmax_measure_shares_the_norm_and_head_of_the_model():
    dense, lm = models("gpt_neox")
    assert lm.model.stack.confidence.head is lm.model.head
    assert lm.model.stack.confidence.norm is lm.model.norm
    ours, theirs = (list(map(id, weights(m).values())) for m in (lm, dense))
    assert sorted(ours) == sorted(theirs)


# Training the exit probe -------------------------------------------------------------------------


def test_logistic_regression_recovers_the_weights_that_made_the_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20000, 3)) * [1, 5, 0.2] + [0, 3, 0]
    w, b = np.array([1.0, -0.3, 2.0]), 0.9
    y = rng.random(len(x)) < 1 / (1 + np.exp(-(x @ w + b)))
    found, constant = logistic_regression(x, y)
    assert_same(found, w, tolerance=0.1, atol=0.02)
    p = 1 / (1 + np.exp(-(x @ found + constant)))
    weight = np.where(y, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    # The classes are balanced, so b is not 0.9, but the gradient of the loss is 0.
    assert abs((weight * (p - y)).mean()) < 1e-9, "the gradient for b is not 0"


def test_exit_probe_of_many_layers_learns_from_tokens_at_equal_distances(monkeypatch):
    """4 texts of 30 tokens after L - 1 layers are too many here, so every fourth token counts."""
    dense = LM(tiny_model(layers=L), TOKENIZER)
    texts = np.random.default_rng(5).integers(0, 258, (4, 30)).tolist()
    h, same = examples(dense, texts)
    monkeypatch.setattr(exit_probe, "MOST_EXAMPLES", 4 * 30 * (L - 1) // 3 - 1)
    some, same_of_some = examples(dense, texts)
    every_fourth = h.reshape(4, L - 1, 30, 16)[:, :, ::4]
    assert_same(some, every_fourth.reshape(-1, 16))
    assert_same(same_of_some, same.reshape(4, L - 1, 30)[:, :, ::4].ravel())


def test_exit_probe_is_better_than_chance_and_deterministic():
    dense = LM(tiny_model(layers=L), TOKENIZER)
    texts = np.random.default_rng(5).integers(0, 258, (60, 30)).tolist()
    w, b = train_exit_probe(dense, texts[:50])
    again = train_exit_probe(dense, texts[:50])
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
    assert_same(same, np.concatenate(expected), "labels of the examples")
    positive = h @ w + b > 0
    balanced_accuracy = (positive[same].mean() + (~positive[~same]).mean()) / 2
    assert balanced_accuracy > 0.55


def test_measure_probe_runs_with_the_probe_that_it_trained():
    _, lm = models(measure="probe", threshold=0.5)
    assert lm.model.stack.confidence.w.shape == (16,)
    close(in_chunks(lm, IDS, (1,) * 40), lm.logits(IDS))
    depths, _ = depths_and_cost(lm, IDS)
    assert depths.min() < L, "no token exited"


def test_measure_probe_needs_a_tokenizer():
    without = LM(tiny_model(layers=L))
    with pytest.raises(MinitxError, match="early_exit.*tokenizer"):
        apply(without, {"early_exit": {"measure": "probe"}})


@pytest.mark.parametrize("texts, match", [([], "at least one text"), ([[5]], "both classes")])
def test_exit_probe_needs_texts_and_examples_of_both_classes(texts, match):
    with pytest.raises(MinitxError, match=f"early_exit.*{match}"):
        train_exit_probe(LM(tiny_model(layers=2), TOKENIZER), texts)


# Refusals ----------------------------------------------------------------------------------------


@part
class NoBackfill(Part):
    """A block that cannot compute keys and values separately."""

    block: Block

    def __call__(self, x, layer):
        return self.block(x, layer)


def test_blocks_that_cannot_backfill_are_refused_unless_every_token_runs_them():
    lm = LM(tiny_model(layers=L), TOKENIZER)
    changed = swap(lm, Block, NoBackfill)
    with pytest.raises(MinitxError, match="early_exit .* NoBackfill .* kv_fill=deferred"):
        apply(changed, {"early_exit": True})
    apply(changed, {"early_exit": {"kv_fill": "deferred"}})
    blocks = lm.model.stack.blocks
    first = replace(lm.model.stack, blocks=(NoBackfill(blocks[0]), *blocks[1:]))
    apply(swap(lm, Stack, lambda stack: first), {"early_exit": True})  # block 0 always runs


def test_default_checks_saturation_from_the_middle_on():
    stack = apply(LM(tiny_model(layers=6), TOKENIZER), {"early_exit": True}).model.stack
    assert (type(stack.confidence), stack.first, stack.every) == (Saturation, 3, 1)
    deep = apply(
        LM(tiny_model(layers=6), TOKENIZER), {"early_exit": {"preset": "paper"}}
    ).model.stack
    assert (type(deep.confidence), deep.first) == (SoftmaxGap, 1)


@pytest.mark.filterwarnings("error")
def test_checks_that_cost_more_than_the_layers_are_said():
    """A check by softmax takes V D = 259 * 16 = 4,144 multiply-adds. A skipped layer saves W_q and
    W_o, 2 * 16 * 16, and the FFN, 3 * 16 * 24: 1,664. Of 6 layers 5 can be skipped: 8,320. Five
    checks take 20,720; two of them, every=3, take 8,288."""
    lm = LM(tiny_model(layers=6), TOKENIZER)
    for every in (1, 2):  # five checks, and three
        with pytest.warns(MinitxWarning, match=f"{[5, 3][every - 1]} checks .*4,144.* or every=3"):
            apply(lm, {"early_exit": {"measure": "softmax", "first": 1, "every": every}})
    with pytest.warns(MinitxWarning, match="in all 2.5 times those of the 5 layers .*1,664 each"):
        apply(lm, {"early_exit": {"preset": "paper"}})
    with pytest.warns(MinitxWarning, match=r"48 each\)\.$"):  # no interval pays
        apply(lm, {"early_exit": {"measure": "softmax", "first": 5}})
    for options in (
        {"measure": "softmax", "first": 1, "every": 3},
        {"measure": "softmax", "threshold": 1.1},  # never measured
        {"measure": "saturation", "first": 2},
        {},
    ):
        apply(lm, {"early_exit": options})
    probe = {"measure": "probe", "first": 5}
    apply(lm, {"early_exit": probe}, calibrate=[list(range(1, 40))])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(threshold=-0.1), "threshold must be a number, at least 0; got -0.1"),
        (dict(first=0), "first must be an integer, at least 1, or None; got 0"),
        (dict(every=0), "every must be an integer, at least 1; got 0"),
        (dict(warm_up=-1), "warm_up must be an integer, at least 0; got -1"),
        (dict(decay=-1.0), "decay must be a number, at least 0, or None; got -1.0"),
        (dict(horizon=0), "horizon must be an integer, at least 1, or None; got 0"),
        (dict(seed=-1), "seed must be an integer, at least 0; got -1"),
        (dict(measure="gap"), "measure must be one of softmax, saturation, probe, random"),
        (dict(kv_fill="zeros"), "kv_fill must be one of copy, deferred"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=f"early_exit: {message}") as refused:
        models(**options)
    assert "\n" not in str(refused.value)


def test_exit_probe_is_trained_once_for_settings_of_one_model(monkeypatch):
    trained = []

    def train(lm, texts):
        trained.append(1)
        return np.zeros(lm.model.config.width), 0.0

    monkeypatch.setattr("minitx.skip.early_exit.exit_probe.train_exit_probe", train)
    monkeypatch.setattr("minitx.skip.early_exit.calibration_ids", lambda *_: [])
    for threshold in (0.5, 0.9):
        apply(tiny_lm(), {"early_exit": {"measure": "probe", "threshold": threshold}})
    assert len(trained) == 1, "a sweep over thresholds trains the probe again"
    apply(tiny_lm("gpt2"), {"early_exit": {"measure": "probe"}})
    assert len(trained) == 2, "another model needs another probe"
