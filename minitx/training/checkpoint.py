"""Training checkpoints: resuming from one gives the same result, bit for bit, as not stopping.

One ``.npz`` file holds the weights, the two moments of AdamW, and as JSON text the progress and the
recipe. It is replaced atomically, so a crash leaves the previous one. Nothing in it is unpickled.
"""

import json
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import atomic_write
from minitx.errors import MinitxError
from minitx.training.recipe import Recipe, Stage

ARRAYS = ("weights", "m", "v")
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

    @property
    def stages_begun(self) -> int:
        """Number of stages that have begun."""
        return self.stage + (self.step > 0)


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
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            text = json.loads(file["text"].tobytes())
            found = {name: file[name] for name in ARRAYS}
        progress = Progress(**text["progress"])
        theirs = settled(text["recipe"], progress)
    except Exception as error:  # zip, JSON and NumPy raise various errors for damaged files
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
    return kept | {"stages": stages, "grades": used}
