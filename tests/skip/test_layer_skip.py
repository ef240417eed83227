"""Layer skipping: the criteria by hand, a literal version, zeroed weights, memory, counts, figures.

The contract tests (test_contract.py) run on models of two layers; here there are six.
"""

import itertools
from dataclasses import replace

import literal_layer_skip as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_model

import minitx
from minitx.calibration import calibration_ids
from minitx.checkpoints.precomputed import Origin, read_precomputed, write_precomputed
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Block, Stack
from minitx.precompute.first_layer import first_layer
from minitx.shared.least_loss import mean_loss
from minitx.skip.layer_skip import (
    CRITERIA,
    Dropped,
    Unit,
    angular_distance,
    block_influence,
    cosine,
    drop_units,
    layer_skip,
    lowest,
    similarity,
    units_of,
)
from minitx.technique import apply, wrap
from minitx.tree import Part, map_weights, nbytes, part

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
OTHER = (IDS * 7 + 3) % 258
TEXTS = [IDS[:17].tolist(), OTHER[:9].tolist(), IDS[20:33].tolist()]  # of different lengths
DROPS = [
    dict(drop="1,4"),
    dict(unit="attention", drop="0,3,5"),
    dict(unit="ffn", drop="0,2"),
    dict(unit="both", drop="attn1,ffn1,ffn2,attn5"),
]
family = pytest.mark.parametrize("family", FAMILIES)
each_drop = pytest.mark.parametrize("options", DROPS, ids=lambda o: "-".join(o.values()))


def tiny_lm(family="llama", dtype=np.float64, layers=L, seed=1):
    return LM(tiny_model(family, seed, dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, with units dropped), with six layers."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"layer_skip": options})


def dropped(lm) -> list[str]:
    """The names of the sub-layers that are dropped."""
    blocks = enumerate(lm.model.stack.blocks)
    slots = [(f"{slot}{i}", getattr(b, slot, None)) for i, b in blocks for slot in ("attn", "ffn")]
    return [name for name, node in slots if type(node) is Dropped]


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


@part
class Rows(Part):
    """An embedding with two tokens, (1, 0) and (0, 1)."""

    def __call__(self, ids, where):
        return np.eye(2)[ids]


@part
class Adds(Part):
    """A sub-layer that adds the same vector to every token."""

    vector: tuple

    def __call__(self, x, layer):
        return np.broadcast_to(np.array(self.vector, float), x.shape)


def by_hand():
    """Three layers: the first adds (0, 1), the second (1, 1), the third (-4, 0) by its FFN.

    token 0: (1, 0) -> (1, 1) -> (2, 2) -> (-2, 2)
    token 1: (0, 1) -> (0, 2) -> (1, 3) -> (-3, 3)
    """
    sublayers = [((0, 1), (0, 0)), ((1, 1), (0, 0)), ((0, 0), (-4, 0))]
    blocks = tuple(Block(Adds(attn), Adds(ffn)) for attn, ffn in sublayers)
    return LM(replace(tiny_model(), embed=Rows(), stack=Stack(blocks)))


def test_influence_and_angle_of_one_turn_are_those_of_the_paper():
    # (1, 0) and (1, 1): cos = 1 / sqrt(2), so BI = 1 - 0.707107; the angle is 45 of 180 degrees
    turn = cosine(np.array([[1.0, 0.0]]), np.array([[1.0, 1.0]]))
    assert 1 - turn[0] == pytest.approx(0.292893, abs=1e-6)
    assert np.arccos(turn[0]) / np.pi == pytest.approx(0.25)


def test_block_influence_by_hand():
    # token 0: 45 degrees, none, 90 degrees. That (1, 1) -> (2, 2) doubles it is not seen.
    assert_same(block_influence(by_hand(), [[0]]), [1 - 0.5**0.5, 0, 1], atol=1e-12)
    # token 1: none; (0, 2).(1, 3) = 6 over 2 sqrt(10); (1, 3).(-3, 3) = 6 over sqrt(10) sqrt(18)
    one = np.array([0, 1 - 3 / 10**0.5, 1 - 1 / 5**0.5])
    assert_same(block_influence(by_hand(), [[1]]), one, atol=1e-12)
    # over all tokens, not over texts: token 1 stands twice
    expected = ([1 - 0.5**0.5, 0, 1] + 2 * one) / 3
    assert_same(block_influence(by_hand(), [[0, 1], [1]]), expected, atol=1e-12)


def test_angular_distance_by_hand():
    lm = by_hand()
    for ids in ([0], [1, 0]):  # the last token alone counts
        assert_same(angular_distance(lm, [ids], 1), [0.25, 0, 0.5], atol=1e-7)
        assert_same(angular_distance(lm, [ids], 2), [0.25, 0.5], tolerance=1e-7)
        assert_same(angular_distance(lm, [ids], 3), [0.75], tolerance=1e-7)  # (1, 0) to (-2, 2)
    mean = angular_distance(lm, [[0], [1]], 3)  # (0, 1) to (-3, 3): 45 degrees
    assert_same(mean, [(0.75 + 0.25) / 2], tolerance=1e-7)


def test_similarity_by_hand():
    lm = by_hand()
    found = similarity(lm, units_of(lm, "both"), [[0]])
    #           attn0   ffn0  attn1 ffn1 attn2  ffn2: (2, 2) to (-2, 2)
    assert_same(found, [0.5**0.5, 1, 1, 1, 1, 0], atol=1e-12)


@pytest.mark.parametrize(
    ("choose", "unit", "count", "plan"),
    [
        ("influence", "layer", 1, ["layer1"]),
        ("influence", "layer", 2, ["layer1", "layer0"]),
        ("angular", "layer", 1, ["layer1"]),
        ("angular", "layer", 2, ["layer0", "layer1"]),
        ("similarity", "attention", 2, ["attn1", "attn2"]),  # a tie: the lower index first
        ("similarity", "ffn", 2, ["ffn0", "ffn1"]),
        ("similarity", "both", 5, ["ffn0", "attn1", "ffn1", "attn2", "attn0"]),
    ],
)
def test_plans_by_hand(choose, unit, count, plan):
    lm = by_hand()
    found = CRITERIA[choose](lm, units_of(lm, unit), count, [[0]])
    assert [str(u) for u in found] == plan


def test_ties_go_to_the_lower_index():
    units = [Unit("layer", i) for i in range(64)]
    scores = np.tile([1.0, 0.0], 32)
    assert [u.index for u in lowest(units, 5, scores)] == [1, 3, 5, 7, 9]


def test_cosine_of_parallel_vectors_is_at_most_1():
    rows = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    assert cosine(rows, 3 * rows).max() <= 1 and cosine(rows, -rows).min() >= -1
    exact = cosine(rows.astype(np.float64), rows[::-1].astype(np.float64))
    assert_same(cosine(rows, rows[::-1]), exact, "taken in float32")


# Against the literal version ---------------------------------------------------------------------


@family
@each_drop
def test_logits_equal_the_literal_version(family, options):
    dense, lm = models(family, **options)
    close(lm.logits(IDS), literal.run(dense.model, IDS, dropped(lm))[0], "logits differ")


@family
@pytest.mark.parametrize("seed", [1, 2])
def test_scores_equal_the_literal_version(family, seed):
    lm = tiny_lm(family, seed=seed)
    found = block_influence(lm, TEXTS)
    close(found, np.array(literal.influence(lm.model, TEXTS)), "influence differs")
    for n in (1, 2, 5, 6):
        found, expected = angular_distance(lm, TEXTS, n), literal.angular(lm.model, TEXTS, n)
        close(found, np.array(expected), f"angular distance over {n} layers differs")
    for unit in ("attention", "ffn", "both"):
        units = units_of(lm, unit)
        expected = literal.similarity(lm.model, TEXTS, map(str, units))
        close(similarity(lm, units, TEXTS), np.array(expected), f"similarity of {unit} differs")
    assert mean_loss(lm, TEXTS) == pytest.approx(literal.loss(lm.model, TEXTS), rel=1e-12)


@family
@pytest.mark.parametrize("unit", ["layer", "attention", "both"])
def test_greedy_plan_equals_the_literal_version(family, unit):
    lm = tiny_lm(family, layers=3)
    units = units_of(lm, unit)
    names = [[f"{slot}{u.index}" for slot in u.slots] for u in units]
    texts = [TEXTS[1], TEXTS[2][:6]]
    expected = literal.greedy(lm.model, texts, names, 2)
    found = CRITERIA["greedy"](lm, units, 2, texts)
    assert [units.index(u) for u in found] == expected


def test_no_plan_is_better_than_the_best_of_all():
    """15 random nets of six layers, three dropped, on text that each net generated itself."""
    losses: dict[str, list] = {"exhaustive": [], "greedy": [], "influence": [], "angular": []}
    for seed in range(15):
        lm = uneven_lm(seed)
        prompts = np.random.default_rng(seed).integers(0, 258, (4, 2)).tolist()
        texts = [p + n for p, n in zip(prompts, lm.generate(prompts, 16, temperature=1.0, seed=0))]
        units = units_of(lm, "layer")
        pairs = itertools.combinations(units, 3)
        losses["exhaustive"].append(min(mean_loss(drop_units(lm, pair), texts) for pair in pairs))
        for choose in ("greedy", "influence", "angular"):
            plan = CRITERIA[choose](lm, units, 3, texts)
            losses[choose].append(mean_loss(drop_units(lm, plan), texts))
    best = np.array(losses["exhaustive"])
    for choose in ("greedy", "influence", "angular"):
        assert (np.array(losses[choose]) >= best).all(), f"{choose} beats the exhaustive search"
    # not on every net, but on average: looking at the loss beats looking at angles
    means = {choose: np.mean(found) for choose, found in losses.items()}
    assert means["exhaustive"] < means["greedy"] < means["influence"]


def uneven_lm(seed):
    """A random model in which some layers add much more than others, at any depth."""
    lm = tiny_lm(dtype=np.float32, seed=seed)
    scale = np.exp(np.random.default_rng(seed).normal(0, 0.8, L)).tolist()

    def scaled(node, name, index):
        return replace(node, **{name: map_weights(getattr(node, name), lambda w: w * scale[index])})

    lm = wrap(lm, "attn", lambda node, index: scaled(node, "out", index))
    return wrap(lm, "ffn", lambda node, index: scaled(node, "down", index))


# What a dropped unit is --------------------------------------------------------------------------


@family
@each_drop
def test_leaving_out_equals_zeroed_output_matrices_bit_for_bit(family, options):
    """A sub-layer whose last matrix and bias are zero adds nothing."""
    dense, lm = models(family, np.float32, **options)
    zeroed = with_zeros(dense, dropped(lm))
    assert_same(lm.logits(IDS), zeroed.logits(IDS))
    assert (lm.logits(IDS) != dense.logits(IDS)).any(), "nothing was dropped"
    assert lm.generate(IDS[:5], 30) == zeroed.generate(IDS[:5], 30)


def with_zeros(lm, names):
    """The dense model with zeros in W_o or W_down of these sub-layers."""
    for slot, last in (("attn", "out"), ("ffn", "down")):

        def change(node, index, slot=slot, last=last):
            if f"{slot}{index}" not in names:
                return node
            return replace(node, **{last: map_weights(getattr(node, last), lambda w: w * 0)})

        lm = wrap(lm, slot, change)
    return lm


@family
def test_neutral_is_the_dense_model_itself(family):
    dense, lm = models(family, np.float32, count=0)
    assert_same(lm.logits(IDS), dense.logits(IDS))
    assert repr(lm) == repr(dense)


@family
def test_without_any_layer_a_token_is_all_that_is_read(family):
    _, lm = models(family, count=L, choose="random")
    m = lm.model
    expected = m.head(m.norm(m.embed(IDS, slice(0, 40))))
    assert_same(lm.logits(IDS), expected)


def test_the_tree_shows_what_runs_and_weights_are_gone():
    dense, lm = models(unit="both", drop="attn1,ffn5")
    assert dropped(lm) == ["attn1", "ffn5"]
    assert repr(lm).count("Dropped") == 2
    gone = nbytes(dense.model.stack.blocks[1].attn) + nbytes(dense.model.stack.blocks[5].ffn)
    rope = nbytes(dense.model.stack.blocks[1].attn.rope)  # shared with the other layers
    assert nbytes(dense) - nbytes(lm) == gone - rope


# Memory ------------------------------------------------------------------------------------------


@family
@each_drop
def test_one_pass_chunks_and_single_tokens_agree(family, options):
    _, lm = models(family, **options)
    whole = lm.logits(IDS)
    for sizes in ((7, 20, 13), (*(1,) * 16, 24), (3, 1, 1, 35)):
        close(in_chunks(lm, IDS, sizes), whole, f"decoding by {sizes} differs from prefill")


@family
@each_drop
def test_rewind_and_replay_gives_the_same_logits(family, options):
    _, lm = models(family, **options)
    begun, steps = lm.model.new_state(), (*(1,) * 20, 20)
    once = in_chunks(lm, IDS, steps, begun)
    for back_to in (0, 3, 20):
        fork, state = begun.fork(back_to), begun.fork()
        lm.model(OTHER[:5], state)
        state.rewind(back_to)
        for which, name in ((state, "rewound"), (fork, "forked")):
            again = in_chunks(lm, IDS[back_to:], steps[back_to:], which)
            message = f"a {name} state differs after {back_to}"
            assert_same(again, once[back_to:], message)


@each_drop
def test_two_interleaved_sequences_do_not_disturb_each_other(options):
    _, lm = models(**options)
    states, found = [lm.model.new_state(), lm.model.new_state()], ([], [])
    for t in range(40):
        for which, ids in enumerate((IDS, OTHER)):
            found[which].append(lm.model(ids[t : t + 1], states[which])[0])
    for which, ids in enumerate((IDS, OTHER)):
        assert_same(found[which], in_chunks(lm, ids, (1,) * 40))


@family
@each_drop
def test_a_ragged_batch_row_equals_the_row_alone(family, options):
    _, lm = models(family, **options)
    prompts = [IDS[:3].tolist(), OTHER[:9].tolist(), IDS[10:16].tolist()]
    assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]


@family
@each_drop
def test_dropped_attention_stores_no_cache_rows(family, options):
    dense, lm = models(family, **options)
    states = [model.new_state() for model in (dense.model, lm.model)]
    for model, state in zip((dense.model, lm.model), states):
        model(IDS[:9], state)
        model(IDS[9:10], state)
    without = [f"attn{i}" in dropped(lm) for i in range(L)]
    assert [layer.keys is None for layer in states[1].layers] == without
    assert [layer.count for layer in states[1].layers] == [0 if gone else 10 for gone in without]
    share = 1 - sum(without) / L
    assert states[1].bytes_per_token == states[0].bytes_per_token * share


# Counts ------------------------------------------------------------------------------------------


@family
@each_drop
def test_counted_cost_equals_the_formula_on_the_card(family, options):
    dense, lm = models(family, np.float32, **options)
    c = dense.model.config
    width, d, H, K = c.width, c.head_width, c.heads, c.kv_heads
    attention, ffn = (sum(name.startswith(s) for name in dropped(lm)) for s in ("attn", "ffn"))
    states = [model.new_state() for model in (dense.model, lm.model)]
    for S in (1, 2, 3, 12):
        step = IDS[states[0].position : S]
        if len(step) > 1:  # up to the last token, which is counted
            for model, state in zip((dense.model, lm.model), states):
                model(step[:-1], state)
        before, after = (
            counted(model, step[-1:], state) for model, state in zip((dense, lm), states)
        )
        saved = before.total().multiply_adds - after.total().multiply_adds
        per_attention = 2 * width * (H + K) * d + 2 * S * H * d
        per_ffn = (3 if family == "llama" else 2) * width * c.hidden
        assert saved == attention * per_attention + ffn * per_ffn, f"at {S} cached tokens"
        cache = before.total().cache_bytes - after.total().cache_bytes
        assert cache == attention * 2 * S * K * d * 4
    assert after.events == {"sub-layer runs skipped": attention + ffn}


def counted(lm, ids, state):
    with counting(lm) as counts:
        lm.model(ids, state)
    return counts


def test_the_event_counts_every_token_of_a_batch():
    _, lm = models(drop="1,4")
    with counting(lm) as counts:
        lm.logits(np.stack([IDS, OTHER]))
    assert counts.events == {"sub-layer runs skipped": 4 * 80}


# Choosing ----------------------------------------------------------------------------------------


def test_defaults_are_one_layer_by_influence_and_sublayers_by_similarity():
    dense, lm = models()
    texts = calibration_ids("layer_skip", dense, 16)
    expected = int(np.argmin(literal.influence(dense.model, [ids[:48] for ids in texts])))
    assert dropped(lm) == [f"attn{expected}", f"ffn{expected}"]
    for unit in ("attention", "ffn", "both"):
        assert dropped(models(unit=unit)[1]) == dropped(models(unit=unit, choose="similarity")[1])


@family
def test_llm_drop_preset_drops_the_attention_that_turns_its_input_least(family):
    """The paper's list: attention sub-layers by similarity, highest first. They cache nothing."""
    lm = apply(tiny_lm(family), {"layer_skip": dict(preset="llm-drop", count=2, stories=2)})
    names = [f"attn{i}" for i in range(L)]
    texts = calibration_ids("layer_skip", tiny_lm(family), 2)
    scores = literal.similarity(tiny_lm(family).model, texts, names)
    highest = sorted(names, key=lambda name: -scores[names.index(name)])[:2]
    assert dropped(lm) == sorted(highest), "other attention sub-layers, or FFNs, are dropped"
    state = lm.model.new_state()
    lm.model(IDS, state)
    rows = {f"attn{i}": layer.count for i, layer in enumerate(state.layers)}
    assert rows == {name: 0 if name in highest else 40 for name in names}, "cache rows"


def test_deepest_units_go_first_but_the_very_last_is_kept():
    assert dropped(models(choose="last", count=2)[1]) == ["attn3", "ffn3", "attn4", "ffn4"]
    assert dropped(models(choose="last", unit="ffn", count=1)[1]) == ["ffn4"]
    assert dropped(models(choose="last", unit="both", count=2)[1]) == ["ffn4", "attn5"]
    assert len(dropped(models(choose="last", count=5)[1])) == 10


def test_random_plans_follow_the_seed_and_reach_every_unit():
    plans = [dropped(models(choose="random", unit="both", count=2, seed=s)[1]) for s in range(60)]
    assert all(len(set(plan)) == 2 for plan in plans)
    assert plans[7] == dropped(models(choose="random", unit="both", count=2, seed=7)[1])
    seen = [sum(name in plan for plan in plans) for name in map(str, units_of(tiny_lm(), "both"))]
    assert min(seen) >= 2 and max(seen) <= 22  # 10 of 60 expected for each of 12


@pytest.mark.parametrize("choose", CRITERIA)
def test_plans_are_chosen_from_the_model_as_it_stands(choose, monkeypatch):
    """All options lead to the criterion's own function, with the texts that were asked for."""
    calls = []

    def criterion(lm, units, count, texts):
        calls.append((len(units), count, len(texts)))
        return units[:count]

    monkeypatch.setitem(CRITERIA, choose, criterion)
    unit = "ffn" if choose == "similarity" else "layer"
    _, lm = models(choose=choose, unit=unit, count=2, stories=3)
    assert calls == [(6, 2, 3)]
    assert dropped(lm) == (
        ["ffn0", "ffn1"] if unit == "ffn" else ["attn0", "ffn0", "attn1", "ffn1"]
    )


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (dict(drop="3"), ["attn3", "ffn3"]),
        (dict(drop=" 5, 0 "), ["attn0", "ffn0", "attn5", "ffn5"]),
        (dict(drop="5+0", unit="attention"), ["attn0", "attn5"]),
        (dict(drop="ffn5,attn3", unit="both"), ["attn3", "ffn5"]),
    ],
)
def test_an_explicit_list_is_read(options, names):
    assert dropped(models(**options)[1]) == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(drop="6"), "drop has '6'; expected 0 to 5, the layers of this model"),
        (dict(drop="-1"), "drop has '-1'; expected 0 to 5"),
        (dict(drop="1,,2"), "drop has ''; expected 0 to 5"),
        (dict(drop=""), "drop has ''; expected 0 to 5"),
        (dict(drop="attn1"), "drop has 'attn1'; expected 0 to 5, the layers"),
        (dict(drop="1", unit="both"), "drop has '1'; expected attn0 to ffn5, the sub-layers of"),
        (dict(drop="layer1", unit="ffn"), "expected 0 to 5, the FFN sub-layers of this model"),
        (dict(drop="2,1,2"), "drop has '2' twice; name it once"),
        (dict(drop="1", count=1), "got both drop and count; give only one of them"),
        (dict(count=7), "count is 7; expected at most 6 of the 6 layers of this model."),
        (dict(count=13, unit="both"), "expected at most 12 of the 12 sub-layers"),
        (
            dict(count=6, choose="last"),
            "at most 5 of the 6 layers .* since choose=last keeps the very last",
        ),
        (dict(count=-1), "layer_skip: count must be an integer, at least 0, or None; got -1"),
        (
            dict(choose="influence", unit="attention"),
            "choose=influence does not rank attention sub-layers .unit=attention.; "
            "use similarity, greedy, random or last.",
        ),
        (dict(choose="angular", unit="both"), "choose=angular does not rank sub-layers"),
        (
            dict(choose="similarity"),
            "choose=similarity does not rank layers .*use influence, angular, greedy, random or ",
        ),
        (dict(choose="best"), "choose must be one of .*greedy, random, last, or None; got 'best'"),
        (dict(stories=0), "layer_skip: stories must be an integer, at least 1; got 0"),
        (dict(seed=-1), "layer_skip: seed must be an integer, at least 0; got -1"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value) and "layer_skip" in str(caught.value)


def test_models_it_does_not_fit_are_refused():
    skipless = LM(tiny_model("skipless"), TOKENIZER)
    with pytest.raises(MinitxError, match="layer_skip needs residual connections and this"):
        apply(skipless, {"layer_skip": {"count": 0}})
    bare = replace(tiny_lm(), tokenizer=None)
    with pytest.raises(MinitxError, match="layer_skip learns .*use choose=random, last or drop"):
        apply(bare, {"layer_skip": True})
    for options in (dict(choose="last"), dict(count=0), dict(count=0, choose="angular")):
        apply(bare, {"layer_skip": options})


# With other techniques ---------------------------------------------------------------------------


@family
@each_drop
def test_first_layer_after_layer_skip_changes_nothing(family, options):
    """A table of the first block is made after units are dropped, whatever the order of flags."""
    _, lm = models(family, **options)
    flags = {"first_layer": True, "layer_skip": options}
    if "attn0" in dropped(lm):
        with pytest.raises(MinitxError) as caught:
            apply(tiny_lm(family), flags)
        assert str(caught.value) == (
            "first_layer needs a part of type Attention where layer_skip has put a Dropped; "
            "use one of the two."
        )
        return
    both = apply(tiny_lm(family), flags)
    assert dropped(both) == dropped(lm)
    close(both.logits(IDS), lm.logits(IDS), "logits differ", 1e-12)


@pytest.mark.parametrize("family, names", [("llama", "attn0,ffn0"), ("gpt2", "attn0,ffn0,attn2")])
def test_a_block_with_a_table_can_be_dropped(family, names):
    """As when a model that was written with first_layer is read again: the row of the table is
    split, and its hidden state goes on."""
    dense, lm = models(family, unit="both", drop=names)
    later = layer_skip(first_layer(dense), unit="both", drop=names)
    close(later.logits(IDS), lm.logits(IDS), "logits differ", 1e-12)
    close(in_chunks(later, IDS, (5, 1, 34)), lm.logits(IDS), "chunks differ")
    with counting(later) as counts:
        later.logits(IDS)
    assert counts.events == {"sub-layer runs skipped": 40 * len(dropped(lm))}


def test_heads_wider_than_the_model_are_dropped_from_a_table():
    dense = LM(tiny_model("llama", dtype=np.float64, layers=3, head_width=12, rope_width=12))
    lm = layer_skip(first_layer(dense), unit="attention", drop="0")
    close(lm.logits(IDS), layer_skip(dense, unit="attention", drop="0").logits(IDS), "differ")


def test_a_table_refuses_what_it_cannot_give():
    table = first_layer(tiny_lm("gpt_neox"))
    with pytest.raises(MinitxError, match="cannot drop ffn0: block 0, a FirstParallelBlock,"):
        layer_skip(table, drop="0")
    with pytest.raises(MinitxError, match="choose=influence compares the hidden states .* a table"):
        layer_skip(table)
    with pytest.raises(MinitxError, match="choose=similarity compares the hidden states"):
        layer_skip(table, unit="attention")
    assert len(dropped(layer_skip(table, unit="attention", choose="greedy", stories=2))) == 1


def test_ffn_skip_does_not_count_dropped_ffns():
    flags = {"ffn_skip": dict(threshold=-2.0, skip=2, warm_up=0, cold_start=1, cold_end=6)}
    lm = apply(tiny_lm(), flags | {"layer_skip": dict(unit="ffn", drop="2,4")})
    with counting(lm) as counts:
        lm.logits(IDS)
    # of FFNs 1, 3 and 5, the first is measured and the next two are skipped
    assert counts.events["skippable FFNs"] == 3 * 40
    assert counts.events["FFNs skipped"] == 2 * 40
    assert counts.events["sub-layer runs skipped"] == 2 * 40


TOGETHER = {
    "exit, copied": {"early_exit": dict(threshold=0.2, warm_up=3)},
    "exit, deferred": {"early_exit": dict(threshold=0.2, warm_up=3, kv_fill="deferred")},
    "ffn_skip": {"ffn_skip": dict(threshold=0.8, skip=2, warm_up=4, cold_start=1, cold_end=L)},
    "quantize": {"quantize": dict(bits=8)},
    "elsa": {"elsa": dict(p=1.0)},
    "int8 cache": {"quantize_cache": dict(bits=8)},
    "all": {
        "quantize": dict(bits=8),
        "ffn_skip": dict(threshold=0.8, skip=2, warm_up=4, cold_start=1, cold_end=L),
        "first_layer": {},
        "early_exit": dict(threshold=0.2, warm_up=3),
    },
}
together = pytest.mark.parametrize("others", TOGETHER.values(), ids=TOGETHER)


@together
def test_chunks_and_rewinding_with_other_techniques(others):
    lm = apply(tiny_lm(), others | {"layer_skip": dict(unit="both", drop="attn1,ffn1,ffn2,attn5")})
    whole = lm.logits(IDS)
    for sizes in ((7, 20, 13), (1,) * 40):
        close(in_chunks(lm, IDS, sizes), whole, f"decoding by {sizes} differs", 1e-8)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    expected = lm.model(IDS[20:30], state)
    lm.model(OTHER[:5], state)
    state.rewind(20)
    assert_same(lm.model(IDS[20:30], state), expected)
    assert all(state.layers[i].count == 0 for i in (1, 5)), "a dropped layer has cache rows"


@pytest.mark.parametrize("kv_fill", ["copy", "deferred"])
@each_drop
def test_early_exit_with_dropped_units_equals_zeroed_weights(options, kv_fill):
    """Tokens exit after the same layers, and a dropped layer has no rows to backfill."""
    flags = {"early_exit": dict(threshold=0.2, warm_up=3, kv_fill=kv_fill)}
    lm = apply(tiny_lm(), flags | {"layer_skip": options})
    zeroed = apply(with_zeros(tiny_lm(), dropped(apply(tiny_lm(), {"layer_skip": options}))), flags)
    close(lm.logits(IDS), zeroed.logits(IDS), "logits differ")
    with counting(lm) as counts:
        lm.logits(IDS)
    assert counts.events["layers skipped"] > 0


def test_speculation_with_dropped_units_gives_the_same_text():
    for options in DROPS:
        dense, lm = models(dtype=np.float32, **options)
        both = apply(dense, {"layer_skip": options, "prompt_lookup": {}})
        assert both.generate(IDS[:5], 30) == lm.generate(IDS[:5], 30)


def test_a_written_model_keeps_the_dropped_units(tmp_path):
    _, lm = models(dtype=np.float32, unit="both", drop="attn1,ffn5")
    write_precomputed(lm, tmp_path / "out", Origin("tiny", "--layer-skip"), None)
    model, _ = read_precomputed(tmp_path / "out")
    assert_same(model(IDS), lm.logits(IDS))


# Figures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stories():
    lm = minitx.load("stories")
    return lm, calibration_ids("layer_skip", lm, 4)


def test_on_stories_three_late_layers_have_almost_no_influence(stories):
    influence = block_influence(*stories)
    assert (influence[4:7] > 0.003).all() and (influence[4:7] < 0.015).all()
    assert (influence[1:4] > 0.1).all() and (influence[1:4] < 0.3).all()
    assert 0.8 < influence[0] < 1


def test_on_stories_criteria_agree_on_layers_4_to_6(stories):
    lm, texts = stories
    plan = CRITERIA["influence"](lm, units_of(lm, "layer"), 3, texts)
    assert sorted(u.index for u in plan) == [4, 5, 6]
    plan = CRITERIA["greedy"](lm, units_of(lm, "layer"), 3, texts[:2])
    assert {u.index for u in plan} <= {4, 5, 6, 7}  # on more text 4, 5 and 6
    distance = angular_distance(lm, texts, 3)  # of few tokens, so 5 to 7 may be as near
    assert 0.06 < distance[4:].min() <= distance[4:].max() < 0.11 and distance[:4].min() > 0.2


def test_on_stories_what_a_layer_costs_depends_on_which(stories):
    lm, texts = stories
    dense = mean_loss(lm, texts)
    assert 0.6 < dense < 0.9
    costs = {
        drop: mean_loss(layer_skip(lm, drop=drop), texts) - dense for drop in ("4,5,6", "2", "0")
    }
    assert 0 < costs["4,5,6"] < 0.015
    assert 0.02 < costs["2"] < 0.1
    assert 5 < costs["0"] < 15


def test_without_training_for_it_a_layer_cannot_go():
    lm = minitx.load("stories-parallel")
    texts = calibration_ids("layer_skip", lm, 2)
    costs = [mean_loss(layer_skip(lm, drop=str(i)), texts) - mean_loss(lm, texts) for i in range(4)]
    assert 0.25 < min(costs) < 1
