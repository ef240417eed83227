"""Checkpoints: everything from which training goes on to the very result it would have had.

One ``.npz`` file holds the weights, the two moments of AdamW, and as JSON text the progress and the
recipe. It is replaced as a whole, so a crash leaves the one before; nothing in it is unpickled.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import atomic_write
from minitx.errors import MinitxError
from minitx.training.recipe import Recipe, Stage

ARRAYS = ("weights", "m", "v")
# Of fields that a stage may lack: of those that are younger than its checkpoint, too.
DEFAULTS = {f.name: f.default for f in fields(Stage) if f.default is not MISSING}


@dataclass
class Progress:
    """How far the training is. With the recipe, the weights and the moments it says all that
    follows: no random number depends on anything but the seed and these counts."""

    stage: int = 0
    step: int = 0  # steps done in this stage
    total: int = 0  # steps done in all
    tokens: int = 0
    seconds: float = 0.0
    losses: list = field(default_factory=list)  # of the steps since the last check
    log: list = field(default_factory=list)  # one entry for each check
    errors: list = field(default_factory=list)  # of detectors, as the losses

    @property
    def begun(self) -> int:
        """How many stages have been begun."""
        return self.stage + (self.step > 0)


def write_checkpoint(
    path: Path, recipe: Recipe, progress: Progress, arrays: dict, model_size: int | None = None
) -> None:
    """Write the file; ``arrays`` holds the flat vectors weights, m and v.

    model_size: how much of them the model takes. What is behind it, detectors, is left out until a
    stage has trained it: so that stage may still be changed.
    """
    trained = any(stage.detector for stage in recipe.stages[: progress.begun])
    size = None if trained else model_size
    text = json.dumps({"recipe": recipe.as_dict(), "progress": asdict(progress)})
    with atomic_write(path) as file:
        kept = {name: arrays[name][:size] for name in ARRAYS}
        np.savez(file, text=np.frombuffer(text.encode(), np.uint8), **kept)


def read_checkpoint(
    path: Path, recipe: Recipe, arrays: dict, model_size: int | None = None
) -> Progress:
    """Fill ``arrays`` from the file and return its progress. Stages that were not begun may have
    changed in the recipe since; MinitxError if anything else has, or if the file is damaged.

    model_size: how much of ``arrays`` the model takes; a file may hold that alone, and the rest
    stays as it is.
    """
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            text = json.loads(file["text"].tobytes())
            found = {name: file[name] for name in ARRAYS}
        progress = Progress(**text["progress"])
        theirs = begun(text["recipe"], progress)
    except Exception as error:  # zip, JSON and NumPy have their own errors for damage
        raise MinitxError(
            f"{path}: is no checkpoint of this training ({error}); delete it to begin anew."
        ) from None
    ours = begun(recipe.as_dict(), progress)
    if changed := [name for name in ours if ours[name] != theirs[name]]:
        raise MinitxError(
            f"{path}: belongs to another recipe ({', '.join(changed)} differ); "
            "restore the recipe, give another folder, or begin anew without resuming."
        )
    for name, array in found.items():
        shapes = arrays[name].shape, (model_size,)
        if array.shape not in shapes or array.dtype != arrays[name].dtype:
            raise MinitxError(
                f"{path}: holds {array.shape} {array.dtype} numbers as {name}, expected "
                f"{arrays[name].shape} {arrays[name].dtype}; delete it to begin anew."
            )
        arrays[name][: len(array)] = array
    return progress


def begun(recipe: dict, progress: Progress) -> dict:
    """What of a recipe the training up to here depended on. Stages to come may still be changed."""
    stages = [DEFAULTS | stage for stage in recipe["stages"][: progress.begun]]
    used = {name: recipe["grades"].get(name) for stage in stages for name in stage["grades"]}
    kept = {name: recipe[name] for name in ("model", "seed", "shards")}
    return kept | {"stages": stages, "grades": used}
