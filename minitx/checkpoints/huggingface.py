"""Read and write a Hugging Face model folder: ``config.json`` and ``model.safetensors``.

    read_model(folder)          -> Transformer
    write_model(model, folder)     in the format that transformers loads

The files that count, as in transformers:

    config.json                the model (hf_config.py), and what older files say about generation
    generation_config.json     when a text ends (hf_generation.py)
    model.safetensors          the weights; else the shards in model.safetensors.index.json
    adapter_config.json        refused: a PEFT adapter would change the weights

All tensor names and shapes are checked against the configuration before the first weight is read.
Tokenizers have their own modules. Pickles (``pytorch_model.bin``) are never opened, and code of the
folder (``auto_map``, ``custom_generate``) is never run: transformers asks before it does.
"""

import json
from dataclasses import dataclass
from os.path import commonprefix
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
from minitx.checkpoints.hf_generation import with_generation
from minitx.checkpoints.hf_weights import (
    NAME_MAPS,
    TensorMap,
    full_name,
    is_buffer,
    tensor_maps,
    why_missing,
)
from minitx.checkpoints.safetensors import TensorInfo, read_header, read_tensor
from minitx.checkpoints.safetensors_write import need_stored_dtype, write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import weights as tree_weights

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


# ---------------------------------------------------------------------------------------- reading


def read_model(folder, dtype=np.float32) -> Transformer:
    """The model in ``folder``, its weights as ``dtype`` (float32 or float64).

    Raises MinitxError if configuration, index or tensors are missing, unexpected, of the wrong
    shape, not finite, contradictory, or not supported.
    """
    folder, dtype = Path(folder), need_float_dtype(dtype)
    if not folder.is_dir():
        raise MinitxError(f"{folder}: there is no such folder; expected one with a config.json.")
    if (folder / ADAPTER).exists():
        raise MinitxError(
            f"{folder / ADAPTER}: this folder has a PEFT adapter, which changes the model; merge "
            "it (merge_and_unload, then save_pretrained) and load the result."
        )
    config = with_generation(read_config(folder / CONFIG), folder, folder / CONFIG)
    tensors = _by_full_name(folder, config, _locate_tensors(folder))
    weights: dict[str, np.ndarray] = {}
    for tensor_map in _match(folder, config, tensors):
        weights.update(tensor_map.split(_load(tensors[tensor_map.name], dtype)))
    model = build(config, lambda path, shape: weights[path])
    _check_tied_head(folder, config, tensors, model, dtype)
    return model


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is."""

    name: str  # in the file
    file: Path
    info: TensorInfo  # its header entry


Tensors = dict[str, StoredTensor]


def _load(stored: StoredTensor, dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # float64 values that overflow float32 are reported as Inf
        array = read_tensor(stored.file, stored.name, stored.info).astype(dtype, copy=False)
    return need_finite(stored.file, stored.name, array)


def _by_full_name(folder: Path, config: Config, stored: Tensors) -> Tensors:
    """The tensors by their full names (hf_weights.py) instead of their names in the file."""
    found: Tensors = {}
    for tensor in stored.values():
        name = full_name(config, tensor.name)
        if name in found:
            raise MinitxError(
                f"{folder}: tensors {found[name].name!a} and {tensor.name!a} are both {name!a}; "
                "remove one of them."
            )
        found[name] = tensor
    return found


def _locate_tensors(folder: Path) -> Tensors:
    """All tensors of the folder by their names in the file: its single file, or else the shards of
    its index."""
    if (folder / ONE_FILE).exists():
        return _tensors_in(folder / ONE_FILE)
    if (folder / INDEX).exists():
        return _locate_in_shards(folder)
    for pattern in PICKLES:
        for pickle in sorted(folder.glob(pattern)):
            raise MinitxError(
                f"{folder}: expected {ONE_FILE}, got {pickle.name}; opening a pickle can run any "
                "code, so minitx never does: save the model again with transformers' "
                "save_pretrained, which writes safetensors."
            )
    others = [f.name for pattern in ("*.safetensors", "*.gguf") for f in folder.glob(pattern)]
    raise MinitxError(
        f"{folder}: expected {ONE_FILE} or {INDEX}, got {some(sorted(others)) or 'neither'}."
    )


def _tensors_in(file: Path) -> Tensors:
    return {
        name: StoredTensor(name, file, info) for name, info in read_header(file).tensors.items()
    }


def _locate_in_shards(folder: Path) -> Tensors:
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
    found: Tensors = {}
    for shard in shards:
        for name, tensor in _tensors_in(folder / shard).items():
            if weight_map.get(name) != shard:
                raise MinitxError(
                    f"{folder / shard}: has tensor {name!a}, but {INDEX} maps it to "
                    f"{abbreviate(weight_map.get(name))}; the shards do not belong together."
                )
            found[name] = tensor
    for name, shard in weight_map.items():
        if name not in found:
            raise MinitxError(
                f"{folder / shard}: has no tensor {name!a}, but {INDEX} maps it to this file."
            )
    return found


def _match(folder: Path, config: Config, tensors: Tensors) -> list[TensorMap]:
    """The tensors to read, once all are there, in the expected shapes, and no other tensor is."""
    # A huge layer count must fail before a list of all its tensors is built.
    if config.layers > len(tensors) + 100:
        raise MinitxError(
            f"{folder}: {CONFIG} has {config.layers} layers but the folder only "
            f"{len(tensors)} tensors."
        )
    expected = tensor_maps(config)
    _need_all(folder, config, expected, tensors)
    for tensor_map in expected:
        stored = tensors[tensor_map.name]
        if stored.info.shape != tensor_map.shape:
            raise MinitxError(
                f"{stored.file}: tensor {stored.name!a} must have shape {tensor_map.shape} by "
                f"{CONFIG}, got {stored.info.shape}."
            )
    names = {tensor_map.name for tensor_map in expected}
    for name, stored in tensors.items():
        copy_of_embedding = config.tied and name == NAME_MAPS[config.family].head
        if not (name in names or copy_of_embedding or is_buffer(config, name)):
            raise MinitxError(
                f"{stored.file}: tensor {stored.name!a} has no place in a model of this {CONFIG}; "
                "ignoring it would change the model's output."
            )
    return expected


def _need_all(folder: Path, config: Config, expected: list[TensorMap], tensors: Tensors) -> None:
    """Raises MinitxError if tensors are missing: which, what is there instead, and why."""
    missing = [tensor_map.name for tensor_map in expected if tensor_map.name not in tensors]
    if not missing:
        return
    wanted = {tensor_map.name for tensor_map in expected}
    stored = [tensor.name for tensor in tensors.values()]
    strange = [tensor.name for name, tensor in tensors.items() if name not in wanted]
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    near = sorted(strange or stored, key=lambda name: -len(commonprefix([name, missing[0]])))
    cause = why_missing(config, missing, stored)
    raise MinitxError(
        f"{folder}: tensor {missing[0]!a}{more} is missing but required by {CONFIG}; the folder "
        f"has {some(near)}{cause and '; ' + cause}."
    )


def some(names: list[str], most: int = 3) -> str:
    """The first few of these names, each abbreviated, for an error message."""
    text = ", ".join(abbreviate(name) for name in names[:most])
    return f"{text} and {len(names) - most} more" if len(names) > most else text


def _check_tied_head(
    folder: Path, config: Config, tensors: Tensors, model: Transformer, dtype
) -> None:
    """If a tied head is stored too, it must equal the embedding."""
    head = tensors.get(NAME_MAPS[config.family].head)
    if config.tied and head:
        table = model.head.w
        if head.info.shape != table.shape or (_load(head, dtype) != table).any():
            raise MinitxError(
                f"{folder}: {CONFIG} ties {head.name!a} to the embedding but their values differ; "
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
