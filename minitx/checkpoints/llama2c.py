"""Read llama2.c checkpoints (``stories15M.bin``, ...) of versions 0, 1 and 2.

    version 0   header of 7 int32; float32 weights; two tables of rotary angles, not read
    version 1   256-byte header; float32 weights, norms first
    version 2   as version 1, but matrices in int8 with one float32 scale per group

All are llama models without biases: RoPE base 10000, norm epsilon 1e-5. Matrices are stored
(out, in). llama2.c rotates adjacent columns (2i, 2i+1) of a head, minitx columns (i, i + d/2). The
reader permutes the columns of queries and keys, which makes the two rotations the same.

The int8 weights of version 2 are dequantized to floats. ``runq.c`` also quantizes the activations
to int8, so its text may differ from the text of minitx; the text of ``run.c`` does not.

The tokenizer.bin is read in ``llama2c_tokenizer.py``. Format: https://github.com/karpathy/llama2.c
(export.py, run.c).
"""

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minitx.build import build, shapes
from minitx.checkpoints.common import (
    need_finite,
    need_float_dtype,
    need_small_rope_tables,
    open_file,
)
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Transformer

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42" as a uint32
HEADER_BYTES = {0: 28, 1: 256, 2: 256}
BOS = 1  # starts every text in llama2.c; generating it again ends the text

# The minitx path of each stored weight; "{}" is the layer.
EMBED, NORM, HEAD = "embed.w", "norm.gain", "head.w"
ATTN_NORM, FFN_NORM = "stack.blocks.{}.attn.norm.gain", "stack.blocks.{}.ffn.norm.gain"
WQ, WK, WV = (f"stack.blocks.{{}}.attn.qkv.{x}.w" for x in "qkv")
WO = "stack.blocks.{}.attn.out.w"
W1 = "stack.blocks.{}.ffn.expand.gate.w"
W2 = "stack.blocks.{}.ffn.down.w"
W3 = "stack.blocks.{}.ffn.expand.up.w"
ANGLES = "rotary angles"
MATRICES = (EMBED, WQ, WK, WV, WO, W1, W2, W3)

# The order in the file. A path with "{}" is stored for all layers in a row.
ORDER = {
    0: (EMBED, ATTN_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3, NORM, ANGLES, HEAD),
    1: (ATTN_NORM, FFN_NORM, NORM, *MATRICES, HEAD),
    2: (ATTN_NORM, FFN_NORM, NORM, *MATRICES, HEAD),
}


@dataclass(frozen=True)
class Llama2cHeader:
    """The header of a checkpoint."""

    version: int
    config: Config
    group: int | None  # version 2: the group size, int8 values per scale


def read_llama2c(path, dtype=np.float32) -> Transformer:
    """The model in the file ``path``, its weights as ``dtype`` (float32 or float64).

    Raises MinitxError if the file is missing or not a llama2.c checkpoint, if its size does not
    match its header, or if a weight is not finite.
    """
    path, dtype = Path(path), need_float_dtype(dtype)
    with open_file(path) as file:
        header = parse_header(path, file.read(256))
        _check_size(path, header, os.fstat(file.fileno()).st_size)
        weights = _read_weights(path, header, file, dtype)
    return build(header.config, lambda name, shape: weights[name])


# ----------------------------------------------------------------------------------------- header


def parse_header(path, first: bytes) -> Llama2cHeader:
    """Parses the header from ``first``, the first 256 bytes of the file or all of a shorter one."""
    version, start = 0, 0
    if first[:4] == MAGIC:
        version, start = int.from_bytes(first[4:8], "little", signed=True), 8
        if version not in (1, 2):
            raise MinitxError(f"{path}: the llama2.c version must be 1 or 2, got {version}.")
    if len(first) < HEADER_BYTES[version]:
        raise MinitxError(
            f"{path}: expected a llama2.c header of {HEADER_BYTES[version]} bytes, "
            f"got {len(first)} bytes."
        )
    sizes = struct.unpack_from("<7i", first, start)
    if version == 0:
        tied = sizes[5] > 0  # a negative vocabulary size marks an untied head
        sizes = (*sizes[:5], abs(sizes[5]), sizes[6])
    else:
        if first[36] > 1:
            raise MinitxError(
                f"{path}: the shared-classifier flag must be 0 or 1, got {first[36]}."
            )
        tied = first[36] == 1
    group = struct.unpack_from("<i", first, 37)[0] if version == 2 else None
    return Llama2cHeader(version, _config(path, sizes, tied), group)


def _config(path, sizes: tuple, tied: bool) -> Config:
    width, hidden, layers, heads, kv_heads, vocab_size, context = sizes
    try:
        if min(width, heads) < 1 or width % heads:
            raise MinitxError(
                f"The width must be a multiple of the heads, got {width} and {heads}."
            )
        config = Config(
            family="llama",
            vocab_size=vocab_size,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_width=width // heads,
            hidden=hidden,
            context=context,
            norm_eps=1e-5,
            rope_width=width // heads,
            rope_base=10000.0,
            tied=tied,
            bos=BOS if vocab_size > BOS else None,
            eos=(BOS,) if vocab_size > BOS else (),
        )
    except MinitxError as error:
        raise MinitxError(
            f"{path}: invalid header, so the file is corrupt or not from llama2.c: {error}"
        ) from None
    need_small_rope_tables(path, config)
    return config


# ---------------------------------------------------------------------------------------- weights


def _check_size(path: Path, header: Llama2cHeader, size: int) -> None:
    """The file size must match the header exactly (checked before anything is allocated)."""
    tensors = _stored_tensors(header)
    if header.version == 2:
        _check_group_size(path, header, tensors)
    expected = HEADER_BYTES[header.version] + sum(
        _stored_bytes(header, name, math.prod(shape)) * count for name, shape, count in tensors
    )
    if size != expected:
        fault = "truncated" if size < expected else "too long"
        raise MinitxError(
            f"{path}: expected {expected} bytes by its header, got {size}; "
            f"the file is {fault}, or its header is corrupt."
        )


def _stored_tensors(header: Llama2cHeader) -> list[tuple[str, tuple, int]]:
    """(name, minitx shape, count) of everything in the file, in order; count is L or 1."""
    config = header.config
    # One layer gives the shapes of all layers; with a context of 1 the rotary tables stay small.
    known = shapes(replace(config, layers=1, context=1))
    known[ANGLES] = (config.context, config.head_width)  # cos, then sin, of d/2 angles each
    names = [
        name for name in ORDER[header.version] if name.format(0) in known
    ]  # a tied model has no HEAD
    return [(name, known[name.format(0)], config.layers if "{}" in name else 1) for name in names]


def _is_quantized(header: Llama2cHeader, name: str) -> bool:
    return header.version == 2 and name in (*MATRICES, HEAD)


def _check_group_size(path, header: Llama2cHeader, tensors) -> None:
    group = header.group
    for name, shape, _ in tensors:
        if _is_quantized(header, name) and (group < 1 or math.prod(shape) % group):
            raise MinitxError(
                f"{path}: the group size must divide the {math.prod(shape)} values of "
                f"{name.format(0)}, got {group}."
            )


def _stored_bytes(header: Llama2cHeader, name: str, size: int) -> int:
    """Bytes in the file of one tensor of ``size`` values."""
    if _is_quantized(header, name):
        return size + 4 * (size // header.group)  # int8 values, then one scale per group
    return 4 * size


def _read_weights(path, header: Llama2cHeader, file, dtype) -> dict[str, np.ndarray]:
    """All weights by path in minitx layout: (in, out), with half-split rotary columns."""
    weights = {}
    file.seek(HEADER_BYTES[header.version])
    for name, shape, count in _stored_tensors(header):
        num_bytes = _stored_bytes(header, name, math.prod(shape))
        if name == ANGLES:  # recomputed, as in run.c
            file.seek(num_bytes, os.SEEK_CUR)
            continue
        for i in range(count):
            stored = file.read(num_bytes)
            if len(stored) != num_bytes:
                raise MinitxError(
                    f"{path}: changed while it was read; try again when it is complete."
                )
            values = decode_values(header, name, stored, dtype)
            weight = _to_minitx_layout(header.config, name, values, shape)
            weights[name.format(i)] = need_finite(path, name.format(i), weight)
    return weights


def decode_values(header: Llama2cHeader, name: str, stored: bytes, dtype) -> np.ndarray:
    """Decodes the bytes of one tensor into its flat values; int8 values are dequantized."""
    if not _is_quantized(header, name):
        return np.frombuffer(stored, "<f4").astype(dtype)
    groups = len(stored) // (header.group + 4)
    integers = np.frombuffer(stored, np.int8, groups * header.group).reshape(groups, header.group)
    scales = np.frombuffer(stored, "<f4", offset=integers.size)
    return (integers.astype(dtype) * scales.astype(dtype)[:, None]).ravel()


def _to_minitx_layout(config: Config, name: str, values: np.ndarray, shape: tuple) -> np.ndarray:
    if name == EMBED or len(shape) == 1:
        return values.reshape(shape)
    w = values.reshape(shape[::-1])  # (out, in)
    if name in (WQ, WK):
        w = half_split(w, config.head_width)
    return np.ascontiguousarray(w.T)  # (in, out)


def half_split(w: np.ndarray, d: int) -> np.ndarray:
    """Permutes the rows of each head of w (heads*d, in): from pairs (2i, 2i+1) to (i, i + d/2)."""
    pairs = w.reshape(-1, d // 2, 2, w.shape[-1])  # (heads, pair, index in pair, in)
    return pairs.swapaxes(1, 2).reshape(w.shape)
