"""Save a model after offline work by techniques, and load it without repeating that work.

    out/precomputed.json          its origin, and the tree of parts (parts.py)
    out/precomputed.safetensors   its arrays, in their in-memory dtypes
    out/tokenizer.json (or .bin)  a copy of the tokenizer file

The folder is self-contained: loading needs neither the original checkpoint nor calibration text.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from minitx.calibration import Calibrated
from minitx.checkpoints.common import abbreviate, fingerprint, need_float_dtype, read_json
from minitx.checkpoints.parts import deserialize, serialize
from minitx.checkpoints.safetensors import read_as_stored
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import Part, float_type, walk

JSON_FILE, ARRAYS_FILE = "precomputed.json", "precomputed.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Origin:
    """How the folder was made: the model that was loaded, the flags, and what techniques were
    calibrated on."""

    model: str
    flags: str
    calibrated: tuple[Calibrated, ...] = ()

    def __str__(self) -> str:
        return f"made by: minitx precompute -m {self.model} {self.flags}"


def write_precomputed(lm, folder, origin: Origin, tokenizer: Path | None) -> None:
    """Write the model and its decoding loop into the new ``folder``, which appears atomically.

    tokenizer: the tokenizer file to copy, or None. Raises MinitxError if the folder exists, or if a
    part cannot be serialized.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise MinitxError(f"{folder} already exists; give the name of a new folder.")
    entries, arrays, indices = serialize(model=lm.model, decode=lm.decode)
    # In the same parent folder, where a rename is atomic.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_safetensors(temporary / ARRAYS_FILE, arrays, None, {"format": "minitx precomputed"})
        content = {"format": FORMAT_VERSION, "from": origin.model, "flags": origin.flags}
        content["calibrated"] = [asdict(use) for use in origin.calibrated]
        content |= {
            "dtype": str(float_type(lm.model)),
            "arrays": fingerprint(temporary / ARRAYS_FILE),
        }
        text = json.dumps(content | indices | {"entries": entries}, indent=1)
        (temporary / JSON_FILE).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / f"tokenizer{tokenizer.suffix}")
        os.rename(temporary, folder)
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_precomputed(folder: Path) -> bool:
    return (folder / JSON_FILE).exists()


def read_origin(folder) -> Origin:
    """How the folder was made."""
    content = _read_content(Path(folder))
    return Origin(content["from"], content["flags"], _read_calibrated(folder, content))


def _read_calibrated(folder, content: dict) -> tuple[Calibrated, ...]:
    names = {field.name for field in fields(Calibrated)}
    found = content.get("calibrated", [])  # older folders do not say
    for use in found if isinstance(found, list) else [found]:
        if (
            not isinstance(use, dict)
            or set(use) != names
            or not all(isinstance(word, str) for word in use.values())
        ):
            raise MinitxError(
                f"{Path(folder) / JSON_FILE}: 'calibrated' must be a list of objects with strings "
                f"for {', '.join(sorted(names))}, got {abbreviate(use)}."
            )
    return tuple(Calibrated(**use) for use in found)


def read_precomputed(folder, dtype=np.float32) -> tuple[Transformer, Part]:
    """The model and the decoding loop in the folder, smoke-tested on one token.

    Raises MinitxError if the files are corrupt or do not belong together, or if ``dtype`` is not
    the one in which the model was precomputed: its values are already rounded to that.
    """
    folder, dtype = Path(folder), need_float_dtype(dtype)
    content = _read_content(folder)
    if content["dtype"] != str(dtype):
        raise MinitxError(
            f"{folder} was precomputed in {abbreviate(content['dtype'])}; load it in that dtype, "
            f"not in {dtype}."
        )
    if content["arrays"] != fingerprint(folder / ARRAYS_FILE):
        raise MinitxError(
            f"{folder / ARRAYS_FILE}: does not match the fingerprint in {JSON_FILE}; run minitx "
            "precompute again."
        )
    path = folder / JSON_FILE
    parts = deserialize(path, content.get("entries"), read_as_stored(folder / ARRAYS_FILE))
    model, decode = (_root(path, parts, content, name) for name in ("model", "decode"))
    if type(model) is not Transformer:
        raise MinitxError(f"{path}: 'model' must be a Transformer, got a {type(model).__name__}.")
    _smoke_test(path, model)
    return model, decode


def _read_content(folder: Path) -> dict:
    path = folder / JSON_FILE
    content = read_json(path)
    if content.get("format") != FORMAT_VERSION:
        raise MinitxError(
            f"{path}: 'format' must be {FORMAT_VERSION} for this version of minitx, "
            f"got {abbreviate(content.get('format'))}."
        )
    for name in ("from", "flags", "dtype", "arrays"):
        if not isinstance(content.get(name), str):
            raise MinitxError(
                f"{path}: {name!r} must be a string, got {abbreviate(content.get(name))}."
            )
    return content


def _root(path: Path, parts: list[Part], content: dict, name: str) -> Part:
    index = content.get(name)
    if type(index) is not int or not 0 <= index < len(parts):
        raise MinitxError(
            f"{path}: {name!r} must be the index of an entry, got {abbreviate(index)}."
        )
    return parts[index]


def _smoke_test(path: Path, model: Transformer) -> None:
    """Run one token: parts that are each valid may still not fit together."""
    counts = {len(node.blocks) for _, node in walk(model) if hasattr(node, "blocks")}
    if counts != {model.config.layers}:
        raise MinitxError(f"{path}: expected {model.config.layers} layers, got {sorted(counts)}.")
    try:
        logits = model(np.array([0]), model.new_state())
        complete = logits.shape == (1, model.config.vocab_size)
    except Exception as error:  # anything NumPy or a part may raise for wrong shapes or types
        raise MinitxError(f"{path}: its parts do not fit together ({error}).") from None
    if not complete or not np.isfinite(logits).all():
        raise MinitxError(
            f"{path}: expected {model.config.vocab_size} finite logits from its parts."
        )
