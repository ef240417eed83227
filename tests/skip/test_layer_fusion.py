"""Layer fusion: patterns by hand, a literal version, memory, choice of layers, gradients, figures.

tests/core/test_layer_sharing.py holds the core to blocks that stand in several places.
"""

import literal_layer_fusion as literal
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
from minitx.shared.combine import combined
from minitx.shared.least_loss import least_loss, mean_loss
from minitx.skip.layer_fusion import pattern_of
from minitx.technique import apply
from minitx.training.autograd import gradients
from minitx.training.loss import cross_entropy
from minitx.tree import map_weights, nbytes, weights

L = 6
IDS = np.random.default_rng(3).integers(0, 258, 40)
SETTINGS = [
    dict(first=0, size=None, group=2, pattern="cycle", weights="first"),
    dict(first=1, size=5, group=2, pattern="sequence", weights="mean"),
    dict(first=2, size=4, group=None, pattern="sequence", weights="last"),
]
family = pytest.mark.parametrize("family", FAMILIES)
each_setting = pytest.mark.parametrize("options", SETTINGS, ids=lambda o: o["weights"])


def tiny_lm(family="llama", dtype=np.float64, layers=L):
    return LM(tiny_model(family, dtype=dtype, layers=layers), TOKENIZER)


def models(family="llama", dtype=np.float64, **options):
    """(dense, sharing), with six layers."""
    lm = tiny_lm(family, dtype)
    return lm, apply(lm, {"layer_fusion": options})


def sets_of(lm) -> list[int]:
    """For each layer the first layer that has the same weights."""
    blocks = lm.model.stack.blocks
    return [blocks.index(block) for block in blocks]


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


# Worked example ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "group", "sequence", "cycle"),
    [
        # six layers in groups of two: ceil(6 / 2) = 3 sets
        (6, 2, [0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2]),
        # seven: ceil(7 / 2) = 4 sets, and the last group has one layer
        (7, 2, [0, 0, 1, 1, 2, 2, 3], [0, 1, 2, 3, 0, 1, 2]),
        (6, 3, [0, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1]),
        (4, 4, [0, 0, 0, 0], [0, 0, 0, 0]),  # ALBERT
        (4, 9, [0, 0, 0, 0], [0, 0, 0, 0]),
        (3, 1, [0, 1, 2], [0, 1, 2]),  # nothing is shared
    ],
)
def test_patterns_by_hand(size, group, sequence, cycle):
    for pattern, expected in (("sequence", sequence), ("cycle", cycle)):
        assert pattern_of(size, group, pattern) == expected, pattern
        assert getattr(literal, pattern)(size, group) == expected, f"literal {pattern}"


def test_shared_weights_by_hand():
    # Layers 2, 3 and 4 with every weight 3, 6 and 12: first 3, last 12, mean 21 / 3 = 7.
    lm = tiny_lm()
    blocks = lm.model.stack.blocks[2:5]
    parts = [map_weights(b, lambda w, x=x: w * 0 + x) for b, x in zip(blocks, (3, 6, 12))]
    mean = combined("layer_fusion", parts, [1 / 3] * 3)
    assert {float(w.flat[0]) for w in weights(mean).values()} == {7}
    assert {float(w.flat[-1]) for w in weights(mean).values()} == {7}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(size=3, first=2), [0, 1, 2, 2, 2, 5]),
        (dict(size=4, first=1, group=2), [0, 1, 1, 3, 3, 5]),
        (dict(size=4, first=1, group=2, pattern="cycle"), [0, 1, 2, 1, 2, 5]),
        (dict(size=None, first=0), [0] * 6),
        (dict(size=99), [0] * 6),
        (dict(size=2, first=4, weights="mean"), [0, 1, 2, 3, 4, 4]),
    ],
)
def test_places_by_hand(options, expected):
    assert sets_of(models(**options)[1]) == expected


# Against the literal version ---------------------------------------------------------------------


@family
@each_setting
def test_logits_equal_the_literal_version(family, options):
    dense, lm = models(family, **options)
    size, first = options["size"] or L, options["first"]
    sets = getattr(literal, options["pattern"])(size, options["group"] or size)
    expected = literal.run(dense.model, IDS, first, sets, options["weights"])
    close(lm.logits(IDS), expected, "logits differ")
    assert abs(expected - dense.logits(IDS)).max() > 1e-3, "sharing changed nothing"


@family
def test_neutral_is_the_dense_model_itself(family):
    for options in (dict(group=1), dict(size=1)):
        dense, lm = models(family, np.float32, **options)
        assert repr(lm) == repr(dense) and nbytes(lm) == nbytes(dense)


# What is shared and what is not ------------------------------------------------------------------


@family
@each_setting
def test_memory_falls_by_the_formula_on_the_card_and_nothing_else_does(family, options):
    dense, lm = models(family, np.float32, **options)
    n, group = options["size"] or L, options["group"] or options["size"] or L
    gone = n - -(-n // group)
    block = sum(w.nbytes for w in weights(dense.model.stack.blocks[0]).values())
    assert nbytes(dense) - nbytes(lm) == gone * block
    totals = []
    for one in (dense, lm):
        with counting(one) as counts:
            one.generate(IDS[:5], 4)
        totals.append(counts.total())
    assert totals[0] == totals[1], "multiply-adds and bytes read are those of the dense model"


def test_each_layer_keeps_cache_rows_of_its_own():
    _, lm = models(**SETTINGS[0])
    state = lm.model.new_state()
    lm.model(IDS[:9], state)
    assert [layer.count for layer in state.layers] == [9] * L
    assert (state.layers[0].keys[..., :9, :] != state.layers[3].keys[..., :9, :]).any()


@each_setting
def test_chunks_and_rewinding(options):
    _, lm = models(**options)
    state = lm.model.new_state()
    once = in_chunks(lm, IDS, (20, *[1] * 20), state)
    close(once, lm.logits(IDS), "in chunks, logits differ")
    state.rewind(20)
    assert_same(in_chunks(lm, IDS[20:], (1,) * 20, state), once[20:])


def test_the_tree_shows_which_layers_share():
    text = repr(models(**SETTINGS[0])[1])
    assert "blocks.3: Block, the same as blocks.0" in text
    assert "blocks.5: Block, the same as blocks.2" in text


def test_quantized_matrices_stay_shared():
    lm = apply(tiny_lm(), {"quantize": dict(bits=8), "layer_fusion": SETTINGS[0]})
    assert sets_of(lm) == [0, 1, 2, 0, 1, 2]


def test_a_written_model_shares_as_before(tmp_path):
    _, lm = models(dtype=np.float32, **SETTINGS[1])
    write_precomputed(lm, tmp_path / "out", Origin("tiny", "--layer-fusion"), None)
    model, _ = read_precomputed(tmp_path / "out")
    assert_same(model(IDS), lm.logits(IDS))
    assert nbytes(model) == nbytes(lm.model), "it is stored once per layer"


# Which layers ------------------------------------------------------------------------------------


def test_the_place_with_the_lowest_calibration_loss_is_chosen():
    lm = tiny_lm()
    texts = calibration_ids("layer_fusion", lm, 2)
    starts = range(L - 1)
    fused = {f: apply(lm, {"layer_fusion": dict(size=2, first=f)}) for f in starts}
    losses = [mean_loss(fused[f], texts) for f in starts]
    found = apply(lm, {"layer_fusion": dict(size=2, stories=2)})
    assert repr(found) == repr(fused[int(np.argmin(losses))]), losses
    # ties, to six digits, go to the earlier place
    assert least_loss("x", [4, 2, 3], lambda f: fused[2], texts) == 4


def test_random_places_are_drawn_by_seed():
    seen = {str(sets_of(models(size=2, choose="random", seed=s)[1])) for s in range(40)}
    assert len(seen) == L - 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(first=4), "layer_fusion: first is 4; expected at most 2, since 4 of the 6 layers"),
        (dict(group=0), "layer_fusion: group must be an integer, at least 1, or None; got 0"),
        (dict(weights="best"), "weights must be one of first, last, mean; got 'best'"),
        (dict(pattern="reverse"), "pattern must be one of sequence, cycle; got 'reverse'"),
    ],
)
def test_refusals_are_one_clear_sentence(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        models(**options)
    assert "\n" not in str(caught.value)


def test_layers_of_different_shapes_have_no_mean():
    lm = tiny_lm()
    blocks = list(lm.model.stack.blocks[:2])
    blocks[1] = map_weights(blocks[1], lambda w: w[..., :-1])
    with pytest.raises(MinitxError, match="layer_fusion adds up .* another type or shape"):
        combined("layer_fusion", blocks, [0.5, 0.5])
    with pytest.raises(MinitxError, match="a Block has another type or shape"):
        combined("layer_fusion", [blocks[0], blocks[0].ffn], [0.5, 0.5])


# Training ----------------------------------------------------------------------------------------


@family
def test_the_gradient_of_shared_weights_is_the_sum_over_their_layers(family):
    """Against central differences."""
    model = apply(tiny_lm(family, layers=3), {"layer_fusion": dict(size=None)}).model
    ids, targets, weight = IDS[:6], IDS[1:7], np.ones(6)

    def loss(model):
        return cross_entropy(model(ids), targets, weight) / 6

    _, found, _ = gradients(model, loss)
    assert not any("blocks.1." in path for path in found), "the weights of layer 1 are those of 0"
    rng, step = np.random.default_rng(1), 1e-6
    for path in ("stack.blocks.0.attn.qkv.k.w", "stack.blocks.0.ffn.down.w"):
        target = weights(model)[path]
        direction = rng.standard_normal(target.shape)

        def moved(sign, target=target, direction=direction):
            return map_weights(model, lambda w: w + sign * step * direction if w is target else w)

        expected = float(loss(moved(1)) - loss(moved(-1))) / (2 * step)
        assert float((found[path] * direction).sum()) == pytest.approx(expected, rel=1e-5), path


# Figures -----------------------------------------------------------------------------------------


def test_on_stories_late_layers_can_share_and_early_ones_cannot():
    lm = minitx.load("stories")
    texts = calibration_ids("layer_fusion", lm, 2)
    dense = mean_loss(lm, texts)

    def added(**options):
        return mean_loss(apply(lm, {"layer_fusion": options}), texts) - dense

    costs = [added(first=first) for first in range(5)]
    assert sets_of(apply(lm, {"layer_fusion": {}})) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert -0.002 < costs[4] < 0.03, "the place that the default chooses"
    assert 0.1 < costs[1] < 0.8 and costs[4] < np.mean(costs) / 20, "no better than at random"
    assert 3 < added(size=None, weights="mean") < 12, "ALBERT, without training for it"
    assert 0.08 < added(size=None, group=2, pattern="cycle") < 0.4
    assert 1 < added(size=None, group=2) < 5, "sequence"
