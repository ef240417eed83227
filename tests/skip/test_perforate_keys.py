"""perforate_keys: which keys a query keeps, both forms, what they compute and cost."""

import literal_perforate_keys as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx import fast
from minitx.errors import MinitxError
from minitx.lab.evaluate import chains, story_end
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.perforate_keys import (
    AttendGatheredOnce,
    KeysByPosition,
    PerforatedValues,
    RandomKeys,
)
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 258, 40)
DEMO = {"sinks": 1, "window": 4, "stride": 3}


def part(keys, form="skip", scale=0.5):
    if form == "values":
        return PerforatedValues(keys, scale)
    return SparseAttention(keys, scale, arithmetic=AttendGatheredOnce())


def attend(q, k, v, keys, steps=None, form="skip"):
    """Perforated attention, in one step or several."""
    layer, out, at = Layer(k.shape[-2]), [], 0
    for size in steps or (k.shape[-2],):
        new = slice(at, at + size)
        layer.take(size).store(k[..., new, :], v[..., new, :])
        out.append(part(keys, form)(q[..., new, :], *layer.rows(), layer))
        at += size
    return np.concatenate(out, -2)


def kept_keys(i, sinks, window, stride):
    found = KeysByPosition(sinks, window, stride).kept(np.array([[i]]), np.arange(i + 3))
    return np.flatnonzero(found).tolist()


def test_kept_keys_by_hand():
    """The query at position 10 with sinks=2 window=3 stride=4: sinks 0 and 1; window 8, 9, 10;
    divisible by 4: 0, 4 and 8."""
    assert kept_keys(10, 2, 3, 4) == [0, 1, 4, 8, 9, 10]
    assert kept_keys(10, 0, 1, 6) == [0, 6, 10], "a query keeps its own key"
    assert kept_keys(10, 0, 1, 100) == [0, 10]
    assert kept_keys(3, 2, 3, 4) == [0, 1, 2, 3]
    for i in range(12):
        expected = [j for j in range(i + 1) if literal.keeps(i, j, 2, 3, 4)]
        assert kept_keys(i, 2, 3, 4) == expected


def test_worked_example_by_hand():
    """The query at position 4 with scores ln 1, ln 5, ln 1, ln 3, ln 2 and values 1 2 3 4 5. With
    sinks=0 window=2 stride=2 it keeps 0, 2, 3, 4 and skips key 1, the one with the score ln 5.

        skip      p = 1/7, 1/7, 3/7, 2/7              (1 + 3 + 12 + 10) / 7  = 26/7
        values    p = 1/12, (5/12), 1/12, 3/12, 2/12  (1 + 3 + 12 + 10) / 12 = 26/12
    """
    q, k = np.ones((1, 5, 1)), np.log([1.0, 5, 1, 3, 2])[None, :, None]
    v = np.array([1.0, 2, 3, 4, 5])[None, :, None]
    for form, expected in (("skip", 26 / 7), ("values", 26 / 12)):
        layer = Layer(5).take(5)
        layer.store(k, v)
        found = part(KeysByPosition(0, 2, 2), form, scale=1.0)(q, k, v, layer)
        assert found[0, 4, 0] == pytest.approx(expected), form
        by_hand = literal.attend(q.tolist(), k.tolist(), v.tolist(), 1.0, [0], 0, 2, 2, form)
        assert by_hand[0][4] == [pytest.approx(expected)], form


@pytest.mark.parametrize("form", ["skip", "values"])
@pytest.mark.parametrize("steps", [(14,), (6, 1, 1, 6), (1,) * 14])
def test_equals_the_literal_version(form, steps):
    q, k, v = (RNG.standard_normal((n, 14, 4)) for n in (6, 2, 2))
    for sinks, window, stride in ((2, 3, 4), (0, 1, 5), (0, 1, 100), (3, 20, 2)):
        found = attend(q, k, v, KeysByPosition(sinks, window, stride), steps, form)
        expected = literal.attend(
            *(x.tolist() for x in (q, k, v)), 0.5, [0, 0, 0, 1, 1, 1], sinks, window, stride, form
        )
        what = f"sinks={sinks} window={window} stride={stride}"
        assert_same(found, expected, what, atol=1e-12)


@pytest.mark.parametrize("form", ["skip", "values"])
def test_several_blocks_of_queries_equal_one(monkeypatch, form):
    q, k, v = (RNG.standard_normal((n, 30, 4)) for n in (2, 1, 1))
    whole = attend(q, k, v, KeysByPosition(2, 3, 4), form=form)
    monkeypatch.setattr(fast, "ROWS", 8)
    again = attend(q, k, v, KeysByPosition(2, 3, 4), form=form)
    assert_same(again, whole, atol=1e-12)


def test_a_factor_of_one_over_the_rate_doubles_the_output():
    """All values are 1, so dense attention gives 1, and so does the softmax over half of the keys;
    multiplied by 1 / rate = 2 it gives 2."""
    q, k, v = (*(RNG.standard_normal((1, 40, 4)) for _ in range(2)), np.ones((1, 40, 1)))
    found = attend(q, k, v, KeysByPosition(0, 1, 2))
    assert_same(found, 1.0, tolerance=1e-7)
    arrays = [x[:, -20:].tolist() if x is q else x.tolist() for x in (q, k, v)]
    doubled = literal.attend(*arrays, 0.5, [0], 0, 1, 2, factor=2.0)
    assert_same(doubled, 2.0, tolerance=1e-7)


@pytest.mark.parametrize("mean, better", [(0.0, "values"), (2.0, "skip")])
def test_form_skip_is_better_if_values_have_a_common_mean(mean, better):
    """As the card says. Errors of both forms against dense attention."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 80, 8)) for _ in range(3))
    v += mean
    dense = attend(q, k, v, KeysByPosition(0, 80, 2))
    size = np.linalg.norm(dense[:, 40:])
    errors = {
        form: np.linalg.norm(attend(q, k, v, KeysByPosition(2, 4, 2), form=form) - dense) / size
        for form in ("skip", "values")
    }
    assert min(errors, key=errors.get) == better, errors


def test_random_keys_are_as_many_and_hold_the_own_key():
    scores = np.random.default_rng(0).random(60, np.float32)
    i, j = np.arange(60)[:, None], np.arange(60)
    by_position = KeysByPosition(2, 5, 4).kept(i, j)
    drawn = RandomKeys(2, 5, 4, scores).kept(i, j)
    assert_same(drawn.sum(-1), by_position.sum(-1), "keys of a query")
    assert drawn[i[:, 0], j].all() and not (drawn & (j > i)).any()
    assert (drawn != by_position).sum() > 300


@pytest.mark.parametrize("options", [{}, {"form": "values"}, {"choose": "random"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_equal_their_rows(family, options):
    lm = apply(tiny_lm(family, dtype=np.float64), {"perforate_keys": DEMO | options})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist(), IDS[9:21].tolist()]
    assert lm.generate(prompts, 12) == [lm.generate(prompt, 12) for prompt in prompts]
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")
    check_close(in_chunks(lm, IDS, (20, 1, 1, 18)), lm.logits(IDS), 1e-12, "in chunks")


def test_a_query_sees_only_what_comes_before_it():
    lm = apply(tiny_lm("gpt2", dtype=np.float64), {"perforate_keys": DEMO})
    other = IDS.copy()
    other[30:] = (other[30:] + 1) % 258
    check_close(lm.logits(other)[:30], lm.logits(IDS)[:30], 1e-12, "later tokens matter")


@pytest.mark.parametrize("form", ["skip", "values"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family, form):
    """One token after 29 others, sinks=2 window=4 stride=4: 0 and 1, 26 to 29, and of 2 to 25
    those divisible by 4, which are 6 (24 / 4), make r = 12."""
    dense = tiny_lm(family)
    options = {"sinks": 2, "window": 4, "stride": 4, "form": form}
    lm = apply(dense, {"perforate_keys": options})
    c, S = dense.model.config, 30
    state = lm.model.new_state()
    lm.model(IDS[: S - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[S - 1 : S], state)
    H, K, d, r = c.heads, c.kv_heads, c.head_width, 12
    place = "model.stack.blocks.0.attn.attend"
    work = counts.total(place)
    assert work.multiply_adds == H * d * (2 * r if form == "skip" else S + r)
    assert work.cache_bytes == 4 * K * d * (2 * r if form == "skip" else S + r)
    assert counts.events == {"keys kept": c.layers * H * r, "keys seen": c.layers * H * S}


def test_a_prompt_saves_too():
    """300 queries in blocks of 64, sinks=0 window=8 stride=16. A block multiplies with what any of
    its queries keeps: the rows divisible by 16 and those from 7 before its first query on."""
    keys, T, d = KeysByPosition(0, 8, 16), 300, 4
    q, k, v = (RNG.standard_normal((1, T, d)) for _ in range(3))
    layer = Layer(T).take(T)
    layer.store(k, v)
    sparse = part(keys)
    with counting(sparse) as counts:
        sparse(q, k, v, layer)
    expected = 0
    for a in range(0, T, 64):
        b = min(a + 64, T)
        rows = {j for j in range(b) if j % 16 == 0 or j > a - 8}
        expected += (b - a) * len(rows) * 2 * d
    assert (
        counts.total().multiply_adds
        == expected
        < 0.55 * sum((min(a + 64, T) - a) * min(a + 64, T) * 2 * d for a in range(0, T, 64))
    )


def test_neutral_setting_is_the_dense_model():
    lm = tiny_lm()
    for options in ({"stride": 1}, {"window": 48}):
        assert repr(apply(lm, {"perforate_keys": options}).model) == repr(lm.model)
    found = apply(lm, {"perforate_keys": DEMO | {"window": 46}})  # all but one distance
    check_close(found.logits(IDS), lm.logits(IDS), 1e-6, "no query is far enough")


def test_other_selectors_and_eviction_are_refused_and_quantized_caches_are_not():
    found = apply(tiny_lm(), {"perforate_keys": DEMO, "quantize_cache": {"bits": 8}})
    assert np.isfinite(in_chunks(found, IDS, (12, *[1] * 28))).all()
    others = {
        "predictive_attention": True,
        "heavy_hitters": {"heavy": 4, "recent": 4},
        "sink_window": {"window": 8},
    }
    for other, options in others.items():
        with pytest.raises(MinitxError, match="perforate_keys") as caught:
            apply(tiny_lm(), {"perforate_keys": DEMO, other: options})
        assert other in str(caught.value)


def test_on_stories_positions_are_better_than_random_ones():
    dense = minitx.load("stories")
    ids = next(chains(dense.tokenizer, "evaluation", "full", 512, story_end(dense))).ids

    def loss(options):
        lm = apply(dense, {"perforate_keys": options}) if options else dense
        with counting(lm) as counts:
            losses = token_losses(lm.logits(ids[:-1]), np.array(ids[1:]))
        return float(losses.mean()), counts.events

    found = [loss(options) for options in (None, {"stride": 4}, {"stride": 4, "choose": "random"})]
    (before, _), (after, events), (random, same) = found
    assert events == same and 0.5 < events["keys kept"] / events["keys seen"] < 0.75
    assert -0.02 < after - before < 0.04, f"{after - before:+.3f} nats per token"
    assert random - before > 0.3, f"random keys cost {random - before:+.3f}"
