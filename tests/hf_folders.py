"""Shared by the Hugging Face tests: the reference folders, and helpers that corrupt a copy.

transformers wrote the folders in ``reference/files`` (see make.py there).
"""

import json
import shutil
from pathlib import Path

import numpy as np

from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors

REFERENCE = Path(__file__).parent / "reference" / "files"
NAMES = sorted(folder.name for folder in REFERENCE.iterdir() if (folder / "config.json").exists())
IDS = np.load(REFERENCE / "ids.npy")


def relative_error(found, expected) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def edit(folder: Path, **changes) -> None:
    """Change fields of config.json; ``...`` removes a field."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


def edit_tensors(folder: Path, change) -> None:
    """Apply ``change(dict of tensors)`` to model.safetensors."""
    tensors = read_tensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of the reference folder ``name``, which a test may corrupt."""
    return Path(shutil.copytree(REFERENCE / name, tmp_path / name))
