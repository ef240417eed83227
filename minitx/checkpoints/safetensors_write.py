"""Write ``.safetensors`` files; the format is described in ``safetensors.py``."""

import json

import numpy as np

from minitx.checkpoints.common import abbreviate, atomic_write
from minitx.checkpoints.safetensors import (
    FLOAT_DTYPES,
    ITEM_BYTES,
    NUMPY_DTYPES,
    check_metadata,
    widen,
)
from minitx.errors import MinitxError


def write_safetensors(path, tensors: dict[str, np.ndarray], dtype="F32", metadata=None) -> None:
    """Write ``tensors`` in sorted order, all as ``dtype`` ("F32", "F16", "BF16" or "F64"), or each
    in its own dtype, including integers, if ``dtype`` is None.

    ``metadata`` (strings to strings) defaults to ``{"format": "pt"}``, which transformers requires.
    Values are rounded to nearest, ties to even; float64 is rounded to BF16 via float32. NaN and Inf
    are kept, but a finite value that overflows ``dtype`` is an error. The write is atomic.
    """
    if dtype is not None:
        need_stored_dtype(dtype)
    metadata = check_metadata(path, {"format": "pt"} if metadata is None else metadata)
    header, position = {"__metadata__": metadata}, 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        if name == "__metadata__" or array.dtype.kind not in ("f" if dtype else "fiub"):
            raise MinitxError(
                f"{path}: expected a tensor of real numbers, got {name!a} ({array.dtype})."
            )
        kind = dtype or _dtype_name(array.dtype)
        end = position + array.size * ITEM_BYTES[kind]
        shape = list(array.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)  # aligns the values to 8 bytes
    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            array = np.asarray(tensors[name])
            if dtype:
                array = _narrow(path, name, array, dtype)
            else:
                array = array.astype(NUMPY_DTYPES[_dtype_name(array.dtype)], copy=False)
            file.write(array.tobytes())


def need_stored_dtype(dtype) -> None:
    """Raise MinitxError unless this is the safetensors name of a dtype of weights."""
    if not (isinstance(dtype, str) and dtype in FLOAT_DTYPES):
        raise MinitxError(
            f"dtype must be one of {', '.join(FLOAT_DTYPES)}, got {abbreviate(dtype)}."
        )


def _dtype_name(dtype: np.dtype) -> str:
    """The safetensors name of a NumPy dtype."""
    found = [name for name, known in NUMPY_DTYPES.items() if np.dtype(known) == dtype]
    if not found:
        raise MinitxError(f"Expected an array of a dtype that safetensors has, got {dtype}.")
    return found[0]


def _narrow(path, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """``array`` rounded to the stored dtype; a finite value must not become Inf."""
    with np.errstate(over="ignore", invalid="ignore"):
        stored = array.ravel().astype(np.float32 if dtype == "BF16" else FLOAT_DTYPES[dtype])
    if dtype == "BF16":
        stored = _bfloat16_bits(stored)
    became_infinite = np.isinf(widen(stored, dtype)) & np.isfinite(array.ravel())
    if became_infinite.any():
        largest = np.abs(array.ravel()[became_infinite]).max()
        raise MinitxError(
            f"{path}: tensor {name!a} has the value {largest:.4g}, which overflows {dtype}; "
            "write a wider dtype."
        )
    return stored


def _bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """float32 (n,) -> the upper 16 bits of each, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    odd = (bits >> 16) & 1
    rounded = (bits + (0x7FFF + odd)) >> 16  # add half a unit, or just less if even
    # Rounding could carry a NaN into Inf (or wrap), so a NaN is truncated and made quiet instead.
    rounded = np.where(np.isnan(values), (bits >> 16) | 0x40, rounded)
    return rounded.astype("<u2")
