"""Writing ``.safetensors``, the format that safetensors.py reads and describes."""

import json

import numpy as np

from minitx.checkpoints.common import replacing
from minitx.checkpoints.safetensors import FILE_DTYPE, ITEM_BYTES, OWN_DTYPE, check_metadata, widen
from minitx.errors import MinitxError


def write_safetensors(path, tensors: dict[str, np.ndarray], dtype="F32", metadata=None) -> None:
    """Write ``tensors`` in sorted order, all as ``dtype`` ("F32", "F16", "BF16" or "F64"), or each
    as it is, integers too, if that is None.

    ``metadata`` (strings to strings) is ``{"format": "pt"}`` if None: transformers asks for it.
    Numbers are rounded to nearest, ties to even; float64 goes to BF16 by way of float32. NaN and
    Inf are kept, but a finite number too large for ``dtype`` is an error. The file appears under
    its name when it is complete, or not at all.
    """
    if dtype not in (*FILE_DTYPE, None):
        raise MinitxError(f"cannot write dtype {dtype!r}; choose one of {', '.join(FILE_DTYPE)}.")
    metadata = check_metadata(path, {"format": "pt"} if metadata is None else metadata)
    header, position = {"__metadata__": metadata}, 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        if name == "__metadata__" or array.dtype.kind not in ("f" if dtype else "fiub"):
            raise MinitxError(f"{path}: {name!a} ({array.dtype}) is not a tensor of real numbers.")
        kind = dtype or _own(array.dtype)
        end = position + array.size * ITEM_BYTES[kind]
        shape = list(array.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8 bytes
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            array = np.asarray(tensors[name])
            if dtype:
                array = _narrow(path, name, array, dtype)
            else:
                array = array.astype(OWN_DTYPE[_own(array.dtype)], copy=False)
            file.write(array.tobytes())


def _own(dtype: np.dtype) -> str:
    """The format's word for a type of NumPy."""
    return next(word for word, known in OWN_DTYPE.items() if np.dtype(known) == dtype)


def _narrow(path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` as it lies in the file; a finite number must not become infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = array.ravel().astype(np.float32 if dtype == "BF16" else FILE_DTYPE[dtype])
    if dtype == "BF16":
        stored = _bfloat16_bits(stored)
    became_infinite = np.isinf(widen(stored, dtype)) & np.isfinite(array.ravel())
    if became_infinite.any():
        largest = np.abs(array.ravel()[became_infinite]).max()
        raise MinitxError(
            f"{path}: tensor {name!a} holds a number of size {largest:.4g}, "
            f"too large for {dtype}; write a wider dtype."
        )
    return stored


def _bfloat16_bits(numbers: np.ndarray) -> np.ndarray:
    """float32 (n,) -> the upper 16 bits of each, rounded to nearest, ties to even."""
    bits = numbers.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + (0x7FFF + odd)) >> 16  # half a unit up, a hair less if already even
    # Rounding could carry a NaN over into Inf (or wrap), so a NaN is cut and marked quiet instead.
    rounded = np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded)
    return rounded.astype("<u2")
