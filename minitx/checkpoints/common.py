"""What several formats here need: strict JSON, files that appear complete or not at all, and checks
on what was read."""

import hashlib
import json
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from minitx.config import Config
from minitx.errors import MinitxError

# Numbers in one rotary table (cos or sin): the largest that a file's word alone makes us compute.
MAX_ROTARY_TABLE = 2**24  # a context of 131072 tokens at head width 128


def parse_json(text: bytes):
    """Strict JSON from UTF-8 bytes: no key twice, no NaN, no endless number.

    Raises ValueError, and only that, on any fault.
    """

    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key!a} occurs twice")
            found[key] = value
        return found

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    def bounded(digits):  # 20 digits hold any 64-bit number; a million would take minutes
        return int(digits) if len(digits) <= 20 else refuse(digits[:20] + "...")

    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_int=bounded,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_json(path) -> dict:
    """The JSON object in the file ``path``; MinitxError if it is missing or is anything else."""
    try:
        content = parse_json(Path(path).read_bytes())
    except OSError as error:
        raise unreadable(path, error) from None
    except ValueError as error:
        raise MinitxError(f"{path}: is not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise MinitxError(f"{path}: holds a JSON {type(content).__name__}, expected an object.")
    return content


def unreadable(path, error: OSError) -> MinitxError:
    """The error for a file that the system does not let us read."""
    return MinitxError(f"{path}: cannot be read ({error.strerror or error}).")


def fingerprint(*paths) -> str:
    """The SHA-256 of these files, one after another: it tells them from others."""
    found = hashlib.sha256()
    for path in paths:
        try:
            found.update(Path(path).read_bytes())
        except OSError as error:
            raise unreadable(path, error) from None
    return found.hexdigest()


@contextmanager
def replacing(path):
    """A binary file that takes the name ``path`` when the block ends well; otherwise no trace."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: rename is atomic
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:  # also when interrupted from the keyboard
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            reason = error.strerror or error
            raise MinitxError(f"{path}: cannot be written ({reason}).") from None
        raise


def short(value) -> str:
    """A value from a file as one line of bounded length, for a message."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def need_finite(path, name: str, array: np.ndarray) -> np.ndarray:
    """``array`` itself, if every number in it is finite."""
    if not np.isfinite(array).all():
        raise MinitxError(
            f"{path}: tensor {name!a} holds NaN or Inf (as {array.dtype}); weights must be finite."
        )
    return array


def need_float(dtype) -> np.dtype:
    """The NumPy type that a model is asked for in; float32 and float64 are the ones it runs in."""
    if np.dtype(dtype) not in (np.float32, np.float64):
        raise MinitxError(f"A model runs in float32 or float64, not in {np.dtype(dtype)}.")
    return np.dtype(dtype)


def need_modest_tables(path, config: Config) -> None:
    """Refuse a context for which the rotary tables, which no file holds, would fill the memory."""
    if config.context * config.rope_width > MAX_ROTARY_TABLE:
        raise MinitxError(
            f"{path}: a context of {config.context} tokens with {config.rope_width} rotary columns "
            f"needs tables of more than {MAX_ROTARY_TABLE} numbers; write a smaller context there."
        )
