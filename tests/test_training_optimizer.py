"""AdamW against a loop over single numbers; schedule and clipping against values worked by hand."""

import math

import numpy as np
import pytest

from minitx.build import random_model
from minitx.config import Config
from minitx.training.optimizer import EPSILON, Layout, adamw, clip_factor, learning_rate
from minitx.tree import weights

CONFIG = Config("gpt2", 11, 8, 2, 2, 2, 4, 16, 9, activation="relu", tied=True, qkv_bias=True)


def slow_adamw(w, gradients, lr, betas, decay):
    """Loshchilov and Hutter (2019), algorithm 2, one number at a time."""
    w, m, v = list(w), [0.0] * len(w), [0.0] * len(w)
    for t, g in enumerate(gradients, 1):
        for i in range(len(w)):
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g[i]
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g[i] ** 2
            m_hat = m[i] / (1 - betas[0] ** t)
            v_hat = v[i] / (1 - betas[1] ** t)
            w[i] = w[i] - lr * (m_hat / (math.sqrt(v_hat) + EPSILON) + decay[i] * w[i])
    return np.array(w), np.array(m), np.array(v)


def test_adamw_is_the_slow_loop():
    rng = np.random.default_rng(0)
    w, decay = rng.standard_normal(20), rng.choice([0.0, 0.1], 20)
    gradients = rng.standard_normal((7, 20)) * 10.0 ** rng.integers(-6, 2, 20)
    wanted = slow_adamw(w, gradients, 0.01, (0.9, 0.95), decay)
    m, v = np.zeros(20), np.zeros(20)
    for t, g in enumerate(gradients, 1):
        adamw(w, g.copy(), m, v, t, 0.01, (0.9, 0.95), decay)
    for a, b in zip((w, m, v), wanted):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_adamw_stays_float32_and_does_not_depend_on_slices():
    rng = np.random.default_rng(1)
    w = rng.standard_normal(1000).astype(np.float32)
    g = rng.standard_normal(1000).astype(np.float32)
    whole = [w.copy(), g.copy(), np.zeros_like(w), np.zeros_like(w)]
    parts = [x.copy() for x in whole]
    adamw(*whole, 1, 1e-3, (0.9, 0.95), 0.1)
    for cut in np.array_split(np.arange(1000), 7):
        where = slice(cut[0], cut[-1] + 1)
        adamw(*(x[where] for x in parts), 1, 1e-3, (0.9, 0.95), 0.1)
    for a, b in zip(whole, parts):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)


def test_first_step_is_about_lr_whatever_the_gradient():
    w = np.zeros(3)
    adamw(w, np.array([1e-3, -5.0, 2e4]), np.zeros(3), np.zeros(3), 1, 0.01, (0.9, 0.99), 0.0)
    np.testing.assert_allclose(w, [-0.01, 0.01, -0.01], rtol=1e-4)


def test_learning_rates_by_hand():
    def rates(schedule, steps):
        return [learning_rate(s, 9, 1.0, 4, schedule, 0.2) for s in steps]

    np.testing.assert_allclose(rates("constant", range(6)), [0.25, 0.5, 0.75, 1, 1, 1])
    # From step 4 (full rate) to step 8 (the last): cos of 0, 45, 90, 135, 180 degrees.
    half = math.sqrt(0.5)
    cosine = [0.2 + 0.4 * (1 + c) for c in (1, half, 0, -half, -1)]
    np.testing.assert_allclose(rates("cosine", range(4, 9)), cosine)
    assert learning_rate(0, 1, 3.0, 0, "cosine", 0.1) == 3.0


def test_clipping_limits_the_norm():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == clip_factor(5.0, 0.0) == 1.0


def test_layout_packs_and_shows_every_weight():
    model, layout = random_model(CONFIG, 3), Layout(CONFIG)
    flat = np.full(layout.size, np.nan, np.float32)
    layout.pack(weights(model), flat)
    assert np.isfinite(flat).all()
    seen = layout.model(flat)
    for path, w in weights(seen).items():
        np.testing.assert_array_equal(w, weights(model)[path])
        assert np.shares_memory(w, flat)
    assert seen.head.w is seen.embed.tokens.w
    flat[:] = 0
    assert not weights(seen)["norm.gain"].any()
    layout.pack({}, flat := np.ones(layout.size, np.float32))
    assert not flat.any()


@pytest.mark.parametrize("tied", [True, False])
def test_decay_is_for_matrices_only(tied):
    config = Config("gpt2", 11, 8, 2, 2, 2, 4, 16, 9, tied=tied, qkv_bias=True, ffn_bias=True)
    layout = Layout(config)
    mask = layout.decays()
    decayed = {path for path, (where, _) in layout.slots.items() if mask[where].all()}
    kept = {path for path, (where, _) in layout.slots.items() if not mask[where].any()}
    assert decayed | kept == set(layout.slots)
    block = "stack.blocks.0."
    assert {"embed.w", "embed.tokens.w", "norm.gain", "norm.bias"} <= kept
    assert {block + "attn.qkv.q.b", block + "ffn.expand.up.b", block + "attn_norm.gain"} <= kept
    assert {block + "attn.qkv.q.w", block + "attn.out.w", block + "ffn.down.w"} <= decayed
    assert ("head.w" in decayed) == (not tied)
