"""Training: bit-identical results for any number of processes and after any interruption; single
steps against their definition; the loop; checkpoints."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from minitx.build import random_model
from minitx.checkpoints.huggingface import read_model
from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally
from minitx.training import train as train_module
from minitx.training.autograd import gradients
from minitx.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from minitx.training.data import KIND_NUMBER, PADDING, StoryDataset, story_tokenizer
from minitx.training.layerskip import record
from minitx.training.loss import token_losses
from minitx.training.optimizer import ParameterLayout, adamw, has_weight_decay
from minitx.training.recipe import recipe_from
from minitx.training.train import train
from minitx.training.worker import SharedArrays, Worker, batch_loss
from minitx.training.worker_pool import WorkerPool
from minitx.tree import weights

TOKENIZER = story_tokenizer()
MODEL = {
    "family": "llama", "width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "head_width": 8,
    "hidden": 32, "context": 64, "rope_width": 8, "rope_base": 500.0,
}  # fmt: skip
FIRST = {
    "name": "first", "grades": {"one_hop_tiny": 1}, "row": 40, "batch": 8, "steps": 6, "every": 3,
    "check": 6, "lr": 0.01, "warmup": 3, "chain": False, "answer_weight": 5, "weight_decay": 0.1,
}  # fmt: skip
SECOND = FIRST | {
    "name": "second", "chain": True, "layer_dropout": 0.3, "schedule": "cosine", "muon": 0.02,
    "early_exit": {"scale": 0.2, "rotation": 2},
}  # fmt: skip


def recipe_of(*stages, **changes):
    return {"name": "toy", "seed": 4, "shards": 4, "model": MODEL, "stages": [*stages]} | changes


def write(folder, recipe):
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return path


class Alone:
    """A barrier for a single worker; it also resets ``next_shard`` for each step."""

    def __init__(self):
        self.next_shard = multiprocessing.Value("i", 0)

    def wait(self):
        self.next_shard.value = 0


def worker_of(recipe) -> Worker:
    """The only worker of a run, in this process."""
    recipe = recipe_from(recipe)
    layout = ParameterLayout(recipe.config(len(TOKENIZER), TOKENIZER.eos))
    alone = Alone()
    worker = Worker(0, 1, recipe, SharedArrays(layout.size, recipe.shards), alone, alone.next_shard)
    layout.flatten(weights(random_model(layout.config, recipe.seed)), worker.shared["weights"])
    return worker


# Processes and interruptions ---------------------------------------------------------------------


def test_training_is_bit_identical_for_any_workers_and_interruptions(tmp_path):
    path = write(tmp_path, recipe_of(FIRST, SECOND))
    whole = train(path, tmp_path / "two", workers=2, bar=False)
    assert whole["finished"] and [s["end"] for s in whole["stages"]] == ["steps", "steps"]

    stopped = train(path, tmp_path / "one", workers=1, time_limit=0, bar=False)
    assert not stopped["finished"] and (tmp_path / "one" / "checkpoint.npz").exists()
    assert not (tmp_path / "one" / "model.safetensors").exists()
    resumed = train(path, tmp_path / "one", workers=1, bar=False)
    assert resumed["finished"]

    for name in ("model.safetensors", "config.json", "tokenizer.json", "recipe.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    with np.load(tmp_path / "two" / "checkpoint.npz") as a:
        with np.load(tmp_path / "one" / "checkpoint.npz") as b:
            for name in ("weights", "m", "v"):
                np.testing.assert_array_equal(a[name], b[name])
    for log in (whole["log"], resumed["log"]):
        for entry in log:
            del entry["seconds"]
    assert whole["log"] == resumed["log"]
    assert [(e["stage"], e["step"]) for e in whole["log"]] == [
        ("first", 3), ("first", 6), ("second", 3), ("second", 6),
    ]  # fmt: skip
    on_disk = json.loads((tmp_path / "two" / "training_log.json").read_text())
    assert on_disk["stages"] == whole["stages"]
    read = read_model(tmp_path / "two")  # float16, hence the tolerance
    with np.load(tmp_path / "two" / "checkpoint.npz") as a:
        got = read.embed.w.ravel()
        np.testing.assert_allclose(got, a["weights"][: got.size], rtol=1e-3, atol=1e-6)

    # Training continues if a stage is appended to the recipe.
    longer = write(tmp_path, recipe_of(FIRST, SECOND, SECOND | {"name": "third", "steps": 1}))
    more = train(longer, tmp_path / "two", workers=1, bar=False)
    assert [s["stage"] for s in more["stages"]] == ["first", "second", "third"]


def test_interrupt_saves_a_checkpoint_and_says_how_to_resume(tmp_path):
    path = write(tmp_path, recipe_of(FIRST | {"steps": 10**6, "every": 1}))
    command = [sys.executable, "-m", "minitx.training.train", str(path), "--workers", "1"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while process.poll() is None and not (tmp_path / "training_log.json").exists():
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # like Ctrl-C: to all processes
        output, errors = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 3, errors
    assert "to resume from" in output and "Traceback" not in errors
    assert (tmp_path / "checkpoint.npz").exists()


def test_nan_in_a_step_is_reported_and_keeps_the_checkpoint(tmp_path):
    path = write(tmp_path, recipe_of(FIRST))
    train(path, workers=1, time_limit=0, bar=False)
    with np.load(tmp_path / "checkpoint.npz") as file:
        arrays = {name: file[name] for name in file.files}
    arrays["weights"][-1] = np.nan
    np.savez(tmp_path / "checkpoint.npz", **arrays)
    with pytest.raises(MinitxError, match="not finite at step 1; lower lr"):
        train(path, workers=2, bar=False)
    with np.load(tmp_path / "checkpoint.npz") as file:
        assert np.isnan(file["weights"][-1])  # not overwritten


def test_dead_worker_is_reported():
    recipe = recipe_from(recipe_of(FIRST))
    layout = ParameterLayout(recipe.config(len(TOKENIZER), TOKENIZER.eos))
    with pytest.raises(MinitxError, match="Worker process 0 ended"):
        with WorkerPool(1, recipe, SharedArrays(layout.size, recipe.shards)) as pool:
            pool.processes[0].kill()
            pool.call("step", 0, 0, 0)
    assert not any(process.is_alive() for process in pool.processes)


# One step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("done", [0, 5])
def test_step_is_adamw_on_the_mean_gradient(done):
    """Against one computation of the whole batch: gradient / total weight, clipped, AdamW."""
    worker = worker_of(recipe_of(FIRST | {"warmup": 0, "clip": 0.5}))
    stage, before = worker.recipe.stages[0], worker.shared["weights"].copy()
    loss, tokens = worker.step(0, 0, done)

    model = worker.layout.model(before.copy())
    batch = worker.rows.batch(0, 0, 8)
    value, found, _ = gradients(model, lambda m: batch_loss(m, batch, stage, 0, range(8), 0))
    total = batch.weights.sum()
    assert loss == pytest.approx(value / total, rel=1e-6)
    assert tokens == (batch.kinds != PADDING).sum() < 8 * 40
    g = np.empty(worker.layout.size, np.float32)
    worker.layout.flatten(found, g)
    g /= total
    norm = np.linalg.norm(g)
    assert norm > 0.5
    m, v = np.zeros_like(g), np.zeros_like(g)
    g *= 0.5 / norm
    moved = np.abs(g) > 1e-6  # if g is tiny, rounding decides the sign of the first step
    for path, (where, _) in worker.layout.slots.items():
        w = before[where], g[where], m[where], v[where]
        adamw(*w, done + 1, 0.01, stage.betas, 0.1 * has_weight_decay(path))
    np.testing.assert_allclose(worker.shared["m"], m, rtol=1e-3, atol=1e-8)
    np.testing.assert_allclose(worker.shared["v"], v, rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(worker.shared["weights"][moved], before[moved], atol=1e-4)


def test_step_is_muon_inside_blocks_and_adamw_elsewhere():
    """Compared with a step of AdamW alone; weight decay is the same for both."""
    found = {}
    for rate in (None, 0.02):
        worker = worker_of(recipe_of(FIRST | {"warmup": 0, "muon": rate}))
        before = {path: w.copy() for path, w in weights(worker.model).items()}
        worker.step(0, 0, 0)
        found[rate] = {path: w.copy() for path, w in weights(worker.model).items()}
    assert not worker.shared["v"][worker.layout.slots["stack.blocks.0.attn.out.w"][0]].any()
    decay = 1 - 0.02 * worker.recipe.stages[0].weight_decay
    for path, w in found[0.02].items():
        if path.startswith("stack.") and path.endswith(".w"):
            step = before[path] * decay - w
            size = np.linalg.svd(step)[1] / (0.02 * 0.2 * max(w.shape) ** 0.5)
            assert 0.5 < np.median(size) < 1.3 and size.max() < 1.3, path
        else:
            np.testing.assert_array_equal(w, found[None][path], path)


@pytest.mark.parametrize("stage", [FIRST, SECOND])
def test_padding_does_not_change_loss_or_gradients(stage):
    recipe = recipe_from(recipe_of(stage | {"chain": False}))
    stage = recipe.stages[0]
    rows = StoryDataset(TOKENIZER, {"one_hop_tiny": 1}, 64, 1, chain=False)
    batch = rows.batch(0, 0, 3)
    other = batch.ids.copy()
    other[:, 1:][batch.kinds == PADDING] = 77
    model = random_model(recipe.config(len(TOKENIZER), TOKENIZER.eos), 2)

    def run(batch):
        return gradients(model, lambda m: batch_loss(m, batch, stage, 1, range(3), 5))[:2]

    value, found = run(batch)
    assert (batch.kinds == PADDING).any() and (other != batch.ids).any()
    for changed in (batch._replace(ids=other), batch.trimmed()):
        value_2, found_2 = run(changed)
        assert value_2 == pytest.approx(value, rel=1e-6)
        for path in found:
            np.testing.assert_allclose(found_2[path], found[path], rtol=1e-3, atol=1e-4)


def test_early_exits_rotate_with_the_steps():
    recipe = recipe_from(recipe_of(SECOND | {"layer_dropout": 0.0}))
    batch = StoryDataset(TOKENIZER, {"one_hop_tiny": 1}, 40, 1).batch(0, 0, 2)
    model = random_model(recipe.config(len(TOKENIZER), TOKENIZER.eos), 2)
    recorded, hidden = record(model)
    recorded(batch.ids[:, :-1])
    one, two, three = (
        (token_losses(model.head(model.norm(x)), batch.ids[:, 1:]) * batch.weights).sum()
        for x in hidden
    )
    # L = 3, scale 0.2: e = 0, 0.2, 2.2; exits l = 0 and 2 at even steps, l = 1 and 2 at odd ones.

    def loss(step):
        stage = recipe.stages[0]
        return gradients(model, lambda m: batch_loss(m, batch, stage, step, range(2), 0))[0]

    even, odd = loss(4), loss(5)
    assert even == pytest.approx(three, rel=1e-5)
    assert odd == pytest.approx(0.2 / 2.4 * two + 2.2 / 2.4 * three, rel=1e-5)
    assert abs(two - three) > 5e-4 * three and one != two


def test_answer_weight_changes_the_loss():
    light, heavy = (worker_of(recipe_of(FIRST | {"answer_weight": w})) for w in (1, 1e6))
    (loss_1, _), (loss_2, _) = (worker.step(0, 0, 0) for worker in (light, heavy))
    assert loss_1 != loss_2
    answers = heavy.rows.batch(0, 0, 8).kinds > 0
    assert answers.any() and (heavy.rows.batch(0, 0, 8).weights[answers] == 1e6).all()


def test_training_reduces_the_loss():
    stage = FIRST | {"row": 60, "batch": 16, "lr": 0.02, "steps": 40}
    worker = worker_of(recipe_of(stage, model=MODEL | {"width": 32}))
    before = sum(worker.check(0).values(), Tally.empty())
    losses = [worker.step(0, step, step)[0] for step in range(40)]
    after = sum(worker.check(0).values(), Tally.empty())
    assert losses[0] > 6 and np.mean(losses[-5:]) < 3
    assert after.loss[0] < 0.5 * before.loss[0]
    assert after.floor == before.floor < after.loss[0]
    assert (after.count == before.count).all() and after.count[KIND_NUMBER["where1"]] >= 6


# The loop, with a fake worker pool ---------------------------------------------------------------


class FakePool:
    """Returns made-up results; the accuracy of where1 rises by 0.1 at every check."""

    def __init__(self):
        self.calls = []
        self.checks = 0

    def call(self, *arguments):
        self.calls.append(arguments)
        if arguments[0] == "step":
            return [(2.0, 100)]
        self.checks += 1
        tally = Tally.empty()
        tally.count[[0, KIND_NUMBER["where1"]]] = 10
        tally.right[KIND_NUMBER["where1"]] = min(self.checks, 10)
        return [{1: tally}, {0: tally}]


def run_of(folder, recipe) -> train_module.Run:
    recipe = recipe_from(recipe)
    layout = ParameterLayout(recipe.config(len(TOKENIZER), TOKENIZER.eos))
    return train_module.Run(recipe, layout, SharedArrays(layout.size, 4), folder, False)


def test_stage_ends_when_its_accuracies_are_reached(tmp_path):
    until = FIRST | {"steps": 50, "until": {"where1": 0.3}}
    run, pool = run_of(tmp_path, recipe_of(until, FIRST)), FakePool()
    assert run.train(pool, lambda: False)
    stages = run.log()["stages"]
    assert [(s["stage"], s["step"], s["end"]) for s in stages] == [
        ("first", 9, "reached"), ("first", 6, "steps"),
    ]  # fmt: skip
    steps = [arguments[1:] for arguments in pool.calls if arguments[0] == "step"]
    assert steps == [(0, s, s) for s in range(9)] + [(1, s, 9 + s) for s in range(6)]
    assert run.progress.tokens == 1500


def test_stage_that_misses_its_accuracies_ends_with_a_message(tmp_path, capsys):
    run = run_of(tmp_path, recipe_of(FIRST | {"until": {"where1": 0.99}}))
    run.bar = True
    assert run.train(FakePool(), lambda: False)
    assert "'first' has not reached" in capsys.readouterr().out
    assert run.log()["stages"][0]["end"] == "steps"


@pytest.mark.parametrize("stop_at", [1, 2, 3, 5, 6, 8, 9, 14])
def test_resuming_after_any_step_makes_the_same_calls(tmp_path, stop_at):
    recipe = recipe_of(FIRST | {"steps": 50, "until": {"where1": 0.3}}, FIRST)
    whole = FakePool()
    run_of(tmp_path, recipe).train(whole, lambda: False)
    pool, steps = FakePool(), []
    run = run_of(tmp_path, recipe)
    assert not run.train(pool, lambda: len(steps.append(0) or steps) == stop_at)
    again = run_of(tmp_path, recipe)
    again.load()
    assert again.train(pool, lambda: False)
    assert pool.calls == whole.calls


# Checkpoints -------------------------------------------------------------------------------------


def arrays_of(size=10):
    return {
        name: np.arange(size, dtype=np.float32) + i for i, name in enumerate(("weights", "m", "v"))
    }


def test_checkpoint_round_trip(tmp_path):
    recipe, path = recipe_from(recipe_of(FIRST, SECOND)), tmp_path / "c.npz"
    entry = {"stage": "first", "step": 6, "tokens": 600, "seconds": 1.0, "accuracy": {"who": 0.5}}
    progress = Progress(1, 3, 9, 900, 1.5, [0.25], [entry | {"end": "steps"}])
    write_checkpoint(path, recipe, progress, arrays_of())
    got = {name: np.zeros(10, np.float32) for name in ("weights", "m", "v")}
    assert read_checkpoint(path, recipe, got) == progress
    for name, array in arrays_of().items():
        np.testing.assert_array_equal(got[name], array)


def test_checkpoint_of_another_recipe_is_refused(tmp_path):
    path = tmp_path / "c.npz"
    write_checkpoint(path, recipe_from(recipe_of(FIRST, SECOND)), Progress(1, 0), arrays_of())
    later = recipe_of(FIRST, SECOND | {"lr": 1.0})  # a stage that has not begun may change
    read_checkpoint(path, recipe_from(later), arrays_of())
    for name, other in (
        ("stages", recipe_of(FIRST | {"lr": 1.0}, SECOND)),
        ("seed", recipe_of(FIRST, SECOND, seed=5)),
        ("model", recipe_of(FIRST, SECOND, model=MODEL | {"hidden": 8})),
    ):
        with pytest.raises(MinitxError, match=f"another recipe \\({name} differ"):
            read_checkpoint(path, recipe_from(other), arrays_of())
    with pytest.raises(MinitxError, match="expected weights of shape"):
        read_checkpoint(path, recipe_from(later), arrays_of(11))


@pytest.mark.parametrize("keep", [0, 10, 300, 900])
def test_damaged_checkpoint_is_refused(tmp_path, keep):
    recipe, path = recipe_from(recipe_of(FIRST)), tmp_path / "c.npz"
    write_checkpoint(path, recipe, Progress(), arrays_of(500))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(MinitxError, match="expected a training checkpoint"):
        read_checkpoint(path, recipe, arrays_of(500))


PROGRESS = {
    "stage": [99, -1, 3, True, 1.0, "1", None, [], {}, 2**63, 10**400],
    "step": [7, -1, 6.0, "3", None, True, 10**30],
    "total": [0, 100, -5, None, "9"],
    "tokens": [-1, 1.5, "many", None],
    "seconds": [-1.0, "1", None, [], 10**400],
    "losses": [3, None, ["a"], [None], [10**400], {"a": 1}],
    "log": [3, None, [3], [{}], [{"stage": "first"}], "text", {"a": 1}],
    "errors": [3, [[1]], None],
    "more": [1],
}


def test_checkpoint_with_an_impossible_progress_is_refused(tmp_path):
    """``stage: 99`` is not a finished training."""
    recipe, path = recipe_from(recipe_of(FIRST, SECOND)), tmp_path / "c.npz"
    write_checkpoint(path, recipe, Progress(1, 3, 9, 900, 1.5), arrays_of())
    read_checkpoint(path, recipe, arrays_of())
    with np.load(path) as file:
        kept = {name: file[name] for name in file.files}
    whole = json.loads(kept["text"].tobytes())
    for name, values in PROGRESS.items():
        for value in values:
            text = json.dumps(whole | {"progress": whole["progress"] | {name: value}})
            kept["text"] = np.frombuffer(text.encode(), np.uint8)
            np.savez(path, **kept)
            with pytest.raises(MinitxError, match="delete (it|the file) to restart") as caught:
                read_checkpoint(path, recipe, arrays_of())
            assert str(path) in str(caught.value), f"{name}: {value!r}"


def test_pickle_in_a_checkpoint_is_not_loaded(tmp_path):
    path = tmp_path / "c.npz"
    np.savez(path, text=np.array([{"a": 1}], object))
    with pytest.raises(MinitxError, match="expected a training checkpoint"):
        read_checkpoint(path, recipe_from(recipe_of(FIRST)), arrays_of())


# Before the first step ----------------------------------------------------------------------------

OBSTACLES = {
    "a file where the folder should be": (lambda out: out.write_text("x"), "cannot be written"),
    "a folder where a file should be": (
        lambda out: (out / "config.json").mkdir(parents=True), "config.json: is not a regular file",
    ),
    "another model": (lambda out: write_file(out / "config.json", "{}"), "contains a model"),
    "another tokenizer": (lambda out: write_file(out / "tokenizer.json", "{}"), "contains a model"),
    "another recipe": (lambda out: write_file(out / "recipe.json", "{}"), "is another recipe"),
    "a broken link": (
        lambda out: (out.mkdir(), (out / "checkpoint.npz").symlink_to("x")), "not a regular file",
    ),
}  # fmt: skip


def write_file(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_written_is_refused_before_the_first_step(name, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("training has begun")

    monkeypatch.setattr(train_module, "WorkerPool", never)
    path, out = write(tmp_path / "in", recipe_of(FIRST)), tmp_path / "out"
    make, words = OBSTACLES[name]
    make(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(MinitxError, match=words):
        train(path, out, bar=False)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is left behind"


@pytest.mark.parametrize("limit", [-1, float("nan"), "3", True, 10**400])
def test_invalid_time_limit_is_refused(tmp_path, limit):
    with pytest.raises(MinitxError, match="time_limit must be seconds >= 0"):
        train(write(tmp_path, recipe_of(FIRST)), time_limit=limit, bar=False)


@pytest.mark.parametrize("workers", [0, -1, 1.5, True])
def test_invalid_number_of_workers_is_refused(tmp_path, workers):
    with pytest.raises(MinitxError, match="number of workers"):
        train(write(tmp_path, recipe_of(FIRST)), workers=workers, bar=False)


def test_command_line_reports_an_invalid_recipe(tmp_path, capsys):
    path = write(tmp_path, recipe_of(FIRST | {"lr": 0}))
    assert train_module.main([str(path)]) == 2
    assert "'lr' of stage 1 must be a number above 0, got 0" in capsys.readouterr().out
