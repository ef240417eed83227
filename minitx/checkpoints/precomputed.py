"""Save a model after offline work by techniques, and load it without repeating that work.

    out/precomputed.json          its origin, and the tree of parts (parts.py)
    out/precomputed.safetensors   its arrays, in their in-memory dtypes
    out/tokenizer.json (or .bin)  its tokenizer

The folder is self-contained: loading needs neither the original checkpoint nor calibration text.

Two fingerprints hold it together: the JSON has one of the arrays, and one of all its other fields.
So whatever is changed by a damaged disk, by hand or by mixing two folders is refused, even where
the result would run: a doubled scale, a matrix in another shape. What remains, a file that was
written to deceive, is checked part by part (parts.py) and by running a short text.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from minitx.calibration import Calibrated
from minitx.checkpoints.common import (
    abbreviate,
    atomic_write,
    fingerprint,
    need_float_dtype,
    need_new_folder,
    read,
    read_json,
    remove_abandoned,
    temporary_name,
    unwritable,
)
from minitx.checkpoints.parts import deserialize, serialize
from minitx.checkpoints.safetensors import read_as_stored
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.checkpoints.tokenizer_json_write import write_tokenizer
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.model import PositionEmbedding, Rope, Transformer
from minitx.tree import Part, float_type, walk

JSON_FILE, ARRAYS_FILE = "precomputed.json", "precomputed.safetensors"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Origin:
    """How the folder was made: the model that was loaded, the flags, what techniques were
    calibrated on, and the name of the recipe by which the result was trained further, if it was."""

    model: str
    flags: str
    calibrated: tuple[Calibrated, ...] = ()
    recipe: str = ""

    def __str__(self) -> str:
        if self.recipe:
            return f"{self.model} {self.flags}, trained further by the recipe {self.recipe!r}"
        return f"made by: minitx precompute -m {self.model} {self.flags}"


def write_precomputed(lm, folder, origin: Origin, tokenizer: Path | None) -> None:
    """Write the model and its decoding loop into the new ``folder``, which appears atomically.

    tokenizer: the file that lm's tokenizer was read from, or None. Raises MinitxError if the folder
    exists, or if a part cannot be serialized.
    """
    folder = Path(folder)
    need_new_folder(folder)
    temporary = temporary_name(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        temporary.mkdir()
        write_parts(lm, temporary, origin)
        if tokenizer is not None:
            _write_tokenizer(lm.tokenizer.original, tokenizer, temporary)
        os.rename(temporary, folder)
    except OSError as error:
        raise unwritable(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_parts(lm, folder: Path, origin: Origin) -> None:
    """Write the JSON and the arrays into an existing folder: the JSON last, which is refused while
    it does not belong to the arrays."""
    entries, arrays, indices = serialize(model=lm.model, decode=lm.decode)
    write_safetensors(folder / ARRAYS_FILE, arrays, None, {"format": "minitx precomputed"})
    content = {"format": FORMAT_VERSION, "from": origin.model, "flags": origin.flags}
    content |= {"recipe": origin.recipe} if origin.recipe else {}
    content["calibrated"] = [asdict(use) for use in origin.calibrated]
    content |= {"dtype": str(float_type(lm.model)), "arrays": fingerprint(folder / ARRAYS_FILE)}
    content |= indices | {"entries": entries}
    content |= {"fingerprint": signature(content)}
    with atomic_write(folder / JSON_FILE) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _write_tokenizer(tokenizer, file: Path, folder: Path) -> None:
    """The tokenizer that was read from `file`, in one file that needs no other to mean the same."""
    if file.suffix == ".bin":
        (folder / "tokenizer.bin").write_bytes(read(file))
    else:
        write_tokenizer(tokenizer, folder)


def is_precomputed(folder: Path) -> bool:
    return (folder / JSON_FILE).exists()


def read_origin(folder) -> Origin:
    """How the folder was made."""
    content = _read_content(Path(folder))
    calibrated = _read_calibrated(folder, content)
    return Origin(content["from"], content["flags"], calibrated, content.get("recipe", ""))


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
    arrays = read_as_stored(folder / ARRAYS_FILE)

    def roots() -> tuple[Part, Part]:
        parts = deserialize(path, content.get("entries"), arrays)
        return _root(path, parts, content, "model"), _root(path, parts, content, "decode")

    model, decode = roots()
    if type(model) is not Transformer:
        raise MinitxError(f"{path}: 'model' must be a Transformer, got a {type(model).__name__}.")
    _smoke_test(path, model, decode, dtype)
    return roots()  # other parts: those of the test have forgotten what they store, and where


def _read_content(folder: Path) -> dict:
    path = folder / JSON_FILE
    content = read_json(path)
    if content.get("format") != FORMAT_VERSION:
        raise MinitxError(
            f"{path}: 'format' must be {FORMAT_VERSION} for this version of minitx, "
            f"got {abbreviate(content.get('format'))}."
        )
    for name in ("from", "flags", "dtype", "arrays", "fingerprint"):
        if not isinstance(content.get(name), str):
            raise MinitxError(
                f"{path}: {name!r} must be a string, got {abbreviate(content.get(name))}."
            )
    if not isinstance(content.get("recipe", ""), str):
        raise MinitxError(
            f"{path}: 'recipe' must be a string, got {abbreviate(content['recipe'])}."
        )
    if content["fingerprint"] != signature(content):
        raise MinitxError(
            f"{path}: does not match its own fingerprint, so it was changed after it was written; "
            "run minitx precompute again."
        )
    return content


def signature(content: dict) -> str:
    """The SHA-256 of all fields but ``fingerprint``; spaces and the order of keys do not matter."""
    signed = {name: value for name, value in content.items() if name != "fingerprint"}
    return hashlib.sha256(json.dumps(signed, sort_keys=True).encode()).hexdigest()


def _root(path: Path, parts: list[Part], content: dict, name: str) -> Part:
    index = content.get(name)
    if type(index) is not int or not 0 <= index < len(parts):
        raise MinitxError(
            f"{path}: {name!r} must be the index of an entry, got {abbreviate(index)}."
        )
    return parts[index]


SMOKE_TOKENS = 24


def _smoke_test(path: Path, model: Transformer, decode: Part, dtype: np.dtype) -> None:
    """Run a short text as generation does: parts that are each valid may still not fit together.
    The parts forget what they store before it, and what they stored of this text after it."""
    c = model.config
    counts = {len(node.blocks) for _, node in walk(model) if hasattr(node, "blocks")}
    if counts != {c.layers}:
        raise MinitxError(f"{path}: expected {c.layers} layers, got {sorted(counts)}.")
    tables = [node.w for _, node in walk(model) if type(node) is PositionEmbedding]
    tables += [node.cos for _, node in walk(model) if type(node) is Rope]
    if any(len(table) != c.context for table in tables):
        raise MinitxError(f"{path}: expected tables with a row for each of {c.context} positions.")
    _forget(model, decode)
    try:
        logits, new = _run(model, decode)
    except Exception as error:  # anything NumPy or a part may raise for wrong shapes or types
        raise MinitxError(f"{path}: its parts do not fit together ({error}).") from None
    if logits.shape[1:] != (c.vocab_size,) or not np.isfinite(logits).all():
        raise MinitxError(f"{path}: expected {c.vocab_size} finite logits from its parts.")
    if logits.dtype != dtype or not all(0 <= token < c.vocab_size for token in new):
        raise MinitxError(f"{path}: expected {dtype} logits and tokens of the vocabulary.")


def _run(model: Transformer, decode: Part) -> tuple[np.ndarray, list[int]]:
    """Logits (T, V) of a prompt and a further token, and the tokens of a short greedy text. The ids
    are spread over the vocabulary, from the first to the last."""
    V, context = model.config.vocab_size, model.config.context
    T = max(1, min(SMOKE_TOKENS, context - 4))
    ids = np.linspace(0, V - 1, T).astype(int).tolist()
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = model.new_state()
        logits = [model(step, state) for step in (ids[:-1], ids[-1:]) if step]
        model(ids)  # without a cache
        new = list(decode(model, new_state(model, ids), ids, Sampler(), min(3, context - T)))
    _forget(model, decode)
    return np.concatenate(logits), new


def _forget(*roots: Part) -> None:
    for root in roots:
        for _, node in walk(root):
            node.forget()
