"""DOTA's joint training: the loss, its gradient, and what the trainer does with detectors.

A recipe without a detector trains as before: that is what test_training.py checks.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_model_gradients import MODELS, example, model_of
from test_training import FIRST, SECOND, TOKENIZER, Alone, recipe_of, write

import minitx
from minitx import fast, tree
from minitx.build import build
from minitx.errors import MinitxError
from minitx.model import split_heads
from minitx.skip.dota.detector import Detector
from minitx.skip.dota.file import read_detectors
from minitx.state import Layer, Tokens
from minitx.training.autograd import grad_of
from minitx.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from minitx.training.detector import (
    Joint,
    joint_gradients,
    joint_loss,
    random_detectors,
    squared_products,
)
from minitx.training.loss import cross_entropy
from minitx.training.recipe import recipe_from
from minitx.training.train import Run, train
from minitx.training.worker import SharedArrays, Worker, layout_of

SHORT = FIRST | {"steps": 3, "layers": 2}
THIRD = FIRST | {"name": "third", "detector": {"k": 4, "weight": 0.02}, "muon": 0.02}


def detectors_for(config, rank=2, seed=3):
    """In float64, and twice as large as those that training begins with."""
    return tuple(
        Detector(*(2.0 * getattr(d, name) for name in ("p", "w_q", "w_k")))
        for d in random_detectors(config, rank, seed)
    )


def as_sum(model, ids, targets, weights):
    return cross_entropy(model(ids), targets, weights)


# The loss ----------------------------------------------------------------------------------------


def literal_error(model, detectors, ids, rows):
    """The mean squared error pair by pair, from a forward pass of its own."""
    squared, x = [], model.embed(ids, slice(0, ids.shape[1]))
    T = ids.shape[1]
    for block, detector in zip(model.stack.blocks, detectors):
        attn, tokens = block.attn, Tokens(slice(0, T))
        read = attn.norm(x)
        q = attn.rope(split_heads(attn.qkv.q(read), attn.heads), tokens)
        k = attn.rope(split_heads(attn.qkv.k(read), attn.kv_heads), tokens)
        rank, G = detector.rank, attn.heads // attn.kv_heads
        for b in range(len(ids)):
            for h in range(attn.heads):
                key_head = h // G
                y = read[b] @ detector.p
                a = y @ detector.w_q[:, h * rank : (h + 1) * rank]
                c = y @ detector.w_k[:, key_head * rank : (key_head + 1) * rank]
                a, c = rotated(attn, a), rotated(attn, c)
                for i in range(T):
                    for j in range(i + 1):
                        if rows[b, i] > 0:
                            s = q[b, h, i] @ k[b, key_head, j] / q.shape[-1] ** 0.5
                            squared.append((s - a[i] @ c[j]) ** 2)
        x = block(x, Layer(T, remember=False).take(T))
    return np.mean(squared)


def rotated(attn, z):
    """Rows z (T, 2) rotated by the slowest angle of the model, if it is rotary."""
    if not hasattr(attn.rope, "cos"):
        return z
    slowest = attn.rope.cos.shape[1] // 2 - 1
    cos, sin = attn.rope.cos[: len(z), slowest], -attn.rope.sin[: len(z), slowest]
    return np.stack([z[:, 0] * cos - z[:, 1] * sin, z[:, 1] * cos + z[:, 0] * sin], 1)


@pytest.mark.parametrize("name", MODELS)
def test_joint_loss_equals_the_literal_version(monkeypatch, name):
    monkeypatch.setattr(fast, "ROWS", 4)  # so that queries come in several blocks
    config = MODELS[name]
    model, detectors = model_of(config), detectors_for(config)
    ids, targets, weights = example(config)
    weights[0, 4:] = 0  # padding: those queries are left out
    expected = literal_error(model, detectors, ids, weights)
    found, value, error = joint_gradients(
        model, detectors, lambda m: as_sum(m, ids, targets, weights), 0.3, weights
    )
    assert value == pytest.approx(float(as_sum(model, ids, targets, weights)), rel=1e-12)
    assert error / weights.sum() == pytest.approx(expected, rel=1e-10)
    both = joint_loss(
        Joint(model, detectors), lambda m: as_sum(m, ids, targets, weights), 0.3, weights
    )[0]
    assert both == pytest.approx(value + 0.3 * error, rel=1e-12)
    assert {path for path in found if path.startswith("detectors.")} == {
        f"detectors.{i}.{w}" for i in (0, 1) for w in ("w_q", "w_k")
    }


@pytest.mark.parametrize("name", MODELS)
def test_joint_gradients_equal_central_differences(monkeypatch, name):
    """Of the model and the detectors: along one direction per weight, and one through all."""
    monkeypatch.setattr(fast, "ROWS", 4)
    config = MODELS[name]
    model, detectors = model_of(config), detectors_for(config)
    ids, targets, weights = example(config)
    weights[1, 5:] = 0
    loss = partial(as_sum, ids=ids, targets=targets, weights=weights)
    found, _, _ = joint_gradients(model, detectors, loss, 0.3, weights)
    arrays = tree.weights(model) | {
        path: w for path, w in tree.weights(Joint(None, detectors)).items()
    }
    assert found.keys() == arrays.keys()
    rng = np.random.default_rng(1)
    direction = {path: rng.standard_normal(w.shape) for path, w in arrays.items()}

    def at(chosen, step):
        moved = {path: w + step * direction[path] * (path in chosen) for path, w in arrays.items()}
        changed = tuple(
            replace(d, w_q=moved[f"detectors.{i}.w_q"], w_k=moved[f"detectors.{i}.w_k"])
            for i, d in enumerate(detectors)
        )
        joint = Joint(build(config, lambda path, shape: moved[path]), changed)
        return float(joint_loss(joint, loss, 0.3, weights)[0])

    for chosen in [set(arrays), *({path} for path in arrays)]:
        expected = (at(chosen, 1e-6) - at(chosen, -1e-6)) / 2e-6
        got = sum((found[path] * direction[path]).sum() for path in chosen)
        size = np.sqrt(sum((found[path] ** 2).sum() for path in chosen))
        assert abs(got - expected) < 1e-6 * max(size, abs(expected)) + 2e-9, chosen


def test_squared_products_gradients_equal_the_closed_form():
    """For one head without rotation, with E = S~ - S on the m pairs that count and Y = X P:
    dW~q = (2/m) Y^T E K~, dW~k = (2/m) Y^T E^T Q~, dWq = -(2/m) X^T E K, dWk = -(2/m) X^T E^T Q."""
    rng = np.random.default_rng(2)
    x, p = rng.standard_normal((5, 4)), rng.standard_normal((4, 2))
    w_q, w_k, wq, wk = (rng.standard_normal(s) for s in ((2, 2), (2, 2), (4, 3), (4, 3)))
    y, m, rows = x @ p, 15, np.ones((1, 5), bool)

    def loss(w_q, w_k, wq, wk):
        left = np.concatenate([np.matmul(y, w_q), -np.matmul(x, wq)], -1)
        right = np.concatenate([np.matmul(y, w_k), np.matmul(x, wk)], -1)
        return squared_products(left[None, None], right[None, None], rows) * (1 / m)

    _, found = grad_of(loss, w_q, w_k, wq, wk)
    a, b, q, k = y @ w_q, y @ w_k, x @ wq, x @ wk
    e = np.tril(a @ b.T - q @ k.T) * (2 / m)
    expected = y.T @ e @ b, y.T @ e.T @ a, -x.T @ e @ k, -x.T @ e.T @ q
    for got, wanted in zip(found, expected):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


# The trainer -------------------------------------------------------------------------------------


class InThisProcess:
    """A pool of one worker, without the time that it takes to start a process."""

    def __init__(self, recipe, layout, memory):
        alone = Alone()
        self.worker = Worker(0, 1, recipe, memory, alone, alone.next_shard)

    def call(self, name, *arguments):
        return [getattr(self.worker, name)(*arguments)]


def train_here(folder, *stages, stop_at=None) -> dict:
    """Train in this process, or go on from the folder's checkpoint, up to so many steps more."""
    folder.mkdir(exist_ok=True)
    recipe = recipe_from(recipe_of(*stages))
    layout = layout_of(recipe, TOKENIZER)
    memory, steps = SharedArrays(layout.size, recipe.shards), []
    run = Run(recipe, layout, memory, folder, False)
    run.load() if (folder / "checkpoint.npz").exists() else run.initialize()
    pool = InThisProcess(recipe, layout, memory)
    if run.train(pool, lambda: len(steps.append(0) or steps) == stop_at):
        run.write_folder(TOKENIZER, write(folder, recipe_of(*stages)))
    return run.log()


def same_results(a, b):
    with np.load(a / "checkpoint.npz") as one, np.load(b / "checkpoint.npz") as other:
        for name in ("weights", "m", "v"):
            np.testing.assert_array_equal(one[name], other[name])
    for name in ("model.safetensors", "dota.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    logs = (json.loads((f / "training_log.json").read_text())["log"] for f in (a, b))
    for ours, theirs in zip(*logs, strict=True):
        assert ours | {"seconds": 0} == theirs | {"seconds": 0}


def test_training_stopped_or_extended_by_a_stage_is_bit_identical(tmp_path):
    stages = SHORT, THIRD
    log = train_here(tmp_path / "whole", *stages)["log"]
    for steps in (1, 3, None):  # in the first stage, and in the one with the detector
        train_here(tmp_path / "stopped", *stages, stop_at=steps)
    train_here(tmp_path / "added", SHORT)
    assert not (tmp_path / "added" / "dota.safetensors").exists()
    train_here(tmp_path / "added", *stages)
    for folder in ("stopped", "added"):
        same_results(tmp_path / "whole", tmp_path / folder)
    assert ["detector_loss" in entry for entry in log] == [False, True, True]
    assert all(entry["detector_loss"] > 0 for entry in log[1:])


def test_training_with_more_workers_is_bit_identical(tmp_path):
    """In processes of their own, where BLAS has one thread, which this one's may not."""
    path = write(tmp_path, recipe_of(THIRD | {"steps": 2}))
    for workers in (1, 2):
        assert train(path, tmp_path / str(workers), workers, bar=False)["finished"]
    same_results(tmp_path / "1", tmp_path / "2")
    lm = minitx.load(tmp_path / "2", dota={"keep": 4})
    assert "fit=trained" in repr(lm) and len(lm.generate("Once", 5)) > 0


def test_detector_weight_0_leaves_the_model_as_it_is_and_more_lowers_the_error(tmp_path):
    stage = FIRST | {"steps": 9, "every": 9, "chain": True}

    def last(name, weight):
        detector = {} if weight is None else {"detector": {"k": 4, "weight": weight}}
        return train_here(tmp_path / name, stage | detector)["log"][-1]

    dense, watched, heavy = last("a", None), last("b", 0), last("c", 0.5)
    assert watched["loss"] == dense["loss"] != heavy["loss"]
    assert watched["training_loss"] == dense["training_loss"]
    assert 0 < heavy["detector_loss"] < watched["detector_loss"]
    trained = read_detectors(tmp_path / "c", minitx.load(tmp_path / "c").model.config)
    drawn = random_detectors(minitx.load(tmp_path / "c").model.config, 4, 0)
    assert [d.rank for d in trained] == [4] * 3
    assert set(np.unique(trained[0].p)) == set(np.unique(drawn[0].p)), "p was trained"


def test_checkpoint_without_detectors_is_read(tmp_path):
    recipe, path = recipe_from(recipe_of(FIRST, SECOND)), tmp_path / "c.npz"
    arrays = {name: np.arange(10, dtype=np.float32) for name in ("weights", "m", "v")}
    write_checkpoint(path, recipe, Progress(1, 3, 9), arrays)
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    text = json.loads(kept["text"].tobytes())
    for stage in text["recipe"]["stages"]:
        del stage["detector"]
    del text["progress"]["errors"]
    kept["text"] = np.frombuffer(json.dumps(text).encode(), np.uint8)
    np.savez(path, **kept)
    longer = recipe_from(recipe_of(FIRST, SECOND, THIRD))
    got = {name: np.full(14, 7, np.float32) for name in arrays}
    assert read_checkpoint(path, longer, got, 10) == Progress(1, 3, 9)
    for array in got.values():
        np.testing.assert_array_equal(array, [*range(10), 7, 7, 7, 7])
    for wrong in (9, 11):
        with pytest.raises(MinitxError, match="expected weights of shape"):
            read_checkpoint(path, longer, got, wrong)


def test_training_again_without_a_detector_deletes_the_file(tmp_path):
    train_here(tmp_path, THIRD | {"steps": 1})
    assert (tmp_path / "dota.safetensors").exists()
    (tmp_path / "checkpoint.npz").unlink()
    train_here(tmp_path, FIRST | {"steps": 1})
    assert not (tmp_path / "dota.safetensors").exists()


@pytest.mark.parametrize(
    "detector, words",
    [
        (4, "an object with k and weight"),
        ({}, "must have the field 'k'"),
        ({"k": 4, "wait": 1}, "Unknown field 'wait' in detector of stage 2"),
        ({"k": 0}, "integer >= 1"),
        ({"k": 4, "weight": -1}, "a number >= 0"),
        ({"k": 3}, "k must be an even integer, 2 to the head width 8; got 3"),
        ({"k": 10}, "2 to the head width 8; got 10"),
        ({"k": 2}, "expected a detector with k=4"),
    ],
)
def test_bad_recipe_is_refused(detector, words):
    with pytest.raises(MinitxError, match="^[^\n]*" + words):
        recipe_from(recipe_of(THIRD, FIRST | {"name": "x", "detector": detector}))
