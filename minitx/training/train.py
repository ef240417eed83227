"""Train by a recipe: stage after stage, with checks, checkpoints, and a model folder at the end.

    python -m minitx.training.train RECIPE --out FOLDER --workers 2 --time-limit 600

After any interruption (a time limit, Ctrl-C, a power failure), the same command resumes from the
last checkpoint, with the same result as without interruption. The computation is in worker.py.
"""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean as mean

from minitx import progress
from minitx.checkpoints.common import atomic_write, need_writable_folder, read
from minitx.checkpoints.huggingface import CONFIG, INDEX, ONE_FILE, write_model
from minitx.checkpoints.precomputed import ARRAYS_FILE as PRECOMPUTED_ARRAYS
from minitx.checkpoints.precomputed import JSON_FILE as PRECOMPUTED
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError, abbreviate
from minitx.lab.evaluate import Tally, report
from minitx.skip.dota.file import FILE as DETECTORS
from minitx.skip.mixture_of_depths.file import FILE as ROUTERS
from minitx.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from minitx.training.data import story_tokenizer
from minitx.training.detector import initial_weights, write_trained
from minitx.training.distillation import TextArrays
from minitx.training.mixture_of_depths import write_routed
from minitx.training.optimizer import ParameterLayout
from minitx.training.recipe import DTYPES, Recipe, Stage, read_recipe
from minitx.training.skipless_init import initial_model
from minitx.training.start import has_techniques, write_with_techniques
from minitx.training.worker import SharedArrays, layout_of
from minitx.training.worker_pool import WorkerPool
from minitx.tree import weights
from minitx.values import has_type

CHECKPOINT, LOG, RECIPE = "checkpoint.npz", "training_log.json", "recipe.json"
# Of a model that is there already.
MODEL_FILES = (
    *(ONE_FILE, INDEX, CONFIG, "tokenizer.json", "tokenizer_config.json", DETECTORS),
    *(ROUTERS, PRECOMPUTED, PRECOMPUTED_ARRAYS),
)


def train(
    recipe_path,
    out=None,
    workers: int | None = None,
    resume: bool = True,
    time_limit: float | None = None,
    bar: bool = True,
) -> dict:
    """Train a model by the recipe; returns {"finished": bool, "stages": [...], "log": [...]}.

    out: output folder, for checkpoints and then the model (default: the recipe's folder). workers:
    number of processes (default: one per core); the result does not depend on it. resume: continue
    from a checkpoint if there is one. time_limit: seconds after which to save and stop. bar: show a
    progress bar.

    It spawns processes, so scripts must call it under ``if __name__ == "__main__":``.
    Raises MinitxError for an invalid recipe, or a checkpoint of another recipe.
    """
    start = time.monotonic()
    recipe = read_recipe(recipe_path)
    workers = _workers(workers, recipe)
    if time_limit is not None and not (has_type(time_limit, float) and time_limit >= 0):
        raise MinitxError(f"time_limit must be seconds >= 0, got {abbreviate(time_limit)}.")
    out = _folder(recipe_path, out)
    tokenizer = story_tokenizer()
    layout = layout_of(recipe, tokenizer)
    shared = SharedArrays(layout.size, recipe.shards, TextArrays.for_recipe(recipe))
    run = Run(recipe, layout, shared, out, bar)
    if resume and (out / CHECKPOINT).exists():
        run.load()
    else:
        run.initialize()
    deadline = None if time_limit is None else start + time_limit
    with WorkerPool(workers, recipe, shared) as pool, stop_signals() as stop:
        finished = run.train(pool, lambda: stop.is_set() or _past(deadline))
    if finished:
        run.write_folder(tokenizer, recipe_path)
    elif bar:
        print(f"Stopped at a checkpoint; run the same command to resume from {out / CHECKPOINT}.")
    return {"finished": finished} | run.log()


class Run:
    """One training run: its arrays in shared memory, and its files in the folder ``out``."""

    def __init__(
        self, recipe: Recipe, layout: ParameterLayout, shared: SharedArrays, out: Path, bar: bool
    ):
        self.recipe, self.layout, self.out, self.bar = recipe, layout, out, bar
        self.arrays = shared.arrays()
        self.progress = Progress()
        self.saved = time.monotonic()  # time of the last checkpoint
        self.speed = 0.0  # tokens per second in the last step

    # The loop ------------------------------------------------------------------------------------

    def initialize(self) -> None:
        """The weights of the model to start from, or random ones. Of random ones, blocks that the
        first stage does not train start as identities (they add 0 to the residual stream), so that
        adding them later does not change the loss."""
        if self.layout.tree is not None:
            self.layout.flatten(weights(self.layout.tree), self.arrays["weights"])
            return
        first = weights(initial_model(self.layout.config, self.recipe.seed))
        layers = self.layout.config.layers
        for number in range(self.recipe.stages[0].layers or layers, layers):
            for writer in ("attn.out.w", "ffn.down.w"):
                first[f"stack.blocks.{number}.{writer}"][:] = 0
        first |= initial_weights(self.recipe, self.layout.config)
        self.layout.flatten(first, self.arrays["weights"])

    def train(self, pool: WorkerPool, should_stop) -> bool:
        """Train all stages; False if ``should_stop()`` ended it before."""
        while self.progress.stage < len(self.recipe.stages):
            if not self.run_stage(pool, should_stop):
                return False
        return True

    def run_stage(self, pool: WorkerPool, should_stop) -> bool:
        """Train the rest of the current stage; False if stopped before its end."""
        p, stage = self.progress, self.recipe.stages[self.progress.stage]
        with progress.bar(stage.steps, f"train: {stage.name}", shown=self.bar) as shown:
            shown.initial = shown.n = p.step  # steps of an interrupted run
            while p.step < stage.steps:
                self.step(pool, stage)
                shown.update()
                if (p.step % stage.every == 0 or p.step == stage.steps) and self.check(pool, stage):
                    break
                shown.set_postfix_str(self.status(stage), refresh=False)
                if should_stop():
                    self.save()
                    shown.close()  # unfinished: it stays where it is
                    return False
                if time.monotonic() - self.saved > self.recipe.save_every:
                    self.save()
        reached = self.reached(stage)
        if self.bar and stage.until and not reached:
            print(f"Stage {stage.name!r} has not reached its accuracies in {stage.steps} steps.")
        p.log[-1]["end"] = "reached" if reached else "steps"
        p.stage, p.step = p.stage + 1, 0
        self.save()
        return True

    def step(self, pool: WorkerPool, stage: Stage) -> None:
        p, start = self.progress, time.monotonic()
        loss, tokens, *error = pool.call("step", p.stage, p.step, p.total)[0]
        seconds = time.monotonic() - start
        self.speed = tokens / seconds
        p.losses.append(loss)
        p.errors += error
        p.step, p.total = p.step + 1, p.total + 1
        p.tokens, p.seconds = p.tokens + tokens, p.seconds + seconds

    def check(self, pool: WorkerPool, stage: Stage) -> bool:
        """Evaluate on calibration stories and log the result; True if the stage may end."""
        p, start = self.progress, time.monotonic()
        tallies: dict[int, Tally] = {}
        for found in pool.call("check", p.stage):
            tallies |= found
        r = report(sum((tallies[shard] for shard in sorted(tallies)), Tally.empty()))
        p.seconds += time.monotonic() - start
        p.log.append(
            {
                "stage": stage.name,
                "step": p.step,
                "tokens": p.tokens,
                "seconds": round(p.seconds, 1),
                "training_loss": round(mean(p.losses), 5),
                **({f"{stage.beside}_loss": round(mean(p.errors), 5)} if p.errors else {}),
                "loss": round(r.loss, 5),
                "floor": round(r.floor, 5),
                "answer_loss": round(r.answer_loss, 5),
                "accuracy": {kind: round(a, 4) for kind, a in r.by_kind.items()},
            }
        )
        p.losses, p.errors = [], []
        self.write_log()
        return self.reached(stage)

    def reached(self, stage: Stage) -> bool:
        """Has the last check reached every target accuracy of the stage?"""
        accuracy = self.progress.log[-1]["accuracy"]
        targets = stage.until
        return bool(targets) and all(accuracy.get(kind, 0) >= a for kind, a in targets.items())

    def status(self, stage: Stage) -> str:
        """For the progress bar: loss, tokens per second, accuracies of the last check."""
        p = self.progress
        words = [f"loss {p.losses[-1]:.3f}" if p.losses else "", f"{self.speed:,.0f} tok/s"]
        words += [f"{stage.beside} {error:.2f}" for error in p.errors[-1:]]
        if p.log and p.log[-1]["stage"] == stage.name:
            words += [f"{kind} {100 * a:.0f}%" for kind, a in p.log[-1]["accuracy"].items()]
        return ", ".join(word for word in words if word)

    # Files ---------------------------------------------------------------------------------------

    def save(self) -> None:
        size = self.layout.model_size
        write_checkpoint(self.out / CHECKPOINT, self.recipe, self.progress, self.arrays, size)
        self.saved = time.monotonic()

    def load(self) -> None:
        self.layout.flatten(
            initial_weights(self.recipe, self.layout.config), self.arrays["weights"]
        )
        size = self.layout.model_size
        self.progress = read_checkpoint(self.out / CHECKPOINT, self.recipe, self.arrays, size)

    def log(self) -> dict:
        p = self.progress
        ends = [entry for entry in p.log if "end" in entry]
        stages = [
            {key: e[key] for key in ("stage", "step", "tokens", "seconds", "end")} for e in ends
        ]
        return {"name": self.recipe.name, "stages": stages, "log": p.log}

    def write_log(self) -> None:
        with atomic_write(self.out / LOG) as file:
            file.write((json.dumps(self.log(), indent=1) + "\n").encode())

    def write_folder(self, tokenizer, recipe_path) -> None:
        """Write the trained model with its recipe and the log: a plain one as a Hugging Face
        folder, one with routers likewise, with their file, one with other techniques as ``minitx
        precompute`` writes it."""
        model = self.layout.model(self.arrays["weights"])
        if self.recipe.capacity is not None:
            write_routed(model, self.recipe.capacity, self.out, DTYPES[self.recipe.dtype])
        elif has_techniques(self.recipe):
            write_with_techniques(self.recipe, model, tokenizer, self.out)
        else:
            write_model(model, self.out, DTYPES[self.recipe.dtype])
            write_trained(self.recipe, self.layout, self.arrays["weights"], self.out)
        write_tokenizer(tokenizer, self.out)
        source, copy = _recipe_file(recipe_path), self.out / RECIPE
        if not copy.exists() or not copy.samefile(source):
            content = read(source)
            with atomic_write(copy) as file:
                file.write(content)
        self.write_log()


def _folder(recipe_path, out) -> Path:
    """The output folder, created if needed. Refused before the first step, not after the last, if
    it cannot be written, or if it contains a model without a checkpoint (such as a shipped one) or
    another recipe, which would be overwritten."""
    path = Path(recipe_path)
    folder = Path(out) if out is not None else path if path.is_dir() else path.parent
    need_writable_folder(folder)
    for name in (*MODEL_FILES, CHECKPOINT, LOG, RECIPE):
        if os.path.lexists(folder / name) and not (folder / name).is_file():
            raise MinitxError(
                f"{folder / name}: is not a regular file, so the trained model could not be "
                "written; use another output folder (--out)."
            )
    theirs = [name for name in MODEL_FILES if (folder / name).exists()]
    if theirs and not (folder / CHECKPOINT).exists():
        raise MinitxError(
            f"{folder}: contains a model ({theirs[0]}) but no training checkpoint, so training "
            "would overwrite it; use another output folder (--out)."
        )
    if not (folder / CHECKPOINT).exists() and (folder / RECIPE).exists():
        if read(folder / RECIPE) != read(_recipe_file(recipe_path)):
            raise MinitxError(
                f"{folder / RECIPE}: is another recipe, which training would overwrite; use "
                "another output folder (--out)."
            )
    return folder


def _recipe_file(recipe_path) -> Path:
    path = Path(recipe_path)
    return path / RECIPE if path.is_dir() else path


def _workers(asked: int | None, recipe: Recipe) -> int:
    """Number of processes: as asked, or one per core, at most one per shard."""
    if asked is not None and (type(asked) is not int or asked < 1):
        raise MinitxError(
            f"The number of workers must be an integer >= 1, got {abbreviate(asked)}."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(asked or cores or 1, recipe.shards)


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


@contextmanager
def stop_signals():
    """An event that SIGINT (Ctrl-C) or SIGTERM sets, so that the current step can finish. A second
    signal interrupts at once. Outside the main thread no signal is handled."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def main(arguments: list[str] | None = None) -> int:
    """Command line interface; ``minitx train`` does the same."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m minitx.training.train")
    parser.add_argument("recipe", help="recipe.json, or a folder that contains it")
    parser.add_argument("--out", help="output folder (default: the recipe's folder)")
    parser.add_argument("--workers", type=int, help="number of processes (default: one per core)")
    parser.add_argument("--time-limit", type=float, help="seconds after which to stop and save")
    parser.add_argument("--no-resume", action="store_true", help="ignore an existing checkpoint")
    given = parser.parse_args(arguments)
    try:
        result = train(
            given.recipe, given.out, given.workers, not given.no_resume, given.time_limit
        )
    except MinitxError as error:
        print(f"error: {error}")
        return 2
    return 0 if result["finished"] else 3


if __name__ == "__main__":
    raise SystemExit(main())
