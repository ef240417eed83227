"""Checkpoints: everything from which training goes on to the very result it would have had.

One ``.npz`` file holds the weights, the two moments of AdamW, and as JSON text the progress and the
recipe. It is replaced as a whole, so a crash leaves the one before; nothing in it is unpickled.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from minitx.errors import MinitxError
from minitx.files.common import replacing
from minitx.training.recipe import Recipe

ARRAYS = ("weights", "m", "v")


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


def write_checkpoint(path: Path, recipe: Recipe, progress: Progress, arrays: dict) -> None:
    """Write the file; ``arrays`` holds the flat vectors weights, m and v."""
    text = json.dumps({"recipe": recipe.as_dict(), "progress": asdict(progress)})
    with replacing(path) as file:
        kept = {name: arrays[name] for name in ARRAYS}
        np.savez(file, text=np.frombuffer(text.encode(), np.uint8), **kept)


def read_checkpoint(path: Path, recipe: Recipe, arrays: dict) -> Progress:
    """Fill ``arrays`` from the file and return its progress. Stages that were not begun may have
    changed in the recipe since; MinitxError if anything else has, or if the file is damaged."""
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
        if array.shape != arrays[name].shape or array.dtype != arrays[name].dtype:
            raise MinitxError(
                f"{path}: holds {array.shape} {array.dtype} numbers as {name}, needed are "
                f"{arrays[name].shape} {arrays[name].dtype}; delete it to begin anew."
            )
        arrays[name][:] = array
    return progress


def begun(recipe: dict, progress: Progress) -> dict:
    """What of a recipe the training up to here depended on. Stages to come may still be changed."""
    stages = recipe["stages"][: progress.stage + (progress.step > 0)]
    used = {name: recipe["grades"].get(name) for stage in stages for name in stage["grades"]}
    kept = {name: recipe[name] for name in ("model", "seed", "shards")}
    return kept | {"stages": stages, "grades": used}
