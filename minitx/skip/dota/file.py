"""``dota.safetensors``: the trained detectors of a model, beside its weights.

Tensors ``blocks.0.p``, ``blocks.0.w_q``, ``blocks.0.w_k``, ``blocks.1.p``, ... (``Detector``), in
float32. The metadata holds a fingerprint of the weights that the detectors were trained with.
"""

from dataclasses import fields
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import need_finite, weights_fingerprint
from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.skip.dota.detector import Detector, check_rank, shapes

FILE = "dota.safetensors"
NAMES = tuple(f.name for f in fields(Detector))


def write_detectors(detectors, folder) -> None:
    """Write the detectors of all blocks into the folder that holds the model's weights."""
    tensors = {
        f"blocks.{i}.{name}": getattr(detector, name)
        for i, detector in enumerate(detectors)
        for name in NAMES
    }
    metadata = {"format": "minitx detectors", "weights": weights_fingerprint(folder)}
    write_safetensors(Path(folder) / FILE, tensors, "F32", metadata)


def read_detectors(folder, config: Config, dtype=np.float32) -> tuple[Detector, ...]:
    """One detector for each block. MinitxError if the file is missing or damaged, does not fit a
    model of this configuration, or was trained with other weights than those in the folder."""
    path = Path(folder) / FILE
    found = read_tensors(path)
    wanted = [f"blocks.{i}.{name}" for i in range(config.layers) for name in NAMES]
    if missing := [name for name in wanted if name not in found]:
        raise MinitxError(
            f"{path}: has no tensor {missing[0]!a}; expected the detectors of {config.layers} "
            "blocks, which training with this model's own recipe writes."
        )
    if unknown := sorted(set(found) - set(wanted)):
        raise MinitxError(
            f"{path}: unexpected tensor {unknown[0]!a} for a model of {config.layers} blocks; is "
            "it another model's file?"
        )
    p = found["blocks.0.p"]
    rank = p.shape[-1] if p.ndim else 0
    check_rank(rank, config, f"{path}: the detectors' rank")
    need_same_heads(path, found, config, rank)
    for name in wanted:
        expected = shapes(config, rank)[name.rpartition(".")[2]]
        if found[name].shape != expected:
            raise MinitxError(
                f"{path}: {name} has the shape {found[name].shape}; expected {expected}. Is it "
                "another model's file?"
            )
        need_finite(path, name, found[name])
    if read_header(path).metadata.get("weights") != weights_fingerprint(folder):
        raise MinitxError(
            f"{path}: was not trained with the weights beside it; take both from one training, or "
            "use fit=post-hoc."
        )
    return tuple(
        Detector(*(found[f"blocks.{i}.{name}"].astype(dtype) for name in NAMES))
        for i in range(config.layers)
    )


def need_same_heads(path, found: dict, config: Config, rank: int) -> None:
    """Refuse detectors that were all trained for another number of heads than the model has."""
    blocks = range(config.layers)
    trained = {
        tuple(found[f"blocks.{i}.{name}"].size // rank**2 for name in ("w_q", "w_k"))
        for i in blocks
    }
    ours = config.heads, config.kv_heads
    if len(trained) == 1 and ours not in trained:
        heads, kv_heads = trained.pop()
        raise MinitxError(
            f"{path}: dota's detectors were trained for {heads} query heads and {kv_heads} key "
            f"heads, and this model has {ours[0]} and {ours[1]} (prune_structure removes heads); "
            "use fit=post-hoc."
        )
