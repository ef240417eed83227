"""cats: which neurons are active, what that computes, and what it costs on stories."""

from functools import cache

import literal_cats as literal
import numpy as np
import pytest
from own_rows import check_own_rows
from same import assert_same
from tiny import WIDE, check_close, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import FFN, Linear, NoNorm, SwiGLU
from minitx.shared.activation_threshold import AboveThreshold
from minitx.skip.cats import ThresholdedFFN, gate_thresholds
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import walk

RNG = np.random.default_rng(6)
IDS = RNG.integers(0, 258, 40)


def ffn(w_gate, w_up, w_down, t):
    """A feed-forward network without norm, with this threshold."""
    parts = [Linear(np.array(w, float)) for w in (w_gate, w_up, w_down)]
    dense = FFN(NoNorm(), SwiGLU(*parts[:2]), parts[2])
    return ThresholdedFFN.of(dense, AboveThreshold(t))


def test_worked_example_by_hand():
    """x = (1, 1) has the gates silu(0) = 0, silu(2) = 1.76, silu(-1) = -0.27 and the ups 5, 3, 4.
    Above 0.5 in magnitude is neuron 1 only: 1.76 * 3 * (0, 1). Above 0.2 neuron 2 too, although its
    gate is negative: -0.27 * 4 * (1, 1) is added. Neuron 0 adds nothing whatever t is."""
    w_gate, w_up = [[0, 1, 0], [0, 1, -1]], [[2, 3, 1], [3, 0, 3]]
    w_down = [[7, 7], [0, 1], [1, 1]]
    x, one, two = np.ones((1, 2)), literal.silu(2.0), literal.silu(-1.0)
    for t, expected, active in (
        (0.5, (0, 3 * one), [1]),
        (0.2, (4 * two, 3 * one + 4 * two), [1, 2]),
        (-1.0, (4 * two, 3 * one + 4 * two), [0, 1, 2]),
    ):
        found = ffn(w_gate, w_up, w_down, t)(x, Layer.once(1))
        assert_same(found[0], expected, f"t={t}", tolerance=1e-7)
        by_hand, neurons = literal.ffn([1.0, 1.0], w_gate, w_up, w_down, t)
        assert neurons == active and by_hand == pytest.approx(list(expected))


@pytest.mark.parametrize("t", [0.0, 0.3, 0.6, 100.0])
def test_equals_the_literal_version(t):
    w_gate, w_up, w_down = (RNG.standard_normal(s) for s in ((5, 12), (5, 12), (12, 5)))
    x = RNG.standard_normal((7, 5))
    part = ffn(w_gate, w_up, w_down, t)
    one_by_one = np.concatenate([part(row[None], Layer.once(1)) for row in x])
    arrays = [w.tolist() for w in (w_gate, w_up, w_down)]
    expected = np.array([literal.ffn(row, *arrays, t)[0] for row in x.tolist()])
    assert_same(one_by_one, expected, "one token at a time", atol=1e-12)
    together = part(x, Layer.once(7))
    assert_same(together, expected, "tokens together", atol=1e-12)


def test_biases_are_added_once_and_to_active_neurons_only():
    lm = tiny_lm("llama", dtype=np.float64)
    (dense, *_) = [node for _, node in walk(lm.model) if type(node) is FFN]
    arrays = dense.expand.gate.w, dense.expand.up.w, dense.down.w
    biases = [RNG.standard_normal(w.shape[1]) for w in arrays]
    gate, up, down = (Linear(w, b) for w, b in zip(arrays, biases, strict=True))
    dense = FFN(dense.norm, SwiGLU(gate, up), down)
    x = RNG.standard_normal((3, 16))
    for rows in (x, x[:1]):
        found = ThresholdedFFN.of(dense, AboveThreshold(-1.0))(rows, Layer.once(len(rows)))
        check_close(found, dense(rows, Layer.once(len(rows))), 1e-12, "all neurons active")
        none = ThresholdedFFN.of(dense, AboveThreshold(1e9))(rows, Layer.once(len(rows)))
        assert_same(none, np.tile(biases[2], (len(rows), 1)))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_threshold_is_the_quantile_of_the_gates(sparsity):
    lm = tiny_lm("llama", dtype=np.float64)
    texts = [IDS.tolist(), IDS[5:30].tolist()]
    found = list(gate_thresholds(lm, texts, sparsity).values())
    gates: list[list] = [[], []]
    for ids in texts:
        x = lm.model.embed(np.array(ids), slice(0, len(ids)))
        for block, seen in zip(lm.model.stack.blocks, gates, strict=True):
            layer = Layer.once(len(ids))
            z = block.ffn.expand.gate(block.ffn.norm(x + block.attn(x, layer)))
            seen += [literal.silu(number) for number in z.ravel().tolist()]
            x = block(x, Layer.once(len(ids)))
    expected = [literal.threshold(seen, sparsity) for seen in gates]
    assert found == pytest.approx(expected, rel=1e-4)
    for t, seen in zip(found, gates, strict=True):
        assert np.mean(abs(np.array(seen)) <= t) == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("tokens", [1, 2, 20])
def test_counted_work_equals_the_formula_on_the_card(tokens):
    """All gates, F comparisons, and of up and down the active neurons: of several tokens, those
    that any of them needs."""
    lm = apply(tiny_lm("llama"), {"cats": {"sparsity": 0.8, "stories": 1}})
    c, part = lm.model.config, lm.model.stack.blocks[0].ffn
    D, F = c.width, c.hidden
    x = RNG.standard_normal((tokens, D)).astype(np.float32)
    with counting(part) as counts:
        part(x, Layer.once(tokens))
    g = part.gate(part.norm(x))
    active = abs(g / (1 + np.exp(-g))) > part.select.threshold
    n = int(active.any(0).sum())  # the union
    work = counts.total()
    assert work.multiply_adds == tokens * (D * F + F + 2 * D * n), "multiply-adds differ"
    assert work.weight_bytes == 4 * (D * F + 2 * D * n), "bytes of rows that are not used"
    assert counts.events == {"neurons active": active.sum(), "neurons": tokens * F}
    assert 0 < n < F or tokens > 2, "nothing was skipped"


def test_prompt_with_each_tokens_own_rows_costs_what_single_tokens_cost():
    check_own_rows("cats", {"sparsity": 0.8, "stories": 1})


def test_neutral_setting_is_the_dense_model():
    lm = tiny_lm("llama")
    assert repr(apply(lm, {"cats": {"sparsity": 0.0}}).model) == repr(lm.model)


def test_models_without_gates_are_refused():
    with pytest.raises(MinitxError, match="cats thresholds the gates of SwiGLU.* teal"):
        apply(tiny_lm("gpt2"), {"cats": True})
    with pytest.raises(MinitxError, match="cats needs.*quantize"):
        apply(tiny_lm("llama"), {"cats": True, "quantize": True})
    assert apply(tiny_lm("llama"), {"cats": True, "separate_magnitudes": {"matrices": "attention"}})


def test_each_neuron_is_a_contiguous_row():
    lm = apply(tiny_lm(model=tiny_model("llama", **WIDE)), {"cats": {"stories": 1}})
    for block in lm.model.stack.blocks:
        for rows in (block.ffn.up, block.ffn.down):
            assert rows.w.flags.c_contiguous, "rows that are gathered are not contiguous"
        assert block.ffn.gate.w.flags.f_contiguous


def test_monitor_falls_back_to_the_exact_ffn_where_the_error_is_too_large():
    dense = tiny_lm("llama", dtype=np.float64)
    options = {"sparsity": 0.9, "stories": 1, "monitor": 2}
    strict = apply(dense, {"cats": options | {"limit": 1e-9}})
    with counting(strict) as counts:
        found = strict.logits(IDS)
    assert counts.events["checks above the limit"] == counts.events["quality checks"] > 0
    loose = apply(dense, {"cats": options | {"limit": 1e9}})
    plain = apply(dense, {"cats": options | {"monitor": 0}})
    errors = [abs(lm.logits(IDS) - dense.logits(IDS)).mean() for lm in (strict, loose, plain)]
    assert abs(found - dense.logits(IDS)).mean() == errors[0] < errors[1] < errors[2]


# On stories --------------------------------------------------------------------------------------


@cache
def stories():
    dense = minitx.load("stories")
    return dense, [story.ids for story in encode(dense.tokenizer, held_out(dense, 4))]


@cache
def measured(**options):
    """Loss, the share of neurons that was active, and multiply-adds to decode 30 tokens."""
    dense, texts = stories()
    lm = apply(dense, {"cats": {"stories": 4, **options}}) if options else dense
    with counting(lm) as counts:
        losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
    active = counts.events["neurons active"] / max(counts.events["neurons"], 1)
    state = lm.model.new_state()
    lm.model(texts[0][:60], state)
    with counting(lm) as counts:
        for token in texts[0][60:90]:
            lm.model([token], state)
    return np.concatenate(losses).mean(), active, counts.total().multiply_adds


def test_on_stories_sparsity_is_that_of_the_calibration_text():
    for sparsity in (0.5, 0.8):
        _, active, _ = measured(sparsity=sparsity)
        assert active == pytest.approx(1 - sparsity, abs=0.02), "on held-out stories"


def test_on_stories_the_price_grows_with_sparsity():
    dense, _, work = measured()
    half, most = (measured(sparsity=sparsity) for sparsity in (0.5, 0.97))
    assert -0.01 < half[0] - dense < 0.006, f"{half[0] - dense:+.4f} nats per token"
    assert 0.02 < most[0] - dense < 0.3, f"{most[0] - dense:+.4f} nats per token"
    assert 0.78 < half[2] / work < 0.82 and 0.59 < most[2] / work < 0.64


def test_on_stories_large_gates_are_better_than_random_neurons_at_equal_cost():
    dense, _, _ = measured()
    gate, random = measured(sparsity=0.5), measured(sparsity=0.5, choose="random")
    assert random[2] == pytest.approx(gate[2], rel=0.03), "multiply-adds differ"
    assert random[0] - dense > 0.5, "random neurons cost too little"
    assert gate[0] - dense < 0.006
