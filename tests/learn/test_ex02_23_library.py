"""The solutions of exercises 2, 4, 5, 6 and 23 do what the library does."""

import numpy as np
from same import assert_same

from minitx import ops
from minitx.decode import Sampler
from minitx.learn import ex02_rotary, ex04_sampling, ex05_kv_cache
from minitx.state import Layer


def test_exercise_2_equals_rotate_with_its_tables():
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((5, 8)), np.array([3, 0, 11, 7, 4])
    cos, sin = ops.rope_tables(8, 12, 500.0, np.float64)
    expected = ops.rotate(x, cos[positions], sin[positions])
    found = ex02_rotary.rotate(x, positions, 500.0)
    assert_same(found, expected, "rotated rows", tolerance=1e-12)


def test_exercise_4_equals_the_sampler():
    rng = np.random.default_rng(0)
    for temperature, top_k, top_p in ((0.7, 5, 0.8), (1.3, 12, 0.5), (2.0, 3, 1.0), (0.0, 4, 0.9)):
        logits = 5 * rng.standard_normal(12)
        expected = Sampler(temperature, top_k, top_p, seed=0).probabilities(logits)
        found = ex04_sampling.probabilities(logits, temperature, top_k, top_p)
        assert_same(found, expected, "probabilities", axes=("token",), tolerance=1e-12)


def test_exercise_5_equals_a_layer_also_after_a_rewind():
    rng = np.random.default_rng(0)
    layer = Layer(8)
    cache = ex05_kv_cache.Cache(8, 2, 4, ex05_kv_cache.rotate)
    for T, keep in ((3, 3), (4, 5), (1, 6), (2, 8)):
        k, v = rng.standard_normal((2, 2, T, 4))
        layer.take(T)
        layer.store(ex05_kv_cache.rotate(k, layer.tokens.array), v)
        for found, expected in zip(cache.append(k, v), layer.rows()):
            assert_same(found, expected, "cached rows", axes=("head", "token", "column"))
        layer.rewind(keep)
        cache.rewind(keep)
