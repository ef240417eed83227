"""What ``minitx models`` lists: the shipped models, read from their files without loading them."""

import math
from dataclasses import dataclass
from pathlib import Path

from minitx.checkpoints.common import read
from minitx.checkpoints.find import shipped
from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.huggingface import CONFIG, ONE_FILE
from minitx.checkpoints.safetensors import read_header
from minitx.config import Config


@dataclass(frozen=True)
class Entry:
    """One shipped model."""

    name: str
    config: Config
    weights: int  # how many numbers
    file_bytes: int  # of the file that holds them
    purpose: str  # the first paragraph of its README.md


def catalog() -> list[Entry]:
    """The shipped models; ``stories``, the default everywhere, comes first."""
    return [_entry(name, folder) for name, folder in sorted(shipped().items())]


def _entry(name: str, folder: Path) -> Entry:
    path = folder / ONE_FILE
    tensors = read_header(path).tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return Entry(name, read_config(folder / CONFIG), weights, path.stat().st_size, _purpose(folder))


def _purpose(folder: Path) -> str:
    """The first paragraph after the heading of the model's README.md."""
    paragraphs = read(folder / "README.md").decode("utf-8").split("\n\n")
    return " ".join(paragraphs[1].split()).replace("`", "")
