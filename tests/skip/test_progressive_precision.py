"""progressive_precision: codes in two parts, which queries are redone, what is read and counted,
and what the paper's rule is worth on stories."""

from functools import cache

import literal_progressive_precision as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

import minitx
from minitx import fast
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.skip.progressive_precision import RULES, Flat, KeyCode, ProgressiveAttend
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(8)
IDS = RNG.integers(0, 258, 40)


def attend(q, k, v, high, low, threshold, steps=None, scale=0.5, choose="flat"):
    """Attention in one step or several, with the events that it counts."""
    part = ProgressiveAttend(KeyCode(high, low), scale, RULES[choose](threshold))
    layer, out, at = Layer(k.shape[-2]), [], 0
    with counting(part) as counts:
        for size in steps or (k.shape[-2],):
            new = slice(at, at + size)
            layer.take(size).store(k[..., new, :], v[..., new, :])
            out.append(part(q[..., new, :], *layer.rows(), layer))
            at += size
    return np.concatenate(out, -2), counts.events


def test_worked_example_by_hand():
    """high=3, low=2: m = ((8 - 1) * 4 - 1) // 2 = 13, so a key with max 13 is its own code:

        key      first number = 4 * high part + low part
        6, 13    6 = 4 * 2 - 2
        5, 13    5 = 4 * 1 + 1
        2, 13    2 = 4 * 1 - 2

    The query 127, 0 is its own code too, and scale = ln 2 / 127 makes weights powers of 2:

        high parts    2^8 2^4 2^4 / 288 = 8/9 1/18 1/18
        both          2^6 2^5 2^2 / 100 = .64  .32  .04

    Values 9 18 36: 8 + 1 + 2 = 11 from the high parts, 5.76 + 5.76 + 1.44 = 12.96 from both."""
    q, k = np.array([[[127.0, 0]]]), np.array([[[6.0, 13], [5, 13], [2, 13]]])
    v = np.array([[[9.0], [18], [36]]])
    high, low, scales = KeyCode(3, 2)(k)
    assert high[0, :, 0].tolist() == [2, 1, 1] and low[0, :, 0].tolist() == [-2, 1, -2]
    assert scales.tolist() == [[1, 1, 1]]
    layer = Layer(3).take(3)
    layer.store(k, v)
    layer.tokens = layer.tokens.only([2])
    scale = np.log(2) / 127
    for threshold, choose, expected in (
        (0.5, "flat", 11),
        (0.9, "flat", 12.96),
        (0.5, "peaked", 12.96),
        (0.9, "peaked", 11),
    ):
        part = ProgressiveAttend(KeyCode(3, 2), scale, RULES[choose](threshold))
        found = part(q, k, v, layer).item()
        assert found == pytest.approx(expected), f"{choose}, threshold={threshold}"
        lists = q.tolist(), k.tolist(), v.tolist()
        by_hand, _ = literal.attend(*lists, scale, [0], 3, 2, threshold, choose)
        assert by_hand == [[[pytest.approx(expected)]]]


@pytest.mark.parametrize("high, low", [(2, 4), (3, 1), (4, 4), (8, 8), (3, None)])
@pytest.mark.parametrize("threshold, choose", [(0, "flat"), (0.4, "flat"), (0.4, "peaked")])
@pytest.mark.parametrize("steps", [(14,), (6, 1, 1, 6)])
def test_equals_the_literal_version(high, low, threshold, choose, steps):
    q, k, v = (RNG.standard_normal((n, 14, 4)) for n in (6, 2, 2))
    found, events = attend(q, k, v, high, low, threshold, steps, choose=choose)
    lists = q.tolist(), k.tolist(), v.tolist()
    expected, redone = literal.attend(*lists, 0.5, [0, 0, 0, 1, 1, 1], high, low, threshold, choose)
    assert_same(found, expected, "attention output", atol=1e-12)
    assert events["queries redone"] == len(redone) and events["queries seen"] == 6 * 14
    assert threshold == 0 or 0 < len(redone) < 6 * 14, "one side only is tested"


def test_several_blocks_of_queries_equal_one(monkeypatch):
    q, k, v = (RNG.standard_normal((n, 30, 4)) for n in (2, 1, 1))
    whole, _ = attend(q, k, v, 3, 4, 0.4)
    monkeypatch.setattr(fast, "ROWS", 8)
    assert_same(attend(q, k, v, 3, 4, 0.4)[0], whole, atol=1e-12)


@pytest.mark.parametrize("high", range(2, 9))
@pytest.mark.parametrize("low", [1, 4, 8, None])
def test_parts_fit_their_bits_and_are_the_nearest_multiple_and_the_rest(high, low):
    k = RNG.standard_normal((3, 50, 6))
    k[0, 0] = 0
    code = KeyCode(high, low)
    high_part, low_part, scales = code(k)
    assert abs(high_part).max() == 2 ** (high - 1) - 1, "the high part uses all of its range"
    codes = high_part * float(code.step)
    if low:
        assert low_part.min() >= -(2 ** (low - 1)) and low_part.max() < 2 ** (low - 1)
        codes += low_part
    else:
        assert low_part.shape == (3, 50, 0), "without low bits none are kept"
    error = abs(codes * scales[..., None] - k)
    assert (error <= scales[..., None] * 0.5000001).all(), "a code is off by more than a half"
    assert (high_part[0, 0] == 0).all() and scales[0, 0] == 1


def test_threshold_0_never_redoes_and_1_always():
    q, k, v = (RNG.standard_normal((n, 20, 4)) for n in (2, 1, 1))
    seen = {t: attend(q, k, v, 3, 4, t)[1]["queries redone"] for t in (0, 0.3, 0.6, 1)}
    assert seen[0] == 0 and seen[1] == 2 * 20, seen
    assert 0 < seen[0.3] < seen[0.6] < 40, f"redone queries do not grow with the threshold: {seen}"
    opposite = attend(q, k, v, 3, 4, 0.3, choose="peaked")[1]["queries redone"]
    assert opposite == 40 - seen[0.3]


def test_all_bits_are_nearly_dense_and_float_keys_exactly():
    q, k, v = (RNG.standard_normal((n, 20, 8)) for n in (2, 1, 1))
    lists = q.tolist(), k.tolist(), v.tolist()
    dense = np.array(literal.attend(*lists, 0.5, [0, 0], 8, None, 1)[0])
    errors = [
        abs(attend(q, k, v, high, low, 1)[0] - dense).max()
        for high, low in ((2, 2), (4, 4), (8, 8))
    ]
    assert errors[0] > 10 * errors[1] > 0, errors
    assert 0 < errors[2] < 0.05, "what the 8 bits of the query leave"
    assert_same(attend(q, k, v, 2, None, 1)[0], dense, atol=1e-12)


def test_last_bits_of_a_float_do_not_decide():
    """Two keys that are equal but for rounding: weights of 1/2 each, give or take the last bit, at
    a threshold of 1/2, which is not above it."""
    q, key = RNG.standard_normal((1, 40, 4)), RNG.standard_normal((1, 1, 4))
    v = RNG.standard_normal((1, 2, 4))
    for ulps in (0, 1, 2, 5):
        k = np.concatenate([key, key * (1 + ulps * 2**-52)], 1)
        for t in range(0, 40, 2):
            _, events = attend(q[:, t : t + 2], k, v, 3, 4, 0.5, (1, 1))
            assert events["queries redone"] == 1, "the second query is flat, the first sees one key"


@pytest.mark.parametrize("family", FAMILIES)
def test_random_baseline_in_padded_batches_equals_rows(family):
    options = {"high": 2, "threshold": 0.5, "choose": "random"}
    lm = apply(tiny_lm(family, dtype=np.float64), {"progressive_precision": options})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist()]
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]
    with counting(lm) as counts:
        lm.logits(IDS)
    share = counts.events["queries redone"] / counts.events["queries seen"]
    assert 0.3 < share < 0.7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("low, threshold", [(4, 0.0), (4, 1.0), (4, 0.3), (None, 0.3)])
def test_counted_work_equals_the_formula_on_the_card(family, low, threshold):
    """One token after 29 others. Heads of width 8: 3 bytes of high bits and 4 of the scale."""
    options = {"high": 3, "low": low, "threshold": threshold}
    lm = apply(tiny_lm(family), {"progressive_precision": options})
    c, S = lm.model.config, 30
    state = lm.model.new_state()
    lm.model(IDS[: S - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[S - 1 : S], state)
    work = counts.total("model.stack.blocks.0.attn.attend")
    work += counts.total("model.stack.blocks.1.attn.attend")
    redone, H, K, d = counts.events["queries redone"], c.heads, c.kv_heads, c.head_width
    assert counts.events["queries seen"] == 2 * H
    assert threshold not in (0, 1) or redone == threshold * 2 * H
    assert work.multiply_adds == 2 * 2 * H * S * d + redone * S * d
    integers = 2 * H * S * d + (redone * S * d if low else 0)
    assert work.integers == {8: integers}
    of_high, of_low = 3 * d // 8 + 4, (4 * d if low is None else low * d // 8)
    read = work.cache_bytes - 2 * K * S * (of_high + 4 * d)
    assert read % (S * of_low) == 0, "low parts are read for whole key heads"
    heads = read // (S * of_low)
    assert redone * K / H <= heads <= min(redone, 2 * K), "key heads with a redone query"


def test_low_parts_of_a_key_head_are_read_once_for_all_its_queries():
    """Two query heads of one key head, the first peaked (not redone), the second flat."""
    k = np.array([[[9.0, 1], [1, 9], [-9, 1]]])
    q = np.array([[[9.0, 0]], [[0, 0.01]]])
    layer = Layer(3).take(3)
    layer.store(k, k)
    layer.tokens = layer.tokens.only([2])
    for queries, low_parts in ((q[[0, 0]], 0), (q, 1), (q[[1, 1]], 1)):
        part = ProgressiveAttend(KeyCode(4, 4), 1.0, Flat(0.5))
        with counting(part) as counts:
            part(queries, *layer.rows(), layer)
        values, scales, parts = 3 * 2 * 8, 3 * 8, 3 * 1  # float64; 2 numbers of 4 bits
        expected = values + scales + (1 + low_parts) * parts
        assert counts.total().cache_bytes == expected


def test_neutral_setting_is_the_dense_model_and_the_tree_shows_the_options():
    lm = tiny_lm()
    for options in ({"threshold": 1.0}, {"threshold": 0.0, "choose": "peaked"}):
        same = apply(lm, {"progressive_precision": options | {"low": None}})
        assert repr(same.model) == repr(lm.model)
    drawn = repr(apply(lm, {"progressive_precision": {"threshold": 0.3}}).model)
    assert "attend: ProgressiveAttend(scale=0.353553)" in drawn
    assert "rule: Flat(threshold=0.3)" in drawn
    assert "code: KeyCode(high=4, low=4)" in drawn


# On stories --------------------------------------------------------------------------------------


@cache
def stories():
    dense = minitx.load("stories")
    return dense, [text.ids for text in encode(dense.tokenizer, held_out(dense, 3))]


@cache
def on_stories(**options):
    """Loss above dense in nats per token, and the share of queries that are redone."""
    dense, texts = stories()
    lm = apply(dense, {"progressive_precision": options}) if options else dense
    with counting(lm) as counts:
        losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
    loss = float(np.concatenate(losses).mean())
    share = counts.events["queries redone"] / max(counts.events["queries seen"], 1)
    return loss - (on_stories()[0] if options else 0), share


def test_on_stories_four_bits_are_enough_and_two_are_not():
    always, _ = on_stories(high=4, threshold=0.0)
    default, share = on_stories(high=4, low=4, threshold=0.1)
    assert abs(always) < 0.005 and abs(default) < 0.005, (always, default)
    assert 0.3 < share < 0.6, f"{share:.3f} of the queries are redone"
    assert on_stories(high=2, threshold=0.0)[0] > 0.1


def test_on_stories_the_papers_rule_is_worse_than_random_and_its_opposite_better():
    """At equal shares of redone queries, high parts of 2 bits: as the card says."""
    flat, share = on_stories(high=2, threshold=0.1)
    random, same = on_stories(high=2, threshold=round(share, 3), choose="random")
    assert abs(share - same) < 0.02
    peaked, fewer = on_stories(high=2, threshold=0.1, choose="peaked")
    assert fewer < share + 0.05
    assert flat > 1.5 * random and peaked < 0.7 * random, (flat, random, peaked)
