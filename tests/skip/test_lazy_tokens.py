"""LazyLLM: examples by hand, the literal version, the laws of a technique that decides by the step,
what it costs, and figures on the shipped weights."""

from collections import Counter

import numpy as np
import pytest
from literal_lazy_tokens import LazyLLM
from same import assert_same
from tiny import FAMILIES, KINDS, TOKENIZER, error, in_chunks, tiny_model

import minitx
from minitx.decode import new_state
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Attend, Stack
from minitx.skip.lazy_tokens import (
    NEVER,
    AuxCache,
    LazyStack,
    ScoringAttend,
    last_row,
    pruning_layers,
)
from minitx.state import State
from minitx.technique import apply, decides, find, wrap
from minitx.tree import Part, part, walk

L = 4  # layers, of which all tokens run the first; tokens are pruned after layers 1, 2 and 3
CUTS = (1, 2, 3)
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
STEPS = [12] + [1] * 8 + [5] + [1] * 10 + [5]  # a prompt, tokens, and chunks of several

family = pytest.mark.parametrize("family", FAMILIES)
kind = pytest.mark.parametrize("family", KINDS)


def models(family="llama", dtype=np.float64, **options):
    """(dense, lazy): tokens may be pruned after any layer."""
    lm = LM(tiny_model(family, dtype=dtype, layers=L), TOKENIZER)
    return lm, apply(lm, {"lazy_tokens": {"first": 1} | options})


def steps_of(ids, sizes=STEPS):
    cuts = np.cumsum([0, *sizes])
    return [ids[a:b] for a, b in zip(cuts, cuts[1:])]


def positions_held(layer):
    """The positions of a layer's cache rows, in the order of the rows."""
    return np.arange(layer.count) if layer.row_positions is None else layer.row_positions


def waiting(layer, tokens_below):
    """Positions whose hidden states wait in front of a layer: those that the layer before holds."""
    return sorted(set(tokens_below) - set(positions_held(layer).tolist()))


# Examples by hand --------------------------------------------------------------------------------


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


def test_token_pruned_in_the_prompt_is_revived_by_a_later_step():
    """Two layers, keep = 0.5, scores by position 3, 1, 2, 0, 0.

    The prompt has 4 tokens: ceil(0.5 * 4) = 2 go on, the last (3) and the best other (0).
    One more token: of 5, ceil(2.5) = 3 go on: the last (4) and the best of 0..3, which are 0 and 2.
    Layer 2 has token 0 already, so it runs 2 (from its hidden state after layer 1) and 4; token 3
    has a row there, but is not seen in this step.
    """
    first, second = Notes([], []), Notes([], [])
    scores = np.array([[3, 1, 2, 0, 0], [0] * 5], np.float32)
    stack = LazyStack(Stack((first, second)), keep=0.5, cuts=(1,), random=scores)
    state = State(2, capacity=5)
    x = 10.0 * np.arange(5)[:, None]  # token i enters as 10 i
    found = []
    for a, b in ((0, 4), (4, 5)):
        state.take(b - a)
        found.append(stack(x[a:b], state).ravel().tolist())
        state.position = b
    assert first.ran == [[0, 1, 2, 3], [4]], "layer 1 runs every token once"
    assert second.ran == [[0, 3], [2, 4]], "layer 2 runs what was selected and it has not run yet"
    assert second.saw == [[0, 3], [0, 2, 4]], "layer 2 attends to what was selected in this step"
    # Tokens 1 and 2 were pruned after one layer, so they give what they were after it.
    assert found == [[2, 11, 21, 32], [42]]


def test_score_is_the_mean_over_heads_of_the_last_tokens_attention_weights():
    """d = 1, scale 1, one key head with keys 0, ln 2, ln 5 and two query heads, of which the last
    token has 1 and 0: the first weighs the keys 1 : 2 : 5, the second 1 : 1 : 1.

    means: (1/8 + 1/3) / 2 = 11/48, (2/8 + 1/3) / 2 = 14/48, (5/8 + 1/3) / 2 = 23/48
    """
    state = State(1, capacity=3)
    layer = state.layers[0].take(3)
    k = np.log([1.0, 2.0, 5.0]).reshape(1, 3, 1)
    layer.store(k, k)
    q = np.array([[9.0, -9, 1], [7, 5, 0]])[..., None]  # (H, T, d); only the last column counts
    attend = ScoringAttend(Attend(1.0))
    with counting(attend) as counts:
        found = attend(q, k, k, layer)
    assert_same(last_row(layer).weights, np.array([11, 14, 23]) / 48, tolerance=1e-7)
    assert_same(found, Attend(1.0)(q, k, k, layer), "attention itself is unchanged")
    # attention: 2 heads * 3 queries * 3 keys * (1 + 1); the scores: 2 heads * 3 keys * 1
    assert counts.total().multiply_adds == 36 + 6


@pytest.mark.parametrize(
    ("keep", "kept"),
    [(1.0, [0, 1, 2, 3, 4]), (0.8, [0, 1, 3, 4]), (0.7, [0, 1, 3, 4]), (0.6, [1, 3, 4])]
    + [(0.4, [1, 4]), (0.2, [4]), (0.01, [4])],
)
def test_selection_keeps_the_last_and_the_best_in_order(keep, kept):
    """Scores 2, 3, 1, 3, 0: the last stays although it is the worst; 0.7 * 5 is rounded up."""
    scores = np.array([[2, 3, 1, 3, 0]], np.float32)
    stack = LazyStack(Stack(()), keep, (), scores)
    found = stack.select(np.arange(5), State(1, 5).layers[0])
    assert found.tolist() == kept


def test_ties_go_to_the_lower_index():
    stack = LazyStack(Stack(()), 0.5, (), np.ones((1, 6), np.float32))
    found = stack.select(np.array([0, 2, 3, 5]), State(1, 6).layers[0])
    assert found.tolist() == [0, 5]


@pytest.mark.parametrize(
    ("layers", "every", "first", "cuts"),
    [(32, 0.3, 1, (9, 19, 28)), (8, 0.3, 1, (2, 4, 7)), (8, 0.3, 4, (4, 7)), (2, 0.3, 1, (1,))]
    + [(10, 0.1, 1, tuple(range(1, 10))), (8, 1.0, 1, ()), (1, 0.3, 1, ()), (8, 0.5, 5, ())],
)
def test_pruning_layers_follow_each_share_of_the_layers(layers, every, first, cuts):
    """Paper, Llama 2: layers 1-9, 10-19, 20-28 and 29-32 are the groups."""
    assert pruning_layers(layers, every, first) == cuts


# The literal version -----------------------------------------------------------------------------


@family
@pytest.mark.parametrize("keep", [0.3, 0.5, 0.9])
def test_every_step_equals_the_literal_version(family, keep):
    dense, lm = models(family, keep=keep)
    literal, state = LazyLLM(dense.model, keep, CUTS), lm.model.new_state()
    with counting(lm) as counts:
        for number, ids in enumerate(steps_of(IDS)):
            found = lm.model.next_logits(ids, state)
            assert_same(
                found, literal.step(ids), f"logits differ in step {number}", tolerance=1e-12
            )
            for index, layer in enumerate(state.layers):
                held = positions_held(layer)
                assert sorted(held) == sorted(literal.KV[index]), (
                    f"rows of layer {index} in step {number}"
                )
                if index in CUTS:
                    below = positions_held(state.layers[index - 1]).tolist()
                    assert waiting(layer, below) == sorted(literal.aux[index]), "aux differs"
    assert counts.events["tokens revived"] == literal.revived > 0
    assert max(literal.times_run.values()) == 1


@family
def test_cached_keys_are_those_of_the_literal_version(family):
    """Rotated by the tokens' original positions, whichever row they are stored in."""
    dense, lm = models(family, keep=0.5)
    literal, state = LazyLLM(dense.model, 0.5, CUTS), lm.model.new_state()
    for ids in steps_of(IDS):
        lm.model(ids, state)
        literal.step(ids)
    for index, layer in enumerate(state.layers):
        for row, i in enumerate(positions_held(layer)):
            for cached, expected in zip((layer.keys, layer.values), literal.KV[index][i]):
                assert_same(cached[:, row], expected, f"{index}, {i}", atol=1e-12)


# Keeping everything ------------------------------------------------------------------------------

ALL = [dict(keep=1.0), dict(keep=0.999), dict(keep=0.999, choose="random")]  # ceil(0.999 n) = n


@pytest.mark.filterwarnings("ignore:lazy_tokens.*prunes none")
@kind
@pytest.mark.parametrize("sizes", [(40,), (11, 1, 28), (1,) * 40], ids=["one", "chunks", "tokens"])
@pytest.mark.parametrize("options", ALL, ids=str)
def test_keeping_every_token_is_dense(family, sizes, options):
    dense, lm = models(family, **options)
    assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes), tolerance=1e-12)
    assert_same(lm.logits(IDS), dense.logits(IDS), tolerance=1e-12)


@kind
def test_keep_1_is_dense_bit_for_bit(family):
    dense, lm = models(family, np.float32, keep=1.0)
    for sizes in ((40,), STEPS):
        assert_same(in_chunks(lm, IDS, sizes), in_chunks(dense, IDS, sizes))
    with counting(dense) as expected:
        in_chunks(dense, IDS, STEPS)
    with counting(lm) as counts:
        in_chunks(lm, IDS, STEPS)
    assert counts.total() == expected.total(), "keep=1 costs what dense costs"


# Steps -------------------------------------------------------------------------------------------


@kind
@pytest.mark.parametrize("choose", ["attention", "random"])
def test_the_same_steps_give_the_same_result(family, choose):
    _, lm = models(family, keep=0.5, choose=choose)
    assert decides(lm.model) == "step"
    assert_same(in_chunks(lm, IDS, STEPS), in_chunks(lm, IDS, STEPS))


@kind
def test_nothing_before_a_changed_token_moves(family):
    """In one step, with a selection that does not depend on the tokens. (With attention the last
    token selects for all, so a change of any token may change which others go on: by design.)"""
    _, lm = models(family, keep=0.5, choose="random")
    changed = IDS.copy()
    changed[25] = (changed[25] + 1) % 258
    before, after = lm.logits(IDS), lm.logits(changed)
    assert_same(after[:25], before[:25], atol=1e-12)
    assert error(after[25:], before[25:]) > 1e-3


def test_a_pass_without_memory_equals_the_same_step_with_memory():
    for options in (dict(keep=0.5), dict(keep=0.3), dict(keep=0.5, choose="random")):
        for name in KINDS:
            _, lm = models(name, **options)
            whole = lm.model(IDS, lm.model.new_state())
            assert_same(lm.logits(IDS), whole, atol=1e-12 * abs(whole).max())


@kind
@pytest.mark.parametrize("back_to", [0, 7, 20, 27, 37])
def test_rewind_and_replay_repeats_every_step_bit_for_bit(family, back_to):
    """Also what later steps revived is pruned again: a forgotten token leaves no trace."""
    _, lm = models(family, keep=0.5)
    state = lm.model.new_state()
    sizes = [7, 13, *[1] * 20] if back_to in (0, 7, 20) else [27, *[1] * 13]
    once, held = [], {0: [[]] * L}
    with counting(lm) as counts:
        for ids in steps_of(IDS, sizes):
            once.append(lm.model(ids, state))
            held[state.position] = [positions_held(layer).tolist() for layer in state.layers]
    assert counts.events["tokens revived"] > 0
    lm.model(OTHER[:8], state)  # to be forgotten
    state.rewind(40)
    state.rewind(back_to)
    found = [sorted(positions_held(layer)) for layer in state.layers]
    assert found == [sorted(rows) for rows in held[back_to]], "rows after the rewind"
    done = int(np.searchsorted(np.cumsum(sizes), back_to, "right"))
    for number, ids in list(enumerate(steps_of(IDS, sizes)))[done:]:
        assert_same(lm.model(ids, state), once[number], f"step {number}")


@pytest.mark.parametrize("back_to", [1, 13, 19])
def test_rewind_into_a_step_forgets_only_the_later_tokens(back_to):
    _, lm = models(keep=0.5)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    held = [positions_held(layer) for layer in state.layers]
    state.rewind(back_to)
    for before, layer in zip(held, state.layers):
        assert positions_held(layer).tolist() == before[before < back_to].tolist()
    lm.model(OTHER[back_to : back_to + 1], state)
    for layer in state.layers:
        assert positions_held(layer)[-1] == back_to, "the new token has a row in every layer"
        assert layer.visible is None, "after a step nothing is hidden"


def test_fork_goes_on_by_itself():
    _, lm = models(keep=0.5)
    state = lm.model.new_state()
    for ids in steps_of(IDS)[:6]:
        lm.model(ids, state)
    fork, earlier = state.fork(), state.fork(14)
    rest = steps_of(IDS)[6:]
    for _ in range(2):  # what runs in between must not be seen
        lm.model(OTHER[:3], earlier)
    expected = [lm.model(ids, state) for ids in rest]
    for ids, logits in zip(rest, expected):
        assert_same(lm.model(ids, fork), logits)
    for layer in fork.layers:
        for kept in layer.memory.kept.values():
            if isinstance(kept, AuxCache):
                assert kept.layers[0] is layer, "a fork's aux cache belongs to its own layers"


def test_interleaved_sequences_do_not_disturb_each_other():
    _, lm = models(keep=0.5)
    alone = [in_chunks(lm, ids, STEPS) for ids in (IDS, OTHER)]
    states, found = [lm.model.new_state(), lm.model.new_state()], [[], []]
    for pair in zip(steps_of(IDS), steps_of(OTHER)):
        for which in (0, 1):
            found[which].append(lm.model(pair[which], states[which]))
    for which in (0, 1):
        assert_same(np.concatenate(found[which]), alone[which])


@family
def test_ragged_batch_rows_equal_the_rows_alone(family):
    _, lm = models(family, keep=0.5)
    prompts = [IDS[:12].tolist(), OTHER[:5].tolist(), IDS[20:21].tolist()]
    batch = lm.generate(prompts, 20)
    assert batch == [lm.generate(prompt, 20) for prompt in prompts]


@kind
def test_batch_without_memory_runs_its_rows_one_after_another(family):
    _, lm = models(family, keep=0.5)
    found = lm.logits(np.stack([IDS, OTHER]))
    for row, ids in zip(found, (IDS, OTHER)):
        assert_same(row, lm.logits(ids), atol=1e-12 * abs(found).max())
    start = np.array([0, 9])
    padded = np.stack([IDS, np.concatenate([np.zeros(9, int), OTHER[:31]])])
    found = lm.model(padded, lm.model.new_state(start, remember=False))
    assert_same(found[1, 9:], lm.logits(OTHER[:31]), atol=1e-12 * abs(found).max())


def test_everything_stays_float32():
    _, lm = models(dtype=np.float32, keep=0.5)
    state = lm.model.new_state()
    for ids in steps_of(IDS):
        assert lm.model(ids, state).dtype == np.float32
    for layer in state.layers:
        for kept in layer.memory.kept.values():
            assert not isinstance(kept, AuxCache) or kept.rows.dtype == np.float32


# Cost --------------------------------------------------------------------------------------------


@part
class Counted(Part):
    """A block that counts how often it runs each token."""

    inner: Part
    times: Counter

    def __call__(self, x, layer):
        assert len(x) == len(layer.tokens)
        self.times.update(layer.tokens.array.tolist())
        return self.inner(x, layer)


@family
@pytest.mark.parametrize("choose", ["attention", "random"])
@pytest.mark.parametrize("sizes", [STEPS, (40,), (1,) * 40], ids=["steps", "one", "tokens"])
def test_each_token_is_run_at_most_once_in_a_layer(family, choose, sizes):
    _, lm = models(family, keep=0.5, choose=choose)
    times = [Counter() for _ in range(L)]
    counted = wrap(lm, "block", lambda block, index: Counted(block, times[index]))
    state = counted.model.new_state()
    in_chunks(counted, IDS, sizes, state)
    for index, layer in enumerate(state.layers):
        assert set(times[index].values()) == {1}, f"layer {index} ran a token twice"
        assert sorted(times[index]) == sorted(positions_held(layer)), (
            "a row for each token that was run"
        )
    assert [len(t) for t in times] == sorted([len(t) for t in times], reverse=True)
    assert len(times[0]) == 40, "the first group runs every token"


def test_nobody_waits_in_front_of_a_layer_that_holds_its_keys_and_values():
    _, lm = models(keep=0.3)
    state = lm.model.new_state()
    for ids in steps_of(IDS):
        lm.model(ids, state)
        for layer in state.layers:
            if AuxCache in layer.memory.kept:
                stored = layer.memory.kept[AuxCache].stored
                assert sorted(positions_held(layer)) == np.flatnonzero(stored < NEVER).tolist()


def predicted(c, n, keep, cuts):
    """Multiply-adds of a prompt of n <= 64 tokens and the logits after it: the card's ``Saves``."""
    D, H, K, d, F = c.width, c.heads, c.kv_heads, c.head_width, c.hidden
    ffn = 3 if c.family == "llama" else 2  # matrices: with a gate or without
    total, n_l = 0, n
    for index in range(c.layers):
        if index in cuts:
            n_l = int(np.ceil(keep * n_l - 1e-9))
        total += n_l * (D * (H + 2 * K) * d + H * d * D + ffn * D * F)  # the products
        total += n_l * n_l * 2 * H * d  # attention
        total += H * n_l * d if index + 1 in cuts and keep < 1 else 0  # the scores
    return total + D * c.vocab_size


@family
@pytest.mark.parametrize("keep", [1.0, 0.7, 0.45, 0.1])
@pytest.mark.parametrize("n", [1, 5, 33])
def test_counted_cost_of_a_prompt_is_the_predicted_one(family, keep, n):
    _, lm = models(family, keep=keep)
    with counting(lm) as counts:
        lm.model.next_logits(IDS[:n], lm.model.new_state())
    assert counts.total().multiply_adds == predicted(lm.model.config, n, keep, CUTS)


@family
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
def test_products_never_cost_more_than_dense(family, keep):
    """Over a whole generation: late or not, no token is run twice. (The attention of a late token
    may cost more, since its row costs all visible keys, masked or not.)"""
    dense, lm = models(family, keep=keep)
    found = []
    for model in (dense, lm):
        with counting(model) as counts:
            in_chunks(model, IDS, STEPS)
        products = [e for path, e in counts.entries.items() if "attend" not in path]
        found.append(sum(e.multiply_adds for e in products))
    assert found[1] <= found[0] and (keep > 0.5 or found[1] < found[0])


def test_events_count_pruned_and_revived_tokens():
    """12 tokens: 6 go on, then 3, then 2: pruned are 6 + 3 + 1. Nobody can be revived yet."""
    _, lm = models(keep=0.5)
    state = lm.model.new_state()
    with counting(lm) as counts:
        lm.model(IDS[:12], state)
    assert counts.events == {"tokens pruned": 10, "tokens revived": 0}
    assert [layer.count for layer in state.layers] == [12, 6, 3, 2]
    with counting(lm) as counts:
        for t in range(12, 30):
            lm.model(IDS[t : t + 1], state)
    # rows of the deepest layers: the two it had, one for each new token, and the revived ones
    revived = sum(layer.count for layer in state.layers[1:]) - (6 + 3 + 2) - 3 * 18
    assert 0 < counts.events["tokens revived"] <= revived


# Refusals, the tree ------------------------------------------------------------------------------


def test_a_batch_with_a_cache_is_refused():
    _, lm = models(keep=0.5)
    with pytest.raises(MinitxError, match=r"lazy_tokens .* batch of shape \(2, 40\).* lm.generate"):
        lm.model(np.stack([IDS, OTHER]), lm.model.new_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(keep=0.0), "lazy_tokens: keep must be a number, above 0 .*; got 0.0"),
        (dict(keep=1.2), "lazy_tokens: keep must be .*; got 1.2"),
        (dict(keep=float("nan")), "lazy_tokens: keep must be .*; got nan"),
        (dict(every=0.0), "lazy_tokens: every must be a number, above 0 .*; got 0.0"),
        (dict(first=0), "lazy_tokens: first must be an integer, at least 1, or None; got 0"),
        (dict(seed=-1), "lazy_tokens: seed must be an integer, at least 0; got -1"),
        (dict(choose="best"), "lazy_tokens: choose must be one of attention, random; got 'best'"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("other", "choose"),
    [
        ("early_exit", "attention"),
        ("elsa", "attention"),
        ("dota", "attention"),
        ("dota", "random"),
        ("sink_window", "attention"),
        ("heavy_hitters", "random"),  # which evict rows behind its back
    ],
)
def test_techniques_that_need_what_it_changes_are_refused_by_name(other, choose):
    """Its place, softmax attention, or (dota, also with random) a row for every token."""
    lm, _ = models()
    with pytest.raises(MinitxError) as caught:
        apply(lm, {"lazy_tokens": dict(choose=choose), other: find(other).demo})
    assert other in str(caught.value) and "lazy_tokens" in str(caught.value)


@family
def test_exact_techniques_do_not_change_which_tokens_are_pruned(family):
    """first_layer hands the stack rows of a table, wider than the hidden state."""
    dense, lm = models(family, keep=0.5)
    both = apply(dense, {"lazy_tokens": dict(keep=0.5, first=1), "first_layer": True})
    assert_same(in_chunks(both, IDS, STEPS), in_chunks(lm, IDS, STEPS), tolerance=1e-11)
    batch = np.stack([IDS, OTHER])
    assert_same(both.logits(batch), lm.logits(batch), tolerance=1e-11)


def test_the_tree_shows_the_scoring_layers():
    _, lm = models(keep=0.5)
    scoring = [path for path, node in walk(lm.model) if type(node) is ScoringAttend]
    assert scoring == [f"stack.inner.blocks.{index}.attn.attend" for index in (0, 1, 2)]
    _, lm = models(keep=0.5, choose="random")
    assert not any(type(node) is ScoringAttend for _, node in walk(lm.model))


# On the shipped weights --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    lm = minitx.load("stories")
    return lm, encode(lm.tokenizer, held_out(lm, 16))


def test_stories_prompt_costs_what_the_card_says(stories):
    """Groups of 2, 2, 3 and 1 layers run 1, 0.7, 0.49 and 0.343 of the tokens."""
    dense, read = stories
    ids = sum((story.ids[:-1] for story in read), [])[:320]
    lm = apply(dense, {"lazy_tokens": {"preset": "paper"}})
    found = []
    for model in (dense, lm):
        state = new_state(model.model, ids)
        with counting(model) as counts:
            model.model.next_argmax(ids, state)
        found.append(counts.total().multiply_adds)
    assert [layer.count for layer in state.layers] == [320] * 2 + [224] * 2 + [157] * 3 + [110]
    assert 0.61 < found[1] / found[0] < 0.63
    # Forty tokens later, few of the pruned tokens have not been revived.
    ids = [dense.encode("Once")[-1]]
    for _ in range(40):
        ids = [lm.model.next_argmax(ids, state)]
    assert [layer.count for layer in state.layers][:2] == [360] * 2
    assert 0.95 < state.layers[-1].count / 360 <= 1


def divergence(dense, lm, prompts):
    """Mean KL(dense || lm), in nats, of the token after each prompt, read in one step."""
    found = []
    for ids in prompts:
        z = [m.model.next_logits(ids, new_state(m.model, ids)).astype(float) for m in (dense, lm)]
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() for row in z)
        found.append((p * np.log(p / q)).sum())
    return np.mean(found)


def test_stories_next_token_is_closer_to_dense_with_attention_than_with_random(stories):
    """After prompts of 40, 60 and 80 % of a story."""
    dense, read = stories
    prompts = [s.ids[: int(share * len(s.ids))] for s in read for share in (0.4, 0.6, 0.8)]
    kl = {}
    for choose in ("attention", "random"):
        lm = apply(dense, {"lazy_tokens": dict(keep=0.3, first=1, choose=choose)})
        kl[choose] = divergence(dense, lm, prompts)
    assert 0.31 < kl["attention"] < 0.42, kl
    assert 0.85 < kl["random"] < 1.08, kl
