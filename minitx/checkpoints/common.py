"""Shared by the formats: bounded reads, strict JSON, atomic file writes, checks on what was read.

Every reader of the package gets its bytes from ``read`` or ``open_file``: only regular files are
read, and no more of them than a limit for their kind. A FIFO would wait for ever, /dev/zero has no
end, and a sparse file of a gigabyte takes no space on the disk but all of it in memory.
"""

import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minitx.checkpoints.wrong_file import not_json
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.errors import abbreviate as abbreviate
from minitx.values import need_float_dtype as need_float_dtype

MAX_JSON_BYTES = 2**26  # the tokenizer.json of 256,000 tokens takes half of it
MAX_TEXT_BYTES = 2**26
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


# Reading ------------------------------------------------------------------------------------------


def read(path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The contents of a file of at most ``limit`` bytes. MinitxError if it is missing, no regular
    file, larger, not readable, or changed while it is read."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1) if size <= limit else b""  # one more, if it has grown
    if size > limit:
        raise MinitxError(
            f"{path}: is larger than {limit:,} bytes, the most that is read of such a file; is it "
            "the right one?"
        )
    if len(content) != size:
        raise MinitxError(
            f"{path}: changed while it was read (expected {size} bytes, got {len(content)}); try "
            "again later."
        )
    return content


@contextmanager
def open_file(path: str | Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading. MinitxError if it is anything else, and for every error of
    the operating system until it is closed."""
    if "\0" in os.fspath(path):
        raise MinitxError(f"{path}: no file can have this name.")
    try:
        _need_regular(path, os.stat(path).st_mode)  # before it is opened: a device may react to it
        with open(path, "rb", opener=_without_waiting) as file:
            _need_regular(path, os.fstat(file.fileno()).st_mode)  # still
            yield file
    except OSError as error:
        raise unreadable(path, error) from None


def _without_waiting(path, flags: int) -> int:
    """Open, but without waiting for someone who writes to a FIFO."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


KINDS_OF_FILE = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def _need_regular(path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = KINDS_OF_FILE.get(stat.S_IFMT(mode), "no regular file")
        raise MinitxError(f"{path}: is {kind}; expected a regular file.")


def read_json(path, limit: int = MAX_JSON_BYTES) -> dict:
    """The JSON object in the file ``path``; MinitxError if it is missing or not an object."""
    text = read(path, limit)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise not_json(path, text, error) from None
    if not isinstance(content, dict):
        raise MinitxError(f"{path}: expected a JSON object, got a {type(content).__name__}.")
    return content


def read_npz(path, limit: int) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz`` file that takes at most ``limit`` bytes unpacked. Nothing is
    unpickled. MinitxError if the file cannot be read, ValueError if its contents are damaged."""
    with open_file(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                size = sum(member.file_size for member in archive.infolist())
            if size > limit:
                raise ValueError(f"it unpacks to {size:,} bytes; expected at most {limit:,}")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        except Exception as error:  # zip, zlib and NumPy raise various errors for damaged files
            raise ValueError(error) from None


def unreadable(path, error: OSError) -> MinitxError:
    """The error for a file that the operating system cannot read."""
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return MinitxError(
            f"{path}: is a link to a file that does not exist; bring that file back, or delete the "
            "link."
        )
    if isinstance(error, FileNotFoundError):
        return MinitxError(f"{path}: there is no such file.")
    return MinitxError(f"{path}: cannot be read ({error.strerror or error}).")


def fingerprint(*paths) -> str:
    """The SHA-256 of the concatenated contents of these files."""
    found = hashlib.sha256()
    for path in paths:
        with open_file(path) as file:
            while block := file.read(2**20):
                found.update(block)
    return found.hexdigest()


def weights_fingerprint(folder) -> str:
    """The fingerprint of the weights in the folder: one file, or its shards, or what minitx
    precompute wrote."""
    names = "model*.safetensors", "precomputed.safetensors"
    return fingerprint(*(path for name in names for path in sorted(Path(folder).glob(name))))


def arrays_fingerprint(tensors: dict[str, np.ndarray]) -> str:
    """The SHA-256 of arrays by name, as a file holds them in float32."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        values = np.ascontiguousarray(tensors[name], "<f4")
        found.update(f"{name} {values.shape} ".encode())
        found.update(values.tobytes())
    return found.hexdigest()


# Writing ------------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path):
    """Yields a temporary binary file; renames it to ``path`` on success, else deletes it."""
    path = Path(path)
    temporary = temporary_name(path)
    try:
        remove_abandoned(path)
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:  # including KeyboardInterrupt
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def unwritable(path, error: OSError) -> MinitxError:
    """The error for a file or folder that the operating system cannot write."""
    return MinitxError(f"{path}: cannot be written ({error.strerror or error}).")


def temporary_name(path: Path) -> Path:
    """Where this process writes what is to become ``path``: in the same folder, where a rename is
    atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files and folders of ``path`` whose process was killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.(\d{{1,10}})\.tmp")
    for found in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        match = pattern.fullmatch(found.name)
        if match and not is_running(int(match[1])):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Is there a process of this number? True if that cannot be known."""
    if os.name != "posix":  # elsewhere this os.kill would end it
        return True
    try:
        os.kill(process, 0)  # signal 0 only asks
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's; a number that no process can have
        pass
    return True


def need_writable_folder(folder: Path) -> None:
    """Create the folder if necessary and see that a file can be written in it: before hours of
    work, not after."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(folder, error) from None


def need_writable_file(path: Path) -> None:
    """See that a file of this name can be written: before long work, not after."""
    try:
        if path.is_dir():
            raise MinitxError(f"{path} is a folder; give the name of a file.")
        if path.exists() and not path.is_file():
            raise MinitxError(f"{path} is not a regular file; give the name of a new one.")
        if not path.parent.is_dir():
            raise MinitxError(f"{path}: there is no folder {path.parent}; create it first.")
        probe = temporary_name(path)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise unwritable(path, error) from None


def need_new_folder(folder: Path) -> None:
    """See that there is no such folder, and that it can be created: before long work."""
    if os.path.lexists(folder):
        raise MinitxError(f"{folder} already exists; give the name of a new folder.")
    above = next(path for path in folder.absolute().parents if os.path.lexists(path))
    try:
        probe = above / temporary_name(folder).name
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise unwritable(folder, error) from None


def need_finite(path, name: str, array: np.ndarray) -> np.ndarray:
    """Returns ``array`` if all its values are finite; raises MinitxError otherwise."""
    if not np.isfinite(array).all():
        raise MinitxError(
            f"{path}: tensor {name!a} holds NaN or Inf (as {array.dtype}); weights must be finite."
        )
    return array


def need_small_rope_tables(path, config: Config) -> None:
    """Reject a context for which the rotary tables, computed at load time, exhaust memory."""
    if config.context * config.rope_width > MAX_ROPE_TABLE:
        raise MinitxError(
            f"{path}: a context of {config.context} tokens with {config.rope_width} rotary columns "
            f"needs rotary tables of more than {MAX_ROPE_TABLE} values; set a smaller context."
        )
