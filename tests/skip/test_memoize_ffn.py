"""memoize_ffn: who gets a stored output, what that computes and counts, its monitor, stories."""

from functools import cache

import literal_memoize_ffn as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import FFN, Activated, Linear, NoNorm
from minitx.shared.memo_table import MemoTable, cover, principal
from minitx.skip.memoize_ffn import MemoizedFFN, MonitoredFFN, inputs_and_outputs
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

RNG = np.random.default_rng(4)
IDS = RNG.integers(0, 258, 40)
DEMO = {"size": 64, "radius": 0.8, "first": 0, "stories": 2}


def doubling(D=2):
    """An FFN without a norm that doubles its input."""
    twice = Linear(2 * np.eye(D))
    return dict(norm=NoNorm(), expand=Activated(twice, lambda x: x), down=Linear(np.eye(D)))


def memoized(keys, values, radius, rank=2, kind=MemoizedFFN, **options):
    keys, values = np.array(keys), np.array(values)
    basis = np.eye(keys.shape[1])[:, :rank]
    memo = MemoTable.of(keys, basis)
    return kind(**doubling(keys.shape[1]), memo=memo, values=values, radius=radius, **options)


def test_worked_example_by_hand():
    # Stored: (1, 0) -> (2, 0) and (0, 1) -> (0, 2). x = (0.9, 0.1) is sqrt(0.01 + 0.01) = 0.141
    # from the first key: a hit at radius 0.2, so it gets (2, 0); a miss at 0.1, and doubled it is
    # (1.8, 0.2). x = (0, 1) is a stored one: a hit at any radius.
    x = np.array([[0.9, 0.1], [0.0, 1.0]])
    stored = [[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 2.0]]
    for radius, first, hits in ((0.2, [2.0, 0.0], 2), (0.1, [1.8, 0.2], 1), (0.0, [1.8, 0.2], 1)):
        ffn = memoized(*stored, radius)
        with counting(ffn) as counts:
            y = ffn(x, Layer.once(2))
        assert_same(y, [first, [0, 2]], f"radius {radius}", tolerance=1e-7)
        assert counts.events == {"lookups": 2, "hits": hits}


@pytest.mark.parametrize("rank", [1, 3, 6])
@pytest.mark.parametrize("radius", [0.0, 0.5, 9.0])
def test_equals_the_literal_version(rank, radius):
    keys, values = RNG.standard_normal((8, 6)), RNG.standard_normal((8, 6))
    x = keys[RNG.integers(0, 8, 20)] + 0.3 * RNG.standard_normal((20, 6))
    ffn, basis = memoized(keys, values, radius, rank), np.eye(6)[:, :rank].tolist()
    with counting(ffn) as counts:
        y = ffn(x, Layer.once(20))
    expected, hits = literal.memoized(
        lambda row: [2 * a for a in row], x.tolist(), keys.tolist(), values, basis, radius
    )
    assert_same(y, expected, "FFN output", atol=1e-12)
    assert counts.events["hits"] == sum(hits)


@pytest.mark.parametrize("steps", [(30,), (7, 1, 1, 21), (1,) * 30])
def test_monitored_equals_the_literal_version(steps):
    keys = RNG.standard_normal((6, 4))
    values = 2 * keys + 0.5 * RNG.standard_normal((6, 4))
    x = keys[np.arange(30) % 6] + 0.2 * np.sin(np.arange(30))[:, None]
    how = dict(every=2, limit=0.3, halvings=2)
    ffn = memoized(keys, values, 0.6, rank=4, kind=MonitoredFFN, **how)
    layer, found = Layer(30), []
    for a, b in zip(ends := np.cumsum([0, *steps]), ends[1:]):
        found.append(ffn(x[a:b], layer.take(b - a)))
    expected, used = literal.monitored(
        lambda row: [2 * a for a in row], x.tolist(), keys.tolist(), values, np.eye(4), 0.6, **how
    )
    assert_same(np.concatenate(found), expected, atol=1e-12)
    assert {0.6, 0.3, 0.15} == set(used), "the example uses every radius"


def test_monitor_halves_the_radius_after_a_false_hit():
    # The stored value is wrong (error 1 of 2 = 0.5). Every 2nd token is checked; distances 0.2.
    x = np.full((6, 2), [1.2, 0.0])
    ffn = memoized(
        [[1.0, 0.0]], [[1.2, 0.0]], 0.3, kind=MonitoredFFN, every=2, limit=0.4, halvings=1
    )
    with counting(ffn) as counts:
        y = ffn(x, Layer.once(6))
    # position 0 hits; 1 is checked: exact, and a false hit, so the radius is 0.15: all others miss
    assert_same(y[:, 0], [1.2, *[2.4] * 5], tolerance=1e-7)
    assert counts.events["checks above the limit"] == 1 and counts.events["hits"] == 1
    layer = Layer(6).take(3)
    ffn(x[:3], layer)
    layer.rewind(1)
    again = ffn(x[:1] - [0.0, 0.01], layer.take(1))  # position 1 is checked, and 0.2 hits again
    assert again[0, 0] == 2.4 and ffn(x[:1], layer.take(1))[0, 0] == 2.4


def test_monitor_without_halvings_only_counts_false_hits():
    x = np.full((6, 2), [1.2, 0.0])
    ffn = memoized(
        [[1.0, 0.0]], [[1.2, 0.0]], 0.3, kind=MonitoredFFN, every=2, limit=0.4, halvings=0
    )
    with counting(ffn) as counts:
        y = ffn(x, Layer.once(6))
    assert_same(y[:, 0], [1.2, 2.4] * 3, tolerance=1e-7)
    expected = {"lookups": 3, "hits": 3, "quality checks": 3, "checks above the limit": 3}
    assert counts.events == expected


def test_what_is_stored_equals_the_literal_cover():
    lm = tiny_lm(dtype=np.float64)
    stored = apply(lm, {"memoize_ffn": DEMO | {"size": 9}}).model.stack.blocks[1].ffn
    recorded = apply(lm, {"memoize_ffn": DEMO | {"size": 999, "radius": 0.0}})
    seen = recorded.model.stack.blocks[1].ffn
    assert len(stored.values) == 9
    for key, value in zip(stored.memo.keys, stored.values):
        row = abs(seen.memo.keys - key).sum(1).argmin()
        check_close(key, seen.memo.keys[row], 1e-12, "a key is a calibration token")
        check_close(value, seen.values[row], 1e-12, "its value is that token's output")
    keys = RNG.standard_normal((25, 3))
    for size in (4, 99):
        assert cover(keys, 0.7, size).tolist() == literal.cover(keys.tolist(), 0.7, size)


def test_the_search_uses_principal_components_of_the_inputs():
    """Of all calibration tokens, not only of those that are stored."""
    options = {"memoize_ffn": DEMO | {"size": 999, "radius": 0.0, "rank": 4}}
    memo = (
        apply(tiny_lm(dtype=np.float64), options, calibrate=[IDS.tolist()])
        .model.stack.blocks[0]
        .ffn.memo
    )
    assert len(memo.keys) == len(IDS), "every token is stored"
    assert_same(abs(memo.basis.T @ principal(memo.keys, 4)), np.eye(4), atol=1e-9)
    few = apply(
        tiny_lm(dtype=np.float64),
        {"memoize_ffn": options["memoize_ffn"] | {"size": 3}},
        calibrate=[IDS.tolist()],
    )
    assert_same(few.model.stack.blocks[0].ffn.memo.basis, memo.basis)


def test_calibration_text_itself_hits_everywhere_at_radius_zero():
    lm = tiny_lm(dtype=np.float64)
    found = apply(lm, {"memoize_ffn": DEMO | {"size": 99, "radius": 0.0}}, calibrate=[IDS.tolist()])
    with counting(found) as counts:
        logits = found.logits(IDS)
    assert counts.events["hits"] == counts.events["lookups"] == 2 * 40
    check_close(logits, lm.logits(IDS), 1e-12, "stored outputs of the same tokens")


@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family):
    dense = tiny_lm(family)
    lm = apply(dense, {"memoize_ffn": DEMO | {"rank": 3}})
    with counting(lm) as counts:
        lm.logits(IDS)
    with counting(dense) as before:
        dense.logits(IDS)
    hits, lookups = counts.events["hits"], counts.events["lookups"]
    assert 0 < hits < lookups == 80
    c = dense.model.config
    D, F, saved = c.width, c.hidden, (3 if family == "llama" else 2) * c.width * c.hidden
    looked_up = sum(40 * (D * 3 + len(b.ffn.values) * 3 + D) for b in lm.model.stack.blocks)
    assert (
        before.total().multiply_adds - counts.total().multiply_adds == hits * saved - looked_up
    ), f"D={D}, F={F}"


def test_first_layers_have_no_table():
    tree = [
        b.ffn for b in apply(tiny_lm(), {"memoize_ffn": DEMO | {"first": 1}}).model.stack.blocks
    ]
    assert type(tree[0]) is FFN and type(tree[1]) is MemoizedFFN
    with pytest.raises(MinitxError, match="memoize_ffn: first must be at most 2"):
        apply(tiny_lm(), {"memoize_ffn": {"first": 3}})


def test_an_output_does_not_depend_on_what_was_run_before():
    lm = apply(tiny_lm("gpt2", dtype=np.float64), {"memoize_ffn": DEMO})
    once = lm.logits(IDS)
    lm.logits((IDS + 1) % 258)
    assert_same(lm.logits(IDS), once)


@pytest.mark.parametrize("options", [{}, {"monitor": 3, "limit": 0.2}, {"choose": "random"}])
def test_padded_batches_and_chunks_equal_one_sequence(options):
    lm = apply(tiny_lm("gpt_neox", dtype=np.float64), {"memoize_ffn": DEMO | options})
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist()]
    assert lm.generate(prompts, 9) == [lm.generate(prompt, 9) for prompt in prompts]
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")
    check_close(in_chunks(lm, IDS, (9, 1, 30)), lm.logits(IDS), 1e-12, "in chunks")


def test_baselines_hit_by_plan_and_random_ones_give_other_outputs():
    lms = {
        choose: apply(tiny_lm(), {"memoize_ffn": DEMO | {"choose": choose}})
        for choose in ("nearest", "random", "random_tokens")
    }
    hits = {}
    for choose, lm in lms.items():
        with counting(lm) as counts:
            lm.logits(IDS)
        hits[choose] = counts.events["hits"]
    assert hits["random"] == hits["random_tokens"] > 0
    nearest, random, tokens = (lm.model.stack.blocks[0].ffn.values for lm in lms.values())
    assert_same(nearest, tokens)
    assert sorted(nearest.tolist()) == sorted(random.tolist()) and (nearest != random).any()
    with pytest.raises(MinitxError, match="memoize_ffn: monitor=2 .* choose=random"):
        apply(tiny_lm(), {"memoize_ffn": {"choose": "random", "monitor": 2}})


def test_rate_of_the_baseline_is_that_of_calibration_tokens_that_are_not_stored():
    lm = tiny_lm()
    random = apply(lm, {"memoize_ffn": DEMO | {"choose": "random"}})
    texts = calibration_ids("test", lm, DEMO["stories"])
    for index, block in enumerate(random.model.stack.blocks):
        x, _ = inputs_and_outputs(lm, texts)[index]
        stored = set(cover(x, DEMO["radius"], DEMO["size"]).tolist())
        others = [row for i, row in enumerate(x) if i not in stored]
        hits = [block.ffn.memo.nearest(row)[1] <= DEMO["radius"] for row in others]
        assert block.ffn.rate == pytest.approx(np.mean(hits)), "stored tokens, which hit, count"


def test_another_technique_in_the_place_of_the_ffn_is_refused_by_name():
    with pytest.raises(MinitxError, match="memoize_ffn needs .* FFN where ffn_skip has put"):
        apply(tiny_lm(), {"memoize_ffn": DEMO, "ffn_skip": {"cold_start": 0, "cold_end": 2}})


# On stories --------------------------------------------------------------------------------------


@cache
def on_stories(**options):
    """Loss per token of two stories above dense, and what was counted."""
    dense = minitx.load("stories")
    lm = apply(dense, {"memoize_ffn": options | {"stories": 6}})
    texts = [text.ids for text in encode(dense.tokenizer, held_out(dense, 2))]

    def losses(lm):
        found = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
        return np.concatenate(found).mean()

    with counting(lm) as counts:
        loss = losses(lm)
    return float(loss - losses(dense)), counts


def test_on_stories_a_radius_is_better_than_random_tokens():
    loss, counts = on_stories()
    rate = counts.events["hits"] / counts.events["lookups"]
    assert -0.01 < loss < 0.02, f"{loss:+.4f} nats per token"
    assert 0.33 < rate < 0.45, f"hit rate {rate:.3f}"
    random, other = on_stories(choose="random_tokens")
    assert other.events["hits"] >= counts.events["hits"] and random > 0.2, f"{random:+.3f}"


def test_on_stories_the_monitor_tightens_a_radius_that_is_too_large():
    wide, counts = on_stories(radius=0.7)
    checked, others = on_stories(radius=0.7, monitor=8, limit=0.3)
    assert others.events["checks above the limit"] > 20
    assert others.events["hits"] < 0.6 * counts.events["hits"]
    assert wide > 0.05 and checked < wide / 2, f"{wide:+.3f} without, {checked:+.3f} with monitor"
