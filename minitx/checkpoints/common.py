"""Shared by the formats: JSON, atomic file writes, and checks on what was read."""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from minitx.checkpoints.wrong_file import not_json
from minitx.config import Config
from minitx.errors import MinitxError

# Most values in one rotary table (cos or sin) that a config file alone can make us compute.
MAX_ROPE_TABLE = 2**24  # a context of 131072 tokens at head width 128


def parse_json(text: bytes, object_pairs_hook=None):
    """The JSON value in UTF-8 bytes, as ``json.loads`` reads it. Raises only ValueError.

    Every legal number is a value, whatever its size: whether it makes sense is judged by whoever
    uses the field. Of equal keys the last one counts, unless ``object_pairs_hook`` objects.
    """
    try:
        return json.loads(
            text.decode("utf-8"), object_pairs_hook=object_pairs_hook, parse_int=_parse_int
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _parse_int(digits: str) -> int | float:
    """Converting a million digits to an int would take minutes; to a float (Inf) it takes none."""
    return int(digits) if len(digits) <= 300 else float(digits)


def read_json(path) -> dict:
    """The JSON object in the file ``path``; MinitxError if it is missing or not an object."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise unreadable(path, error) from None
    try:
        content = parse_json(text)
    except ValueError as error:
        raise not_json(path, text, error) from None
    if not isinstance(content, dict):
        raise MinitxError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def unreadable(path, error: OSError) -> MinitxError:
    """The error for a file that the operating system cannot read."""
    return MinitxError(f"{path}: cannot be read ({error.strerror or error}).")


def fingerprint(*paths) -> str:
    """The SHA-256 of the concatenated contents of these files."""
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(Path(path).read_bytes())
        except OSError as error:
            raise unreadable(path, error) from None
    return found.hexdigest()


@contextmanager
def atomic_write(path):
    """Yields a temporary binary file; renames it to ``path`` on success, else deletes it."""
    path = Path(path)
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}.tmp"
    )  # in the same folder, rename is atomic
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:  # including KeyboardInterrupt
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise MinitxError(f"{path}: cannot be written ({reason}).") from None
        raise


def abbreviate(value) -> str:
    """A value as one ASCII line of at most 60 characters, for an error message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def need_finite(path, name: str, array: np.ndarray) -> np.ndarray:
    """Returns ``array`` if all its values are finite; raises MinitxError otherwise."""
    if not np.isfinite(array).all():
        raise MinitxError(
            f"{path}: tensor {name!a} holds NaN or Inf (as {array.dtype}); weights must be finite."
        )
    return array


def need_float_dtype(dtype) -> np.dtype:
    """The dtype as a NumPy dtype; raises MinitxError unless it is float32 or float64."""
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise MinitxError(f"dtype must be float32 or float64, got {np.dtype(dtype)}.")
    return np.dtype(dtype)


def need_small_rope_tables(path, config: Config) -> None:
    """Reject a context for which the rotary tables, computed at load time, exhaust memory."""
    if config.context * config.rope_width > MAX_ROPE_TABLE:
        raise MinitxError(
            f"{path}: a context of {config.context} tokens with {config.rope_width} rotary columns "
            f"needs rotary tables of more than {MAX_ROPE_TABLE} values; set a smaller context."
        )
