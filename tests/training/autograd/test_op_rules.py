"""Gradient rules of the operations of minitx/ops.py and of the loss, against central
differences."""

import numpy as np
import pytest
from differences import check, draw
from tiny import padded_mask

from minitx import fast, ops
from minitx.training.autograd import grad_of
from minitx.training.autograd.array import RULES
from minitx.training.loss import cross_entropy, token_losses

A, B = draw(3, 4), draw(3, 4, seed=1)

# Operations of ops.py ------------------------------------------------------------------------


def test_norm_gradients():
    x, gain, bias = draw(2, 3, 6), draw(6, low=0.5), draw(6, seed=3)
    check(lambda x, gain: ops.rms_norm(x, gain, 1e-5), x, gain)
    check(lambda x, gain, bias: ops.layer_norm(x, gain, bias, 1e-5), x, gain, bias)
    check(lambda x: ops.rms_norm(x, gain, 0.3), x[0, 0])
    check(lambda x: ops.layer_norm(x, gain, bias, 0.3), x[0])
    check(
        lambda gain: ops.rms_norm(x, gain, 1e-5), gain
    )  # plain x: by the rules of its NumPy functions
    check(lambda gain, bias: ops.layer_norm(x, gain, bias, 1e-5), gain, bias)


@pytest.mark.parametrize("name", ops.ACTIVATIONS)
def test_activation_gradients(name):
    check(ops.ACTIVATIONS[name], draw(4, 5) * 2)


def test_swiglu_gradient():
    check(ops.swiglu, draw(2, 3, 4), draw(2, 3, 4, seed=1))
    check(lambda gate: ops.swiglu(gate, A), B)


def test_linear_gradient():
    for lead in ((), (3,), (2, 3), (2, 1, 3)):
        check(lambda x, w, b: ops.linear(x, w, b), draw(*lead, 4), draw(4, 5), draw(5))
        check(ops.linear, draw(*lead, 4), draw(4, 5))


@pytest.mark.parametrize("width", [2, 4, 6])
def test_rotate_gradient(width):
    cos, sin = ops.rope_tables(width, 9, 100.0, np.float64)
    check(lambda x: ops.rotate(x, cos[2:7], sin[2:7]), draw(2, 3, 5, 6))
    check(lambda x: ops.rotate(x, cos[2:7], sin[2:7]), draw(2, 5, 3, 6).swapaxes(1, 2))


@pytest.mark.parametrize("rows", [64, 2])
@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("H,K", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("T,S", [(5, 5), (3, 7), (1, 4), (1, 1)])
def test_attention_gradient(monkeypatch, rows, lead, H, K, T, S):
    monkeypatch.setattr(fast, "ROWS", rows)
    q, k, v = draw(*lead, H, T, 3), draw(*lead, K, S, 3, seed=1), draw(*lead, K, S, 3, seed=2)
    check(lambda q, k, v: ops.attention(q, k, v, 0.7), q, k, v)


@pytest.mark.parametrize("rows", [64, 2])
def test_attention_gradient_in_a_padded_batch(monkeypatch, rows):
    monkeypatch.setattr(fast, "ROWS", rows)
    start = np.array([0, 2, 4])
    q, k, v = draw(3, 4, 5, 3), draw(3, 2, 5, 3, seed=1), draw(3, 2, 5, 3, seed=2)
    mask = padded_mask(start, 5)
    check(lambda q, k, v: ops.attention(q, k, v, 0.7, mask), q, k, v)


def test_every_operation_has_a_gradient_rule():
    marked = {f for f in vars(ops).values() if hasattr(f, "plain")}
    assert len(marked) == 9 and marked <= set(RULES)


# Losses --------------------------------------------------------------------------------------


def test_cross_entropy_value_and_gradient():
    x, targets = draw(2, 3, 5) * 3, np.array([[0, 4, 2], [2, 2, 1]])
    weights = np.array([[1, 0, 0.5], [2, 1, 1]])
    losses = token_losses(x, targets)
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    by_hand = [[-np.log(p[i, j, targets[i, j]]) for j in range(3)] for i in range(2)]
    assert np.allclose(losses, by_hand, rtol=1e-12)
    assert cross_entropy(x, targets, weights) == pytest.approx((losses * weights).sum(), rel=1e-12)
    check(lambda x: cross_entropy(x, targets, weights), x)
    check(lambda x: cross_entropy(x, targets, weights) / weights.sum(), x)
    check(lambda x: cross_entropy(x, np.array(3), np.array(2.0)), x[0, 0])
    check(lambda x: cross_entropy(x, targets, np.ones((2, 3), np.float32)), x)


def test_cross_entropy_of_huge_logits_does_not_overflow():
    x = np.array([[1e4, -1e4, 0.0], [-1e4, 0, 1e4]], np.float32)
    value, (g,) = grad_of(lambda x: cross_entropy(x, np.array([0, 0]), np.ones(2)), x)
    assert value == 2e4 and g.dtype == np.float32
    assert np.array_equal(g, [[0, 0, 0], [-1, 0, 1]])


def test_cross_entropy_of_shards_adds_up():
    x, targets, weights = draw(6, 5), np.arange(6) % 5, draw(6, low=0.0)
    whole = cross_entropy(x, targets, weights)
    parts = [cross_entropy(x[s], targets[s], weights[s]) for s in (slice(0, 2), slice(2, 6))]
    assert whole == pytest.approx(sum(parts), rel=1e-14)
