"""Reading ``.safetensors``: a length, a JSON table of contents, then the raw numbers.

    8 bytes    n, the length of the header (little-endian, unsigned)
    n bytes    JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
    the rest   the numbers, row by row, little-endian; offsets count from here

The whole header is checked against the real size of the file before anything is allocated, so a
header that lies costs one error message and no memory. Nothing is ever unpickled. This file knows
nothing about models: which tensors there must be is decided in ``huggingface.py``. To write such a
file: ``safetensors_write.py``.

Format: https://github.com/huggingface/safetensors (README, "Format").
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitx.checkpoints.common import parse_json, short, unreadable
from minitx.errors import MinitxError

# Bytes per number of every dtype whose size is known, so that offsets can be checked even for
# tensors that are never read (old GPT-2 files carry boolean masks).
ITEM_BYTES = {
    **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1},
}
# How the readable ones lie in the file; NumPy has no bfloat16, so its bits are read as integers.
FILE_DTYPE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# What NumPy knows itself, and so can be kept as it is.
OWN_DTYPE = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?", "I8": "i1", "U8": "u1"},
    **{"I16": "<i2", "I32": "<i4", "I64": "<i8", "U16": "<u2", "U32": "<u4", "U64": "<u8"},
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 32  # NumPy 1's limit


@dataclass(frozen=True)
class TensorInfo:
    """One line of the table of contents; ``begin`` and ``end`` count from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The checked table of contents of one file."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path) -> Header:
    """The table of contents, every entry checked against the size of the file.

    Raises MinitxError if the file is missing, truncated, has trailing bytes, or if its header is
    not the JSON described above or its tensors overlap, leave holes or do not fill the file.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise MinitxError(f"{path}: there is no such file; expected a .safetensors file.")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = _header_length(path, file.read(8), size)
            text = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from None
    entries = _parse_header(path, text)
    metadata = check_metadata(path, entries.pop("__metadata__", {}))
    data_begin = 8 + length
    tensors = {
        name: _check_entry(path, name, entry, data_begin, size) for name, entry in entries.items()
    }
    _check_tiling(path, tensors, data_begin, size)
    return Header(tensors, metadata)


def read_tensors(path, names=None) -> dict[str, np.ndarray]:
    """The tensors called ``names`` (all if None), by name, each with the shape the file gives it.

    F32, F16 and BF16 arrive as float32 (no rounding takes place), F64 stays float64. Any other
    dtype is an error when it is asked for; not asked for, it may be there.
    """
    header = read_header(path)
    names = header.tensors if names is None else names
    for name in names:
        if name not in header.tensors:
            raise MinitxError(f"{path}: has no tensor {name!a}.")
    return {name: read_tensor(path, name, header.tensors[name]) for name in names}


def read_tensor(path, name: str, info: TensorInfo) -> np.ndarray:
    """One tensor that ``read_header`` found; see ``read_tensors`` for its dtype."""
    if info.dtype not in FILE_DTYPE:
        raise MinitxError(
            f"{path}: tensor {name!a} is {info.dtype}; weights must be {', '.join(FILE_DTYPE)}."
        )
    return widen(_numbers(path, name, info, FILE_DTYPE), info.dtype).reshape(info.shape)


def read_as_stored(path) -> dict[str, np.ndarray]:
    """All tensors by name, in the types that the file has them in, integers too."""
    found = {}
    for name, info in read_header(path).tensors.items():
        if info.dtype not in OWN_DTYPE:
            raise MinitxError(f"{path}: tensor {name!a} is {info.dtype}, which NumPy has not.")
        array = _numbers(path, name, info, OWN_DTYPE).reshape(info.shape)
        found[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    return found


def _numbers(path, name: str, info: TensorInfo, dtypes: dict[str, str]) -> np.ndarray:
    """The tensor's numbers, flat, as they lie in the file."""
    count = math.prod(info.shape)
    try:
        flat = np.fromfile(path, dtypes[info.dtype], count, offset=info.begin)
    except OSError as error:
        raise unreadable(path, error) from None
    if flat.size != count:  # the file shrank after its header was checked
        raise MinitxError(f"{path}: tensor {name!a} ends early; the file is truncated.")
    return flat


def widen(flat: np.ndarray, dtype: str) -> np.ndarray:
    """File numbers as native float32 or float64; widening is exact."""
    if dtype == "BF16":  # bfloat16 is the upper half of a float32
        return (flat.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN is no reason to warn here
        return flat.astype(np.float64 if dtype == "F64" else np.float32, copy=False)


# --------------------------------------------------------------------------------------- checking


def _header_length(path, first: bytes, size: int) -> int:
    """The header's length, known to fit in the file."""
    if len(first) < 8:
        raise MinitxError(
            f"{path}: is {size} bytes long; a safetensors file has at least 8 (truncated?)."
        )
    length = int.from_bytes(first, "little")
    if length > size - 8:
        raise MinitxError(
            f"{path}: announces a header of {length} bytes, but only {size - 8} follow; "
            "the file is truncated or is not safetensors."
        )
    if length > MAX_HEADER_BYTES:
        raise MinitxError(
            f"{path}: announces a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed."
        )
    return length


def _parse_header(path, text: bytes) -> dict:
    """The header's JSON as a dict."""
    try:
        entries = parse_json(text)
    except ValueError as error:
        raise MinitxError(f"{path}: its header is not valid JSON ({error}).") from None
    if not isinstance(entries, dict):
        raise MinitxError(f"{path}: its header is a JSON {type(entries).__name__}, not an object.")
    return entries


def check_metadata(path, metadata) -> dict[str, str]:
    """``__metadata__`` maps strings to strings."""
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise MinitxError(f"{path}: __metadata__ in its header must map strings to strings.")
    return metadata


def _check_entry(path, name: str, entry, data_begin: int, size: int) -> TensorInfo:
    """One header entry: right fields, right types, offsets that fit its shape and the file."""
    where = f"{path}: tensor {name!a}"
    if not isinstance(entry, dict):
        raise MinitxError(f"{where} is not described by a JSON object.")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise MinitxError(f"{where} has no {field!r} in the header.")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise MinitxError(f"{where} has the unknown dtype {short(dtype)}.")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise MinitxError(
            f"{where} has the shape {short(shape)}; "
            f"expected a list of at most {MAX_DIMENSIONS} integers >= 0."
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise MinitxError(
            f"{where} has the data_offsets {short(offsets)}; expected [begin, end], begin <= end."
        )
    begin, end = (data_begin + offset for offset in offsets)
    if end > size:
        raise MinitxError(
            f"{where} ends at byte {end}, the file at {size} (truncated, or a lying header)."
        )
    # Python integers do not overflow, so a product of huge dimensions cannot wrap round to fit.
    if math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
        raise MinitxError(
            f"{where} of shape {short(shape)} and dtype {dtype} does not fill "
            f"the {end - begin} bytes that its data_offsets give it."
        )
    if math.prod(max(n, 1) for n in shape) >= 2**59:  # an empty array NumPy still cannot hold
        raise MinitxError(f"{where} has the impossible shape {short(shape)}.")
    return TensorInfo(dtype, tuple(shape), begin, end)


def _are_counts(values) -> bool:
    """True for a list of integers >= 0 (JSON's true and 1.0 are not integers)."""
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)


def _check_tiling(path, tensors: dict[str, TensorInfo], data_begin: int, size: int) -> None:
    """Taken by position, each tensor must begin where the one before it ends, up to the end."""
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
        raise MinitxError(f"{path}: {size - position} bytes follow the last tensor; expected 0.")
