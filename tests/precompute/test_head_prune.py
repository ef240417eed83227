"""head_prune: the importance of heads, which are removed, and what the smaller model computes."""

from dataclasses import replace

import literal_head_prune as literal
import numpy as np
import pytest
from same import assert_same
from test_prune_structure import kept_heads, make, parts
from tiny import FAMILIES, error, tiny_lm

import minitx
from minitx.calibration import calibration_ids
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.precomputed import Origin, read_precomputed, write_precomputed
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Attend, AttendUnequalGroups, Attention, Linear
from minitx.precompute.head_prune import (
    by_norm,
    contribution,
    gated,
    importance,
    keep_heads,
    lowest,
    prune_in_rounds,
    text_loss,
    without_heads,
)
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.state import Layer
from minitx.technique import apply, wrap

IDS = np.random.default_rng(3).integers(0, 258, 30)
TEXTS = [IDS[:12].tolist(), IDS[9:25].tolist(), IDS[20:].tolist()]


def prune(lm, **options):
    return apply(lm, {"head_prune": dict(stories=2) | options})


def all_alive(lm):
    return [np.ones(attn.heads, bool) for attn in parts(lm, Attention)]


# Importance --------------------------------------------------------------------------------------


def test_three_readings_by_hand():
    """What each token contributes to the derivative of its text's loss by a head's gate:

        head 0: text 1  +3 +1   text 2  -4        per text  |4| + |-4| = 8
                                                  per token  3 + 1 + 4 = 8   per batch |4 - 4| = 0
        head 1: text 1  +1 -1   text 2  +5        per text  |0| + |5|  = 5
                                                  per token  1 + 1 + 5 = 7   per batch |0 + 5| = 5

    The paper and the authors' code remove head 1. A sum over the batch lets head 0's texts cancel,
    and removes it."""
    heads = [[3, 1], [-4]], [[1, -1], [5]]
    for reading, scores in (
        (literal.per_text, (8, 5)), (literal.per_token, (8, 7)), (literal.per_batch, (0, 5))
    ):  # fmt: skip
        assert tuple(map(reading, heads)) == scores, reading.__doc__
        goes = lowest([np.array(scores)], [np.ones(2, bool)], 1)
        assert goes == [(0, int(np.argmin(scores)))]


@pytest.mark.parametrize("family", FAMILIES)
def test_importance_equals_finite_differences_of_the_literal_version(family):
    """Also with a head that is gone: its gate is 0."""
    lm = make(family)

    def loss(ids):
        return lambda gates: float(text_loss(gated(lm, [np.array(g) for g in gates]), ids))

    alive = all_alive(lm)
    for gone in ((), ((0, 1), (1, 2))):
        for layer, head in gone:
            alive[layer][head] = False
        gates = [heads.astype(float).tolist() for heads in alive]
        expected = literal.importance([loss(ids) for ids in TEXTS[:2]], gates)
        found = importance(lm, alive, TEXTS[:2])
        assert_same(found, expected, "mean |derivative by the gate|", tolerance=1e-5, atol=1e-9)


def test_texts_do_not_cancel():
    """The mean of absolute derivatives is more than the absolute value of their mean."""
    lm = make("llama")
    each = np.array([importance(lm, all_alive(lm), [ids]) for ids in TEXTS])
    whole = np.array(importance(lm, all_alive(lm), TEXTS))
    assert_same(whole, each.mean(0), "the mean over texts of |derivative|", tolerance=1e-7)


def test_gates_of_one_change_nothing_and_gates_of_zero_remove_a_head():
    lm = make("gpt2")
    alive = all_alive(lm)
    assert_same(gated(lm, alive).logits(IDS), lm.logits(IDS))
    alive[1][2] = False
    found = wrap(lm, "attn", lambda attn, i: keep_heads(attn, np.flatnonzero(alive[i])))
    off = error(found.logits(IDS), gated(lm, alive).logits(IDS))
    assert off < 1e-12, f"a sliced head is not a head with a gate of 0: {off:.0e}"


def test_norm_divides_by_the_length_of_a_layers_scores():
    assert_same(by_norm(np.array([3.0, 4.0])), [0.6, 0.8], tolerance=1e-7)
    assert by_norm(np.zeros(3)).tolist() == [0, 0, 0]


def test_contribution_is_what_a_head_adds_to_the_residual_stream():
    """The sum over tokens of |E_h W_h|^2; 0 for a head that is gone."""
    lm, alive = make("gpt_neox"), all_alive(make("gpt_neox"))
    alive[0][1] = False
    found = contribution(lm, alive, TEXTS)
    attn = parts(lm, Attention)[0]
    seen = watch_inputs(lm, Linear, TEXTS, Rows)[id(attn.out)].all  # (n, 6 * 8)
    for h in range(6):
        own = slice(8 * h, 8 * h + 8)
        expected = 0 if h == 1 else (seen[:, own] @ attn.out.w[own]) ** 2
        assert_same(found[0][h], np.sum(expected), f"head {h}", tolerance=1e-7)


# Which heads go ----------------------------------------------------------------------------------


def test_rounds_remove_the_lowest_first_and_leave_one_head_per_layer():
    """Layer 0 has scores 1 2 3, layer 1 has 4 9 8. Two a round: first 1 and 2; then 3 is the last
    of its layer and stays, so 4 and 8 go; then each layer has one head left."""
    scores = [np.array([1.0, 2, 3]), np.array([4.0, 9, 8])]
    alive = [np.ones(3, bool), np.ones(3, bool)]
    for count, expected in (
        (2, [[0, 0, 1], [1, 1, 1]]), (3, [[0, 0, 1], [0, 1, 1]]), (5, [[0, 0, 1], [0, 1, 0]])
    ):  # fmt: skip
        found = prune_in_rounds(lambda _: scores, alive, count, 0.34, True)
        assert np.array(found).astype(int).tolist() == expected, f"{count} heads"
        assert all(heads.all() for heads in alive), "the argument was changed"


def test_lowest_equals_the_literal_version():
    rng = np.random.default_rng(0)
    for _ in range(30):
        scores = rng.integers(0, 5, (3, 4))
        alive = rng.random((3, 4)) < 0.7
        alive[:, 0] = True
        expected = literal.lowest_first(scores.tolist(), alive.tolist(), 5)
        assert sorted(lowest(list(scores), list(alive), 5)) == sorted(expected), (scores, alive)


def test_scores_are_taken_again_before_each_round_unless_told_otherwise():
    for recompute, times in ((True, 3), (False, 1)):
        asked = []

        def scores(alive, asked=asked):
            asked.append([heads.copy() for heads in alive])
            return [np.arange(5.0)] * 2

        prune_in_rounds(scores, [np.ones(5, bool)] * 2, 5, 0.2, recompute)
        assert len(asked) == times, "two of ten heads go in each round"
        assert recompute is False or int(np.sum(asked[1])) == 8, "without those that are gone"


def test_random_heads_follow_the_seed():
    lm = make("llama")
    kept = [
        [kept_heads(*both)[0] for both in zip(parts(lm, Attention), parts(found, Attention))]
        for found in (prune(lm, share=0.5, choose="random", seed=s) for s in (0, 0, 1))
    ]
    assert kept[0] == kept[1] != kept[2]
    assert sum(map(len, kept[0])) == 6


# The smaller model -------------------------------------------------------------------------------


@pytest.mark.parametrize("choose", ["importance", "contribution", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_sliced_heads_equal_masked_heads(family, choose):
    """12 or 8 heads, of which half go; in groups of 2, 1 and 3, of which some get unequal."""
    lm = make(family)
    changed = prune(lm, share=0.5, choose=choose)
    gates = [np.zeros(attn.heads) for attn in parts(lm, Attention)]
    for gate, *both in zip(gates, parts(lm, Attention), parts(changed, Attention)):
        gate[kept_heads(*both)[0]] = 1
    assert sum(g.sum() for g in gates) == sum(map(len, gates)) / 2, "half of the heads are left"
    off = error(changed.logits(IDS), gated(lm, gates).logits(IDS))
    assert off < 1e-12, f"sliced heads are not heads with a gate of 0: {off:.0e}"
    assert error(changed.logits(IDS), lm.logits(IDS)) > 1e-3


def test_key_head_goes_with_its_last_query_head_only():
    """Query heads 0 1 | 2 3 | 4 5 share key heads 0, 1 and 2."""
    attn = parts(make("llama"), Attention)[0]
    for heads, kv, key_head in (
        ([0, 2, 3, 4, 5], [0, 1, 2], [0, 1, 1, 2, 2]), ([0, 1, 4, 5], [0, 2], None),
        ([0, 1, 5], [0, 2], [0, 0, 1]), ([3], [1], None), ([1, 2, 4], [0, 1, 2], None),
    ):  # fmt: skip
        found = keep_heads(attn, np.array(heads))
        assert kept_heads(attn, found) == [heads, kv]
        assert (found.heads, found.kv_heads) == (len(heads), len(kv))
        if key_head is None:
            assert type(found.attend) is Attend, "equal groups are plain attention"
        else:
            assert found.attend.key_head.tolist() == key_head


def test_unequal_groups_equal_the_literal_attention():
    rng = np.random.default_rng(1)
    attn = keep_heads(parts(make("llama"), Attention)[0], np.array([0, 2, 3]))
    q, k, v = (rng.standard_normal((n, 5, 8)) for n in (3, 2, 2))
    layer = Layer.once(5)
    layer.store(k, v)
    found = attn.attend(q, k, v, layer)
    expected = literal.attention(*(x.tolist() for x in (q, k, v)), 8**-0.5, [0, 1, 1])
    assert_same(found, expected, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_savings_equal_the_formula_on_the_card(family):
    lm = make(family, np.float32)
    changed = prune(lm, share=0.5, choose="random")
    c, S, before, after = lm.model.config, len(IDS), parts(lm, Attention), parts(changed, Attention)
    queries = sum(a.heads - b.heads for a, b in zip(before, after))
    key_heads = sum(a.kv_heads - b.kv_heads for a, b in zip(before, after))
    work, cache, size = [], [], []
    for model in (lm, changed):
        state = model.model.new_state()
        model.model(IDS[:-1], state)
        with counting(model) as counts:
            model.model(IDS[-1:], state)
        work.append(counts.total().multiply_adds)
        cache.append(state.bytes_per_token)
        size.append(sum(w.size for attn in parts(model, Attention) for w in matrices(attn)))
    D, d = c.width, c.head_width
    assert queries == c.layers * c.heads // 2
    assert work[0] - work[1] == queries * (2 * D * d + 2 * d * S) + key_heads * 2 * D * d
    assert size[0] - size[1] == (queries + key_heads) * 2 * D * d
    assert cache[0] - cache[1] == key_heads * 2 * d * 4


def matrices(attn):
    return [attn.qkv.q.w, attn.qkv.k.w, attn.qkv.v.w, attn.out.w]


def test_config_has_the_new_sizes_only_if_all_layers_agree(tmp_path):
    """One number cannot tell what layers of different sizes have: then it stays that of the model
    before pruning, and the result is not a model that transformers could load."""
    lm = tiny_lm()
    both = prune(lm, share=0.5)  # one of two heads in each of two layers
    assert (both.model.config.heads, both.model.config.kv_heads) == (1, 1)
    write_model(both.model, tmp_path / "both", "F32")
    assert_same(minitx.load(tmp_path / "both").logits(IDS), both.logits(IDS))
    for alive in ([[1, 0], [1, 1]], [[1, 1], [0, 1]]):
        one = without_heads(lm, [np.array(heads, bool) for heads in alive])
        assert [attn.heads for attn in parts(one, Attention)] == [sum(heads) for heads in alive]
        assert one.model.config == lm.model.config, f"{alive}: sizes of one layer as those of all"
    with pytest.raises(MinitxError, match="parts a technique has changed"):
        write_model(one.model, tmp_path / "one", "F32")


def test_layers_of_different_sizes_can_be_precomputed(tmp_path):
    lm = prune(make("llama", np.float32), share=0.4, choose="random")
    assert AttendUnequalGroups in {type(attn.attend) for attn in parts(lm, Attention)}
    write_precomputed(lm, tmp_path / "new", Origin("tiny", "--head-prune"), None)
    model, _ = read_precomputed(tmp_path / "new")
    assert_same(model(IDS), lm.logits(IDS))


def test_prune_structure_goes_first():
    lm = make("llama")
    wanted = {
        "head_prune": dict(share=0.25, stories=1),
        "prune_structure": dict(heads=0.34, stories=1),
    }
    found = apply(lm, wanted)
    assert sum(attn.heads for attn in parts(found, Attention)) == 6  # 12 - 4, then 2 of 8


@pytest.mark.parametrize(
    "other", ["absorb_products", "fuse_projections", "shrink", "heavy_hitters", "value_prune"]
)
def test_techniques_for_equal_groups_are_refused_by_name(other):
    lm = make("gpt_neox")
    wanted = {
        "head_prune": dict(share=0.4, choose="random"),
        other: dict(heavy=4, recent=4) if other == "heavy_hitters" else True,
    }
    if other == "absorb_products":
        wanted[other] = {"pairs": "ov"}
    with pytest.raises(MinitxError, match="head_prune") as caught:
        apply(lm, wanted)
    assert other in str(caught.value)


def test_elsa_learns_thresholds_for_layers_of_different_sizes():
    wanted = {"head_prune": {"share": 0.25, "stories": 1}, "elsa": {"stories": 1}}
    lm = apply(tiny_lm("gpt2"), wanted)
    assert sorted(attn.heads for attn in parts(lm, Attention)) == [1, 2]
    assert np.isfinite(lm.logits(IDS)).all()


def test_detectors_of_dota_are_for_all_heads():
    """A group of heads of one layer is gone: the configuration does not say so."""
    with pytest.raises(
        MinitxError, match="dota's detector of block 2 was trained for 4 query heads"
    ):
        lm = minitx.load("stories")
        lm = wrap(lm, "attn", lambda a, i: keep_heads(a, np.arange(2)) if i == 2 else a)
        apply(lm, {"dota": {"fit": "trained"}})


def test_models_without_a_tokenizer_can_be_pruned_at_random_only():
    lm = replace(make("llama"), tokenizer=None)
    with pytest.raises(MinitxError, match="head_prune learns from calibration .*choose=random"):
        prune(lm, share=0.5)
    assert prune(lm, share=0.0) is not None
    prune(lm, share=0.5, choose="random")


# On stories --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    lm = minitx.load("stories")
    texts = calibration_ids("test", lm, 4)
    return lm, texts, importance(lm, all_alive(lm), texts[:3])


def ranks(x):
    return np.argsort(np.argsort(np.ravel(x)))


def test_importance_ranks_heads_as_their_removal_does(stories):
    """One head of each layer, each removed by itself."""
    lm, texts, scores = stories
    some = [(layer, layer % 4) for layer in range(8)]
    losses = []
    for layer, head in some:
        gates = [np.ones(4, np.float32) for _ in range(8)]
        gates[layer][head] = 0
        losses.append(sum(float(text_loss(gated(lm, gates), ids)) for ids in texts[2:]))
    rank = np.corrcoef(ranks([scores[layer][h] for layer, h in some]), ranks(losses))[0, 1]
    assert 0.6 < rank < 0.99, f"rank correlation with true ablation is {rank:.2f}"


def test_importance_finds_better_heads_than_chance(stories):
    """9 of 32 heads go (share=0.3)."""
    lm, texts, scores = stories
    rng = np.random.default_rng(0)

    def loss(scores):
        alive = prune_in_rounds(lambda _: scores, all_alive(lm), 9, 0.1, False)
        found = gated(lm, [heads.astype(np.float32) for heads in alive])
        return sum(float(text_loss(found, ids)) for ids in texts[2:]) / 2

    dense = sum(float(text_loss(lm, ids)) for ids in texts[2:]) / 2
    best, random = loss(scores), [loss([rng.random(4) for _ in range(8)]) for _ in range(3)]
    assert -0.01 < best - dense < 0.02, f"{best - dense:+.3f} nats per token"
    assert best - dense < 0.1 * (min(random) - dense), f"random heads: {random}, dense: {dense}"
