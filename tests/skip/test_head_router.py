"""Head routing: the selection by hand, a literal version, refusals, counts, figures."""

from functools import cache

import literal_head_router as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally
from minitx.lab.reading import add_up, stories_to_read
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Attention
from minitx.skip.head_router import NormRouter, RoutedAttention, highest, spans
from minitx.state import Layer
from minitx.technique import apply, blocks_of

IDS = np.random.default_rng(5).integers(0, 258, 24)
GROUPED = dict(heads=4, kv_heads=2, width=24, head_width=6, layers=2)  # two key heads, G = 2
family = pytest.mark.parametrize("family", FAMILIES)


def models(family="llama", **options):
    """(dense, routed) in float64, with four heads."""
    rope = {"llama": 6, "gpt2": 0, "gpt_neox": 4}[family]
    sizes = GROUPED | dict(rope_width=rope, kv_heads=2 if family == "llama" else 4)
    lm = LM(tiny_model(family, dtype=np.float64, **sizes), TOKENIZER)
    return lm, apply(lm, {"head_router": {"first": 0} | options})


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


def test_norm_router_by_hand_runs_the_shared_head_and_the_longest_query():
    # Three heads of width 2, the first one shared; two heads run for each token.
    #           head 0    head 1           head 2
    # token 0   (9, 9)    (3, 4): 5        (1, 2): 2.24     heads 0 and 1 run
    # token 1   (0, 0)    (1, 1): 1.41     (-2, 0): 2       heads 0 and 2, though 0 is the shortest
    q = np.array([[9, 9, 3, 4, 1, 2], [0, 0, 1, 1, -2, 0]], float)
    runs = NormRouter(heads=3, shared=1, running=2)(q, Layer.once(2))
    assert_same(runs, [[True, True, False], [True, False, True]])


def test_ties_go_to_the_lower_head_even_if_rounding_differs():
    scores = np.array([[1.0, 2.0, 2.0 + 1e-15, 1.0]])
    assert highest(scores, 0, 1).tolist() == [[False, True, False, False]]
    assert highest(scores, 1, 4).tolist() == [[True, True, True, True, False]]


def test_spans_are_the_stretches_of_adjacent_heads():
    assert list(spans([0, 1, 3, 5, 6])) == [(0, 2), (3, 4), (5, 7)] and list(spans([])) == []


# The literal version -----------------------------------------------------------------------------


@family
@pytest.mark.parametrize("shared, active", [(0.0, 0.75), (0.5, 0.75), (0.25, 0.25), (0.0, 0.25)])
def test_norm_routing_equals_literal(family, shared, active):
    lm, routed = models(family, shared=shared, active=active)
    expected, ran = literal.run(lm.model, IDS, int(4 * shared), int(4 * active))
    close(routed.logits(IDS), expected, "all tokens at once")
    close(in_chunks(routed, IDS, (9, *[1] * 15)), expected, "a prompt, then token by token")
    if shared < active:
        assert len({tuple(heads) for layer in ran for heads in layer}) > 1, "no routing to check"


def test_batch_without_cache_equals_its_rows():
    _, routed = models(active=0.5)
    rows = np.stack([IDS, IDS[::-1], (IDS * 7) % 258])
    for row, found in zip(rows, routed.logits(rows)):
        close(found, routed.logits(row), "a row of the batch")


def test_prompts_of_a_padded_batch_equal_the_prompts_alone():
    """Several tokens of each sequence at once, which see no padding, then one more."""
    _, routed = models(active=0.5)
    lengths = (24, 11)
    start = np.array([24 - n for n in lengths])
    ids = np.stack([np.where(np.arange(24) < s, 0, IDS) for s in start])
    state = routed.model.new_state(start)
    found = np.concatenate([routed.model(ids[:, :-1], state), routed.model(ids[:, -1:], state)], 1)
    for row, s in zip(found, start):
        close(row[s:], routed.logits(IDS[s:]), f"a prompt of {24 - s} tokens")


# Options -----------------------------------------------------------------------------------------


def test_all_heads_active_returns_the_dense_model():
    lm, routed = models(active=1.0)
    assert routed.model is lm.model


@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_random_baseline_runs_as_many_heads(shared):
    for choose in ("norm", "random"):
        _, routed = models(choose=choose, active=0.5, shared=shared)
        with counting(routed) as counts:
            routed.logits(IDS)
        assert counts.events["heads run"] * 2 == counts.events["heads"] == 2 * 4 * len(IDS), choose


def test_first_layers_stay_dense():
    lm, routed = models(active=0.5, first=1)
    kinds = [type(block.attn) for block in blocks_of(routed)]
    assert kinds == [Attention, RoutedAttention]
    close(models(first=2)[1].logits(IDS), lm.logits(IDS), "no layer is routed", 0)


def test_refusals_name_the_technique_and_the_remedy():
    with pytest.raises(MinitxError, match="head_router: shared=0.75 keeps 3 of 4 heads.*smaller"):
        models(shared=0.75, active=0.5)
    with pytest.raises(MinitxError, match="head_router needs a part of type Attend where elsa"):
        apply(models()[0], {"head_router": {"active": 0.5}, "elsa": True})
    with pytest.raises(MinitxError, match="head_router needs a part of type Linear where quantize"):
        apply(models()[0], {"head_router": {"active": 0.5}, "quantize": True})
    with pytest.raises(MinitxError, match="head_router: first must be at most 2.*got 3"):
        models(first=3)


# Work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [0.0, 0.25])
def test_multiply_adds_of_a_decoded_token_are_those_of_the_card(shared):
    """A token after S - 1 others: 2 S d + d D less for each head that does not run."""
    lm, routed = models(active=0.5, shared=shared)
    for S in (5, 20):
        work = []
        for found in (lm, routed):
            state = found.model.new_state()
            found.model(IDS[: S - 1], state)
            with counting(found) as counts:
                found.model(IDS[S - 1 : S], state)
            work.append(counts.total("model.stack").multiply_adds)
        D, d, layers, off = 24, 6, 2, 2
        assert work[0] - work[1] == layers * (off * (2 * S * d + d * D) - (4 - 4 * shared) * d)


def test_prompt_computes_only_the_rows_of_tokens_that_run_a_head():
    """With one of four heads per token, all T x S scores together are those of one head."""
    lm, routed = models(active=0.25)
    with counting(routed) as counts:
        routed.logits(IDS)
    T, d, D = len(IDS), 6, 24
    work = sum(e.multiply_adds for p, e in counts.entries.items() if p.endswith("attn"))
    most = T * T * 2 * d + T * d * D + T * 24  # no query has more than T keys
    assert work <= 2 * most, "heads that do not run were computed"


# Figures on stories ------------------------------------------------------------------------------


@cache
def loss(**options) -> float:
    dense = minitx.load("stories")
    lm = apply(dense, {"head_router": options}) if options else dense
    read, tally = stories_to_read(lm, 3), Tally.empty()
    for one in read.texts:
        add_up(tally, lm, one)
    return read.report(tally).loss


def test_price_on_stories_is_below_that_of_random_and_of_the_same_heads():
    settings = dict(active=0.75, first=2)
    price = loss(**settings) - loss()
    others = [loss(**settings, **o) - loss() for o in (dict(choose="random"), dict(shared=0.75))]
    assert -0.002 < price < 0.01 and min(others) > 2 * price, (price, others)
    assert -0.002 < loss(active=0.5) - loss() < 0.005, "the default"


def test_layers_with_different_numbers_of_heads_each_run_their_share():
    """head_prune leaves 2 heads in the first layer, and 4 in the second."""
    lm = LM(tiny_model("gpt_neox", dtype=np.float64, heads=4, kv_heads=4), TOKENIZER)
    pruned = {"head_prune": {"share": 0.3, "choose": "random"}}
    routed = apply(lm, pruned | {"head_router": {"first": 0, "active": 0.5}})
    heads = [block.attn.heads for block in routed.model.stack.blocks]
    assert sorted(heads) == [2, 4]
    for block, H in zip(routed.model.stack.blocks, heads):
        q = np.random.default_rng(0).standard_normal((6, H * 4))
        runs = block.attn.router(q, None)
        assert runs.shape == (6, H) and (runs.sum(-1) == H // 2).all()
