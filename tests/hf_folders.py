"""What the tests of Hugging Face folders share: the reference folders, and ways to damage a copy.

The folders in ``reference/files`` were written by transformers (see make.py there).
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
    """Change fields of config.json; ``...`` removes one."""
    fields = json.loads((folder / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))


def edit_tensors(folder: Path, change) -> None:
    """Rewrite model.safetensors after ``change(dict of tensors)``."""
    tensors = read_tensors(folder / "model.safetensors")
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors)


def copied(name: str, tmp_path: Path) -> Path:
    """A copy of that reference folder, which a test may damage."""
    return Path(shutil.copytree(REFERENCE / name, tmp_path / name))
