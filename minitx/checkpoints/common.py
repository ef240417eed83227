"""Shared by the formats: strict JSON, atomic file writes, and checks on what was read."""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from minitx.config import Config
from minitx.errors import MinitxError, abbreviate  # noqa: F401 (used by the other readers)

# Most values in one rotary table (cos or sin) that a config file alone can make us compute.
MAX_ROPE_TABLE = 2**24  # a context of 131072 tokens at head width 128


def parse_json(text: bytes):
    """Strict JSON from UTF-8 bytes: no duplicate keys, no NaN, no integers over 20 digits.

    Raises only ValueError.
    """

    def reject_duplicates(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!a} occurs twice")
            found[key] = value
        return found

    def reject_constant(constant):
        raise ValueError(f"{constant} is not JSON")

    def bounded_int(digits):  # 20 digits hold any 64-bit integer; a million would take minutes
        return int(digits) if len(digits) <= 20 else reject_constant(digits[:20] + "...")

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=reject_duplicates,
            parse_constant=reject_constant,
            parse_int=bounded_int,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path) -> dict:
    """The JSON object in the file ``path``; MinitxError if it is missing or not an object."""
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise MinitxError(f"{path}: is not valid JSON ({error}).") from None
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
