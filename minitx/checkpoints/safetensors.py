"""Read ``.safetensors`` files: a length, a JSON header, then the raw values.

    8 bytes    n, the length of the header (little-endian, unsigned)
    n bytes    JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest   the values, row-major, little-endian; offsets are relative to this point

The whole header is checked against the actual file size before anything is allocated, so a corrupt
header costs one error message and no memory. Nothing is ever unpickled. This module knows nothing
about models; ``huggingface.py`` decides which tensors are required. ``safetensors_write.py`` writes
such files.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import abbreviate, open_file, parse_json
from minitx.checkpoints.wrong_file import ENOUGH, wrong_file
from minitx.errors import MinitxError

# Bytes per value of every dtype, so that offsets can be checked even for tensors that are never
# read (old GPT-2 files have boolean masks).
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
# How float values are stored; NumPy has no bfloat16, so its bits are read as integers.
FLOAT_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Dtypes that NumPy has too, so that values can be read without conversion.
NUMPY_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "I8": "i1", "U8": "u1"},
    **{"I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 32  # NumPy 1's limit


@dataclass(frozen=True)
class TensorInfo:
    """The header entry of one tensor; ``begin`` and ``end`` count from the start of the file.
    ``version`` tells whether the file is still the one whose header was read."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    version: tuple[int, ...] = ()


@dataclass(frozen=True)
class SafetensorsHeader:
    """The validated header of one file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path) -> SafetensorsHeader:
    """The header, every entry checked against the file size.

    Raises MinitxError if the file is missing, truncated, has trailing bytes, or if its header is
    not valid JSON as above, or if its tensors overlap, leave gaps or do not fill the file.
    """
    path = Path(path)
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        length = _header_length(path, file.read(ENOUGH), size)
        file.seek(8)
        text = file.read(length)
    entries = _parse_header(path, text)
    metadata = check_metadata(path, entries.pop("__metadata__", {}))
    data_begin = 8 + length
    tensors = {
        name: replace(_check_entry(path, name, entry, data_begin, size), version=_version(status))
        for name, entry in entries.items()
    }
    _check_contiguous(path, tensors, data_begin, size)
    return SafetensorsHeader(tensors, metadata)


def read_tensors(path, names=None) -> dict[str, np.ndarray]:
    """The tensors with these ``names`` (all if None), by name.

    F32, F16 and BF16 are returned as float32, which is exact, and F64 as float64. Requesting a
    tensor of any other dtype is an error; other tensors of the file may have one.
    """
    header = read_header(path)
    names = header.tensors if names is None else names
    for name in names:
        if name not in header.tensors:
            raise MinitxError(f"{path}: has no tensor {name!a}.")
    return {name: read_tensor(path, name, header.tensors[name]) for name in names}


def read_tensor(path, name: str, info: TensorInfo) -> np.ndarray:
    """One tensor by its header entry; dtypes as in ``read_tensors``."""
    if info.dtype not in FLOAT_DTYPES:
        raise MinitxError(
            f"{path}: tensor {name!a}: the dtype of weights must be one of "
            f"{', '.join(FLOAT_DTYPES)}, got {info.dtype}."
        )
    return widen(_read_flat(path, name, info, FLOAT_DTYPES), info.dtype).reshape(info.shape)


def read_as_stored(path) -> dict[str, np.ndarray]:
    """All tensors by name, in their stored dtypes, including integers."""
    found = {}
    for name, info in read_header(path).tensors.items():
        if info.dtype not in NUMPY_DTYPES:
            raise MinitxError(
                f"{path}: tensor {name!a} is {info.dtype}, which NumPy does not support."
            )
        array = _read_flat(path, name, info, NUMPY_DTYPES).reshape(info.shape)
        found[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return found


def _read_flat(path, name: str, info: TensorInfo, dtypes: dict[str, str]) -> np.ndarray:
    """The values of one tensor as stored, flat."""
    count = math.prod(info.shape)
    with open_file(path) as file:
        changed = info.version and _version(os.fstat(file.fileno())) != info.version
        file.seek(info.begin)
        flat = np.fromfile(file, dtypes[info.dtype], 0 if changed else count)
    if flat.size != count or changed:
        raise MinitxError(
            f"{path}: changed while it was read, at tensor {abbreviate(name)}; try again later."
        )
    return flat


def _version(status: os.stat_result) -> tuple[int, ...]:
    """What changes when a file is replaced or written to."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def widen(flat: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values as native float32 or float64; the conversion is exact."""
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (flat.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # no warning for a signaling NaN
        return flat.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


# --------------------------------------------------------------------------------------- checking


def _header_length(path, start: bytes, size: int) -> int:
    """The length of the header, from the start of the file, checked against the file size."""
    if len(start) < 8:
        raise wrong_file(path, start) or MinitxError(
            f"{path}: expected at least 8 bytes, got {size}; is the file truncated?"
        )
    length = int.from_bytes(start[:8], "little")
    if length > size - 8:
        raise wrong_file(path, start) or MinitxError(
            f"{path}: expected a header of {length} bytes, got {size - 8}; "
            "the file is truncated (download it again) or not safetensors."
        )
    if length > MAX_HEADER_BYTES:
        raise MinitxError(
            f"{path}: the header must have at most {MAX_HEADER_BYTES} bytes, got {length}."
        )
    return length


def _without_duplicates(pairs: list[tuple]) -> dict:
    """The format allows each key once: of two entries for a tensor, which one counts?"""
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!a} occurs twice")
        found[key] = value
    return found


def _parse_header(path, text: bytes) -> dict:
    """The header as a dict."""
    try:
        entries = parse_json(text, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise MinitxError(f"{path}: the header is not valid JSON ({error}).") from None
    if not isinstance(entries, dict):
        raise MinitxError(
            f"{path}: the header must be a JSON object, got a {type(entries).__name__}."
        )
    return entries


def check_metadata(path, metadata) -> dict[str, str]:
    """``__metadata__`` must map strings to strings."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MinitxError(f"{path}: __metadata__ in the header must map strings to strings.")
    return metadata


def _check_entry(path, name: str, entry, data_begin: int, size: int) -> TensorInfo:
    """Validate one header entry: fields, types, offsets against its shape and the file size."""
    where = f"{path}: tensor {name!a}"
    if not isinstance(entry, dict):
        raise MinitxError(f"{where}: expected a JSON object, got {abbreviate(entry)}.")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise MinitxError(f"{where} has no {field!r} in the header.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise MinitxError(
            f"{where}: the dtype must be one of {', '.join(ITEM_BYTES)}, got {abbreviate(dtype)}."
        )
    if not _are_non_negative_ints(shape) or len(shape) > MAX_DIMENSIONS:
        raise MinitxError(
            f"{where}: the shape must be a list of at most {MAX_DIMENSIONS} integers >= 0, "
            f"got {abbreviate(shape)}."
        )
    if not _are_non_negative_ints(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MinitxError(
            f"{where}: data_offsets must be [begin, end] with begin <= end, "
            f"got {abbreviate(offsets)}."
        )
    begin, end = (data_begin + offset for offset in offsets)
    if end > size:
        raise MinitxError(
            f"{where} ends at byte {abbreviate(end)}, but the file has {size} bytes; the file is "
            "truncated (download it again) or its header is corrupt."
        )
    # Python integers do not overflow, so a product of huge dimensions cannot wrap around.
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise MinitxError(
            f"{where}: shape {abbreviate(shape)} and dtype {dtype} do not match the {end - begin} "
            "bytes of its data_offsets."
        )
    if math.prod(max(n, 1) for n in shape) >= 2**59:  # empty, but too large for NumPy
        raise MinitxError(f"{where}: the shape {abbreviate(shape)} is too large for NumPy.")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_non_negative_ints(values) -> bool:
    """True for a list of integers >= 0 (JSON's true and 1.0 are not integers)."""
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_contiguous(path, tensors: dict[str, TensorInfo], data_begin: int, size: int) -> None:
    """In order of offset, each tensor begins where the previous one ends, up to the file end."""
    position, previous = data_begin, None
    for name in sorted(tensors, key=lambda n: (tensors[n].begin, tensors[n].end)):
        if tensors[name].begin < position:
            raise MinitxError(f"{path}: tensor {name!a} overlaps tensor {previous!a}.")
        if tensors[name].begin > position:
            raise MinitxError(
                f"{path}: {tensors[name].begin - position} bytes before tensor {name!a} "
                "belong to no tensor."
            )
        position, previous = tensors[name].end, name
    if position != size:
        raise MinitxError(
            f"{path}: expected no bytes after the last tensor, got {size - position}."
        )
