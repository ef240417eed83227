"""Gradients of whole models of each family: against central differences in float64, and against
torch's autograd (tests/reference/grad/make.py)."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from minitx import fast, tree
from minitx.build import build, shapes
from minitx.config import Config
from minitx.training.autograd import gradients
from minitx.training.autograd.array import Traced
from minitx.training.loss import cross_entropy

REFERENCE = Path(__file__).parents[2] / "reference" / "grad" / "grad.npz"

SIZES = dict(vocab_size=11, width=6, layers=2, hidden=7, context=8)
LLAMA = dict(SIZES | {"width": 8}, family="llama", heads=4, kv_heads=2, head_width=4, rope_width=4)
GPT2 = dict(SIZES, family="gpt2", heads=2, kv_heads=2, head_width=3, activation="gelu_tanh")
NEOX = dict(
    SIZES | {"width": 8}, family="gpt_neox", heads=2, kv_heads=2, head_width=4, activation="gelu"
)
BIASES = dict(qkv_bias=True, out_bias=True, ffn_bias=True)
MODELS = {
    "llama": Config(**LLAMA),
    "llama tied, biases": Config(**LLAMA, **BIASES, tied=True),
    "llama, one key head": Config(**LLAMA | {"kv_heads": 1}),
    "gpt2": Config(**GPT2, **BIASES, tied=True),
    "gpt2 relu, untied": Config(**GPT2 | {"activation": "relu"}, **BIASES),
    "neox parallel": Config(**NEOX, **BIASES, rope_width=2, parallel=True),
    "neox serial": Config(**NEOX, **BIASES, rope_width=4, tied=True),
}


def model_of(config, seed=0, dtype=np.float64):
    """Random weights, with gains other than 1 and biases other than 0."""
    rng = np.random.default_rng(seed)
    return build(
        config,
        lambda path, s: (rng.standard_normal(s) * 0.5 + path.endswith("gain")).astype(dtype),
    )


def example(config, B=2, T=6):
    rng = np.random.default_rng(5)
    ids, targets = rng.integers(0, config.vocab_size, (2, B, T))
    return ids, targets, rng.random((B, T))


def loss_on(ids, targets, weights):
    return lambda model: cross_entropy(model(ids), targets, weights) / weights.sum()


@pytest.mark.parametrize("name", MODELS)
def test_model_gradients_equal_central_differences(monkeypatch, name):
    """Directional derivatives: one direction per weight, and one through all weights."""
    monkeypatch.setattr(fast, "ROWS", 4)
    config = MODELS[name]
    model, loss = model_of(config), loss_on(*example(config))
    value, found, extra = gradients(model, loss)
    weights = tree.weights(model)
    assert extra is None and value == float(loss(model))
    assert found.keys() == weights.keys() == shapes(config).keys()
    rng = np.random.default_rng(1)
    direction = {path: rng.standard_normal(w.shape) for path, w in weights.items()}
    for chosen in [set(weights), *({path} for path in weights)]:

        def moved(path, shape, step, chosen=chosen):
            return weights[path] + step * direction[path] * (path in chosen)

        ends = [float(loss(build(config, partial(moved, step=step)))) for step in (1e-6, -1e-6)]
        expected = (ends[0] - ends[1]) / 2e-6
        got = sum((found[p] * direction[p]).sum() for p in chosen)
        size = np.sqrt(sum((found[p] ** 2).sum() for p in chosen))
        assert abs(got - expected) < 1e-6 * max(size, abs(expected)) + 1e-9, chosen


@pytest.mark.parametrize("name", MODELS)
def test_traced_forward_stays_float32_and_equals_the_plain_one(monkeypatch, name):
    monkeypatch.setattr(fast, "ROWS", 4)
    made = []
    init = Traced.__init__

    def record(self, value, backward=None):
        init(self, value, backward)
        made.append(self)

    monkeypatch.setattr(Traced, "__init__", record)
    config = MODELS[name]
    model = model_of(config, dtype=np.float32)
    ids, targets, weights = example(config)

    def loss(traced):
        logits = traced(ids)
        return cross_entropy(logits, targets, weights), logits

    value, found, logits = gradients(model, loss)
    assert {t.dtype for t in made} == {np.dtype(np.float32)}
    assert {g.dtype for g in found.values()} == {np.dtype(np.float32)}
    assert isinstance(logits, np.ndarray) and np.array_equal(logits, model(ids))


def test_gradient_of_tied_embeddings_is_the_sum_of_both_uses():
    config = Config(**LLAMA)
    tied = Config(**LLAMA, tied=True)
    model = model_of(tied)
    weights = tree.weights(model)
    apart = build(config, lambda p, s: weights["embed.w"].T.copy() if p == "head.w" else weights[p])
    loss = loss_on(*example(config))
    together, separate = gradients(model, loss)[1], gradients(apart, loss)[1]
    assert np.allclose(together["embed.w"], separate["embed.w"] + separate["head.w"].T, atol=1e-14)


def test_gradients_are_new_contiguous_arrays():
    model = model_of(Config(**LLAMA, tied=True))
    before = {p: w.copy() for p, w in tree.weights(model).items()}
    _, found, _ = gradients(model, loss_on(*example(model.config)))
    for g in found.values():
        assert g.flags.c_contiguous and g.flags.owndata and g.flags.writeable
        g += 1
    assert all(np.array_equal(w, before[p]) for p, w in tree.weights(model).items())


# Against torch -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_model_gradients_equal_torch(name):
    """The reference has torch's gradients for the same weights and tokens."""
    config = MODELS[name]
    value, found, _ = gradients(model_of(config), loss_on(*example(config)))
    with np.load(REFERENCE, allow_pickle=False) as stored:
        expected = stored[name]
    assert value == pytest.approx(expected[0], rel=1e-12)
    expected = expected[1:]
    for path, g in found.items():
        theirs, expected = expected[: g.size].reshape(g.shape), expected[g.size :]
        assert np.abs(g - theirs).max() < 1e-11 * max(np.abs(theirs).max(), 0.01), path
    assert not expected.size
