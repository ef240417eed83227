"""memoize_attention: who gets stored weights, what that computes and counts, monitor, stories."""

from functools import cache

import literal_memoize_attention as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx import fast
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoNorm, NoRope
from minitx.shared.memo_table import MemoTable
from minitx.skip.memoize_attention import (
    MemoizedAttention,
    MonitoredAttention,
    RandomMaps,
    hit_rate,
)
from minitx.state import Layer, Tokens
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(6)
IDS = RNG.integers(0, 258, 40)
DEMO = {"size": 4, "radius": 2.0, "first": 0, "stories": 4}
ONE = np.ones((1, 1))


def averaging(stored, radius, kind=MemoizedAttention, **options):
    """One head of width 1 without a norm, whose queries and keys are 0, so that a token gets the
    mean of all values so far, and whose values are its inputs. stored: (key, map) by position."""
    keys = np.array([[key] for here in stored for key, _ in here])
    maps = [weights for here in stored for _, weights in here]
    return kind(
        norm=NoNorm(), qkv=QKV(Linear(0 * ONE), Linear(0 * ONE), Linear(ONE)), rope=NoRope(),
        cache=Cache(), attend=Attend(1.0), out=Linear(ONE), heads=1, kv_heads=1,
        memo=MemoTable.of(keys, ONE), ends=np.cumsum([len(here) for here in stored]),
        maps=np.concatenate(maps), starts=np.cumsum([0, *map(len, maps)]),
        radius=radius, **options,
    )  # fmt: skip


def test_worked_example_by_hand():
    # Values 1 2 3, so exactly the outputs are 1, (1 + 2) / 2 and (1 + 2 + 3) / 3. Stored: nothing
    # at position 0; 4 at position 1, half its length from 2; 2.5 and 10 at position 2. 3 is 0.2 of
    # its length from 2.5, whose weights give 0.5 * 1 + 0.25 * 2 + 0.25 * 3 = 1.75.
    stored = [[], [(4.0, [1.0, 0.0])], [(10.0, [0.0, 0.0, 1.0]), (2.5, [0.5, 0.25, 0.25])]]
    for radius, expected, hits in (
        (0.1, [1, 1.5, 2], 0),
        (0.3, [1, 1.5, 1.75], 1),
        (9, [1, 1, 1.75], 2),
    ):
        attn = averaging(stored, radius)
        with counting(attn) as counts:
            y = attn(np.array([[1.0], [2.0], [3.0]]), Layer.once(3))
        assert_same(y[:, 0], expected, f"radius {radius}", tolerance=1e-7)
        assert counts.events == {"lookups": 3, "hits": hits}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("radius", [0.0, 0.9, 2.0])
def test_equals_the_literal_version(family, radius):
    options = DEMO | {"radius": radius, "rank": 3}
    lm = apply(tiny_lm(family, dtype=np.float64), {"memoize_attention": options})
    attn = lm.model.stack.blocks[0].attn
    x = RNG.standard_normal((30, 16))
    x[::3] = 0.9 * lm.model.embed(IDS[:30], slice(0, 30))[::3]
    stored = [[] for _ in attn.ends]
    for position in range(len(stored)):
        for entry in range(*attn.keys_of(position)):
            row = attn.maps[attn.starts[entry] : attn.starts[entry + 1]].reshape(attn.heads, -1)
            stored[position].append((attn.memo.keys[entry], row.tolist()))
    with counting(attn) as counts:
        y = attn(x, Layer.once(30))
    tokens = Tokens(slice(0, 30))
    expected, hits = literal.attention(attn, x, tokens, stored, attn.memo.basis, radius)
    check_close(y, expected, 1e-12, "attention output")
    assert counts.events["hits"] == sum(hits) and (sum(hits) > 0) == (radius > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_text_itself_hits_everywhere_at_radius_zero(family):
    """Its maps are the exact ones, so the logits are the dense ones."""
    lm = tiny_lm(family, dtype=np.float64)
    options = DEMO | {"size": 1, "radius": 0.0}
    found = apply(lm, {"memoize_attention": options}, calibrate=[IDS.tolist()])
    for sizes in ((40,), (7, 1, 32), (1,) * 40):
        with counting(found) as counts:
            logits = in_chunks(found, IDS, sizes)
        assert counts.events["hits"] == counts.events["lookups"] == 2 * 40
        check_close(logits, lm.logits(IDS), 1e-12, "maps of the same text")


def test_values_are_those_of_the_sequence_not_of_the_stored_text():
    attn = averaging([[(1.0, [1.0])], [(1.0, [0.75, 0.25])]], 9.0)
    y = attn(np.array([[4.0], [8.0]]), Layer.once(2))
    assert_same(y[:, 0], [4, 5], "0.75 * 4 + 0.25 * 8 = 5", tolerance=1e-7)


def test_several_blocks_of_hits_equal_one(monkeypatch):
    lm = apply(tiny_lm(dtype=np.float64), {"memoize_attention": DEMO})
    whole = lm.logits(IDS)
    monkeypatch.setattr(fast, "ROWS", 7)
    check_close(lm.logits(IDS), whole, 1e-12, "in blocks of 7")


def test_positions_beyond_the_calibration_text_miss():
    found = apply(
        tiny_lm(dtype=np.float64), {"memoize_attention": DEMO}, calibrate=[IDS[:9].tolist()]
    )
    with counting(found) as counts:
        found.logits(IDS)
    assert counts.events["hits"] <= 2 * 9 and counts.events["lookups"] == 2 * 40


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family):
    """One token after 20 others, which hits in every layer."""
    dense = tiny_lm(family)
    lm = apply(dense, {"memoize_attention": DEMO | {"radius": 99.0, "rank": 3}})
    counted = []
    for one in (dense, lm):
        state = one.model.new_state()
        one.model(IDS[:20], state)
        with counting(one) as counts:
            one.model(IDS[20:21], state)
        counted.append(counts.total())
    assert counts.events == {"lookups": 2, "hits": 2}
    c, S = dense.model.config, 21
    D, wide = c.width, c.heads * c.head_width
    stored = [b.attn.keys_of(20) for b in lm.model.stack.blocks]
    looked_up = sum(D * 3 + (end - first) * 3 + D for first, end in stored)
    saved = counted[0].multiply_adds - counted[1].multiply_adds
    assert saved == 2 * (D * wide + S * wide) - looked_up
    keys = 2 * c.kv_heads * S * c.head_width * 4
    assert counted[0].cache_bytes - counted[1].cache_bytes == keys, "the keys are not read"


def test_monitor_halves_the_radius_after_a_false_hit():
    # Values 1 2 3 4; stored weights are all on the first one, at distance 0.2. Every 2nd position
    # is checked: position 1 gives 1 instead of 1.5, an error of 0.33, position 3 1 instead of 2.5,
    # of 0.6. Above the limit, the radius becomes 0.15, and the tokens after it miss.
    stored = [[(key / 1.2, [1.0, *[0.0] * t])] for t, key in enumerate([1.0, 2.0, 3.0, 4.0])]
    x = np.array([[1.0], [2.0], [3.0], [4.0]])
    for limit, expected, hits, false in (
        (0.3, [1, 1.5, 2, 2.5], 1, 1),
        (0.5, [1, 1.5, 1, 2.5], 2, 1),
    ):
        attn = averaging(stored, 0.3, MonitoredAttention, every=2, limit=limit, halvings=1)
        for sizes in ((4,), (1, 1, 1, 1), (2, 2)):
            layer, y = Layer(4), []
            with counting(attn) as counts:
                for a, b in zip(ends := np.cumsum([0, *sizes]), ends[1:]):
                    y += attn(x[a:b], layer.take(b - a))[:, 0].tolist()
            assert_same(y, expected, f"limit {limit}, in steps of {sizes}", tolerance=1e-7)
            assert counts.events["hits"] == hits
            assert counts.events["checks above the limit"] == false
            assert counts.events["quality checks"] == hits, "only tokens that hit are checked"


@pytest.mark.parametrize("options", [{"radius": 0.9}, {"monitor": 3}, {"choose": "random"}])
def test_batches_and_chunks_equal_one_sequence(options):
    lm = apply(tiny_lm("gpt_neox", dtype=np.float64), {"memoize_attention": DEMO | options})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist()]
    assert lm.generate(prompts, 9) == [lm.generate(prompt, 9) for prompt in prompts]
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")
    check_close(in_chunks(lm, IDS, (9, 1, 30)), lm.logits(IDS), 1e-12, "in chunks")


def test_random_baseline_hits_as_often_as_tokens_that_are_not_stored():
    # Position 0: 1 is stored, so it is left out; 1.2 is 0.2 of its length away, 3 is 2 away. So one
    # of two others hits at radius 0.3.
    attn = averaging([[(1.0, [1.0])]], 0.3)
    assert hit_rate(attn, [np.array([[1.0]]), np.array([[1.2]]), np.array([[3.0]])]) == 0.5
    assert hit_rate(attn, [np.array([[1.0]])]) == 0
    stored = [[(1.0, [1.0]), (2.0, [1.0])], [(5.0, [1.0, 0.0]), (6.0, [0.0, 1.0])]]
    scores = np.array([[0.9, 0.4], [0.0, 0.6]])  # position 0 misses; 1 hits, and gets the second
    attn = averaging(stored, 0.0, RandomMaps, scores=scores, rate=0.5)
    y = attn(np.array([[4.0], [8.0]]), Layer.once(2))
    assert_same(y[:, 0], [4, 8], tolerance=1e-7)


def test_first_layers_have_no_database():
    lm = apply(tiny_lm(), {"memoize_attention": DEMO | {"first": 1}})
    assert [type(b.attn) for b in lm.model.stack.blocks] == [Attention, MemoizedAttention]


def test_what_does_not_fit_is_refused_in_a_sentence():
    def refused(match, **wanted):
        with pytest.raises(MinitxError, match=match):
            apply(tiny_lm(), {"memoize_attention": DEMO} | wanted)

    refused("first must be at most 2", memoize_attention={"first": 3})
    refused("monitor=2 .* choose=random", memoize_attention={"choose": "random", "monitor": 2})
    refused("memoize_attention needs .* heavy_hitters", heavy_hitters={"heavy": 4, "recent": 4})
    refused("memoize_attention needs .* elsa", elsa={"stories": 1})


# On stories --------------------------------------------------------------------------------------


@cache
def on_stories(**options):
    """Loss per token of three stories above dense, and what was counted."""
    dense = minitx.load("stories")
    lm = apply(dense, {"memoize_attention": options})
    texts = [text.ids for text in encode(dense.tokenizer, held_out(dense, 3))]

    def loss(lm):
        found = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
        return float(np.concatenate(found).mean())

    with counting(lm) as counts:
        after = loss(lm)
    return after - loss(dense), counts.events


def test_on_stories_near_tokens_are_better_than_random_ones():
    loss, events = on_stories(stories=20)
    rate = events["hits"] / events["lookups"]
    assert -0.01 < loss < 0.02, f"{loss:+.4f} nats per token"
    assert 0.1 < rate < 0.2, f"hit rate {rate:.3f}"
    random, others = on_stories(stories=12, choose="random", radius=0.5)
    assert others["hits"] > events["hits"] / 2 and random > loss + 0.02, f"{random:+.3f}"
