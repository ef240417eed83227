"""A model with the parts that techniques have put in, written once offline and read again.

    out/precomputed.json          what made it, and the tree of parts (parts.py)
    out/precomputed.safetensors   its arrays, in the types that they have in memory
    out/tokenizer.json (or .bin)  a copy of the tokenizer's file

Nothing of what led to it is needed to read it: no checkpoint, no calibration text.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import fingerprint, need_float, read_json, short
from minitx.checkpoints.parts import describe, restore
from minitx.checkpoints.safetensors import read_as_stored
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.tree import Part, float_type, walk

FILE, ARRAYS = "precomputed.json", "precomputed.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Origin:
    """What made the files: the model that was loaded, and the flags."""

    model: str
    flags: str

    def __str__(self) -> str:
        return f"made by: minitx precompute -m {self.model} {self.flags}"


def write_precomputed(lm, folder, origin: Origin, tokenizer: Path | None) -> None:
    """Write the model and its token loop into the new ``folder``, which appears when it is whole.

    tokenizer: the file that the tokenizer was read from, if there was one; it is copied. Raises
    MinitxError if the folder exists, or if a part holds what no file can.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise MinitxError(f"{folder} exists already; give the name of a new folder.")
    entries, arrays, numbers = describe(model=lm.model, decode=lm.decode)
    # Beside the place where it is to appear: only there can it be renamed at one stroke.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write_safetensors(temporary / ARRAYS, arrays, None, {"format": "minitx precomputed"})
        found = {"format": FORMAT, "from": origin.model, "flags": origin.flags}
        found |= {"dtype": str(float_type(lm.model)), "arrays": fingerprint(temporary / ARRAYS)}
        text = json.dumps(found | numbers | {"entries": entries}, indent=1)
        (temporary / FILE).write_text(text + "\n", encoding="utf-8")
        if tokenizer is not None:
            shutil.copyfile(tokenizer, temporary / f"tokenizer{tokenizer.suffix}")
        os.rename(temporary, folder)
    except OSError as error:
        raise MinitxError(f"{folder}: cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_precomputed(folder: Path) -> bool:
    return (folder / FILE).exists()


def read_origin(folder) -> Origin:
    """What made the files in the folder."""
    found = _read(Path(folder))
    return Origin(found["from"], found["flags"])


def read_precomputed(folder, dtype=np.float32) -> tuple[Transformer, Part]:
    """The model and the token loop in the folder, tried on one token.

    Raises MinitxError if the files are damaged or do not belong together, or if the numbers are not
    of the type asked for: they were rounded to theirs when they were made.
    """
    folder, dtype = Path(folder), need_float(dtype)
    found = _read(folder)
    if found["dtype"] != str(dtype):
        raise MinitxError(
            f"{folder} was precomputed in {short(found['dtype'])}; load it in that type, not in "
            f"{dtype}."
        )
    if found["arrays"] != fingerprint(folder / ARRAYS):
        raise MinitxError(
            f"{folder / ARRAYS}: is not the file that {FILE} was written with; run minitx "
            "precompute again."
        )
    path = folder / FILE
    parts = restore(path, found.get("entries"), read_as_stored(folder / ARRAYS))
    model, decode = (_numbered(path, parts, found, name) for name in ("model", "decode"))
    if type(model) is not Transformer:
        raise MinitxError(f"{path}: 'model' is a {type(model).__name__}, not a Transformer.")
    _try(path, model)
    return model, decode


def _read(folder: Path) -> dict:
    path = folder / FILE
    found = read_json(path)
    if found.get("format") != FORMAT:
        raise MinitxError(
            f"{path}: its 'format' is {short(found.get('format'))}; this minitx reads {FORMAT}."
        )
    for name in ("from", "flags", "dtype", "arrays"):
        if not isinstance(found.get(name), str):
            raise MinitxError(f"{path}: {name!r} is {short(found.get(name))}; expected text.")
    return found


def _numbered(path: Path, parts: list[Part], found: dict, name: str) -> Part:
    number = found.get(name)
    if type(number) is not int or not 0 <= number < len(parts):
        raise MinitxError(f"{path}: {name!r} is {short(number)}; expected the number of an entry.")
    return parts[number]


def _try(path: Path, model: Transformer) -> None:
    """Run one token: entries that are well-formed one by one may still not fit each other."""
    counts = {len(node.blocks) for _, node in walk(model) if hasattr(node, "blocks")}
    if counts != {model.config.layers}:
        raise MinitxError(f"{path}: says {model.config.layers} layers and has {sorted(counts)}.")
    try:
        logits = model(np.array([0]), model.new_state())
        whole = logits.shape == (1, model.config.vocab_size)
    except Exception as error:  # whatever NumPy or a part makes of wrong shapes or types
        raise MinitxError(f"{path}: its parts do not fit each other ({error}).") from None
    if not whole or not np.isfinite(logits).all():
        raise MinitxError(f"{path}: its parts give logits that are NaN or Inf, or too few.")
