"""A Hugging Face model folder: ``config.json`` and ``model.safetensors``, read and written.

    read_model(folder)          -> Transformer
    write_model(model, folder)     so that transformers loads the folder as it is

Read are one file, or several with ``model.safetensors.index.json``. Names and shapes of all tensors
are compared with what the configuration calls for before the first weight is read. Tokenizers are
not read here, and pickles (``pytorch_model.bin``) are never opened.
"""

import json
from pathlib import Path

import numpy as np

from minitx.build import build, shapes
from minitx.checkpoints.common import need_finite, need_float, read_json, replacing, short
from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.hf_config_write import config_fields
from minitx.checkpoints.hf_weights import NAMINGS, Entry, entries, is_buffer
from minitx.checkpoints.safetensors import TensorInfo, read_header, read_tensor
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import weights

CONFIG, ONE_FILE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
Found = dict[str, tuple[Path, TensorInfo]]  # tensor name -> its file and place


# ---------------------------------------------------------------------------------------- reading


def read_model(folder, dtype=np.float32) -> Transformer:
    """The model in ``folder``, its weights as ``dtype`` (float32 or float64).

    Raises MinitxError for every fault of configuration, index or tensors: what is missing, extra,
    misshapen, not finite, contradictory, or not supported.
    """
    folder, dtype = Path(folder), need_float(dtype)
    if not folder.is_dir():
        raise MinitxError(f"{folder}: there is no such folder; give one that holds a config.json.")
    config = read_config(folder / CONFIG)
    found = _find_tensors(folder)
    wanted = _match(folder, config, found)
    ours: dict[str, np.ndarray] = {}
    for entry in wanted:
        ours.update(entry.take(_load(entry.name, found, dtype)))
    model = build(config, lambda path, shape: ours[path])
    _check_tied_copy(folder, config, found, model, dtype)
    return model


def _load(name: str, found: Found, dtype) -> np.ndarray:
    file, info = found[name]
    with np.errstate(over="ignore"):  # a float64 too large for float32 is reported as Inf
        array = read_tensor(file, name, info).astype(dtype, copy=False)
    return need_finite(file, name, array)


def _find_tensors(folder: Path) -> Found:
    """Every tensor of the folder, from its one file or else from the shards of its index."""
    if (folder / ONE_FILE).exists():
        path = folder / ONE_FILE
        return {name: (path, info) for name, info in read_header(path).tensors.items()}
    if (folder / INDEX).exists():
        return _find_in_shards(folder)
    for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt"):
        for pickle in sorted(folder.glob(pattern)):
            raise MinitxError(
                f"{folder}: holds {pickle.name} but no {ONE_FILE}; a pickle can run any code when "
                "it is opened, so minitx never does: save the model again with transformers' "
                "save_pretrained, which writes safetensors."
            )
    raise MinitxError(f"{folder}: holds neither {ONE_FILE} nor {INDEX}; expected one of them.")


def _find_in_shards(folder: Path) -> Found:
    """The tensors that the index places, each found in the shard where it says."""
    index = folder / INDEX
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise MinitxError(f"{index}: has no 'weight_map' from tensor names to file names.")
    shards = sorted(set(places.values()))
    for shard in shards:
        # Only a plain name: "../x" or "/x" would let a download read files outside its folder.
        if "/" in shard or "\\" in shard or "\0" in shard or not shard.endswith(".safetensors"):
            raise MinitxError(
                f"{index}: {short(shard)} is not the name of a .safetensors file in the folder."
            )
    found: Found = {}
    for shard in shards:
        for name, info in read_header(folder / shard).tensors.items():
            if places.get(name) != shard:
                raise MinitxError(
                    f"{folder / shard}: holds tensor {name!a}, which {INDEX} places in "
                    f"{short(places.get(name))}; the shards do not belong together."
                )
            found[name] = (folder / shard, info)
    for name, shard in places.items():
        if name not in found:
            raise MinitxError(
                f"{folder / shard}: has no tensor {name!a}, which {INDEX} places there."
            )
    return found


def _match(folder: Path, config: Config, found: Found) -> list[Entry]:
    """The tensors to read, after every one was found with the right shape and none is left over."""
    # Before a list is made for every layer: has the checkpoint as many tensors as layers at all?
    if config.layers > len(found):
        raise MinitxError(
            f"{folder}: {CONFIG} says {config.layers} layers but there are {len(found)} tensors."
        )
    naming = NAMINGS[config.family]
    bare = not any(name.startswith(naming.prefix) for name in found)  # GPT-2's own files
    wanted = entries(config, "" if bare else None)
    for entry in wanted:
        if entry.name not in found:
            raise MinitxError(f"{folder}: tensor {entry.name!a} is missing; {CONFIG} calls for it.")
        file, info = found[entry.name]
        if info.shape != entry.shape:
            raise MinitxError(
                f"{file}: tensor {entry.name!a} has shape {info.shape}; "
                f"by {CONFIG} it must have {entry.shape}."
            )
    names = {entry.name for entry in wanted}
    for name, (file, _) in found.items():
        copy_of_embedding = config.tied and name == naming.head
        if not (name in names or copy_of_embedding or is_buffer(config, name)):
            raise MinitxError(
                f"{file}: tensor {name!a} has no place in a model of this {CONFIG}; "
                "leaving it out would change what the model computes."
            )
    return wanted


def _check_tied_copy(folder: Path, config: Config, found: Found, model: Transformer, dtype) -> None:
    """A head stored beside the embedding it is tied to must be the same numbers."""
    head = NAMINGS[config.family].head
    if config.tied and head in found:
        table = model.head.w
        if found[head][1].shape != table.shape or (_load(head, found, dtype) != table).any():
            raise MinitxError(
                f"{folder}: {CONFIG} ties {head!a} to the embedding but their numbers differ; "
                "set tie_word_embeddings to false there if they are two."
            )


# ---------------------------------------------------------------------------------------- writing


def write_model(model: Transformer, folder, dtype: str = "F16") -> None:
    """Write ``config.json`` and ``model.safetensors`` (dtype "F16", "BF16", "F32" or "F64").

    The folder is made if need be; each file replaces an older one when it is complete. Only a plain
    model can be written: raises MinitxError if techniques have changed its parts, if no
    architecture of transformers computes the same, or if a weight is not finite or too large.
    """
    folder = Path(folder)
    fields = config_fields(model.config)
    ours = _plain_weights(model)
    tensors = {}
    for entry in entries(model.config):
        tensors[entry.name] = need_finite(folder, entry.name, entry.put(ours))
    # The type to compute in, not to store in: with float16 here transformers would compute in it.
    fields["dtype"] = "float64" if dtype == "F64" else "float32"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be made ({error.strerror or error}).") from None
    write_safetensors(folder / ONE_FILE, tensors, dtype)
    with replacing(folder / CONFIG) as file:
        file.write((json.dumps(fields, indent=2, sort_keys=True) + "\n").encode())


def _plain_weights(model: Transformer) -> dict[str, np.ndarray]:
    """The weights by path, if the model is exactly what ``build`` makes of its configuration."""
    ours = weights(model)
    if {path: w.shape for path, w in ours.items()} == shapes(model.config):
        # Equal weights may still stand in other parts: what is printed is what runs.
        if repr(build(model.config, lambda path, shape: ours[path])) == repr(model):
            return ours
    raise MinitxError(
        "The model is not the plain one of its configuration (a technique changed its parts), and "
        "no Hugging Face architecture holds that; write the model as it was before."
    )
