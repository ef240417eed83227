"""Read and write a Hugging Face model folder: ``config.json`` and ``model.safetensors``.

    read_model(folder)          -> Transformer
    write_model(model, folder)     in the format that transformers loads

Reads a single file, or shards listed in ``model.safetensors.index.json``. All tensor names and
shapes are checked against the configuration before the first weight is read. Tokenizers have their
own modules. Pickles (``pytorch_model.bin``) are never opened.
"""

import json
from pathlib import Path

import numpy as np

from minitx.build import build, shapes
from minitx.checkpoints.common import (
    abbreviate,
    atomic_write,
    need_finite,
    need_float_dtype,
    read_json,
)
from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.hf_config_write import config_fields
from minitx.checkpoints.hf_weights import NAME_MAPS, TensorMap, is_buffer, tensor_maps
from minitx.checkpoints.safetensors import TensorInfo, read_header, read_tensor
from minitx.checkpoints.safetensors_write import need_stored_dtype, write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import weights as tree_weights

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TensorLocations = dict[str, tuple[Path, TensorInfo]]  # tensor name -> file, header entry


# ---------------------------------------------------------------------------------------- reading


def read_model(folder, dtype=np.float32) -> Transformer:
    """The model in ``folder``, its weights as ``dtype`` (float32 or float64).

    Raises MinitxError if configuration, index or tensors are missing, unexpected, of the wrong
    shape, not finite, contradictory, or not supported.
    """
    folder, dtype = Path(folder), need_float_dtype(dtype)
    if not folder.is_dir():
        raise MinitxError(f"{folder}: there is no such folder; expected one with a config.json.")
    config = read_config(folder / CONFIG)
    locations = _locate_tensors(folder)
    weights: dict[str, np.ndarray] = {}
    for tensor_map in _match(folder, config, locations):
        weights.update(tensor_map.split(_load(tensor_map.name, locations, dtype)))
    model = build(config, lambda path, shape: weights[path])
    _check_tied_head(folder, config, locations, model, dtype)
    return model


def _load(name: str, locations: TensorLocations, dtype) -> np.ndarray:
    file, info = locations[name]
    with np.errstate(over="ignore"):  # float64 values that overflow float32 are reported as Inf
        array = read_tensor(file, name, info).astype(dtype, copy=False)
    return need_finite(file, name, array)


def _locate_tensors(folder: Path) -> TensorLocations:
    """All tensors of the folder, in its single file or else in the shards of its index."""
    if (folder / ONE_FILE).exists():
        path = folder / ONE_FILE
        return {name: (path, info) for name, info in read_header(path).tensors.items()}
    if (folder / INDEX).exists():
        return _locate_in_shards(folder)
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for pickle in sorted(folder.glob(pattern)):
            raise MinitxError(
                f"{folder}: expected {ONE_FILE}, got {pickle.name}; opening a pickle can run any "
                "code, so minitx never does: save the model again with transformers' "
                "save_pretrained, which writes safetensors."
            )
    raise MinitxError(f"{folder}: expected {ONE_FILE} or {INDEX}, got neither.")


def _locate_in_shards(folder: Path) -> TensorLocations:
    """The tensors listed in the index, each checked to be in the shard that the index names."""
    index = folder / INDEX
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise MinitxError(f"{index}: expected a 'weight_map' from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        # Only a plain file name: "../x" or "/x" would read files outside the folder.
        if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise MinitxError(
                f"{index}: expected the name of a .safetensors file in this folder, "
                f"got {abbreviate(shard)}."
            )
    locations: TensorLocations = {}
    for shard in shards:
        for name, info in read_header(folder / shard).tensors.items():
            if weight_map.get(name) != shard:
                raise MinitxError(
                    f"{folder / shard}: has tensor {name!a}, but {INDEX} maps it to "
                    f"{abbreviate(weight_map.get(name))}; the shards do not belong together."
                )
            locations[name] = (folder / shard, info)
    for name, shard in weight_map.items():
        if name not in locations:
            raise MinitxError(
                f"{folder / shard}: has no tensor {name!a}, but {INDEX} maps it to this file."
            )
    return locations


def _match(folder: Path, config: Config, locations: TensorLocations) -> list[TensorMap]:
    """The tensors to read, once all are there, in the expected shapes, and no other tensor is."""
    # A huge layer count must fail before a list of all its tensors is built.
    if config.layers > len(locations):
        raise MinitxError(
            f"{folder}: {CONFIG} has {config.layers} layers but the folder only "
            f"{len(locations)} tensors."
        )
    name_map = NAME_MAPS[config.family]
    no_prefix = not any(name.startswith(name_map.prefix) for name in locations)  # OpenAI's GPT-2
    expected = tensor_maps(config, "" if no_prefix else None)
    for tensor_map in expected:
        name = tensor_map.name
        if name not in locations:
            raise MinitxError(f"{folder}: tensor {name!a} is missing but required by {CONFIG}.")
        file, info = locations[name]
        if info.shape != tensor_map.shape:
            raise MinitxError(
                f"{file}: tensor {name!a} must have shape {tensor_map.shape} by {CONFIG}, "
                f"got {info.shape}."
            )
    names = {tensor_map.name for tensor_map in expected}
    for name, (file, _) in locations.items():
        copy_of_embedding = config.tied and name == name_map.head
        if not (name in names or copy_of_embedding or is_buffer(config, name)):
            raise MinitxError(
                f"{file}: tensor {name!a} has no place in a model of this {CONFIG}; "
                "ignoring it would change the model's output."
            )
    return expected


def _check_tied_head(
    folder: Path, config: Config, locations: TensorLocations, model: Transformer, dtype
) -> None:
    """If a tied head is stored too, it must equal the embedding."""
    head = NAME_MAPS[config.family].head
    if config.tied and head in locations:
        table, (_, info) = model.head.w, locations[head]
        if info.shape != table.shape or (_load(head, locations, dtype) != table).any():
            raise MinitxError(
                f"{folder}: {CONFIG} ties {head!a} to the embedding but their values differ; "
                "set tie_word_embeddings to false if they are separate weights."
            )


# ---------------------------------------------------------------------------------------- writing


def write_model(model: Transformer, folder, dtype: str = "F16") -> None:
    """Write ``config.json`` and ``model.safetensors`` (dtype "F16", "BF16", "F32" or "F64").

    Creates the folder if necessary and replaces each file atomically. Raises MinitxError if a
    technique has changed the model's parts, if no architecture of transformers computes the same,
    or if a weight is not finite or overflows ``dtype``.
    """
    need_stored_dtype(dtype)
    folder = Path(folder)
    fields = config_fields(model.config)
    weights = _plain_weights(model)
    tensors = {}
    for tensor_map in tensor_maps(model.config):
        name = tensor_map.name
        tensors[name] = need_finite(folder, name, tensor_map.join(weights))
    # The compute dtype, not the storage dtype: with float16 here transformers would compute in it.
    fields["dtype"] = "float64" if dtype == "F64" else "float32"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be created ({error.strerror or error}).") from None
    write_safetensors(folder / ONE_FILE, tensors, dtype)
    with atomic_write(folder / CONFIG) as file:
        file.write((json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def _plain_weights(model: Transformer) -> dict[str, np.ndarray]:
    """The weights by path, if the model is exactly what ``build`` makes of its configuration."""
    found = tree_weights(model)
    if {path: w.shape for path, w in found.items()} == shapes(model.config):
        # Equal shapes do not mean equal parts; repr shows the types of all parts.
        if repr(build(model.config, lambda path, shape: found[path])) == repr(model):
            return found
    raise MinitxError(
        "Expected an unmodified model, got one whose parts a technique has changed, which no "
        "Hugging Face architecture can hold; write the model without techniques."
    )
