"""head_cascade: which heads are alive in which layer, what runs, and what that costs on stories."""

import numpy as np
import pytest
from literal_head_cascade import Cascade
from same import assert_same
from tiny import FAMILIES, TOKENIZER, check_close, in_chunks, tiny_lm, tiny_model

import minitx
from minitx import ops
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.lm import LM
from minitx.skip.head_cascade import (
    AttendHeads,
    BatchScores,
    HeadScores,
    head_scores,
    pruning_ratios,
)
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses

IDS = np.random.default_rng(5).integers(0, 258, 40)
STEPS = (12, *[1] * 28)
HEADS = {"llama": (4, 2), "gpt2": (4, 4), "gpt_neox": (6, 2)}  # query heads, key/value heads
SMALL = {"unpruned": 0.25, "start": 0.25, "end": 0.5}


def make(family, dtype=np.float64, layers=4):
    heads, kv_heads = HEADS[family]
    sizes = dict(heads=heads, kv_heads=kv_heads, layers=layers)
    return LM(tiny_model(family, dtype=dtype, **sizes), TOKENIZER)


def cascade(lm, **options):
    return apply(lm, {"head_cascade": SMALL | options})


# Which heads are alive ---------------------------------------------------------------------------


def test_worked_example_by_hand():
    """Four heads, one token. |E| sums to 5 1 4 2 in layer 0, of which floor(4 (1 - 0.25)) = 3 stay:
    all but head 1. In layer 1 heads 0, 2 and 3 add 0 3 1, so s = 5 1 7 3, and
    floor(3 (1 - 0.5)) = 1 stays: head 2. Head 1 does not return, nor would it with s = 100."""
    scores = HeadScores(8, 4)
    scores.add(np.array([[5.0], [1], [4], [2]]), np.array([0]))
    scores.prune(0.25)
    assert scores.alive.tolist() == [0, 2, 3]
    scores.add(np.array([[0.0], [3], [1]]), np.array([0]))
    scores.total[1] = 100
    scores.prune(0.5)
    assert scores.total.tolist() == [5, 100, 7, 3] and scores.alive.tolist() == [2]
    scores.begin(1)
    assert scores.alive.tolist() == [0, 1, 2, 3], "a new step begins with all heads"
    assert scores.total.tolist() == [5, 1, 7, 3], "and with the sums of the steps before"


def test_ties_go_to_the_lower_index_and_one_head_stays():
    scores = HeadScores(8, 3)
    scores.add(np.ones((3, 1)), np.array([0]))
    scores.prune(0.34)
    assert scores.alive.tolist() == [0]
    scores.prune(0.99)
    assert scores.alive.tolist() == [0]


def test_ratios_rise_linearly_from_the_first_pruning_layer_to_the_last_but_one():
    assert pruning_ratios(8, 4, 0.1, 0.4) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0])
    assert pruning_ratios(3, 1, 0.5, 0.5) == [0.5, 0.5, 0]
    assert pruning_ratios(2, 1, 0.3, 0.9) == [0.3, 0]
    assert pruning_ratios(2, 2, 0.3, 0.9) == pruning_ratios(2, 9, 0.3, 0.9) == [0, 0]


@pytest.mark.parametrize("sizes", [(12, *[1] * 4), (5, 4, 7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_literal_version(family, sizes):
    dense = make(family)
    lm = cascade(dense)
    literal = Cascade(dense.model, pruning_ratios(4, 1, 0.25, 0.5))
    state, at = lm.model.new_state(), 0
    for size in sizes:
        step = IDS[at : at + size]
        at += size
        found, expected = lm.model(step, state), literal.step(step.tolist())
        check_close(found, expected, 1e-11, f"{family}, step of {size} up to {at}")
        totals = head_scores(state.layers[0], literal.H, ())[()].by_token[:at].sum(0)
        assert_same(totals, literal.s, "accumulated |E|", tolerance=1e-7)
    assert [len(heads) for heads in literal.alive_in] != [literal.H] * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_alive_heads_are_nested_over_depth(family, monkeypatch):
    seen = []
    prune = HeadScores.prune

    def watched(self, ratio, random=None):
        before = set(self.alive.tolist())
        prune(self, ratio, random)
        seen.append((before, set(self.alive.tolist())))

    monkeypatch.setattr(HeadScores, "prune", watched)
    in_chunks(cascade(make(family)), IDS, STEPS)
    assert len(seen) == 3 * len(STEPS)
    assert all(after <= before for before, after in seen), "a head has returned"
    for one, other in zip(seen, seen[1:]):
        assert other[0] == one[1] or len(other[0]) == HEADS[family][0]
    assert any(len(after) > 1 for _, after in seen[0::3])


# What runs ---------------------------------------------------------------------------------------


def test_attention_of_some_heads_is_that_of_all_heads_for_these():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((n, 7, 4)) for n in (6, 3, 3))
    whole = ops.attention(q, k, v, 0.5)
    for heads in ([0, 1, 2, 3, 4, 5], [0, 3, 4], [5], [1, 2, 3, 5]):
        found = AttendHeads(0.5)(q[heads], k, v, None, np.array(heads) // 2)
        assert_same(found, whole[heads], f"heads {heads}", atol=1e-14)


@pytest.mark.parametrize("family", FAMILIES)
def test_savings_equal_the_formula_on_the_card(family):
    """One token after others: the skipped heads' columns of W_q, attention and rows of W_o."""
    dense = make(family, np.float32)
    lm, c, S = cascade(dense), dense.model.config, 20
    work, weights = [], []
    for model in (dense, lm):
        state = model.model.new_state()
        model.model(IDS[: S - 1], state)
        with counting(model) as counts:
            model.model(IDS[S - 1 : S], state)
        work.append(counts.total().multiply_adds)
        weights.append(counts.total().weight_bytes)
    skipped = counts.events["heads skipped"]
    D, d, H, L = c.width, c.head_width, c.heads, c.layers
    ran = L * H - skipped
    # p = 0.25 0.375 0.5: 4 heads, then 3, floor(1.875) = 1 and 1; or 6, then 4, 2 and 1
    assert skipped == {4: 1 + 3 + 3, 6: 2 + 4 + 5}[H]
    assert work[0] - work[1] == skipped * (2 * D * d + 2 * d * S) - ran * d
    assert weights[0] - weights[1] == skipped * 2 * D * d * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_and_values_of_all_heads_are_cached(family):
    dense, lm = make(family), cascade(make(family))
    states = [model.model.new_state() for model in (dense, lm)]
    for model, state in zip((dense, lm), states):
        in_chunks(model, IDS, STEPS, state)
    assert states[0].cache_bytes == states[1].cache_bytes
    first = [state.layers[0].keys[..., :40, :] for state in states]
    np.testing.assert_allclose(*first, atol=1e-12, err_msg="layer 0 sees the dense input")


def test_key_heads_without_a_query_head_are_not_read():
    dense = make("llama", np.float32)  # 2 key heads
    lm = cascade(dense, start=0.75, end=0.75)  # one head from layer 1 on
    read = []
    for model in (dense, lm):
        state = model.model.new_state()
        model.model(IDS[:19], state)
        with counting(model) as counts:
            model.model(IDS[19:20], state)
        read.append(counts.total().cache_bytes)
    assert read[1] / read[0] == (1 + 3 / 2) / 4


# Steps -------------------------------------------------------------------------------------------


def test_sums_go_on_over_steps():
    """The second token is pruned by what the first has added, too."""
    scores = BatchScores((), 8, 2)
    one = scores.sequences[()]
    one.add(np.array([[5.0], [1]]), np.array([0]))
    one.begin(1)
    one.add(np.array([[0.0], [3]]), np.array([1]))
    one.prune(0.5)
    assert one.alive.tolist() == [0], "5 + 0 is more than 1 + 3"
    scores.rewind(0)
    one.begin(0)
    one.add(np.array([[0.0], [3]]), np.array([0]))
    one.prune(0.5)
    assert one.alive.tolist() == [1], "what was undone still counts"


def test_a_step_depends_on_its_own_tokens_and_not_on_later_steps():
    """Within a step, a later token may change which heads the earlier ones lose."""
    lm = cascade(make("gpt2"), start=0.5, end=0.5)
    other = IDS.copy()
    other[12:] = (other[12:] * 5 + 1) % 258
    once, changed = (in_chunks(lm, ids, STEPS) for ids in (IDS, other))
    assert_same(once[:12], changed[:12])
    moved = []
    for last in range(12):
        ids = IDS[:12].copy()
        ids[-1] = last
        moved.append(abs(lm.logits(ids)[:11] - lm.logits(IDS[:12])[:11]).max())
    assert max(moved) > 1e-6, "no token changes the heads of its step"


@pytest.mark.parametrize("choose", ["output", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_their_rows(family, choose):
    lm = cascade(make(family), choose=choose)
    rows = np.stack([IDS[:20], IDS[20:], IDS[10:30]])
    found = lm.logits(rows)
    for row, logits in zip(rows, found):
        check_close(logits, lm.logits(row), 1e-12, "a row of a batch without cache")
    prompts = [IDS[:20].tolist(), IDS[3:7].tolist(), IDS[9:21].tolist()]
    assert lm.generate(prompts, 6) == [lm.generate(prompt, 6) for prompt in prompts]


def test_rewind_inside_a_step_forgets_what_its_tokens_added():
    lm = cascade(make("gpt_neox"))
    long, short = lm.model.new_state(), lm.model.new_state()
    for state in (long, short):
        lm.model(IDS[:10], state)
    lm.model(IDS[10:20], long)
    lm.model(IDS[10:20], short)
    long.rewind(14)
    by_token = head_scores(long.layers[0], 6, ())[()].by_token
    assert by_token[13].all() and not by_token[14:].any(), "what undone tokens added still counts"
    again = lm.model(IDS[14:20], long)
    long.rewind(14)
    assert_same(lm.model(IDS[14:20], long), again)


def test_early_exit_runs_on_top():
    exits = {"measure": "random", "threshold": 0.5, "first": 1, "warm_up": 0}
    lm = apply(make("gpt2"), {"head_cascade": SMALL, "early_exit": exits})
    with counting(lm) as counts:
        once = in_chunks(lm, IDS, STEPS)
    assert counts.events["heads skipped"] > 0 and np.isfinite(once).all()
    state = lm.model.new_state()
    in_chunks(lm, IDS[:30], STEPS[:19], state)
    lm.model(IDS[:5], state)
    state.rewind(30)
    assert_same(in_chunks(lm, IDS[30:], (1,) * 10, state), once[30:])


# Options and models ------------------------------------------------------------------------------


def test_random_heads_are_drawn_anew_in_each_step():
    lm = cascade(make("gpt2"), choose="random")
    same, other = (
        cascade(make("gpt2"), choose="random"),
        cascade(make("gpt2"), choose="random", seed=1),
    )
    found = in_chunks(lm, IDS, STEPS)
    assert_same(in_chunks(same, IDS, STEPS), found)
    assert abs(in_chunks(other, IDS, STEPS) - found).max() > 1e-6


def test_all_layers_unpruned_or_ratios_of_zero_leave_the_model_alone():
    lm = make("llama")
    for options in ({"unpruned": 1.0}, {"start": 0.0, "end": 0.0}):
        assert repr(cascade(lm, **options).model) == repr(lm.model)


def test_layers_with_different_numbers_of_heads_are_refused():
    wanted = {"head_prune": {"share": 0.25, "choose": "random"}, "head_cascade": SMALL}
    with pytest.raises(
        MinitxError, match="head_cascade .* has 1, 2 .head_prune|head_cascade .* 2, 1"
    ):
        apply(tiny_lm(), wanted)


@pytest.mark.parametrize(
    "other, options",
    [
        ("quantize", True), ("fuse_projections", True), ("predictive_attention", True),
        ("heavy_hitters", {"heavy": 4, "recent": 4}), ("sink_window", {"window": 8}),
        ("lazy_tokens", True),
    ],
)  # fmt: skip
def test_techniques_that_do_not_fit_are_refused_by_name(other, options):
    with pytest.raises(MinitxError, match="head_cascade") as caught:
        apply(tiny_lm(), {"head_cascade": SMALL, other: options})
    assert other in str(caught.value)


# On stories --------------------------------------------------------------------------------------


def test_on_stories_the_price_is_small_and_that_of_random_heads():
    """120 tokens of a story: the first 32 in one step, the others one by one. The card says that
    heads with large outputs are hardly better than random ones."""
    dense = minitx.load("stories")
    ids = encode(dense.tokenizer, held_out(dense, 1))[0].ids[:121]
    steps = (32, *[1] * (len(ids) - 33))

    def run(lm):
        with counting(lm) as counts:
            losses = token_losses(in_chunks(lm, np.array(ids[:-1]), steps), np.array(ids[1:]))
        return float(losses.mean()), counts

    before, dense_counts = run(dense)
    after, counts = run(apply(dense, {"head_cascade": True}))
    assert counts.events["heads skipped"] == (1 + 2 + 3 + 3) * (len(ids) - 1)
    assert counts.total().multiply_adds < 0.96 * dense_counts.total().multiply_adds
    random, same = run(apply(dense, {"head_cascade": {"choose": "random"}}))
    assert same.events == counts.events, "the baseline skips as much"
    assert -0.02 < after - before < 0.04, f"{after - before:+.3f} nats per token"
    assert abs(random - after) < 0.05, f"chance: {random - before:+.3f}"


def test_scores_belong_to_the_layer_state_and_not_to_the_part():
    layer = Layer(8).take(1)
    one, again = head_scores(layer, 3, ()), head_scores(layer, 3, ())
    assert one is again and head_scores(Layer(8).take(1), 3, ()) is not one
