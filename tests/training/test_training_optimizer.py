"""AdamW against its literal version, Muon against an SVD; schedules, clipping and layout by
hand."""

import math

import numpy as np
import pytest

from minitx.build import random_model
from minitx.config import Config
from minitx.training.optimizer import (
    EPSILON,
    ParameterLayout,
    adamw,
    clip_factor,
    has_weight_decay,
    is_block_matrix,
    learning_rate,
    muon,
    orthogonalize,
)
from minitx.tree import weights

CONFIG = Config("gpt2", 11, 8, 2, 2, 2, 4, 16, 9, activation="relu", tied=True, qkv_bias=True)


def literal_adamw(w, gradients, lr, betas, decay):
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


def test_adamw_equals_the_literal_version():
    rng = np.random.default_rng(0)
    w, decay = rng.standard_normal(20), rng.choice([0.0, 0.1], 20)
    gradients = rng.standard_normal((7, 20)) * 10.0 ** rng.integers(-6, 2, 20)
    expected = literal_adamw(w, gradients, 0.01, (0.9, 0.95), decay)
    m, v = np.zeros(20), np.zeros(20)
    for t, g in enumerate(gradients, 1):
        adamw(w, g.copy(), m, v, t, 0.01, (0.9, 0.95), decay)
    for a, b in zip((w, m, v), expected):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-15)


def test_adamw_stays_float32_and_is_independent_of_slicing():
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


def test_adamw_first_step_is_about_lr_for_any_gradient():
    w = np.zeros(3)
    adamw(w, np.array([1e-3, -5.0, 2e4]), np.zeros(3), np.zeros(3), 1, 0.01, (0.9, 0.99), 0.0)
    np.testing.assert_allclose(w, [-0.01, 0.01, -0.01], rtol=1e-4)


def test_learning_rate_schedules_by_hand():
    def rates(schedule, steps):
        return [learning_rate(s, 9, 1.0, 4, schedule, 0.2) for s in steps]

    np.testing.assert_allclose(rates("constant", range(6)), [0.25, 0.5, 0.75, 1, 1, 1])
    # From step 4 (full rate) to step 8 (the last): cos of 0, 45, 90, 135, 180 degrees.
    half = math.sqrt(0.5)
    cosine = [0.2 + 0.4 * (1 + c) for c in (1, half, 0, -half, -1)]
    np.testing.assert_allclose(rates("cosine", range(4, 9)), cosine)
    assert learning_rate(0, 1, 3.0, 0, "cosine", 0.1) == 3.0


def test_clip_factor_limits_the_norm():
    assert clip_factor(4.0, 1.0) == 0.25
    assert clip_factor(0.5, 1.0) == clip_factor(5.0, 0.0) == 1.0


def test_layout_flattens_and_views_every_weight():
    model, layout = random_model(CONFIG, 3), ParameterLayout(CONFIG)
    flat = np.full(layout.size, np.nan, np.float32)
    layout.flatten(weights(model), flat)
    assert np.isfinite(flat).all()
    seen = layout.model(flat)
    for path, w in weights(seen).items():
        np.testing.assert_array_equal(w, weights(model)[path])
        assert np.shares_memory(w, flat)
    assert seen.head.w is seen.embed.tokens.w
    flat[:] = 0
    assert not weights(seen)["norm.gain"].any()
    layout.flatten({}, flat := np.ones(layout.size, np.float32))
    assert not flat.any()


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_applies_to_matrices_only(tied):
    config = Config("gpt2", 11, 8, 2, 2, 2, 4, 16, 9, tied=tied, qkv_bias=True, ffn_bias=True)
    layout = ParameterLayout(config)
    decayed = {path for path in layout.slots if has_weight_decay(path)}
    kept = set(layout.slots) - decayed
    assert {path for path in layout.slots if is_block_matrix(path)} == decayed - {"head.w"}
    block = "stack.blocks.0."
    assert {"embed.w", "embed.tokens.w", "norm.gain", "norm.bias"} <= kept
    assert {block + "attn.qkv.q.b", block + "ffn.expand.up.b", block + "attn.norm.gain"} <= kept
    assert {block + "attn.qkv.q.w", block + "attn.out.w", block + "ffn.down.w"} <= decayed
    assert ("head.w" in decayed) == (not tied)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 500])
def test_layout_blocks_contain_every_weight_once(count):
    layout = ParameterLayout(CONFIG)
    blocks = layout.blocks(count)
    assert len(blocks) == count
    assert [path for block in blocks for path in block] == list(layout.slots)
    ends = [layout.slice_of(block) for block in blocks if block]
    assert [where.start for where in ends] == [0, *[where.stop for where in ends[:-1]]]
    assert ends[-1].stop == layout.size
    largest = max(where.stop - where.start for where, _ in layout.slots.values())
    assert max(where.stop - where.start for where in ends) <= layout.size / count + largest


# Muon --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5)])
def test_orthogonalize_sets_singular_values_to_about_one(shape):
    """Five steps of the published polynomial on each singular value."""
    g = np.random.default_rng(0).standard_normal(shape)
    u, sizes, vt = np.linalg.svd(g, full_matrices=False)
    assert sizes[0] > 2 * sizes[-1]
    sizes = sizes / np.linalg.norm(sizes)
    for _ in range(5):
        sizes = 3.4445 * sizes - 4.7750 * sizes**3 + 2.0315 * sizes**5
    assert 0.6 < sizes.min() and sizes.max() < 1.3
    np.testing.assert_allclose(orthogonalize(g), (u * sizes) @ vt, atol=1e-5)
    assert orthogonalize(g.astype(np.float32)).dtype == np.float32


def test_muon_two_steps_by_hand():
    """Two steps: momentum, Nesterov look-ahead, weight decay."""
    rng = np.random.default_rng(1)
    w, g1, g2 = rng.standard_normal((3, 4, 7))
    m, first = np.zeros((4, 7)), w.copy()
    muon(w, g1.copy(), m, 0.1, 0.9, 0.5)
    length = 0.1 * 0.2 * math.sqrt(7)
    np.testing.assert_allclose(w, first * 0.95 - length * orthogonalize(g1 * 1.9))
    before = w.copy()
    muon(w, g2.copy(), m, 0.1, 0.9, 0.5)
    total = 0.9 * g1 + g2
    np.testing.assert_allclose(m, total)
    np.testing.assert_allclose(w, before * 0.95 - length * orthogonalize(g2 + 0.9 * total))


def test_muon_with_zero_gradients_only_decays():
    w, m = np.ones((3, 3), np.float32), np.zeros((3, 3), np.float32)
    muon(w, m.copy(), m, 0.1, 0.9, 0.5)
    np.testing.assert_array_equal(w, np.full((3, 3), 0.95, np.float32))
