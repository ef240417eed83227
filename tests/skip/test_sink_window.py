"""sink_window: what stays in the cache, where a query sees it, and what that costs on stories."""

import numpy as np
import pytest
from literal_sink_window import attend
from same import assert_same
from tiny import FAMILIES, in_chunks, tiny_lm

import minitx
from minitx.errors import MinitxError
from minitx.lab.compare import Workload, compare
from minitx.ledger import counting
from minitx.model import NoRope, Rope
from minitx.ops import rope_tables
from minitx.skip.sink_window import WindowAttend, WindowCache
from minitx.state import Layer
from minitx.technique import apply

RNG = np.random.default_rng(4)
IDS = RNG.integers(0, 258, 40)
SMALL = {"sinks": 2, "window": 5}


def cached(state):
    """The positions in each layer's cache."""
    return [layer.row_tokens().array.tolist() for layer in state.layers]


def test_worked_example_by_hand():
    """sinks=1 window=2: a cache of 3. Token 3 finds it full of 0, 1, 2: row 1 goes. Token 4: row 2.

    All scores are 0 (queries of zeros), so the output is the mean of the cached values:
    token 2: (10 + 11 + 12) / 3 = 11;  token 3: (10 + 12 + 13) / 3;  token 4: (10 + 13 + 14) / 3.
    """
    lm = apply(tiny_lm(), {"sink_window": {"sinks": 1, "window": 2, "positions": "original"}})
    attn = lm.model.stack.blocks[0].attn
    layer, found, rows = Layer(10), [], []
    for t in range(5):
        attn.cache.store(np.ones((1, 1, 8)), np.full((1, 1, 8), 10.0 + t), layer.take(1))
        found.append(attn.attend(np.zeros((2, 1, 8)), *attn.cache.read(layer), layer)[0, 0, 0])
        rows.append(layer.row_tokens().array.tolist())
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]], "the rows that are cached"
    assert_same(found, [10, 10.5, 11, 35 / 3, 37 / 3], tolerance=1e-7)


@pytest.mark.parametrize("positions", ["cache", "original"])
@pytest.mark.parametrize("sinks, window", [(2, 3), (0, 4), (4, 1), (1, 6)])
@pytest.mark.parametrize("sizes", [(1,) * 14, (14,), (5, 1, 8)])
def test_equals_the_literal_version(positions, sinks, window, sizes):
    q, k, v = RNG.standard_normal((3, 2, 14, 6))  # two heads
    rope = Rope(*rope_tables(6, 20, 100.0, np.float64))
    cache = WindowCache(tiny_lm().model.stack.blocks[0].attn.cache, sinks, window)
    part = WindowAttend(6**-0.5, sinks, window, rope if positions == "cache" else NoRope())
    layer, found, at = Layer(20), [], 0
    for size in sizes:
        new = slice(at, at + size)
        layer.take(size)
        cache.store(rope(k[:, new], layer.tokens), v[:, new], layer)
        found.append(part(rope(q[:, new], layer.tokens), *cache.read(layer), layer))
        at += size
    found = np.concatenate(found, 1)
    for head in range(2):
        rows = (a[head].tolist() for a in (q, k, v))
        expected, kept = attend(*rows, sinks, window, 100.0, positions)
        assert_same(found[head], expected, "attention output", atol=1e-12)
    if size == 1:
        assert layer.row_tokens().array.tolist() == kept[-1]


def test_nothing_changes_before_the_first_eviction_and_everything_after():
    """Exact up to sinks + window tokens, different from the next one on."""
    dense, lm = tiny_lm(dtype=np.float64), apply(tiny_lm(dtype=np.float64), {"sink_window": SMALL})
    error = abs(lm.logits(IDS) - dense.logits(IDS)).max(-1)
    assert error[:7].max() < 1e-12 and error[7:].min() > 1e-6


def test_positions_matter_only_with_sinks():
    """RoPE is relative: without sinks, moving all rows together changes nothing."""
    for sinks, differ in ((0, False), (3, True)):
        one, other = (
            apply(
                tiny_lm(dtype=np.float64),
                {"sink_window": {"sinks": sinks, "window": 5, "positions": positions}},
            ).logits(IDS)
            for positions in ("cache", "original")
        )
        assert (abs(one - other).max() > 1e-6) == differ


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_really_freed(family):
    lm = apply(tiny_lm(family), {"sink_window": SMALL})
    state = lm.model.new_state()
    lm.model(IDS[:30], state)
    assert cached(state) == [list(range(30))] * 2, "a step keeps what it has stored"
    lm.model(IDS[30:31], state)
    assert cached(state) == [[0, 1, 26, 27, 28, 29, 30]] * 2
    c = lm.model.config
    assert state.cache_bytes == c.layers * 7 * 2 * c.kv_heads * c.head_width * 4
    with counting(lm) as counts:
        lm.model(IDS[31:32], state)
    assert counts.events["cache rows evicted"] == c.layers
    read = sum(e.cache_bytes for path, e in counts.entries.items() if path.endswith("attend"))
    assert read == state.cache_bytes, "attention reads the rows that are cached, and no others"


def test_counted_cost_is_the_predicted_one():
    """A decoded token: 2 H d (sinks + window), and H d sinks to score the sinks again."""
    for positions, extra in (("original", 0), ("cache", 2)):
        lm = apply(tiny_lm(), {"sink_window": SMALL | {"positions": positions}})
        c, state = lm.model.config, lm.model.new_state()
        lm.model(IDS[:30], state)
        with counting(lm) as counts:
            lm.model(IDS[30:31], state)
        found = counts.entries["model.stack.blocks.0.attn.attend"].multiply_adds
        assert found == c.heads * c.head_width * (2 * 7 + extra), positions


@pytest.mark.parametrize("sizes", [(40,), (11, 1, 1, 20, 7), (1,) * 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_one_pass(family, sizes):
    lm = apply(tiny_lm(family, dtype=np.float64), {"sink_window": SMALL})
    whole = lm.logits(IDS)
    assert_same(in_chunks(lm, IDS, sizes), whole, atol=1e-10)


def test_rewind_inside_the_last_step_works_and_further_back_is_refused():
    lm = apply(tiny_lm(dtype=np.float64), {"sink_window": SMALL})
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    lm.model(IDS[20:28], state)
    state.rewind(23)
    found = lm.model(IDS[23:25], state)
    assert_same(found, lm.logits(IDS[:25])[23:], atol=1e-12)
    with pytest.raises(MinitxError, match="sink_window has freed cache rows .*; rewind to 23 or"):
        state.rewind(22)
    state.rewind(0)
    assert_same(lm.model(IDS[:9], state), lm.logits(IDS[:9]), atol=1e-12)


def test_speculation_runs_on_top():
    lm = apply(tiny_lm(dtype=np.float64), {"sink_window": SMALL})
    both = apply(lm, {"prompt_lookup": {}})
    assert both.generate(IDS[:12], 30) == lm.generate(IDS[:12], 30)
    with pytest.raises(MinitxError, match="sink_window frees cache rows"):
        apply(lm, {"speculative": {"draft": "self"}})


def test_a_padded_batch_keeps_the_sinks_of_each_row():
    lm = apply(tiny_lm(dtype=np.float64), {"sink_window": SMALL})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist(), IDS[9:21].tolist()]
    assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]


def test_other_caches_and_techniques_work_inside():
    for other in ({"quantize_cache": {"bits": 8}}, {"early_exit": {"measure": "random"}}):
        lm = apply(tiny_lm(dtype=np.float64), {"sink_window": SMALL} | other)
        assert_same(in_chunks(lm, IDS, (9, 1, 30)), lm.logits(IDS), atol=1e-8)


@pytest.mark.parametrize(
    "family, options, message",
    [
        ("gpt2", {"positions": "cache"}, "learned.*use positions=original"),
        ("llama", {"sinks": -1}, "sink_window: sinks must be an integer, at least 0; got -1"),
        ("llama", {"window": 0}, "sink_window: window must be an integer, at least 1; got 0"),
        ("llama", {"positions": "own"}, "one of cache, original"),
    ],
)
def test_bad_options_are_refused(family, options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(family), {"sink_window": {"window": 5} | options})


@pytest.mark.parametrize("other", ["elsa", "a3", "sparse_memory", "slim_attention"])
def test_techniques_that_need_every_row_are_refused_by_name(other):
    family = "gpt2" if other == "slim_attention" else "llama"
    with pytest.raises(MinitxError, match="sink_window") as caught:
        apply(tiny_lm(family), {"sink_window": SMALL, other: True})
    assert other in str(caught.value) and "use one of the two" in str(caught.value)


def test_on_stories_the_window_has_a_price_by_hops():
    """Chains of 512 tokens: half of the cache costs next to nothing, an eighth costs answers."""
    dense = minitx.load("stories")
    prices = {}
    for window in (252, 60):
        lm = apply(dense, {"sink_window": {"window": window}})
        found = compare(
            dense, lm, "", Workload(stories=1, prompts=1, rounds=1, chains=2), bar=False
        )
        prices[window] = found.reading.changed.loss - found.reading.dense.loss
        assert found.cache == pytest.approx((4 + window) / 512, abs=0.01)
    assert -0.01 < prices[252] < 0.02
    assert 0.1 < prices[60] < 0.6
