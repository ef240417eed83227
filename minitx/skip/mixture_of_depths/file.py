"""``mixture_of_depths.safetensors``: the trained routers of a model, beside its weights.

Tensors ``blocks.1.w``, ``blocks.3.w``, ... (D,), one for each routed block, in float32. The
metadata holds the capacity in training and a fingerprint of the weights that they belong to.
"""

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minitx.checkpoints.common import need_finite, weights_fingerprint
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError

FILE = "mixture_of_depths.safetensors"


class Trained(NamedTuple):
    """Trained routers."""

    vectors: dict[int, np.ndarray]  # block -> w (D,)
    capacity: float  # share of the tokens that entered each routed block in training


def write_routers(routers: Trained, folder) -> None:
    """Write the routers into the folder that holds the model's weights."""
    tensors = {f"blocks.{i}.w": w for i, w in routers.vectors.items()}
    metadata = {
        "format": "minitx routers",
        "capacity": repr(float(routers.capacity)),
        "weights": weights_fingerprint(folder),
    }
    write_safetensors(Path(folder) / FILE, tensors, "F32", metadata)


def read_routers(folder, config: Config, dtype=np.float32) -> Trained:
    """MinitxError if the file is damaged, does not fit a model of this configuration, or belongs to
    other weights than those in the folder."""
    path = Path(folder) / FILE
    found, metadata = read_tensors(path), read_header(path).metadata
    vectors = {}
    for name, w in found.items():
        index = re.fullmatch(r"blocks\.(\d{1,4})\.w", name)
        if index is None or int(index[1]) >= config.layers:
            raise MinitxError(
                f"{path}: unexpected tensor {name!a} for a model of {config.layers} blocks; is it "
                "another model's file?"
            )
        if w.shape != (config.width,):
            raise MinitxError(
                f"{path}: {name} has the shape {w.shape}; expected {(config.width,)}, the model's "
                "width. Is it another model's file?"
            )
        need_finite(path, name, w)
        vectors[int(index[1])] = w.astype(dtype)
    if metadata.get("weights") != weights_fingerprint(folder):
        raise MinitxError(
            f"{path}: was not trained with the weights beside it; take both from one training, or "
            "use router=fitted."
        )
    return Trained(dict(sorted(vectors.items())), read_capacity(path, metadata))


def read_capacity(path: Path, metadata: dict) -> float:
    try:
        capacity = float(metadata.get("capacity", ""))
    except ValueError:
        capacity = 0.0
    if not 0 < capacity <= 1:
        raise MinitxError(
            f"{path}: expected a capacity above 0, at most 1, in its metadata, got "
            f"{metadata.get('capacity')!a}; train the routers again."
        )
    return capacity
