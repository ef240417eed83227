"""Training checkpoints: resuming from one gives the same result, bit for bit, as not stopping.

One ``.npz`` file holds the weights, the two moments of AdamW, and as JSON text the progress and the
recipe. It is replaced atomically, so a crash leaves the previous one. Nothing in it is unpickled.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import atomic_write, parse_json, read_npz
from minitx.errors import MinitxError
from minitx.training.recipe import Recipe, Stage
from minitx.values import has_type, need_field_types

ARRAYS = ("weights", "m", "v")
MAX_TEXT = 2**26  # bytes of the recipe, the progress and its log
LOGGED = {"stage": str, "step": int, "tokens": int, "seconds": float, "accuracy": dict}
# Optional fields of a stage, also those that were added after a checkpoint was written.
DEFAULTS = {f.name: f.default for f in fields(Stage) if f.default is not MISSING}


@dataclass
class Progress:
    """How far the training is. With the recipe, weights and moments it determines the rest of the
    run: random numbers depend only on the seed and these counts."""

    stage: int = 0
    step: int = 0  # steps done in this stage
    total: int = 0  # steps done in all
    tokens: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # of the steps since the last check
    log: list = field(default_factory=list)  # one entry for each check
    errors: list = field(default_factory=list)  # losses of the detectors since the last check

    def check_types(self) -> None:
        """Raise MinitxError unless everything has the type with which it is written."""
        need_field_types(self, "Its progress")
        if not all(has_type(value, float) for value in (*self.losses, *self.errors)):
            raise MinitxError("its losses must be finite numbers")
        if not all(isinstance(entry, dict) and _is_logged(entry) for entry in self.log):
            raise MinitxError(f"entries of its log must have {', '.join(LOGGED)}")

    def fits(self, recipe: Recipe) -> bool:
        """Can training by this recipe have come this far?"""
        steps = [stage.steps for stage in recipe.stages]
        if not 0 <= self.stage <= len(steps):
            return False
        most = [*steps, 0][self.stage]  # after the last stage no step is done
        ended = sum("end" in entry for entry in self.log)
        return (
            0 <= self.step <= most
            and self.step <= self.total <= sum(steps[: self.stage]) + self.step
            and ended <= self.stage
            and (
                self.step < most or self.step == 0 or bool(self.log)
            )  # checked after its last step
            and min(self.tokens, self.seconds) >= 0
        )

    @property
    def stages_begun(self) -> int:
        """Number of stages that have begun."""
        return self.stage + (self.step > 0)


def _is_logged(entry: dict) -> bool:
    accuracy = entry.get("accuracy")
    return (
        all(has_type(entry.get(name), kind) for name, kind in LOGGED.items())
        and isinstance(entry.get("end", ""), str)
        and all(has_type(value, float) for value in accuracy.values())
    )


def write_checkpoint(
    path: Path, recipe: Recipe, progress: Progress, arrays: dict, model_size: int | None = None
) -> None:
    """Write the file; ``arrays`` holds the flat vectors weights, m and v.

    model_size: length of the model's part of these vectors. The rest, detectors, is not saved
    before a stage has trained it, so that stage can still be changed.
    """
    trained = any(stage.detector for stage in recipe.stages[: progress.stages_begun])
    size = None if trained else model_size
    text = json.dumps({"recipe": recipe.as_dict(), "progress": asdict(progress)})
    with atomic_write(path) as file:
        kept = {name: arrays[name][:size] for name in ARRAYS}
        np.savez(file, text=np.frombuffer(text.encode(), np.uint8), **kept)


def read_checkpoint(
    path: Path, recipe: Recipe, arrays: dict, model_size: int | None = None
) -> Progress:
    """Read the file into ``arrays`` and return its progress. MinitxError if the file is damaged, or
    if the recipe has changed other than in stages that had not begun.

    model_size: length of the model's part of ``arrays``; if the file has only that part, the rest
    is unchanged.
    """
    try:
        size = sum(array.nbytes for array in arrays.values())
        file = read_npz(path, size + MAX_TEXT)
        text = parse_json(file["text"].tobytes())
        found = {name: file[name] for name in ARRAYS}
        progress = Progress(**text["progress"])
        progress.check_types()
        theirs = settled(text["recipe"], progress)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise MinitxError(
            f"{path}: expected a training checkpoint, got an unreadable file ({error}); delete it "
            "to restart training."
        ) from None
    ours = settled(recipe.as_dict(), progress)
    if changed := [name for name in ours if ours[name] != theirs[name]]:
        raise MinitxError(
            f"{path}: belongs to another recipe ({', '.join(changed)} differ); "
            "restore the recipe, use another folder, or restart without resuming."
        )
    if not progress.fits(recipe):
        raise MinitxError(
            f"{path}: stage {progress.stage}, step {progress.step}, {progress.total} steps in all "
            "is not a point of this recipe; delete the file to restart training."
        )
    for name, array in found.items():
        shapes = arrays[name].shape, (model_size,)
        if array.shape not in shapes or array.dtype != arrays[name].dtype:
            raise MinitxError(
                f"{path}: expected {name} of shape {arrays[name].shape} {arrays[name].dtype}, got "
                f"{array.shape} {array.dtype}; delete the file to restart training."
            )
        arrays[name][: len(array)] = array
    return progress


def settled(recipe: dict, progress: Progress) -> dict:
    """The parts of a recipe on which training so far depended; later stages can still change."""
    stages = [DEFAULTS | stage for stage in recipe["stages"][: progress.stages_begun]]
    used = {name: recipe["grades"].get(name) for stage in stages for name in stage["grades"]}
    kept = {name: recipe[name] for name in ("model", "seed", "shards")}
    kept |= {"start": recipe.get("start"), "techniques": recipe.get("techniques", {})}
    return kept | {"stages": stages, "grades": used}
