"""heavy_hitters: which rows the accumulated attention keeps, and what that costs on stories."""

import numpy as np
import pytest
from literal_heavy_hitters import keep, run
from same import assert_same
from tiny import FAMILIES, in_chunks, tiny_lm, tiny_model

import minitx
from minitx import fast
from minitx.errors import MinitxError
from minitx.lab.compare import Size
from minitx.lab.reading import hidden_as_generated, logits_of, stories_to_read
from minitx.ledger import counting
from minitx.model import Cache
from minitx.skip.heavy_hitters import (
    AccumulatingAttend,
    HeavyCache,
    accumulated,
    heaviest_and_latest,
)
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 258, 40)
SMALL = {"heavy": 3, "recent": 4}
STEPS = (12, *[1] * 28)


def test_worked_example_by_hand():
    """Attention rows of five tokens, one head:

        [1] [.7 .3] [.6 .1 .3] [.5 .05 .35 .1] [.4 .05 .3 .05 .2]
        acc = [1 + .7 + .6 + .5 + .4, .3 + .1 + .05 + .05, .3 + .35 + .3, .1 + .05, .2]
            = [3.2, .5, .95, .15, .2]
    heavy=1 recent=2: the last two, and row 0. heavy=2 recent=1: the last one, rows 0 and 2."""
    rows = [[1], [0.7, 0.3], [0.6, 0.1, 0.3], [0.5, 0.05, 0.35, 0.1], [0.4, 0.05, 0.3, 0.05, 0.2]]
    acc = np.sum([np.pad(row, (0, 5 - len(row))) for row in rows], 0)
    assert_same(acc, [3.2, 0.5, 0.95, 0.15, 0.2], tolerance=1e-7)
    for heavy, recent, expected in ((1, 2, [0, 3, 4]), (2, 1, [0, 2, 4]), (3, 0, [0, 1, 2])):
        assert heaviest_and_latest(acc, heavy, recent).tolist() == expected
        assert keep(acc.tolist(), heavy, recent) == expected


def test_ties_go_to_the_lower_index_and_heads_choose_for_themselves():
    acc = np.array([[1.0, 1.0, 1.0, 0.0], [0.0, 2.0, 1.0, 5.0]])
    assert heaviest_and_latest(acc, 2, 1).tolist() == [[0, 1, 3], [1, 2, 3]]


@pytest.mark.parametrize("heavy, recent", [(2, 3), (0, 4), (4, 0), (3, 1)])
@pytest.mark.parametrize("sizes", [(1,) * 14, (6, *[1] * 8), (3, 5, 2, 4)])
def test_equals_the_literal_version(heavy, recent, sizes):
    q, k, v = RNG.standard_normal((2, 14, 4)), *RNG.standard_normal((2, 1, 14, 4))
    cache, attend = HeavyCache(Cache(), heavy, recent), AccumulatingAttend(0.5)
    layer, found, rows, steps, at = Layer(20), [], [], [], 0
    for size in sizes:
        new = slice(at, at + size)
        cache.store(k[:, new], v[:, new], layer.take(size))
        found.append(attend(q[:, new], *cache.read(layer), layer))
        rows.append(layer.row_tokens().array.reshape(-1).tolist())
        steps.append((q[:, new].tolist(), k[0, new].tolist(), v[0, new].tolist()))
        at += size
    outputs, cached = run(steps, heavy, recent)
    assert rows == cached, "the rows that are cached after each step"
    for step, expected in zip(found, outputs, strict=True):
        assert_same(step, expected, "attention output", atol=1e-12)


def test_accumulated_attention_sums_to_the_number_of_queries():
    lm = apply(tiny_lm(dtype=np.float64), {"heavy_hitters": {"heavy": 20, "recent": 20}})
    state = lm.model.new_state()
    in_chunks(lm, IDS[:30], (10, 20), state)
    c = lm.model.config
    for layer in state.layers:
        assert_same(accumulated(layer).total.sum(-1), 30 * c.group, tolerance=1e-7)


def test_a_step_of_several_blocks_of_queries_accumulates_all_of_them(monkeypatch):

    lm = apply(tiny_lm(dtype=np.float64), {"heavy_hitters": {"heavy": 20, "recent": 20}})
    totals = []
    for rows in (64, 8):  # queries in a block
        monkeypatch.setattr(fast, "ROWS", rows)
        state = lm.model.new_state()
        lm.model(IDS[:30], state)
        totals.append([accumulated(layer).total for layer in state.layers])
    np.testing.assert_allclose(*totals, atol=1e-12, err_msg="attention of a block was lost")


def test_nothing_changes_before_the_first_eviction():
    dense, lm = (tiny_lm(dtype=np.float64) for _ in range(2))
    lm = apply(lm, {"heavy_hitters": SMALL})
    expected, found = in_chunks(dense, IDS, (1,) * 40), in_chunks(lm, IDS, (1,) * 40)
    error = abs(found - expected).max(-1)
    assert error[:8].max() < 1e-12, "a step attends before anything of it is evicted"
    assert error[9:].min() > 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_really_freed(family):
    lm = apply(tiny_lm(family), {"heavy_hitters": SMALL})
    state = lm.model.new_state()
    in_chunks(lm, IDS, STEPS, state)
    c = lm.model.config
    assert {layer.count for layer in state.layers} == {8}
    assert state.cache_bytes == c.layers * 8 * 2 * c.kv_heads * c.head_width * 4
    with counting(lm) as counts:
        lm.model([5], state)
    assert counts.events["cache rows evicted"] == c.layers * c.kv_heads
    read = sum(e.cache_bytes for path, e in counts.entries.items() if path.endswith("attend"))
    assert read == state.cache_bytes, "attention reads the rows that are cached, and no others"
    work = counts.entries["model.stack.blocks.0.attn.attend"].multiply_adds
    assert work == 2 * c.heads * c.head_width * 8  # 2 H d (heavy + recent + the token itself)


def test_the_latest_rows_always_stay():
    lm = apply(tiny_lm(), {"heavy_hitters": SMALL})
    state = lm.model.new_state()
    in_chunks(lm, IDS, STEPS, state)
    for layer in state.layers:
        assert_same(layer.row_positions[..., -5:], [np.arange(35, 40)])


@pytest.mark.parametrize("back", range(33, 41))
def test_rewind_inside_the_last_step_is_as_if_it_had_ended_there(back):
    lm = apply(tiny_lm(dtype=np.float64), {"heavy_hitters": SMALL})
    long, short = lm.model.new_state(), lm.model.new_state()
    in_chunks(lm, IDS[:33], (12, *[1] * 21), long)
    in_chunks(lm, IDS[:33], (12, *[1] * 21), short)
    lm.model(IDS[33:], long)
    long.rewind(back)
    if back > 33:
        lm.model(IDS[33:back], short)
    for _ in range(5):  # what stays depends on what has been accumulated
        found, expected = (lm.model([7], state) for state in (long, short))
        assert_same(found, expected, f"back to {back}", atol=1e-12)
    for one, other in zip(long.layers, short.layers):
        assert_same(one.row_positions, other.row_positions)


def test_rewind_before_the_last_step_is_refused_by_name():
    lm = apply(tiny_lm(), {"heavy_hitters": SMALL})
    state = lm.model.new_state()
    in_chunks(lm, IDS[:20], (12, 8), state)
    with pytest.raises(
        MinitxError, match="heavy_hitters has freed cache rows that this needs; rewind to 12"
    ):
        state.rewind(11)
    state.rewind(0)
    assert_same(lm.model(IDS[:9], state), lm.logits(IDS[:9]), tolerance=1e-4, atol=1e-4)


def test_a_long_step_can_only_be_undone_as_a_whole(monkeypatch):

    monkeypatch.setattr(fast, "ROWS", 8)
    lm = apply(tiny_lm(), {"heavy_hitters": SMALL})
    state = lm.model.new_state()
    lm.model(IDS[:9], state)
    with pytest.raises(MinitxError, match="rewind to 9 or later, or to 0"):
        state.rewind(5)


def test_speculation_runs_on_top():
    """Where nothing is evicted, the text is that of plain decoding; where rows are, the steps are
    others (several tokens are verified in one), so it may differ, but it is reproducible."""
    draft = {"prompt_lookup": {}}
    lm = apply(tiny_lm(dtype=np.float64), {"heavy_hitters": {"heavy": 20, "recent": 20}})
    assert apply(lm, draft).generate(IDS[:12], 28) == lm.generate(IDS[:12], 28)
    evicting = apply(tiny_lm(dtype=np.float64), {"heavy_hitters": SMALL} | draft)
    assert evicting.generate(IDS[:12], 28) == evicting.generate(IDS[:12], 28)
    with pytest.raises(MinitxError, match="heavy_hitters frees cache rows"):
        apply(lm, {"speculative": {"draft": "self"}})


@pytest.mark.parametrize("choose", ["attention", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padded_batch_are_the_rows_alone(family, choose):
    lm = apply(tiny_lm(family, dtype=np.float64), {"heavy_hitters": SMALL | {"choose": choose}})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist(), IDS[9:21].tolist()]
    assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]


def test_a_cache_in_few_bits_works_inside():
    wanted = {"heavy_hitters": SMALL, "quantize_cache": {"bits": 8}}
    lm = apply(tiny_lm(), wanted)
    state = lm.model.new_state()
    in_chunks(lm, IDS, STEPS, state)
    assert state.layers[0].keys.dtype == np.uint8 and state.layers[0].count == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heavy": -1}, "heavy_hitters: heavy must be an integer, at least 0; got -1"),
        ({"choose": "last"}, "one of attention, random"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"heavy_hitters": SMALL | options})


@pytest.mark.parametrize("other", ["elsa", "a3", "sink_window", "slim_attention"])
def test_techniques_that_do_not_fit_are_refused_by_name(other):
    family = "gpt2" if other == "slim_attention" else "llama"
    options = {"window": 5} if other == "sink_window" else True
    with pytest.raises(MinitxError, match="heavy_hitters") as caught:
        apply(tiny_lm(family), {"heavy_hitters": SMALL, other: options})
    assert other in str(caught.value)


def test_on_stories_attention_keeps_better_rows_than_chance():
    """The first 320 tokens of a chain of stories."""
    dense = minitx.load("stories")
    ids = stories_to_read(dense, 1, chained=1).texts[0].ids[:321]

    def loss(lm):
        logits = logits_of(lm, hidden_as_generated(lm, ids[:-1]))
        return token_losses(logits, np.array(ids[1:])).mean()

    prices = {}
    for choose in ("attention", "random"):
        options = {"heavy": 64, "recent": 64, "choose": choose}
        lm = apply(dense, {"heavy_hitters": options})
        prices[choose] = loss(lm) - loss(dense)
        share = Size.of(lm, ids[:320]).cache / Size.of(dense, ids[:320]).cache
        assert share == pytest.approx(129 / 320, abs=0.01)
    assert prices["attention"] < 0.6 * prices["random"], prices
    assert 0 < prices["attention"] < 0.08, prices


@pytest.mark.parametrize("family", ("gpt2", "gpt_neox"))
def test_one_cached_head_for_several_key_heads_keeps_one_set_of_rows(family):
    """absorb_products caches its input as one head of values: all key heads then evict alike."""
    lm = tiny_lm(family, dtype=np.float64)
    wanted = {"absorb_products": True, "heavy_hitters": {"heavy": 3, "recent": 3}}
    changed = apply(lm, wanted)
    state = changed.model.new_state()
    for step in (IDS[:12], *([i] for i in IDS[12:20])):
        logits = changed.model(np.array(step), state)
        assert np.isfinite(logits).all()
    layer = state.layers[0]
    assert layer.count == 7, f"expected 3 + 3 rows and the new one, got {layer.count}"
    positions = layer.row_positions
    first = np.broadcast_to(positions[..., :1, :], positions.shape)
    assert_same(positions, first, "heads of one cached head keep the same rows")


def test_step_of_which_some_tokens_exited_is_undone_in_part():
    """early_exit stores the keys of a whole step first, and attends from some of its tokens: what
    each gave is noted by its position."""
    exits = {"measure": "random", "threshold": 0.5, "first": 1, "warm_up": 0}
    model = tiny_model("gpt2", dtype=np.float64, layers=4)
    lm = apply(tiny_lm(model=model), {"heavy_hitters": SMALL, "early_exit": exits})
    once = in_chunks(lm, IDS, STEPS)
    state = lm.model.new_state()
    in_chunks(lm, IDS[:30], STEPS[:19], state)
    lm.model(np.append(IDS[30:33], IDS[20:25]), state)  # eight tokens, some of which exit
    part, whole = state.fork(33), state.fork(30)  # the last five are forgotten, or all of them
    again = in_chunks(lm, IDS[30:], (1,) * 10, whole)
    assert_same(again, once[30:], "the undone step is still counted")
    three = lm.model.new_state()  # the first three in a step of their own
    in_chunks(lm, IDS[:30], STEPS[:19], three)
    lm.model(IDS[30:33], three)
    for layer, expected in zip(part.layers, three.layers, strict=True):
        found = accumulated(layer).total
        assert_same(found, accumulated(expected).total, atol=1e-12)
    prompts = [IDS[:12].tolist(), IDS[:12].tolist(), IDS[20:23].tolist()]
    assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]


def test_layers_deferred_to_a_later_step_are_refused():
    """Rows are evicted step by step, and a deferred layer runs tokens of several steps in one."""
    exits = {"measure": "random", "kv_fill": "deferred"}
    with pytest.raises(MinitxError, match="^early_exit .*deferred.* heavy_hitters decides step"):
        apply(tiny_lm(), {"heavy_hitters": SMALL, "early_exit": exits})
