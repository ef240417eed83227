"""Mixture-of-Depths: who enters, by hand; a literal version; rows of the cache, causality, counts;
the trained model stories-mod against its baselines.

Training: tests/training/test_training_mixture_of_depths.py.
"""

from dataclasses import replace

import literal_mixture_of_depths as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm, tiny_model

from minitx.calibration import calibration_ids
from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError, MinitxWarning
from minitx.lab.evaluate import evaluate_model
from minitx.ledger import counting
from minitx.lm import load
from minitx.model import Stack
from minitx.skip.mixture_of_depths import (
    FILE,
    LearnedRouter,
    RandomRouter,
    RoutedBlock,
)
from minitx.skip.mixture_of_depths.file import Trained, read_routers, write_routers
from minitx.skip.mixture_of_depths.fit import changed_most, fit_router
from minitx.state import Layer
from minitx.technique import apply, wrap
from minitx.tree import Part, part

IDS = np.random.default_rng(3).integers(0, 258, 40)
LAYERS = 4
family = pytest.mark.parametrize("family", FAMILIES)


def routers_of(lm, seed=0, blocks=(1, 3)) -> dict:
    rng = np.random.default_rng(seed)
    return {i: rng.standard_normal(lm.model.config.width) * 0.5 for i in blocks}


def routed(lm, routers, threshold=0.0):
    """The model with these routers."""

    def change(block, index):
        if index not in routers:
            return block
        return RoutedBlock(block, LearnedRouter(routers[index], threshold))

    return wrap(lm, "block", change)


def models(family="llama", threshold=0.0, layers=LAYERS):
    """(dense, routed, its routers), in float64 with four layers."""
    dense = tiny_lm(model=tiny_model(family, dtype=np.float64, layers=layers))
    routers = routers_of(dense)
    return dense, routed(dense, routers, threshold), routers


def entered(lm, ids=IDS):
    """For each routed block, how many of the tokens entered."""
    with counting(lm) as counts:
        lm.logits(ids)
    return counts.events["tokens that entered a block"]


# Worked example ----------------------------------------------------------------------------------


@part
class Adds(Part):
    """A block that adds to each token (2, 0) for each token in the call up to itself."""

    def __call__(self, x, layer):
        n = np.arange(1, len(x) + 1)[:, None]
        return x + n * np.array([2.0, 0.0])


def test_tokens_that_enter_get_r_times_what_the_block_adds_by_hand():
    # w = (0, 1/2), so r is half of the second number: 0.5, -1, 2, 0. Tokens 0 and 2 enter
    # (r > 0; 0 is not above 0), and the block sees only these two: f = (2, 0) and (4, 0).
    x = np.array([[1.0, 1.0], [1.0, -2.0], [1.0, 4.0], [1.0, 0.0]])
    block = RoutedBlock(Adds(), LearnedRouter(np.array([0.0, 0.5])))
    # token 0: 1 + 0.5 * 2 = 2;   token 2: 1 + 2 * 4 = 9;   the others skip the block
    expected = np.array([[2.0, 1.0], [1.0, -2.0], [9.0, 4.0], [1.0, 0.0]])
    layer = Layer.once(4)
    assert_same(block(x, layer), expected)
    assert layer.tokens.end == 4, "the tokens of the step are no longer all of them"
    higher = RoutedBlock(Adds(), LearnedRouter(np.array([0.0, 0.5]), threshold=0.5))
    expected = np.array([[1.0, 1.0], [1.0, -2.0], [1.0 + 2 * 2, 4.0], [1.0, 0.0]])
    assert_same(higher(x, Layer.once(4)), expected, "only r = 2 is above 0.5")


def test_scale_multiplies_the_vector():
    x = np.array([[1.0, 3.0], [2.0, -3.0]])
    r = LearnedRouter(np.array([2.0, 1.0]), scale=0.5).scores(x)
    assert_same(r, [(2 + 3) / 2, (4 - 3) / 2], tolerance=1e-7)


def test_fitted_labels_are_the_tokens_that_the_block_changes_most_by_hand():
    # |f| / |x|: 1/1, 4/2, 3/6 and 2/1: capacity 0.5 takes tokens 1 and 3
    x = np.array([[1.0, 0.0], [0.0, 2.0], [6.0, 0.0], [0.0, 1.0]])
    f = np.array([[0.0, 1.0], [4.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    assert changed_most(x, f, 0.5).tolist() == [False, True, False, True]
    assert changed_most(x, f, 0.6).tolist() == [True, True, False, True]  # 2.4: three
    # x has the labels' sides apart: columns (1 and 6: -1) and (2 and 1: +1), solved one by one:
    # w_0 = -(1 + 6) / (1 + 36), w_1 = (2 + 1) / (4 + 1)
    assert_same(fit_router(x, f, 0.5), [-7 / 37, 3 / 5], tolerance=1e-4)


# Against the literal version ---------------------------------------------------------------------


@family
@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_logits_equal_the_literal_version(family, threshold):
    dense, lm, routers = models(family, threshold)
    found, who = literal.run(dense.model, IDS, routers, literal.by_threshold(threshold))
    check_close(lm.logits(IDS), found, 1e-10, "logits")
    inside = [len(who[i]) for i in routers]
    assert 0 < sum(inside) < 2 * len(IDS) and entered(lm) == sum(inside)
    check_close(in_chunks(lm, IDS, (5, 1, 20, 14)), found, 1e-10, "logits in chunks")


def test_batch_without_cache_equals_its_rows():
    _, lm, _ = models()
    rows = np.stack([IDS, (IDS * 7 + 3) % 258])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a row")
    start = np.array([0, 3])  # the second row has three padding tokens in front
    rows[1, :3] = 0
    padded = lm.model(rows, lm.model.new_state(start, remember=False))
    check_close(padded[1, 3:], lm.logits(rows[1, 3:]), 1e-12, "a padded row")


def test_batch_that_cannot_run_row_by_row_is_refused():
    _, lm, _ = models()
    rows = np.stack([IDS, IDS])
    with pytest.raises(MinitxError, match="^mixture_of_depths .* with a KV cache; [^\n]*$"):
        lm.model(rows, lm.model.new_state())
    both = apply(lm, {"ffn_skip": {"threshold": 0.0, "warm_up": 0, "cold_start": 0}})
    with pytest.raises(MinitxError, match="^mixture_of_depths .* one sequence at a time"):
        both.logits(rows)
    assert both.logits(IDS).shape == (40, 259)


# What enters, and what is stored -----------------------------------------------------------------


def test_cache_holds_only_tokens_that_entered_at_their_positions():
    dense, lm, routers = models()
    _, who = literal.run(dense.model, IDS, routers, literal.by_threshold(0.0))
    for sizes in ((40,), (12, *[1] * 28)):
        state = lm.model.new_state()
        in_chunks(lm, IDS, sizes, state)
        for index, layer in enumerate(state.layers):
            positions = layer.row_tokens().array.tolist()
            expected = sorted(who[index]) if index in who else list(range(40))
            assert positions == expected, f"rows of block {index}"


def test_backfill_then_attend_equals_running_the_block():
    """As early_exit calls a block: the same tokens enter, and only they are cached."""
    _, lm, _ = models()
    block, x = lm.model.stack.blocks[1], np.random.default_rng(0).standard_normal((9, 16))
    whole, apart = Layer.once(9), Layer.once(9)
    expected = block(x, whole)
    block.backfill(x, apart)
    rows = apart.row_tokens().array.tolist()
    assert (
        rows
        == whole.row_tokens().array.tolist()
        == np.flatnonzero(block.router(x, apart)[0]).tolist()
    )
    check_close(block.attend_from(x, apart), expected, 1e-12, "attention after a backfill")


def test_later_tokens_change_nothing_before_them():
    """As ranking the whole text does: see the next test."""
    _, lm, _ = models()
    other = IDS.copy()
    other[25:] = (other[25:] + 1) % 258
    assert_same(lm.logits(other)[:25], lm.logits(IDS)[:25])


def test_ranking_the_whole_text_leaks_the_future():
    """Of r = [.5, .4, .9, .8] the best two are tokens 2 and 3; of the first two, 0 and 1."""
    enters = literal.by_rank(0.5)
    assert enters(dict(enumerate([0.5, 0.4, 0.9, 0.8]))) == {2, 3}
    assert literal.by_rank(1.0)(dict(enumerate([0.5, 0.4]))) == {0, 1}
    dense, _, routers = models()
    other = IDS.copy()
    other[25:] = (other[25:] + 1) % 258
    one, two = (literal.run(dense.model, ids, routers, enters)[0] for ids in (IDS, other))
    assert abs(one[:25] - two[:25]).max() > 1e-3


def test_block_that_no_token_enters_is_not_run():
    dense, lm, _ = models(threshold=1e9)
    assert entered(lm) == 0
    kept = replace(dense.model.stack, blocks=dense.model.stack.blocks[::2])
    without = replace(dense, model=replace(dense.model, stack=Stack(kept.blocks)))
    assert_same(lm.logits(IDS), without.logits(IDS))
    with counting(lm) as counts:
        lm.generate(IDS[:5].tolist(), 5)
    ran = [path for path, entry in counts.entries.items() if entry.weight_bytes]
    inside = [path for path in ran if ".1.inner" in path or ".3.inner" in path]
    assert not inside, "weights of a block that nothing entered were read"


def test_all_enter_with_weight_1_equals_dense():
    """C = S and r = 1: x + 1 (block(x) - x)."""
    dense = tiny_lm(model=tiny_model(dtype=np.float64))
    scores = np.zeros((2, 48))
    lm = wrap(dense, "block", lambda block, i: RoutedBlock(block, RandomRouter(scores, 1.0, 1.0)))
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "all tokens with weight 1")
    check_close(in_chunks(lm, IDS, (12, *[1] * 28)), dense.logits(IDS), 1e-12, "one by one")


def test_step_of_which_few_tokens_enter_can_be_undone_with_a_window():
    """sink_window frees rows by the position at which the step began: of its six tokens perhaps
    only the last one enters; after a rewind to the first, the first may enter."""
    _, lm, _ = models(threshold=1.5)
    lm = apply(lm, {"sink_window": {"sinks": 1, "window": 8}})
    once = in_chunks(lm, IDS, (34, *[1] * 6))
    for last in range(30):  # other tokens in the step that is undone
        state = lm.model.new_state()
        lm.model(IDS[:34], state)
        lm.model((IDS[:6] + last) % 258, state)
        state.rewind(34)
        check_close(in_chunks(lm, IDS[34:], [1] * 6, state), once[34:], 1e-12, "after a rewind")


# Cost --------------------------------------------------------------------------------------------


def test_multiply_adds_are_those_of_the_formula():
    """A routed block that n of T tokens enter: n / T of its matrices, attention among n tokens, and
    D per token for the router."""
    dense, lm, routers = models()
    c, T = dense.model.config, len(IDS)
    _, who = literal.run(dense.model, IDS, routers, literal.by_threshold(0.0))
    with counting(dense) as before:
        dense.logits(IDS)
    with counting(lm) as after:
        lm.logits(IDS)
    per_token = 2 * c.width * (c.heads + c.kv_heads) * c.head_width + 3 * c.width * c.hidden
    for index in routers:
        n = len(who[index])
        block = f"model.stack.blocks.{index}"
        attention = 2 * n * n * c.heads * c.head_width  # ops.attention scores masked keys as well
        found = after.total(block).multiply_adds
        assert found == n * per_token + attention + T * c.width, f"block {index}"
        assert before.total(block).multiply_adds > found


def test_random_router_lets_its_share_in():
    lm = tiny_lm(model=tiny_model(layers=LAYERS, context=4000))
    ids = np.random.default_rng(1).integers(0, 258, 1000)
    for capacity in (0.25, 0.75):
        chosen = {"router": "random", "capacity": capacity}
        assert abs(entered(apply(lm, {"mixture_of_depths": chosen}), ids) / 2000 - capacity) < 0.05
    one, other = (
        apply(lm, {"mixture_of_depths": chosen | {"seed": seed}}).logits(IDS) for seed in (0, 1)
    )
    assert (one != other).any(), "the seed makes no difference"


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [3, 4, 5]),
        ({"every": 2}, [3, 5]),
        ({"first": 1, "every": 2}, [1, 3, 5]),
        ({"first": 0}, [0, 1, 2, 3, 4, 5]),
        ({"first": 9}, []),
    ],
)
def test_every_and_first_tell_which_blocks_are_routed(options, expected):
    lm = tiny_lm(model=tiny_model(layers=6))
    options = {"router": "random", "capacity": 0.5} | options
    blocks = apply(lm, {"mixture_of_depths": options}).model.stack.blocks
    assert [i for i, b in enumerate(blocks) if type(b) is RoutedBlock] == expected


def test_block_0_cannot_be_routed_where_it_is_a_table():
    lm = tiny_lm("gpt_neox")
    options = {"router": "random", "capacity": 0.5}
    with pytest.raises(MinitxError, match="mixture_of_depths with first=0 .* first_layer [^\n]*$"):
        apply(lm, {"mixture_of_depths": options | {"first": 0}, "first_layer": {}})
    both = apply(lm, {"mixture_of_depths": options, "first_layer": {}})
    assert both.logits(IDS).shape == (40, 259)


def test_skipless_model_is_refused():
    with pytest.raises(MinitxError, match="mixture_of_depths needs residual connections [^\n]*$"):
        apply(tiny_lm("skipless"), {"mixture_of_depths": {}})


def test_default_without_trained_routers_fits_them_and_warns():
    with pytest.warns(MinitxWarning, match="not trained with routers.*stories-mod"):
        lm = apply(tiny_lm(), {"mixture_of_depths": {}})
    explicit = apply(tiny_lm(), {"mixture_of_depths": {"router": "fitted", "capacity": 0.25}})
    assert_same(lm.logits(IDS), explicit.logits(IDS))
    with pytest.raises(MinitxError, match="router=trained reads .* was not read from a folder"):
        apply(tiny_lm(), {"mixture_of_depths": {"router": "trained"}})


# The file of trained routers ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A model's folder with trained routers of blocks 1 and 3, capacity 0.25."""
    model = tiny_model(layers=LAYERS)
    write_model(model, tmp_path, "F32")
    rng = np.random.default_rng(0)
    vectors = {i: rng.standard_normal(16).astype(np.float32) for i in (1, 3)}
    write_routers(Trained(vectors, 0.25), tmp_path)
    return tmp_path


def test_trained_routers_are_read_from_the_folder(folder):
    dense = load(folder)
    found = read_routers(folder, dense.model.config)
    assert list(found.vectors) == [1, 3] and found.capacity == 0.25
    for options in ({}, {"router": "trained"}):
        lm = load(folder, mixture_of_depths=options)
        expected = routed(dense, found.vectors)
        assert_same(lm.logits(IDS), expected.logits(IDS))
    assert entered(load(folder, mixture_of_depths={"threshold": 2.0})) < entered(lm)
    random = load(folder, mixture_of_depths={"router": "random"}).model.stack.blocks
    assert [i for i, b in enumerate(random) if type(b) is RoutedBlock] == [1, 3]
    assert random[1].router.capacity == 0.25, "not the capacity of the training"
    for name, value in (("capacity", 0.5), ("every", 2)):
        with pytest.raises(MinitxError, match=f"mixture_of_depths: {name}=.* has trained routers"):
            load(folder, mixture_of_depths={name: value})


def test_file_that_does_not_fit_is_refused(folder):
    config = load(folder).model.config
    w = np.ones(16, np.float32)

    def refused(routers, words, capacity=0.5):
        write_routers(Trained(routers, capacity), folder)
        with pytest.raises(MinitxError, match=f"^[^\n]*{words}[^\n]*$"):
            read_routers(folder, config)

    refused({7: w}, "unexpected tensor 'blocks.7.w' for a model of 4 blocks")
    refused({1: w[:5]}, r"has the shape \(5,\); expected \(16,\)")
    refused({1: w * np.nan}, "blocks.1.w")
    refused({1: w}, "expected a capacity above 0, at most 1", capacity=3.0)
    write_routers(Trained({1: w}, 0.5), folder)
    write_model(tiny_model(layers=LAYERS, seed=9), folder, "F32")
    with pytest.raises(MinitxError, match=f"{FILE}: was not trained with the weights beside it"):
        read_routers(folder, config)


# The trained model -------------------------------------------------------------------------------


def test_trained_routers_answer_what_random_ones_cannot():
    """stories-mod, on 12 stories: at equal cost, 92 and 86 % of the answers that combine two and
    three facts, against 75 and 29 %."""
    lm = load("stories-mod", mixture_of_depths=True)
    random = load("stories-mod", mixture_of_depths={"router": "random", "capacity": 0.13})
    found, baseline = (evaluate_model(model, 12) for model in (lm, random))
    assert 0.01 < baseline.loss - found.loss < 0.03
    assert found.by_hops[2] > 0.8 > baseline.by_hops[2] and baseline.by_hops[3] < 0.5
    assert found.by_hops[3] > baseline.by_hops[3] + 0.4


def test_trained_routers_let_about_their_capacity_in():
    """Trained to tell the best 12.5 % of a text: by itself, each of the four lets in about so
    many, and a threshold above all r none."""
    lm = load("stories-mod", mixture_of_depths=True)
    ids = calibration_ids("a test", lm, 2)[1]
    assert [type(b) is RoutedBlock for b in lm.model.stack.blocks] == [False] * 4 + [True] * 4
    assert 0.05 < entered(lm, ids) / (4 * len(ids)) < 0.2
    assert entered(load("stories-mod", mixture_of_depths={"threshold": 1e6}), ids) == 0
