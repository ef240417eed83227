"""Training by a recipe: stage after stage, with checks, checkpoints, and a model folder at the end.

    python -m minitx.training.train RECIPE --out FOLDER --workers 2 --time-limit 600

Stopped in any way (a time limit, Ctrl-C, a power cut), the same call goes on from the last
checkpoint, to the same result as without the stop. The computing is in worker.py.
"""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from minitx.checkpoints.common import replacing
from minitx.checkpoints.huggingface import ONE_FILE, write_model
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally, report
from minitx.training.checkpoint import Progress, read_checkpoint, write_checkpoint
from minitx.training.data import story_tokenizer
from minitx.training.detector import initial_weights, write_trained
from minitx.training.optimizer import Layout
from minitx.training.recipe import DTYPES, Recipe, Stage, read_recipe
from minitx.training.skipless_init import initial_model
from minitx.training.team import Team
from minitx.training.worker import Memory, layout_of
from minitx.tree import weights

CHECKPOINT, LOG = "checkpoint.npz", "training_log.json"


def train(
    recipe_path,
    out=None,
    workers: int | None = None,
    resume: bool = True,
    time_limit: float | None = None,
    bar: bool = True,
) -> dict:
    """Train a model by the recipe; returns {"finished": bool, "stages": [...], "log": [...]}.

    out: the folder to write (that of the recipe, if None); it holds the checkpoint meanwhile and
    the finished model at the end. workers: processes (as many as cores, if None); the result does
    not depend on it. resume=False begins anew although there is a checkpoint. time_limit: seconds
    after which to stop at a checkpoint. bar: show progress.

    It starts processes, so a script has to call it under ``if __name__ == "__main__":``.
    Raises MinitxError for a bad recipe, or a checkpoint of another recipe.
    """
    began = time.monotonic()
    recipe = read_recipe(recipe_path)
    out = _folder(recipe_path, out)
    tokenizer = story_tokenizer()
    layout = layout_of(recipe, tokenizer)
    memory = Memory(layout.size, recipe.shards)
    run = Run(recipe, layout, memory, out, bar)
    if resume and (out / CHECKPOINT).exists():
        run.load()
    else:
        run.begin()
    deadline = None if time_limit is None else began + time_limit
    with Team(_workers(workers, recipe), recipe, memory) as team, stop_signals() as stop:
        finished = run.go(team, lambda: stop.is_set() or _past(deadline))
    if finished:
        run.write_folder(tokenizer, recipe_path)
    elif bar:
        print(f"Stopped at a checkpoint; the same command goes on from {out / CHECKPOINT}.")
    return {"finished": finished} | run.log()


class Run:
    """One training run: its numbers in memory, and its files in the folder ``out``."""

    def __init__(self, recipe: Recipe, layout: Layout, memory: Memory, out: Path, bar: bool):
        self.recipe, self.layout, self.out, self.bar = recipe, layout, out, bar
        self.arrays = memory.arrays()
        self.progress = Progress()
        self.saved = time.monotonic()  # when the last checkpoint was written
        self.speed = 0.0  # tokens a second in the last step

    # The loop ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Random weights; the moments are zero already. Blocks that the first stage leaves out
        begin as identities (they add 0 to the stream), so that they join in without a jolt."""
        first = weights(initial_model(self.layout.config, self.recipe.seed))
        layers = self.layout.config.layers
        for number in range(self.recipe.stages[0].layers or layers, layers):
            for writer in ("attn.out.w", "ffn.down.w"):
                first[f"stack.blocks.{number}.{writer}"][:] = 0
        first |= initial_weights(self.recipe, self.layout.config)
        self.layout.pack(first, self.arrays["weights"])

    def go(self, team: Team, stopping) -> bool:
        """Train until all stages are done (True), or until ``stopping()`` (False)."""
        while self.progress.stage < len(self.recipe.stages):
            if not self.run_stage(team, stopping):
                return False
        return True

    def run_stage(self, team: Team, stopping) -> bool:
        """The rest of the current stage; False if it had to stop before the end."""
        p, stage = self.progress, self.recipe.stages[self.progress.stage]
        with tqdm(
            total=stage.steps,
            initial=p.step,
            desc=stage.name,
            unit="step",
            disable=not self.bar,
            mininterval=1.0,
        ) as bar:
            while p.step < stage.steps:
                self.step(team, stage)
                bar.update()
                if (p.step % stage.every == 0 or p.step == stage.steps) and self.check(team, stage):
                    break
                bar.set_postfix_str(self.news(stage), refresh=False)
                if stopping():
                    self.save()
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

    def step(self, team: Team, stage: Stage) -> None:
        p, began = self.progress, time.monotonic()
        loss, tokens, *error = team.ask("step", p.stage, p.step, p.total)[0]
        seconds = time.monotonic() - began
        self.speed = tokens / seconds
        p.losses.append(loss)
        p.errors += error
        p.step, p.total = p.step + 1, p.total + 1
        p.tokens, p.seconds = p.tokens + tokens, p.seconds + seconds

    def check(self, team: Team, stage: Stage) -> bool:
        """Measure on calibration stories, note it, and say whether the stage may end."""
        p, began = self.progress, time.monotonic()
        tallies: dict[int, Tally] = {}
        for found in team.ask("check", p.stage):
            tallies |= found
        r = report(sum((tallies[shard] for shard in sorted(tallies)), Tally.empty()))
        p.seconds += time.monotonic() - began
        p.log.append(
            {
                "stage": stage.name,
                "step": p.step,
                "tokens": p.tokens,
                "seconds": round(p.seconds, 1),
                "training_loss": round(sum(p.losses) / len(p.losses), 5),
                **({"detector_loss": round(sum(p.errors) / len(p.errors), 5)} if p.errors else {}),
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
        """Has the last check reached every accuracy that the stage waits for?"""
        accuracy = self.progress.log[-1]["accuracy"]
        wanted = stage.until
        return bool(wanted) and all(accuracy.get(kind, 0) >= a for kind, a in wanted.items())

    def news(self, stage: Stage) -> str:
        """For the bar: loss, tokens a second, and the accuracies of the last check."""
        p = self.progress
        words = [f"loss {p.losses[-1]:.3f}" if p.losses else "", f"{self.speed:,.0f} tok/s"]
        words += [f"detector {error:.2f}" for error in p.errors[-1:]]
        if p.log and p.log[-1]["stage"] == stage.name:
            words += [f"{kind} {100 * a:.0f}%" for kind, a in p.log[-1]["accuracy"].items()]
        return ", ".join(word for word in words if word)

    # Files ---------------------------------------------------------------------------------------

    def save(self) -> None:
        size = self.layout.model_size
        write_checkpoint(self.out / CHECKPOINT, self.recipe, self.progress, self.arrays, size)
        self.saved = time.monotonic()

    def load(self) -> None:
        self.layout.pack(initial_weights(self.recipe, self.layout.config), self.arrays["weights"])
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
        with replacing(self.out / LOG) as file:
            file.write((json.dumps(self.log(), indent=1) + "\n").encode())

    def write_folder(self, tokenizer, recipe_path) -> None:
        """The finished model as a Hugging Face folder, with its recipe and the log."""
        model = self.layout.model(self.arrays["weights"])
        write_model(model, self.out, DTYPES[self.recipe.dtype])
        write_trained(self.recipe, self.layout, self.arrays["weights"], self.out)
        write_tokenizer(tokenizer, self.out)
        source, copy = Path(recipe_path), self.out / "recipe.json"
        source = source / "recipe.json" if source.is_dir() else source
        if not copy.exists() or not copy.samefile(source):
            content = source.read_bytes()
            with replacing(copy) as file:
                file.write(content)
        self.write_log()


def _folder(recipe_path, out) -> Path:
    """The folder to write to, made if need be; refused if it holds a model that was not trained
    there, such as a shipped one, for that would be lost."""
    path = Path(recipe_path)
    folder = Path(out) if out is not None else path if path.is_dir() else path.parent
    if (folder / ONE_FILE).exists() and not (folder / CHECKPOINT).exists():
        raise MinitxError(
            f"{folder}: holds a model ({ONE_FILE}) but no checkpoint of its training, so training "
            "would overwrite it; give another folder to write to (--out)."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be made ({error.strerror or error}).") from None
    return folder


def _workers(asked: int | None, recipe: Recipe) -> int:
    """How many processes: as asked, or one a core; never more than there are shards."""
    if asked is not None and (type(asked) is not int or asked < 1):
        raise MinitxError(f"The number of workers is {asked!r}; expected an integer >= 1.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(asked or cores or 1, recipe.shards)


def _past(deadline: float | None) -> bool:
    return deadline is not None and time.monotonic() > deadline


@contextmanager
def stop_signals():
    """An event that Ctrl-C (or a polite kill) sets, so that the step at hand can be finished. A
    second Ctrl-C stops at once. Outside the main thread nothing is caught."""
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
    """The command line of this file; ``minitx train`` does the same."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m minitx.training.train")
    parser.add_argument("recipe", help="recipe.json, or the folder that holds it")
    parser.add_argument("--out", help="folder to write (default: that of the recipe)")
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--time-limit", type=float, help="seconds after which to stop and save")
    parser.add_argument("--no-resume", action="store_true", help="begin anew")
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
