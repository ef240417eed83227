"""value_prune: which values a query uses, what that computes, and what it costs on stories."""

import literal_value_prune as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx import fast
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.skip.value_prune import PrunedValues, values_kept
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 258, 40)


def attend(q, k, v, keep, steps=None, scale=0.5, **options):
    """Attention with these values pruned, in one step or several."""
    layer, out, at = Layer(k.shape[-2]), [], 0
    for size in steps or (k.shape[-2],):
        new = slice(at, at + size)
        layer.take(size).store(k[..., new, :], v[..., new, :])
        out.append(PrunedValues(scale, keep, **options)(q[..., new, :], *layer.rows(), layer))
        at += size
    return np.concatenate(out, -2)


def test_worked_example_by_hand():
    """One query sees four keys with the scores ln 5, ln 1, ln 3, ln 1: p = .5 .1 .3 .1. Values
    1 2 3 4. keep=0.5 uses two of four, .5 * 1 + .3 * 3 = 1.4; keep=0.25 one, .5 * 1; keep=0.6
    ceil(2.4) = 3, of which key 1 is the third (a tie with key 3): 1.4 + .1 * 2 = 1.6."""
    q, k = np.ones((1, 1, 1)), np.log([5.0, 1, 3, 1])[None, :, None]
    v = np.array([1.0, 2, 3, 4])[None, :, None]
    layer = Layer(4).take(4)
    layer.store(k, v)
    layer.tokens = layer.tokens.only([3])
    for keep, expected in ((1.0, 2.0), (0.6, 1.6), (0.5, 1.4), (0.25, 0.5)):
        found = PrunedValues(1.0, keep)(q, k, v, layer)
        assert found.item() == pytest.approx(expected), f"keep={keep}"
        by_hand = literal.attend([[[1.0]]], k.tolist(), v.tolist(), 1.0, [0], keep)
        assert by_hand == [[[pytest.approx(expected)]]]


@pytest.mark.parametrize("keep", [1.0, 0.7, 0.3, 0.01])
@pytest.mark.parametrize("steps", [(14,), (6, 1, 1, 6), (1,) * 14])
def test_equals_the_literal_version(keep, steps):
    q, k, v = (RNG.standard_normal((n, 14, 4)) for n in (6, 2, 2))
    found = attend(q, k, v, keep, steps)
    expected = literal.attend(q.tolist(), k.tolist(), v.tolist(), 0.5, [0, 0, 0, 1, 1, 1], keep)
    assert_same(found, expected, "attention output", atol=1e-12)


def test_several_blocks_of_queries_equal_one(monkeypatch):
    q, k, v = (RNG.standard_normal((n, 30, 4)) for n in (2, 1, 1))
    whole = attend(q, k, v, 0.4)
    monkeypatch.setattr(fast, "ROWS", 8)
    assert_same(attend(q, k, v, 0.4), whole, atol=1e-12)


def test_number_of_values_is_rounded_up_safely():
    assert values_kept(0.07, np.array([1, 14, 15, 100])).tolist() == [1, 1, 2, 7]
    assert values_kept(1e-300, np.array([1, 5])).tolist() == [0, 0], "the part keeps one anyway"
    q, k, v = (RNG.standard_normal((1, 5, 4)) for _ in range(3))
    one = attend(q, k, v, 1e-300)
    p = np.exp(0.5 * q[0, 4] @ k[0].T)
    assert_same(one[0, 4], p.max() / p.sum() * v[0, p.argmax()], tolerance=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_their_rows(family):
    lm = apply(tiny_lm(family, dtype=np.float64), {"value_prune": {"keep": 0.5}})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist(), IDS[9:21].tolist()]
    assert lm.generate(prompts, 12) == [lm.generate(prompt, 12) for prompt in prompts]
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")


def test_a_query_sees_only_what_comes_before_it():
    lm = apply(tiny_lm("gpt2", dtype=np.float64), {"value_prune": {"keep": 0.5}})
    other = IDS.copy()
    other[30:] = (other[30:] + 1) % 258
    check_close(lm.logits(other)[:30], lm.logits(IDS)[:30], 1e-12, "later tokens matter")


def test_missing_weight_is_missing_from_the_output():
    """Not renormalized: if all values are 1, the output is the weight that was kept."""
    q, k = (RNG.standard_normal((1, 20, 4)) for _ in range(2))
    out = attend(q, k, np.ones((1, 20, 1)), 0.3)[0, :, 0]
    assert out[0] == pytest.approx(1) and (out[1:] < 1).all()
    values = (q.tolist(), k.tolist(), np.ones((1, 20, 1)).tolist())
    again = literal.attend(*values, 0.5, [0], 0.3, renormalize=True)
    assert_same(again, 1.0, tolerance=1e-7)


@pytest.mark.parametrize("mean, better", [(0.0, "full"), (2.0, "renormalized")])
def test_renormalizing_helps_if_values_have_a_common_mean(mean, better):
    """As the card says. Errors of both forms against dense attention."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 40, 8)) for _ in range(3))
    v += mean
    arrays = [x.tolist() for x in (q, k, v)]
    dense = np.array(literal.attend(*arrays, 0.35, [0], 1.0))
    errors = [
        np.linalg.norm(literal.attend(*arrays, 0.35, [0], 0.4, renormalize) - dense)
        for renormalize in (False, True)
    ]
    assert ("full", "renormalized")[int(np.argmin(errors))] == better, errors
    expected = literal.attend(*arrays, 0.35, [0], 0.4)
    assert_same(attend(q, k, v, 0.4, scale=0.35), expected, tolerance=1e-7)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family, keep):
    """One token after 29 others: S d for the scores and r d for the values of each query head."""
    dense = tiny_lm(family)
    lm = apply(dense, {"value_prune": {"keep": keep}})
    c, S = dense.model.config, 30
    state = lm.model.new_state()
    lm.model(IDS[: S - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[S - 1 : S], state)
    work, H, K, d = (
        counts.entries["model.stack.blocks.0.attn.attend"],
        c.heads,
        c.kv_heads,
        c.head_width,
    )
    r = int(np.ceil(keep * S))
    assert work.multiply_adds == H * (S * d + r * d)
    if keep < 1:
        assert work.cache_bytes == 4 * (K * S * d + H * r * d)
        events = counts.events
        assert events == {"values kept": c.layers * H * r, "values seen": c.layers * H * S}


def test_counted_work_of_a_prompt_has_no_values_of_later_tokens():
    lm = apply(tiny_lm("gpt2"), {"value_prune": {"keep": 0.5}})
    with counting(lm) as counts:
        lm.logits(IDS[:20])
    c = lm.model.config
    kept = sum(int(np.ceil(n / 2)) for n in range(1, 21)) * c.heads
    work = counts.entries["model.stack.blocks.0.attn.attend"].multiply_adds
    assert work == c.heads * 20 * 20 * c.head_width + kept * c.head_width
    assert counts.events["values kept"] == c.layers * kept
    assert counts.events["values seen"] == c.layers * c.heads * 210


def test_neutral_setting_is_the_dense_model():
    lm = tiny_lm()
    assert repr(apply(lm, {"value_prune": {"keep": 1.0}}).model) == repr(lm.model)
    pruned = repr(apply(lm, {"value_prune": {"keep": 0.9}}).model)
    assert "attend: PrunedValues(scale=0.353553, keep=0.9)" in pruned


def test_sink_window_and_a_quantized_cache_go_together_with_it_or_are_refused():
    found = apply(tiny_lm(), {"value_prune": {"keep": 0.5}, "quantize_cache": {"bits": 8}})
    assert np.isfinite(in_chunks(found, IDS, (12, *[1] * 28))).all()
    for other in ("elsa", "heavy_hitters", "sink_window"):
        options = {"window": 8} if other == "sink_window" else {"heavy": 4, "recent": 4}
        options = {"stories": 1} if other == "elsa" else options
        with pytest.raises(MinitxError, match="value_prune") as caught:
            apply(tiny_lm(), {"value_prune": {"keep": 0.5}, other: options})
        assert other in str(caught.value)


def test_on_stories_the_largest_weights_are_better_than_chance():
    dense = minitx.load("stories")
    ids = encode(dense.tokenizer, held_out(dense, 1))[0].ids

    def loss(options):
        lm = apply(dense, {"value_prune": options}) if options else dense
        with counting(lm) as counts:
            losses = token_losses(lm.logits(ids[:-1]), np.array(ids[1:]))
        return float(losses.mean()), counts.events

    (before, _), (after, events), (random, same) = map(
        loss, (None, {"keep": 0.35}, {"keep": 0.35, "choose": "random"})
    )
    assert events == same and 0.35 < events["values kept"] / events["values seen"] < 0.37
    assert -0.02 < after - before < 0.03, f"{after - before:+.3f} nats per token"
    assert random - before > 0.3, f"chance costs {random - before:+.3f}"
