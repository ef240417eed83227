"""SpAtten's token pruning: examples by hand, the literal version, what pruned tokens leave behind,
what it costs, and figures on the shipped weights."""

import numpy as np
import pytest
from literal_token_prune import SpAtten
from same import assert_same
from tiny import FAMILIES, KINDS, TOKENIZER, error, in_chunks, tiny_model

import minitx
from minitx.decode import new_state
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Stack
from minitx.skip.token_prune import (
    PruningStack,
    WeightsAdded,
    first_layers,
    layer_shares,
    pruned_tokens,
    received_attention,
    uniform_attention,
)
from minitx.state import State
from minitx.technique import apply, find
from minitx.tree import Part, part, walk

L = 4
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
STEPS = [12] + [1] * 8 + [5] + [1] * 10 + [5]  # a prompt, tokens, and chunks of several

family = pytest.mark.parametrize("family", FAMILIES)
kind = pytest.mark.parametrize("family", KINDS)


def models(family="llama", dtype=np.float64, context=48, **options):
    """(dense, pruned): of 4 layers, tokens may be pruned before the second, third and fourth."""
    lm = LM(tiny_model(family, dtype=dtype, layers=L, context=context), TOKENIZER)
    return lm, apply(lm, {"token_prune": {"first": 1, "keep": 0.4} | options})


def steps_of(ids, sizes=STEPS):
    cuts = np.cumsum([0, *sizes])
    return [ids[a:b] for a, b in zip(cuts, cuts[1:])]


def held(layer) -> list[int]:
    """The positions of a layer's cache rows."""
    return layer.row_tokens().array.tolist()


def rows_of_all(state) -> list[list[int]]:
    return [held(layer) for layer in state.layers]


# Examples by hand --------------------------------------------------------------------------------


def test_uniform_attention_favors_early_tokens_unless_it_is_corrected():
    """Three tokens, each of which attends evenly to itself and all earlier ones:

        [1]  [1/2 1/2]  [1/3 1/3 1/3]        column sums 11/6, 5/6, 2/6

    The first token has the largest sum only because three queries see it, and because early queries
    have fewer tokens to attend to. Dividing by the number of queries is not enough: 11/18, 5/12,
    1/3. Divided by what uniform attention gives, which is this very sum, all three are equal.
    """
    layer = State(1, capacity=3).layers[0].take(3)
    zeros = np.zeros((1, 3, 2))
    layer.store(zeros, zeros)
    WeightsAdded(1.0)(zeros, zeros, zeros, layer)
    attention, alive = received_attention(layer), np.arange(3)
    sums = [11 / 6, 5 / 6, 2 / 6]
    assert_same(attention.received, sums, "column sums", tolerance=1e-7)
    assert_same(attention.uniform, sums, "column sums if it is uniform", tolerance=1e-7)
    for correct, expected in ((False, sums), (True, [1, 1, 1])):
        scores = PruningStack(Stack(()), (1,), correct).scores(alive, layer)
        assert_same(scores, expected, f"correct={correct}", tolerance=1e-6)


def test_received_attention_adds_up_heads_queries_and_steps():
    """d = 1, scale 1, one key head with keys 0, ln 2, ln 5, and two query heads.

    First two tokens, queries (0, 1) in one head and (0, 0) in the other:
        [1] [1/3 2/3]   and   [1] [1/2 1/2]          received 17/6, 7/6
    One more token, queries 1 and 0, which give 1/8 2/8 5/8 and 1/3 1/3 1/3:
        received 17/6 + 11/24, 7/6 + 14/24, 23/24
        uniform  2 (1 + 1/2) + 2/3, 2 (1/2) + 2/3, 2/3
    """
    layer = State(1, capacity=3).layers[0]
    k = np.log([1.0, 2.0, 5.0]).reshape(1, 3, 1)
    attend = WeightsAdded(1.0)
    for a, b, q in ((0, 2, [[0.0, 1], [0, 0]]), (2, 3, [[1.0], [0]])):
        layer.take(b - a).store(k[:, a:b], k[:, a:b])
        attend(np.array(q)[..., None], *layer.rows(), layer)
    attention = received_attention(layer)
    expected = np.array([79, 42, 23]) / 24
    assert_same(attention.received, expected, "attention received", tolerance=1e-7)
    expected = np.array([11, 5, 2]) / 3
    assert_same(attention.uniform, expected, "that of uniform attention", tolerance=1e-7)


@part
class Notes(Part):
    """Stands in for a block: adds 1, stores a row for each token, and notes what it was given."""

    ran: list  # positions run, for each call
    saw: list  # positions that they could attend to

    def __call__(self, x, layer):
        layer.store(np.zeros((1, len(x), 1)), np.zeros((1, len(x), 1)))
        self.ran.append(layer.tokens.array.tolist())
        self.saw.append(layer.row_tokens().array.tolist())
        return x + 1


def test_pruned_token_leaves_for_good_and_later_frees_its_row():
    """Two layers, the second keeps half of all tokens, scores by position 3, 1, 2, 0, 0, 0, 0.

    The prompt has 4 tokens: ceil(0.5 * 4) = 2 go on, the last (3) and the best other (0).
    Of 5 tokens 3 may stay: 0, 3 and the new one (4). Token 2 has a better score, but has left.
    Of 6 tokens 3 may stay: the last (5) and the best of 0, 3 and 4, which are 0 and 3 (a tie).
    Of 7 tokens 4 may stay: 0, 3, 5 and 6. The row of token 4 is free when this step begins.
    """
    first, second = Notes([], []), Notes([], [])
    scores = np.array([3, 1, 2, 0, 0, 0, 0], np.float32)
    stack = PruningStack(Stack((first, second)), (1.0, 0.5), True, scores)
    state = State(2, capacity=7)
    x = 10.0 * np.arange(7)[:, None]  # token i enters as 10 i
    found, rows = [], []
    for a, b in ((0, 4), (4, 5), (5, 6), (6, 7)):
        state.take(b - a)
        found.append(stack(x[a:b], state).ravel().tolist())
        rows.append(held(state.layers[1]))
        state.position = b
    assert first.ran == [[0, 1, 2, 3], [4], [5], [6]], "layer 1 runs every token once"
    assert second.ran == [[0, 3], [4], [5], [6]], "layer 2 runs what was kept"
    assert second.saw == [[0, 3], [0, 3, 4], [0, 3, 5], [0, 3, 5, 6]], "and sees what is alive"
    assert rows == [[0, 3], [0, 3, 4], [0, 3, 4, 5], [0, 3, 5, 6]], "the row of token 4 is freed"
    # Tokens 1 and 2 were pruned after one layer, so they give what they were after it.
    assert found == [[2, 11, 21, 32], [42], [52], [62]]


@pytest.mark.parametrize(
    ("layers", "first", "shares"),
    [(8, 3, [1, 1, 1, 0.9, 0.8, 0.7, 0.6, 0.5]), (4, 3, [1, 1, 1, 0.5]), (2, 1, [1, 0.5])]
    + [(1, 1, [1]), (40, 6, None)],  # 15 % of 40 is 6
)
def test_default_schedule_runs_three_layers_or_15_percent_and_falls_linearly(layers, first, shares):
    assert first_layers(layers) == first
    found = layer_shares(layers, 0.5, first, "linear")
    assert len(found) == layers and found[-1] == (1 if layers == 1 else 0.5)
    if shares is not None:
        assert_same(found, shares, tolerance=1e-7)


def test_constant_schedule_keeps_the_same_share_in_all_later_layers():
    assert layer_shares(5, 0.3, 2, "constant") == (1, 1, 0.3, 0.3, 0.3)
    assert layer_shares(3, 0.3, 7, "constant") == (1, 1, 1)


@pytest.mark.parametrize("seen", [[0, 1, 2, 3, 4], [0, 3, 4], [1, 2, 4]])
def test_uniform_attention_of_some_queries_equals_the_sum_in_loops(seen):
    queries = [q for q in (2, 4) if q in seen]
    expected = [sum(1 / sum(j <= q for j in seen) for q in queries if i <= q) for i in seen]
    assert_same(uniform_attention(np.array(queries), np.array(seen)), expected, tolerance=1e-7)


# The literal version -----------------------------------------------------------------------------


@family
@pytest.mark.parametrize(
    "options",
    [{}, {"correct": False}, {"keep": 0.1}, {"keep": 0.8, "schedule": "constant", "first": 2}],
    ids=str,
)
def test_every_step_equals_the_literal_version(family, options):
    dense, lm = models(family, **options)
    literal = SpAtten(dense.model, lm.model.stack.shares, options.get("correct", True))
    state = lm.model.new_state()
    with counting(lm) as counts:
        for number, ids in enumerate(steps_of(IDS)):
            found, expected = lm.model.hidden(ids, state), literal.step(ids)
            assert_same(found, expected, f"hidden states differ in step {number}", tolerance=1e-12)
            attention = received_attention(state.layers[0])
            for name in ("received", "uniform"):
                sums = [getattr(literal, name)[i] for i in range(literal.n)]
                assert_same(
                    getattr(attention, name)[: literal.n],
                    sums,
                    f"{name}, step {number}",
                    tolerance=1e-7,
                )
    lm.model([7], state)  # frees the rows of what the last step has pruned
    literal.step([7])
    assert counts.events["tokens pruned"] <= literal.pruned
    for index, layer in enumerate(state.layers):
        rows = set(held(layer))
        assert set(literal.KV[index]) <= rows, f"layer {index} has lost a row"
        assert len(rows - set(literal.KV[index])) <= 1, (
            "at most one row is freed when the next step begins"
        )
        for row, i in enumerate(held(layer)):
            for cached, expected in zip((layer.keys, layer.values), literal.KV[index].get(i, ())):
                assert_same(cached[:, row], expected, atol=1e-12)


# Keeping everything, steps -----------------------------------------------------------------------


@kind
@pytest.mark.parametrize("sizes", [(40,), (11, 1, 28), (1,) * 40], ids=["one", "chunks", "tokens"])
@pytest.mark.parametrize("choose", ["attention", "random"])
def test_as_long_as_no_token_is_pruned_it_is_dense(family, sizes, choose):
    dense, lm = models(family, context=120, keep=0.99, choose=choose)  # ceil(0.99 * 40) = 40
    assert type(lm.model.stack) is PruningStack
    assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes), tolerance=1e-12)
    assert_same(lm.logits(IDS), dense.logits(IDS), tolerance=1e-12)


@kind
def test_pass_without_memory_equals_the_same_step_with_memory(family):
    _, lm = models(family)
    whole = lm.model(IDS, lm.model.new_state())
    assert_same(lm.logits(IDS), whole, tolerance=1e-12)


def test_nothing_before_a_changed_token_moves():
    """In one step, with a selection that does not depend on the tokens. (With attention, all
    queries of a step select for all, so a change may change which others go on: by design.)"""
    _, lm = models(choose="random")
    changed = IDS.copy()
    changed[25] = (changed[25] + 1) % 258
    before, after = lm.logits(IDS), lm.logits(changed)
    assert_same(after[:25], before[:25], atol=1e-12)
    assert error(after[25:], before[25:]) > 1e-3


@kind
@pytest.mark.parametrize("choose", ["attention", "random"])
def test_layer_never_sees_a_token_that_it_or_an_earlier_layer_has_lost(family, choose):
    _, lm = models(family, choose=choose)
    state, lost = lm.model.new_state(), [set() for _ in range(L)]
    for ids in steps_of(IDS):
        lm.model(ids, state)
        position = state.position
        for index, layer in enumerate(state.layers):
            rows = set(held(layer))
            assert not rows & set().union(*lost[: index + 1]), f"layer {index} revived a token"
            assert position - 1 in rows, "the last token of a step is alive in every layer"
        lm.model([5], state)  # frees the rows of what the last step has pruned
        rows = rows_of_all(state)
        for index in range(L):
            lost[index] |= set(range(position)) - set(rows[index])
        state.rewind(position)
    assert len(lost[-1]) > 15


# Rewinding ---------------------------------------------------------------------------------------


def test_rewind_to_where_the_last_step_began_leaves_no_trace():
    """Tokens that it had pruned are alive again, and the attention that it gave is forgotten."""
    _, lm = models()
    state = lm.model.new_state()
    in_chunks(lm, IDS[:28], (12, *[1] * 16), state)
    expected = in_chunks(lm, IDS[28:], (1,) * 12, state.fork())
    sums = received_attention(state.layers[0]).received.copy()
    pruned = [pruned_tokens(layer).step.copy() for layer in state.layers]
    lm.model(IDS[28:29], state)  # prunes token 27 in the last layer
    assert any((pruned_tokens(layer).step[:28] == 28).any() for layer in state.layers)
    state.rewind(28)
    for layer, before in zip(state.layers, pruned):
        assert_same(pruned_tokens(layer).step, before, "a token stays pruned")
    after = received_attention(state.layers[0]).received
    assert_same(after, sums, "the attention that the step gave still counts")
    assert_same(in_chunks(lm, IDS[28:], (1,) * 12, state), expected)


def test_rewind_before_the_last_step_is_refused_by_name():
    _, lm = models()
    state = lm.model.new_state()
    in_chunks(lm, IDS[:20], (12, 8), state)
    with pytest.raises(MinitxError, match="position 11: token_prune has freed .* rewind to 12"):
        state.rewind(11)
    state.rewind(0)
    found = lm.model(IDS[:9], state)
    assert_same(found, lm.logits(IDS[:9]), "not as if new", atol=1e-12)


@pytest.mark.parametrize("back_to", [13, 16, 19])
def test_rewind_into_a_step_forgets_the_later_tokens_and_keeps_what_it_decided(back_to):
    _, lm = models()
    state = lm.model.new_state()
    in_chunks(lm, IDS[:20], (12, 8), state)
    before = rows_of_all(state)
    state.rewind(back_to)
    state.rewind(back_to)  # nothing more to do
    expected = [[i for i in rows if i < back_to] for rows in before]
    assert rows_of_all(state) == expected
    attention = received_attention(state.layers[0])
    assert not attention.received[back_to:].any() and attention.received[:back_to].all()
    assert np.isfinite(lm.model(OTHER[:3], state)).all()
    assert all(rows[-1] == back_to + 2 for rows in rows_of_all(state))


def test_speculation_runs_on_top():
    _, lm = models()
    both = apply(lm, {"prompt_lookup": {}})
    prompt = np.tile(IDS[:4], 4)  # so that the lookup drafts tokens, some of which are rejected
    with counting(both) as counts:
        text = both.generate(prompt, 28)
    assert counts.events["tokens pruned"] > 0 and text == both.generate(prompt, 28)


# Batches -----------------------------------------------------------------------------------------


def test_batch_without_cache_runs_its_rows_one_after_another_and_with_one_is_refused():
    _, lm = models()
    found = lm.logits(np.stack([IDS, OTHER]))
    for row, ids in zip(found, (IDS, OTHER)):
        assert_same(row, lm.logits(ids))
    with pytest.raises(MinitxError, match=r"token_prune .* batch of shape \(2, 40\).* lm.generate"):
        lm.model(np.stack([IDS, OTHER]), lm.model.new_state())


# Cost --------------------------------------------------------------------------------------------


@family
@pytest.mark.parametrize("choose", ["attention", "random"])
def test_cost_is_that_of_the_card(family, choose):
    """A prompt of 40 tokens, which runs n_l of them in layer l, and one more token."""
    dense, lm = models(family, choose=choose)
    state, c = lm.model.new_state(), dense.model.config
    scored = 1 if choose == "attention" else 0  # multiply-adds to add up one weight
    for ids, n in ((IDS, 40), ([5], 41)):
        with counting(dense) as expected:
            dense.model(ids, dense.model.new_state())
        with counting(lm) as counts:
            lm.model(ids, state)
        of_dense = expected.total("model.stack.blocks.0").multiply_adds
        T = len(ids)
        of_dense -= 2 * c.head_width * c.heads * T * T  # what is left are its dense products
        for index, share in enumerate((1.0, 0.8, 0.6, 0.4)):
            n_l = int(np.ceil(share * n - 1e-9))
            ran = n_l if n == 40 else 1
            found = counts.total(f"model.stack.inner.blocks.{index}").multiply_adds
            attention = c.heads * ran * n_l * (2 * c.head_width + scored)
            assert found == of_dense * ran // T + attention, f"layer {index}, {n} tokens"


@pytest.mark.parametrize("choose", ["attention", "random"])
def test_cache_holds_the_share_of_each_layer(choose):
    _, lm = models(choose=choose)
    state = lm.model.new_state()
    in_chunks(lm, IDS, (12, *[1] * 28), state)
    limits = [int(np.ceil(share * 40 - 1e-9)) for share in (1.0, 0.8, 0.6, 0.4)]
    for layer, most in zip(state.layers, limits):
        assert most - 3 <= layer.count <= most + 1, (layer.index, layer.count, most)
    rows = sum(layer.count for layer in state.layers)
    c = lm.model.config
    assert state.cache_bytes == rows * 2 * c.kv_heads * c.head_width * 8


# Refusals, the tree ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=0.0), "token_prune: keep must be a number, above 0 .*; got 0.0"),
        (dict(keep=1.2), "token_prune: keep must be .*; got 1.2"),
        (dict(first=0), "token_prune: first must be an integer, at least 1, or None; got 0"),
        (dict(schedule="cosine"), "token_prune: schedule must be one of linear, constant; got"),
        (dict(choose="best"), "token_prune: choose must be one of attention, random; got 'best'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        models(**options)


@pytest.mark.parametrize("options", [dict(first=4), dict(keep=0.999)], ids=str)
def test_setting_that_prunes_nothing_is_said(options):
    with pytest.warns(MinitxWarning, match="token_prune.* prune none of at most 48 tokens"):
        _, lm = models(**options)
    assert type(lm.model.stack) is Stack


@pytest.mark.parametrize(
    "other", ["early_exit", "lazy_tokens", "elsa", "sink_window", "heavy_hitters"]
)
def test_techniques_that_need_what_it_changes_are_refused_by_name(other):
    lm, _ = models()
    with pytest.raises(MinitxError) as caught:
        apply(lm, {"token_prune": {"keep": 0.4}, other: find(other).demo})
    assert other in str(caught.value) and "token_prune" in str(caught.value)


def test_layer_whose_attention_is_dropped_adds_nothing_and_prunes_all_the_same():
    lm, _ = models()
    drop = {"layer_skip": {"unit": "attention", "drop": "0,2"}}
    both = apply(lm, {"token_prune": {"first": 1, "keep": 0.4}} | drop)
    state = both.model.new_state()
    logits = in_chunks(both, IDS, STEPS, state)
    assert np.isfinite(logits).all()
    assert [layer.count for layer in state.layers][0::2] == [0, 0]
    assert state.layers[3].count < 25


def test_the_tree_shows_the_shares_and_what_adds_up():
    _, lm = models()
    assert "PruningStack(shares=1,0.8,0.6,0.4, correct=True)" in repr(lm.model)
    assert sum(type(node) is WeightsAdded for _, node in walk(lm.model)) == L
    _, lm = models(choose="random")
    assert not any(type(node) is WeightsAdded for _, node in walk(lm.model))


# On the shipped weights --------------------------------------------------------------------------


def divergence(dense, lm, prompts):
    """Mean KL(dense || lm), in nats, of the token after each prompt, read in one step."""
    found = []
    for ids in prompts:
        z = [m.model.next_logits(ids, new_state(m.model, ids)).astype(float) for m in (dense, lm)]
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in z)
        found.append((p * np.log(p / q)).sum())
    return float(np.mean(found))


def test_stories_next_token_is_closer_to_dense_with_the_correction():
    """After 40 and 70 % of a story. (Random scores: see the notes.)"""
    dense = minitx.load("stories")
    read = encode(dense.tokenizer, held_out(dense, 12))
    prompts = [s.ids[: int(share * len(s.ids))] for s in read for share in (0.4, 0.7)]
    kl = {}
    for name, options in (("corrected", {}), ("plain", {"correct": False})):
        lm = apply(dense, {"token_prune": {"keep": 0.6} | options})
        kl[name] = divergence(dense, lm, prompts)
    assert 1e-6 < kl["corrected"] < 5e-4, kl
    assert 4e-3 < kl["plain"] < 2e-2, kl
