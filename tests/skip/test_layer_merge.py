"""LaCo's merge: by hand, a literal version, cost, the choice of layers, figures."""

import literal_layer_fusion
import literal_layer_merge as literal
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
from minitx.shared.least_loss import mean_loss
from minitx.skip.layer_merge import merged_block, similarity
from minitx.technique import apply
from minitx.tree import map_weights, nbytes, weights

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
TEXTS = [IDS[:17].tolist(), IDS[20:33].tolist()]  # of different lengths
family = pytest.mark.parametrize("family", FAMILIES)
each_size = pytest.mark.parametrize("size, first", [(2, 1), (3, 2), (6, 0)])


def tiny_lm(family="llama", dtype=np.float64, layers=L):
    return LM(tiny_model(family, dtype=dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, merged), with six layers."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"layer_merge": options})


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


def test_merged_weights_by_hand():
    # Every weight of three layers is 3, 6 and 12: 3 + (6 - 3) + (12 - 3) = 15; 3 + (6 - 3) = 6.
    blocks = tiny_lm().model.stack.blocks[:3]
    parts = [map_weights(b, lambda w, x=x: w * 0 + x) for b, x in zip(blocks, (3, 6, 12))]
    for count, expected in ((1, 3), (2, 6), (3, 15)):
        found = weights(merged_block(parts[:count])).values()
        assert {float(w.flat[0]) for w in found} == {expected}, f"of {count} layers"


@family
def test_merging_two_layers_is_dropping_the_first(family):
    """W_l + (W_l+1 - W_l) = W_l+1, so nothing of layer l is left."""
    dense, lm = models(family, size=2, first=3)
    dropped = apply(dense, {"layer_skip": dict(drop="3")})
    assert_same(lm.logits(IDS), dropped.logits(IDS))


# Against the literal version ---------------------------------------------------------------------


@family
@each_size
def test_logits_equal_the_literal_version(family, size, first):
    dense, lm = models(family, size=size, first=first)
    assert len(lm.model.stack.blocks) == lm.model.config.layers == L - size + 1
    close(lm.logits(IDS), literal.logits(dense.model, IDS, first, size), "logits differ")


@family
@pytest.mark.parametrize("size", [2, 3])
def test_similarity_and_choice_equal_the_literal_version(family, size):
    lm = tiny_lm(family, layers=4)
    for first in range(4 - size + 1):
        merged = apply(lm, {"layer_merge": dict(size=size, first=first)})
        expected = literal.similarity(lm.model, TEXTS, first, size)
        assert similarity(lm, merged, TEXTS) == pytest.approx(expected, rel=1e-10)
    best = literal.best_first(lm.model, TEXTS, size)
    found = apply(lm, {"layer_merge": dict(size=size)}, calibrate=TEXTS)
    given = apply(lm, {"layer_merge": dict(size=size, first=best)})
    assert_same(found.logits(IDS), given.logits(IDS))


@family
def test_neutral_is_the_dense_model_itself(family):
    dense, lm = models(family, np.float32, size=1)
    assert repr(lm) == repr(dense)


def test_all_layers_can_become_one():
    _, lm = models(size=99)
    assert len(lm.model.stack.blocks) == 1


# What is saved -----------------------------------------------------------------------------------


@family
@each_size
def test_cost_and_memory_are_those_of_fewer_layers(family, size, first):
    dense, lm = models(family, np.float32, size=size, first=first)
    block = sum(w.nbytes for w in weights(dense.model.stack.blocks[0]).values())
    assert nbytes(dense) - nbytes(lm) == (size - 1) * block
    work, cached = [], []
    for one in (dense, lm):
        state = one.model.new_state()
        one.model(IDS[:9], state)
        with counting(one) as counts:
            one.model(IDS[9:10], state)
        work.append(counts.total("model.stack"))
        cached.append(state.cache_bytes)
    left = (L - size + 1) / L
    for name in ("multiply_adds", "weight_bytes", "cache_bytes"):
        assert getattr(work[1], name) == getattr(work[0], name) * left, name
    assert cached[1] == cached[0] * left


@each_size
def test_chunks_and_rewinding(size, first):
    _, lm = models(size=size, first=first)
    state = lm.model.new_state()
    once = in_chunks(lm, IDS, (20, *[1] * 20), state)
    close(once, lm.logits(IDS), "in chunks, logits differ")
    state.rewind(20)
    assert_same(in_chunks(lm, IDS[20:], (1,) * 20, state), once[20:])


def test_a_written_model_has_fewer_layers(tmp_path):
    _, lm = models(dtype=np.float32, size=3, first=2)
    write_precomputed(lm, tmp_path / "out", Origin("tiny", "--layer-merge"), None)
    model, _ = read_precomputed(tmp_path / "out")
    assert_same(model(IDS), lm.logits(IDS))


def test_merged_layers_may_share_their_weights_with_others():
    """layer_fusion comes after layer_merge, whatever the order of the flags."""
    dense = tiny_lm()
    flags = {"layer_fusion": dict(size=2, first=0), "layer_merge": dict(size=3, first=2)}
    lm = apply(dense, flags)
    blocks = list(dense.model.stack.blocks)
    expected = [blocks[0], blocks[0], literal.merged(blocks[2:5]), blocks[5]]
    found = literal_layer_fusion.run_blocks(dense.model, IDS, expected)
    close(lm.logits(IDS), found, "logits differ")


# Which layers ------------------------------------------------------------------------------------


def test_random_places_are_drawn_by_seed():
    trees = [models(size=2, choose="random", seed=seed)[1].logits(IDS[:3]) for seed in range(30)]
    assert len({x.tobytes() for x in trees}) == L - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first=4), "layer_merge: first is 4; expected at most 3, since 3 of the 6 layers"),
        (dict(size=0), "layer_merge: size must be an integer, at least 1; got 0"),
        (dict(choose="best"), "choose must be one of similarity, random; got 'best'"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


def test_layers_of_different_shapes_are_refused():
    blocks = list(tiny_lm().model.stack.blocks[:2])
    blocks[1] = map_weights(blocks[1], lambda w: w[..., :-1])
    with pytest.raises(MinitxError, match="layer_merge adds up the weights of layers .* shape in"):
        merged_block(blocks)


# Figures -----------------------------------------------------------------------------------------


def test_on_stories_dropping_two_layers_is_better_than_merging_three():
    lm = minitx.load("stories")
    texts = calibration_ids("layer_merge", lm, 2)
    dense = mean_loss(lm, texts)

    def added(**flags):
        return mean_loss(apply(lm, flags), texts) - dense

    assert 0.03 < added(layer_merge=dict(first=4)) < 0.3
    assert added(layer_skip=dict(drop="4,5")) < 0.01
    assert -0.01 < added(layer_merge=dict(size=2, first=5)) < 0.01
    others = [added(layer_merge=dict(first=first)) for first in (1, 2, 5)]
    assert added(layer_merge=dict(first=4)) < min(others), "no better than at random"
