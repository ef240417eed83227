"""The solutions of exercises 2, 4, 5, 6 and 23 do what the library does."""

import numpy as np
from same import assert_same
from tiny import tiny_model

from minitx import ledger, ops
from minitx.decode import Autoregressive, Sampler
from minitx.learn import ex02_rotary, ex04_sampling, ex05_kv_cache, ex06_cost
from minitx.learn import ex23_answer_key as exercise
from minitx.shared.answer_key import key_of, request
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


def test_exercise_6_equals_what_the_ledger_counts_and_the_cache_holds():
    model = tiny_model("llama")
    state = model.new_state()
    model.hidden([5, 6, 7, 8], state)
    with ledger.counting(model) as counts:
        model.next_logits([9], state)
    assert counts.total().multiply_adds == ex06_cost.multiply_adds(model.config, 1, 5)
    held = sum(rows.nbytes for layer in state.layers for rows in layer.rows())
    assert held == ex06_cost.cache_bytes(model.config, 5)


def library_key(wanted):
    """minitx's own key of a request of exercise 23."""
    dtype = {"float32": np.float32, "float16": np.float64}[wanted["dtype"]]
    model = tiny_model("llama", 2 if wanted["model"] == "another" else 1, dtype)
    choose = Sampler(*(wanted[name] for name in ("temperature", "top_k", "top_p", "seed")))
    fields = request(model, Autoregressive(), choose, wanted["max_new_tokens"])
    return fields and key_of(fields | {"prompt": wanted["prompt"]})


def test_exercise_23_shares_keys_where_the_library_does():
    numbers = (7, 500, 321, 40)
    greedy, sampled = (pairs(*numbers) for pairs in (exercise.greedy_pairs, exercise.sampled_pairs))
    compared = 0
    for difference, first, second in greedy + sampled:
        if {"stop"} & {*first, *second} or first["techniques"] != second["techniques"]:
            continue  # the tiny models here have neither
        if difference.endswith("at temperature 0"):
            continue  # the library keeps them for majority vote, which samples even then
        mine, library = (
            exercise.served(key, first, second) for key in (exercise.request_key, library_key)
        )
        assert mine == library, difference
        compared += 1
    assert compared > 15


def test_exercise_4_shows_how_many_tokens_each_setting_leaves():
    left = ex04_sampling.show(ex04_sampling.EXERCISE.solution).splitlines()[-1].split()
    V, halved, top_k, top_p = map(int, left[-4:])
    assert V == halved > top_p > 1, "a temperature drops no token, top_p does"
    assert top_k == 3
