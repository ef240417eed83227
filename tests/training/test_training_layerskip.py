"""LayerSkip's training recipe: worked numbers, and what the wrapped blocks compute."""

from dataclasses import replace

import numpy as np
import pytest

from minitx.build import random_model
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Stack
from minitx.training.autograd import gradients
from minitx.training.layerskip import (
    drop_layers,
    dropout_by_depth,
    exit_logits,
    exit_loss,
    exit_scales,
    exit_weights,
    record,
    sample_layer_mask,
    shallow,
)
from minitx.training.loss import cross_entropy
from minitx.tree import rebuild, weights

CONFIG = Config("llama", 23, 12, 4, 2, 1, 6, 20, 16, rope_width=6)
MODEL = random_model(CONFIG, 1, np.float64)
IDS = np.random.default_rng(0).integers(0, 23, (3, 9))


def first_blocks(model, depth):
    return rebuild(
        model, lambda n: replace(n, blocks=n.blocks[:depth]) if isinstance(n, Stack) else None
    )


def test_dropout_by_depth_by_hand():
    """exp(l ln 2 / 3) - 1 = 2^(l/3) - 1: 0, 1.2599 - 1, 1.5874 - 1, 2 - 1."""
    np.testing.assert_allclose(dropout_by_depth(4), [0, 0.2599, 0.5874, 1], atol=5e-5)
    assert dropout_by_depth(1) == [0]


def test_exit_scales_and_weights_by_hand():
    """L = 4, scale 0.2: e = 0.2 * (0, 1, 3), and 3 + 0.2 * 3 = 3.6 for the last; their sum is 4.4.
    With layers 1 and 3 alone the sum is 3.8: 0.2 / 3.8 = 0.05263."""
    np.testing.assert_allclose(exit_scales(4, 0.2), [0, 0.2, 0.6, 3.6])
    every = exit_weights(4, 0.2, 1, 5)  # rotation 1: all are on, but l = 0 has weight 0
    np.testing.assert_allclose(list(every.values()), [0.04545, 0.13636, 0.81818], atol=5e-6)
    assert list(every) == [1, 2, 3]
    two = exit_weights(4, 0.2, 4, 9)  # 9 = 1 modulo 4
    assert list(two) == [1, 3]
    np.testing.assert_allclose(list(two.values()), [0.05263, 0.94737], atol=5e-6)
    assert exit_weights(4, 0.2, 4, 8) == {3: 1.0}  # only l = 0, and always the last
    assert exit_weights(1, 0.2, 4, 8) == {0: 1.0}


@pytest.mark.parametrize("rotation", [1, 3, 5])
def test_exit_weights_turn_each_layer_on_once_per_rotation(rotation):
    on = [layer for t in range(rotation) for layer in exit_weights(8, 1.0, rotation, t)]
    assert sorted(set(on)) == list(range(1, 8))
    assert all(on.count(layer) == 1 for layer in range(1, 7))
    for t in range(rotation):
        assert sum(exit_weights(8, 1.0, rotation, t).values()) == pytest.approx(1)


def test_layer_mask_follows_the_dropout_rates_and_depends_on_the_row():
    mask = sample_layer_mask(5, 0.4, 7, range(4000))
    np.testing.assert_allclose(1 - mask.mean(1), 0.4 * np.array(dropout_by_depth(5)), atol=0.03)
    assert mask[0].all() and mask.dtype == np.float32
    np.testing.assert_array_equal(sample_layer_mask(5, 0.4, 7, range(10, 13)), mask[:, 10:13])
    assert (sample_layer_mask(5, 0.4, 8, range(4000)) != mask).any(), "the seed changes nothing"


def test_dropping_no_layer_equals_the_model():
    np.testing.assert_array_equal(drop_layers(MODEL, np.ones((4, 3)))(IDS), MODEL(IDS))


def test_a_dropped_layer_is_skipped_by_its_rows_only():
    mask = np.ones((4, 3))
    mask[3, 1] = 0  # row 1 skips the last layer
    got = drop_layers(MODEL, mask)(IDS)
    np.testing.assert_array_equal(got[[0, 2]], MODEL(IDS)[[0, 2]])
    np.testing.assert_array_equal(got[1], first_blocks(MODEL, 3)(IDS)[1])


def test_no_gradient_flows_through_a_dropped_layer():
    targets, ones = IDS[:, 1:], np.ones((3, 8))

    def loss(model):
        return cross_entropy(drop_layers(model, mask)(IDS[:, :-1]), targets, ones)

    mask = np.ones((4, 3))
    mask[2] = 0
    _, found, _ = gradients(MODEL, loss)
    assert set(found) == set(weights(MODEL))
    for path, g in found.items():
        assert g.any() != path.startswith("stack.blocks.2."), path


def test_recorded_hidden_states_equal_those_of_shallower_models():
    recorded, hidden = record(MODEL)
    logits = recorded(IDS)
    np.testing.assert_array_equal(logits, MODEL(IDS))
    for depth, x in enumerate(hidden, 1):
        np.testing.assert_array_equal(x, first_blocks(MODEL, depth).hidden(IDS))


def test_shallow_model_equals_its_first_blocks():
    for layers in (1, 3, 4):
        np.testing.assert_array_equal(shallow(MODEL, layers)(IDS), first_blocks(MODEL, layers)(IDS))
        assert shallow(MODEL, layers).stack.blocks == MODEL.stack.blocks[:layers]
    np.testing.assert_array_equal(shallow(MODEL, None)(IDS), MODEL(IDS))
    assert (shallow(MODEL, 3)(IDS) != MODEL(IDS)).any()


def test_exit_loss_equals_the_weighted_loss_of_shallower_models():
    ids, targets, ones = IDS[:, :-1], IDS[:, 1:], np.ones((3, 8))

    def loss(logits):
        return cross_entropy(logits, targets, ones)

    on = exit_weights(4, 0.2, 2, 1)
    found, _, _ = gradients(MODEL, lambda m: exit_loss(exit_logits(m, ids), on, loss))
    expected = 0.2 / 3.8 * loss(first_blocks(MODEL, 2)(ids)) + 3.6 / 3.8 * loss(MODEL(ids))
    assert found == pytest.approx(expected, rel=1e-12)


def test_record_refuses_a_model_without_a_plain_stack():
    with pytest.raises(MinitxError, match="type Stack"):
        record(MODEL.stack.blocks[0])
