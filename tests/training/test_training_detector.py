"""Training a detector with its model: the loss and its gradient, and what the trainer does with it.

A recipe without one trains as before: that is what test_training.py checks.
"""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from test_grad_models import MODELS, example, model_of
from test_training import FIRST, SECOND, TOKENIZER, Alone, recipe_of, write

import minitx
from minitx import fast, tree
from minitx.build import build
from minitx.errors import MinitxError
from minitx.model import split_heads
from minitx.skip.dota.detector import Detector, random_detectors, read_detectors
from minitx.state import Layer, Tokens
from minitx.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from minitx.training.detector import Joint, joint_gradients, joint_loss, squares
from minitx.training.detector_fit import fit
from minitx.training.grad import grad_of
from minitx.training.loss import cross_entropy
from minitx.training.recipe import recipe_from
from minitx.training.train import Run, train
from minitx.training.worker import Memory, Worker, layout_of

SHORT = FIRST | {"steps": 3, "layers": 2}
THIRD = FIRST | {"name": "third", "detector": {"k": 4, "weight": 0.02}, "muon": 0.02}


def detectors_for(config, k=2, seed=3):
    """In float64, and larger than they begin."""
    return tuple(
        Detector(*(2.0 * getattr(d, name) for name in ("p", "w_q", "w_k")))
        for d in random_detectors(config, k, seed)
    )


def as_sum(model, ids, targets, weights):
    return cross_entropy(model(ids), targets, weights)


# The loss ----------------------------------------------------------------------------------------


def error_by_hand(model, detectors, ids, rows):
    """The mean squared error pair by pair, from a forward pass of its own."""
    squares, x = [], model.embed(ids, slice(0, ids.shape[1]))
    T = ids.shape[1]
    for block, detector in zip(model.stack.blocks, detectors):
        attn, tokens = block.attn, Tokens(slice(0, T))
        read = attn.norm(x)
        q = attn.rope(split_heads(attn.qkv.q(read), attn.heads), tokens)
        k = attn.rope(split_heads(attn.qkv.k(read), attn.kv_heads), tokens)
        rank, G = detector.k, attn.heads // attn.kv_heads
        for b in range(len(ids)):
            for h in range(attn.heads):
                key_head = h // G
                y = read[b] @ detector.p
                a = y @ detector.w_q[:, h * rank : (h + 1) * rank]
                c = y @ detector.w_k[:, key_head * rank : (key_head + 1) * rank]
                a, c = turned(attn, a), turned(attn, c)
                for i in range(T):
                    for j in range(i + 1):
                        if rows[b, i] > 0:
                            s = q[b, h, i] @ k[b, key_head, j] / q.shape[-1] ** 0.5
                            squares.append((s - a[i] @ c[j]) ** 2)
        x = block(x, Layer(T, remember=False).take(T))
    return np.mean(squares)


def turned(attn, z):
    """Rows z (T, 2) turned by the slowest angle of the model, if it has any."""
    if not hasattr(attn.rope, "cos"):
        return z
    slowest = attn.rope.cos.shape[1] // 2 - 1
    cos, sin = attn.rope.cos[: len(z), slowest], -attn.rope.sin[: len(z), slowest]
    return np.stack([z[:, 0] * cos - z[:, 1] * sin, z[:, 1] * cos + z[:, 0] * sin], 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_joint_loss_is_what_its_docstring_says(monkeypatch, name):
    monkeypatch.setattr(fast, "ROWS", 4)  # so that rows come in several blocks
    config = MODELS[name]
    model, detectors = model_of(config), detectors_for(config)
    ids, targets, weights = example(config)
    weights[0, 4:] = 0  # padding: those queries are left out
    expected = error_by_hand(model, detectors, ids, weights)
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
def test_its_gradient_against_central_differences(monkeypatch, name):
    """In the model and in the detectors: a direction for each weight, and one through all."""
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


def test_the_gradients_of_the_dossier():
    """dW~q = (2/m) Y^T E K~, dW~k = (2/m) Y^T E^T Q~, dWq = -(2/m) X^T E K, dWk = -(2/m) X^T E^T Q
    for one head without rotation; S~ - S is one product there."""
    rng = np.random.default_rng(2)
    x, p = rng.standard_normal((5, 4)), rng.standard_normal((4, 2))
    w_q, w_k, wq, wk = (rng.standard_normal(s) for s in ((2, 2), (2, 2), (4, 3), (4, 3)))
    y, m, rows = x @ p, 15, np.ones((1, 5), bool)

    def loss(w_q, w_k, wq, wk):
        left = np.concatenate([np.matmul(y, w_q), -np.matmul(x, wq)], -1)
        right = np.concatenate([np.matmul(y, w_k), np.matmul(x, wk)], -1)
        return squares(left[None, None], right[None, None], rows) * (1 / m)

    _, found = grad_of(loss, w_q, w_k, wq, wk)
    a, b, q, k = y @ w_q, y @ w_k, x @ wq, x @ wk
    e = np.tril(a @ b.T - q @ k.T) * (2 / m)
    expected = y.T @ e @ b, y.T @ e.T @ a, -x.T @ e @ k, -x.T @ e.T @ q
    for got, wanted in zip(found, expected):
        np.testing.assert_allclose(got, wanted, atol=1e-12)


# The trainer -------------------------------------------------------------------------------------


class InThisProcess:
    """A team of one worker, without the time that it takes to start a process."""

    def __init__(self, recipe, layout, memory):
        alone = Alone()
        self.worker = Worker(0, 1, recipe, memory, alone, alone.taken)

    def ask(self, name, *order):
        return [getattr(self.worker, name)(*order)]


def train_here(folder, *stages, stop_at=None) -> dict:
    """Train in this process, or go on from the folder's checkpoint, up to so many steps more."""
    folder.mkdir(exist_ok=True)
    recipe = recipe_from(recipe_of(*stages))
    layout = layout_of(recipe, TOKENIZER)
    memory, steps = Memory(layout.size, recipe.shards), []
    run = Run(recipe, layout, memory, folder, False)
    run.load() if (folder / "checkpoint.npz").exists() else run.begin()
    team = InThisProcess(recipe, layout, memory)
    if run.go(team, lambda: len(steps.append(0) or steps) == stop_at):
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


def test_stops_and_a_stage_added_later_do_not_change_a_bit(tmp_path):
    stages = SHORT, THIRD
    log = train_here(tmp_path / "whole", *stages)["log"]
    for steps in (1, 3, None):  # stops in the first stage, and in the one with the detector
        train_here(tmp_path / "stopped", *stages, stop_at=steps)
    train_here(tmp_path / "added", SHORT)
    assert not (tmp_path / "added" / "dota.safetensors").exists()
    train_here(tmp_path / "added", *stages)
    for folder in ("stopped", "added"):
        same_results(tmp_path / "whole", tmp_path / folder)
    assert ["detector_loss" in entry for entry in log] == [False, True, True]
    assert all(entry["detector_loss"] > 0 for entry in log[1:])


def test_more_workers_do_not_change_a_bit(tmp_path):
    """In processes of their own, where BLAS has one thread, which this one's may not."""
    path = write(tmp_path, recipe_of(THIRD | {"steps": 2}))
    for workers in (1, 2):
        assert train(path, tmp_path / str(workers), workers, bar=False)["finished"]
    same_results(tmp_path / "1", tmp_path / "2")
    lm = minitx.load(tmp_path / "2", dota={"kappa": 4})
    assert "fit=trained" in repr(lm) and len(lm.generate("Once", 5)) > 0


def test_detectors_learn_and_where_they_weigh_nothing_the_model_is_as_without(tmp_path):
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
    assert [d.k for d in trained] == [4] * 3
    assert set(np.unique(trained[0].p)) == set(np.unique(drawn[0].p))  # P is as it was drawn


def test_a_checkpoint_from_before_there_were_detectors_is_read(tmp_path):
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
        with pytest.raises(MinitxError, match="needed are"):
            read_checkpoint(path, longer, got, wrong)


def test_training_anew_without_a_detector_takes_the_old_file_away(tmp_path):
    train_here(tmp_path, THIRD | {"steps": 1})
    assert (tmp_path / "dota.safetensors").exists()
    (tmp_path / "checkpoint.npz").unlink()
    train_here(tmp_path, FIRST | {"steps": 1})
    assert not (tmp_path / "dota.safetensors").exists()


@pytest.mark.parametrize(
    "detector, words",
    [
        (4, "an object with k and weight"),
        ({}, "no field 'k'"),
        ({"k": 4, "wait": 1}, "Unknown field 'wait' in detector of stage 2"),
        ({"k": 0}, "whole number >= 1"),
        ({"k": 4, "weight": -1}, "a number >= 0"),
        ({"k": 3}, "k=3; an even number"),
        ({"k": 10}, "to the head width, 8"),
        ({"k": 2}, "after one with k=4"),
    ],
)
def test_recipes_that_are_refused(detector, words):
    with pytest.raises(MinitxError, match="^[^\n]*" + words):
        recipe_from(recipe_of(THIRD, FIRST | {"name": "x", "detector": detector}))


# Post hoc ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox parallel"])
def test_the_fit_finds_what_can_be_found(name):
    """No other W~ near it has a smaller error, by the loss that joint training has."""
    config = replace(MODELS[name], context=32)
    model = model_of(config)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, 30) for _ in range(8)]
    found = fit(model, texts, 2)
    ids, ones = np.array(texts), np.ones((8, 30))

    def error(detectors):
        joint = Joint(model, detectors)
        return joint_loss(joint, lambda m: as_sum(m, ids, ids, ones), 1.0, ones)[1][1]

    best = error(found)
    nothing = tuple(replace(d, w_q=0 * d.w_q) for d in found)
    assert best < error(nothing)
    slack = 1e-6 if name == "gpt2" else 0.02  # with rotation: rounds, of which the last is W~q's
    for seed in range(4):
        rng = np.random.default_rng(seed)
        near = tuple(
            replace(d, w_q=d.w_q + 0.03 * abs(d.w_q).max() * rng.standard_normal(d.w_q.shape))
            for d in found
        )
        assert error(near) > best
        near = tuple(
            replace(d, w_k=d.w_k + 0.03 * abs(d.w_k).max() * rng.standard_normal(d.w_k.shape))
            for d in found
        )
        assert error(near) > best * (1 - slack)
