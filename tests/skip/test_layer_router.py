"""The layer router: the gate by hand, a literal version, what is decided when, counts, figures.

The contract tests (test_contract.py) run on models of two layers; here there are five.
"""

from dataclasses import replace
from functools import cache

import literal_layer_router as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, check_close, in_chunks, tiny_model

import minitx
from minitx.calibration import calibration_ids
from minitx.decode import new_state
from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting
from minitx.lm import LM
from minitx.skip.layer_router import (
    Decisions,
    Gates,
    Observed,
    RoutedStack,
    Router,
    fit_gates,
    observe,
    random_gates,
)
from minitx.technique import apply

L = 5
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
TEXTS = [np.random.default_rng(seed).integers(0, 258, 30).tolist() for seed in range(8)]
PROMPT = 12
STEPS = (PROMPT, *[1] * (40 - PROMPT))
family = pytest.mark.parametrize("family", FAMILIES)


@cache
def dense(family="llama", dtype=np.float64) -> LM:
    return LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)


def router(seed=0, threshold=0.5, dtype=np.float64) -> Router:
    """Random gates for layers 1 .. 4, about half of which are below the threshold."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((L - 1, 16)).astype(dtype)
    return Router(w, np.zeros(L - 1, dtype), 1, threshold)


def routed(family="llama", dtype=np.float64, **options) -> LM:
    lm = dense(family, dtype)
    stack = RoutedStack(lm.model.stack, router(dtype=dtype, **options))
    return replace(lm, model=replace(lm.model, stack=stack))


def skipped(lm, ids) -> list[int]:
    """The layers that a sequence with this prompt skips."""
    state = new_state(lm.model, ids)
    lm.model(ids, state)
    return [index for index, layer in enumerate(state.layers) if not layer.count]


# Worked example ----------------------------------------------------------------------------------


def test_gate_by_hand():
    # The mean of (1, 0) and (3, 2) is (2, 1). w . s + b = 2 - 1 - 1 = 0, and sigmoid(0) = 0.5.
    x = np.array([[1.0, 0.0], [3.0, 2.0]])
    gate = Router(np.array([[1.0, -1.0]]), np.array([-1.0]), first=1, threshold=0.5)
    assert gate(x, 1) is True, "a gate at the threshold runs the layer"
    assert replace(gate, threshold=0.51)(x, 1) is False, "a gate below the threshold skips it"
    # (1, 0) alone: 1 - 0 - 1 = 0 as well; (3, 2) alone: 3 - 2 - 1 = 0; (0, 2): -3, sigmoid 0.047
    assert gate(np.array([[0.0, 2.0]]), 1) is False
    assert gate(x, 0) is True and gate(x, 2) is True, "layers without a gate always run"


def test_labels_and_targets_by_hand():
    # Layer A: KL 0.1, 0.1, 0.3, 0.3 with tolerance 0.2: texts 2 and 3 keep it; s is -1 or 1.
    # Layer B: always below, so b alone decides: sigmoid(b) = 1 / (4 + 2), Platt's target.
    s = np.array([-1.0, -1.0, 1.0, 1.0])
    summaries = np.stack([s, s * 0 + 7], 1)[..., None]  # (4 texts, 2 layers, D = 1)
    divergences = np.array([[0.1, 0.0], [0.1, 0.2], [0.3, 0.0], [0.3, 0.2]])
    w, b = fit_gates(Observed(summaries, divergences), tolerance=0.2, ridge=1.0)
    assert w[0, 0] > 0.5 and abs(b[0]) < 1e-9, "layer A: kept where s is positive"
    # at the optimum: sum of (p - target) s + ridge w = 0, with targets 3/4 and 1/4
    p = 1 / (1 + np.exp(-w[0, 0]))
    assert 4 * (p - 0.75) + w[0, 0] == pytest.approx(0, abs=1e-9)
    assert w[1, 0] == 0, "a feature that never changes has no weight"
    assert 1 / (1 + np.exp(-b[1])) == pytest.approx(1 / 6)


# Against the literal version ---------------------------------------------------------------------


@family
def test_skipped_layers_and_logits_equal_the_literal_version(family):
    lm = routed(family)
    gates = {1 + i: (w, 0.0) for i, w in enumerate(lm.model.stack.router.w)}
    seen = set()
    for ids in (*TEXTS, IDS[:PROMPT].tolist()):
        expected = literal.route(lm.model, ids, gates, 0.5)
        assert skipped(lm, ids) == expected, "the router skips other layers"
        logits, _ = literal.run(lm.model, ids, expected)
        check_close(lm.model(ids, new_state(lm.model, ids)), logits, 1e-12, "logits")
        seen.add(tuple(expected))
    assert len(seen) >= 3, "the example has the same layers for every sequence"


def test_observed_divergences_and_summaries_equal_the_literal_version():
    lm = dense()
    seen = observe(lm, TEXTS[:2], range(1, 4), 6)
    for text, summary, divergence in zip(TEXTS[:2], *seen):
        for layer in (1, 2, 3):
            expected = literal.divergence(lm.model, text, layer, 6)
            assert divergence[layer - 1] == pytest.approx(expected), f"KL without layer {layer}"
            entering = literal.run(lm.model, text)[1][layer][:6]
            assert_same(summary[layer - 1], literal.mean(entering), atol=1e-12)


def test_gates_are_the_minimum_of_the_literal_loss():
    rng = np.random.default_rng(0)
    seen = Observed(rng.standard_normal((12, 1, 3)) * [1, 5, 0.2], rng.random((12, 1)))
    (w,), (b,) = fit_gates(seen, tolerance=0.4, ridge=2.0)
    examples = seen.summaries[:, 0].tolist()
    labels = (seen.divergences[:, 0] > 0.4).tolist()
    least = literal.logistic_loss(w, b, examples, labels, 2.0)
    for change in np.concatenate([np.eye(4), -np.eye(4)]) * 1e-3:
        other = literal.logistic_loss(w + change[:3], b + change[3], examples, labels, 2.0)
        assert other > least, "a step away from the gate lowers its loss"


# What is decided, and when -----------------------------------------------------------------------


def test_threshold_0_skips_nothing_and_1_skips_every_gated_layer():
    assert apply(dense(), {"layer_router": {"threshold": 0}}).model is dense().model
    lm = apply(dense(), {"layer_router": {"threshold": 1, "first": 2, "last": 1, "stories": 2}})
    assert skipped(lm, IDS[:PROMPT]) == [2, 3]
    assert skipped(routed(threshold=0.0), IDS[:PROMPT]) == []


def test_later_tokens_run_the_layers_of_the_prompt():
    """Also where their own means would have decided otherwise: so the cache has no holes."""
    lm = routed()
    state = new_state(lm.model, IDS[:PROMPT])
    lm.model(IDS[:PROMPT], state)
    first = [layer.count for layer in state.layers]
    for t in range(PROMPT, 40):
        alone = skipped(lm, IDS[t : t + 1])
        if alone != [index for index, count in enumerate(first) if not count]:
            break
    else:
        pytest.fail("every token alone would decide as the prompt did")
    lm.model(IDS[PROMPT:], state)
    counts = [layer.count for layer in state.layers]
    assert counts == [40 if count else 0 for count in first], "a layer holds some tokens only"


def test_a_short_prompt_and_a_longer_first_step_decide_alike():
    """Tokens after the prompt (drafted ones, say) do not vote."""
    lm = routed()
    one, long = new_state(lm.model, IDS[:PROMPT]), new_state(lm.model, IDS[:PROMPT])
    lm.model(IDS[:PROMPT], one)
    lm.model(np.concatenate([IDS[:PROMPT], OTHER[:20]]), long)
    kept = [s.shared.kept[Decisions].runs for s in (one, long)]
    assert kept[0] == kept[1], "the tokens after the prompt changed the decision"


def test_rewind_to_0_forgets_the_decision_and_further_rewinds_keep_it():
    lm = routed()
    a = next(i for i in TEXTS if skipped(lm, i) != skipped(lm, TEXTS[0]))
    state = new_state(lm.model, a)
    lm.model(a, state)
    before = state.shared.kept[Decisions].runs.copy()
    state.rewind(5)
    lm.model(TEXTS[0][5:], state)
    assert state.shared.kept[Decisions].runs == before, "a rewind into the prompt changes layers"
    state.rewind(0)
    found = lm.model(TEXTS[0], state)
    expected = lm.model(TEXTS[0], new_state(lm.model, TEXTS[0]))
    assert_same(found, expected, "the sequence before is remembered")


@family
def test_rows_of_a_batch_decide_by_themselves(family):
    lm = routed(family)
    assert len({tuple(skipped(lm, ids)) for ids in TEXTS}) > 1
    found = lm.logits(TEXTS)
    for row, ids in zip(found, TEXTS):
        check_close(row, lm.logits(ids), 1e-12, "a row of a batch without a cache")
    prompts = [TEXTS[0][:9], TEXTS[1][:4], TEXTS[2]]
    assert lm.generate(prompts, 10) == [lm.generate(p, 10) for p in prompts]


# Cost --------------------------------------------------------------------------------------------


@family
def test_counted_cost_is_that_of_the_layers_that_run_and_of_the_gates(family):
    """The card's ``Saves``: (T + 1) D for each of four gates, once; a skipped layer costs 0."""
    lm, plain = routed(family), dense(family)
    for ids in TEXTS[:3]:
        off = skipped(lm, ids[:PROMPT])
        found, all_layers = [], []
        for model, totals in ((lm, found), (plain, all_layers)):
            state = new_state(model.model, ids[:PROMPT])
            with counting(model) as counts:
                model.model(ids[:PROMPT], state)
                model.model(ids[PROMPT : PROMPT + 1], state)
            totals.append(counts)
        layers = [all_layers[0].total(f"model.stack.blocks.{i}").multiply_adds for i in range(L)]
        expected = all_layers[0].total().multiply_adds - sum(layers[i] for i in off)
        gates = (L - 1) * (PROMPT + 1) * 16
        assert found[0].total().multiply_adds == expected + gates, f"without layers {off}"
        assert found[0].total("model.stack.router").multiply_adds == gates
        assert found[0].events["layer runs skipped"] == len(off) * (PROMPT + 1)


# Random baseline ---------------------------------------------------------------------------------


def test_random_gates_skip_as_many_calibration_texts_as_the_trained_ones():
    rng = np.random.default_rng(1)
    seen = Observed(rng.standard_normal((16, 3, 8)), rng.random((16, 3)) * [1, 1, 0])
    gates = fit_gates(seen, 0.4, 1.0)

    def count(gates: Gates, threshold):
        scores = (seen.summaries.swapaxes(0, 1) @ gates.w[..., None])[..., 0] + gates.b[:, None]
        return (1 / (1 + np.exp(-scores)) < threshold).sum(1).tolist()

    for threshold in (0.3, 0.5, 0.7):
        drawn = random_gates(seen, gates, threshold, seed=5)
        assert count(drawn, threshold) == count(gates, threshold), "texts that skip each layer"
        assert abs(drawn.w - gates.w).max() > 0.1, "the trained gates"
    assert 0 < count(gates, 0.5)[0] < 16 and count(gates, 0.5)[2] == 16
    assert (random_gates(seen, gates, 0.5, 6).w != drawn.w).any(), "the seed does not matter"


def test_trained_gates_beat_random_ones_where_the_prompt_tells():
    """A made-up layer that matters to half of the texts, and the first number of s says to which.
    (On stories the beginning says nothing: see the card's Notes.)"""
    rng = np.random.default_rng(2)
    s = rng.standard_normal((400, 1, 8))
    matters = s[:, :, 0] + 0.3 * rng.standard_normal((400, 1)) > 0
    train = Observed(s[:64], np.where(matters, 0.02, 0.0)[:64])
    gates = fit_gates(train, 0.001, 10.0)
    right = []
    for one in (gates, *(random_gates(train, gates, 0.5, seed) for seed in range(5))):
        keeps = (s[64:, 0] @ one.w[0] + one.b[0]) >= 0
        right.append((keeps == matters[64:, 0]).mean())
    assert right[0] > 0.85, "trained gates"
    assert abs(np.mean(right[1:]) - 0.5) < 0.25 and max(right[1:]) < right[0], "random gates"


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first=0), "layer_router: first must be an integer, at least 1; got 0"),
        (dict(threshold=1.1), "layer_router: threshold must be a number, 0 to 1; got 1.1"),
        (dict(ridge=0.0), "layer_router: ridge must be a number, at least 0.1; got 0.0"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        apply(dense(), {"layer_router": options})
    assert "\n" not in str(caught.value) and "layer_router" in str(caught.value)


def test_a_setting_without_a_layer_to_skip_warns_and_is_dense():
    with pytest.warns(MinitxWarning, match="layer_router: first=3 and last=2 leave no layer to"):
        assert apply(dense(), {"layer_router": {"first": 3, "last": 2}}).model is dense().model


def test_models_and_batches_it_does_not_fit_are_refused():
    with pytest.raises(MinitxError, match="layer_router needs residual connections and this"):
        apply(LM(tiny_model("skipless"), TOKENIZER), {"layer_router": {"threshold": 0}})
    with pytest.raises(MinitxError, match="layer_router learns from calibration text"):
        apply(replace(dense(), tokenizer=None), {"layer_router": True})
    lm = routed()
    with pytest.raises(MinitxError, match=r"layer_router runs different .* shape \(2, 40\) with"):
        lm.model(np.stack([IDS, OTHER]), lm.model.new_state())


def test_a_table_of_the_first_layer_stays_exact():
    flags = {"layer_router": {"threshold": 1, "stories": 2, "first": 3}}
    both, lm = apply(dense(), flags | {"first_layer": True}), apply(dense(), flags)
    check_close(in_chunks(both, IDS, STEPS), in_chunks(lm, IDS, STEPS), 1e-11, "logits")


# Figures -----------------------------------------------------------------------------------------


def test_on_stories_tolerance_goes_from_no_layer_to_the_four_that_training_made_dispensable():
    lm = minitx.load("stories")
    texts = calibration_ids("layer_router", lm, 5)
    seen = observe(lm, texts, range(1, 8), 32)
    kl = seen.divergences.mean(0)  # of layers 1 .. 7
    assert (kl[:3] > 0.02).all() and (kl[:3] < 0.1).all(), "layers 1 to 3 matter"
    assert (kl[3:] > 0.0005).all() and (kl[3:] < 0.004).all(), "layers 4 to 7 hardly do"

    def skips(tolerance) -> list[float]:
        w, b = fit_gates(seen, tolerance, ridge=10.0)
        return ((np.einsum("ngd,gd->ng", seen.summaries, w) + b) < 0).mean(0).tolist()

    assert skips(1e-5) == [0] * 7
    assert skips(0.02)[3:] == [1] * 4, "each text skips layers 4 to 7"
    middle = skips(0.001)
    assert middle[:3] == [0] * 3 and 0.1 < np.mean(middle[3:]) < 0.9, "texts differ"
