"""Checkpoints of llama2.c (``stories15M.bin``, ...), versions 0, 1 and 2, read into our model.

    version 0   7 integers; float32 weights; two tables of rotary angles, which are not needed
    version 1   256-byte header; float32 weights, norms first
    version 2   as version 1, but matrices as 8-bit integers, one float32 factor per group of them

All are llama models without biases: rotary base 10000, norm epsilon 1e-5. Matrices are stored
(out, in). llama2.c rotates neighbouring columns (2i, 2i+1) of a head, minitx columns (i, i + d/2):
the same rotation once the columns of queries and keys are reordered, which happens here.

Version 2 is computed in float after multiplying its integers out. ``runq.c`` also rounds what goes
into each product to 8 bits, so its text may differ from ours in the end; ``run.c``'s does not.

The weights are Hugging Face's llama otherwise: see ``huggingface.py``. Its tokenizer.bin is read in
``llama2c_tokenizer.py``. Format: https://github.com/karpathy/llama2.c (export.py, run.c).
"""

import math
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minitx.build import build, shapes
from minitx.checkpoints.common import need_finite, need_float, need_modest_tables, unreadable
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Transformer

MAGIC = struct.pack("<I", 0x616B3432)  # "ak42", written as a number
HEADER_BYTES = {0: 28, 1: 256, 2: 256}
BOS = 1  # begins every text of llama2.c, and seeing it again ends the text

# Where each weight of a layer, or of the model, goes; "{}" is the layer.
EMBED, NORM, HEAD = "embed.w", "norm.gain", "head.w"
ATTN_NORM, FFN_NORM = "stack.blocks.{}.attn.norm.gain", "stack.blocks.{}.ffn.norm.gain"
WQ, WK, WV = (f"stack.blocks.{{}}.attn.qkv.{x}.w" for x in "qkv")
WO = "stack.blocks.{}.attn.out.w"
W1 = "stack.blocks.{}.ffn.expand.gate.w"
W2 = "stack.blocks.{}.ffn.down.w"
W3 = "stack.blocks.{}.ffn.expand.up.w"
ANGLES = "rotary angles"
MATRICES = (EMBED, WQ, WK, WV, WO, W1, W2, W3)

# The order in the file. Each entry that has a layer stands there for all layers, one by one.
ORDER = {
    0: (EMBED, ATTN_NORM, WQ, WK, WV, WO, FFN_NORM, W1, W2, W3, NORM, ANGLES, HEAD),
    1: (ATTN_NORM, FFN_NORM, NORM, *MATRICES, HEAD),
    2: (ATTN_NORM, FFN_NORM, NORM, *MATRICES, HEAD),
}


@dataclass(frozen=True)
class Header:
    """What stands before the weights."""

    version: int
    config: Config
    group: int | None  # version 2: how many integers share a factor


def read_llama2c(path, dtype=np.float32) -> Transformer:
    """The model in the file ``path``, its weights as ``dtype`` (float32 or float64).

    Raises MinitxError if the file is missing or is not such a checkpoint, if its length is not
    exactly what its header calls for, or if a weight is not finite.
    """
    path, dtype = Path(path), need_float(dtype)
    if not path.is_file():
        raise MinitxError(f"{path}: there is no such file; expected a llama2.c checkpoint.")
    try:
        with open(path, "rb") as file:
            header = parse_header(path, file.read(256))
            _check_length(path, header, os.fstat(file.fileno()).st_size)
            ours = _read_weights(path, header, file, dtype)
    except OSError as error:
        raise unreadable(path, error) from None
    return build(header.config, lambda name, shape: ours[name])


# ----------------------------------------------------------------------------------------- header


def parse_header(path, first: bytes) -> Header:
    """The header at the beginning of ``first`` (the first 256 bytes of the file, or all of it)."""
    version, start = 0, 0
    if first[:4] == MAGIC:
        version, start = int.from_bytes(first[4:8], "little", signed=True), 8
        if version not in (1, 2):
            raise MinitxError(f"{path}: is marked as llama2.c version {version}; expected 1 or 2.")
    if len(first) < HEADER_BYTES[version]:
        raise MinitxError(
            f"{path}: is {len(first)} bytes long, less than the header of a llama2.c checkpoint."
        )
    sizes = struct.unpack_from("<7i", first, start)
    if version == 0:
        tied = sizes[5] > 0  # a separate head is marked by a negative vocabulary
        sizes = (*sizes[:5], abs(sizes[5]), sizes[6])
    else:
        if first[36] > 1:
            raise MinitxError(f"{path}: its shared-classifier flag is {first[36]}, not 0 or 1.")
        tied = first[36] == 1
    group = struct.unpack_from("<i", first, 37)[0] if version == 2 else None
    return Header(version, _config(path, sizes, tied), group)


def _config(path, sizes: tuple, tied: bool) -> Config:
    width, hidden, layers, heads, kv_heads, vocab_size, context = sizes
    try:
        if min(width, heads) < 1 or width % heads:
            raise MinitxError(f"{heads} heads do not divide a width of {width}.")
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
            f"{path}: its header makes no model, so it is damaged or not of llama2.c: {error}"
        ) from None
    need_modest_tables(path, config)
    return config


# ---------------------------------------------------------------------------------------- weights


def _check_length(path: Path, header: Header, size: int) -> None:
    """The file must be exactly as long as its header calls for (checked before any allocation)."""
    layout = _layout(header)
    if header.version == 2:
        _check_group(path, header, layout)
    needed = HEADER_BYTES[header.version] + sum(
        _stored_bytes(header, name, math.prod(shape)) * times for name, shape, times in layout
    )
    if size != needed:
        fault = "truncated" if size < needed else "too long"
        raise MinitxError(
            f"{path}: is {size} bytes long but its header calls for {needed}; "
            f"the file is {fault}, or damaged at its beginning."
        )


def _layout(header: Header) -> list[tuple[str, tuple, int]]:
    """(name, our shape, how many of them in a row) for everything in the file, in order."""
    config = header.config
    # One layer has the shapes of all; and with a context of 1 no rotary tables are computed here.
    known = shapes(replace(config, layers=1, context=1))
    known[ANGLES] = (config.context, config.head_width)  # cosines, then sines, of d/2 angles each
    names = [name for name in ORDER[header.version] if name.format(0) in known]  # no HEAD if tied
    return [(name, known[name.format(0)], config.layers if "{}" in name else 1) for name in names]


def _is_quantized(header: Header, name: str) -> bool:
    return header.version == 2 and name in (*MATRICES, HEAD)


def _check_group(path, header: Header, layout) -> None:
    group = header.group
    for name, shape, _ in layout:
        if _is_quantized(header, name) and (group < 1 or math.prod(shape) % group):
            raise MinitxError(
                f"{path}: its header groups weights by {group}, "
                f"which does not divide the {math.prod(shape)} numbers of {name.format(0)}."
            )


def _stored_bytes(header: Header, name: str, count: int) -> int:
    """Bytes in the file of one tensor of ``count`` numbers."""
    if _is_quantized(header, name):
        return count + 4 * (count // header.group)  # integers, then one factor per group
    return 4 * count


def _read_weights(path, header: Header, file, dtype) -> dict[str, np.ndarray]:
    """Every weight by its path, as ours: (in, out) and with half-split rotary columns."""
    found = {}
    file.seek(HEADER_BYTES[header.version])
    for name, shape, times in _layout(header):
        size = _stored_bytes(header, name, math.prod(shape))
        if name == ANGLES:  # recomputed, as run.c does
            file.seek(size, os.SEEK_CUR)
            continue
        for i in range(times):
            numbers = _numbers(header, name, file.read(size), dtype)
            ours = _ours(header.config, name, numbers, shape)
            found[name.format(i)] = need_finite(path, name.format(i), ours)
    return found


def _numbers(header: Header, name: str, stored: bytes, dtype) -> np.ndarray:
    """The flat numbers of one tensor from its bytes."""
    if not _is_quantized(header, name):
        return np.frombuffer(stored, "<f4").astype(dtype)
    groups = len(stored) // (header.group + 4)
    integers = np.frombuffer(stored, np.int8, groups * header.group).reshape(groups, header.group)
    factors = np.frombuffer(stored, "<f4", offset=integers.size)
    return (integers.astype(dtype) * factors.astype(dtype)[:, None]).ravel()


def _ours(config: Config, name: str, numbers: np.ndarray, shape: tuple) -> np.ndarray:
    if name == EMBED or len(shape) == 1:
        return numbers.reshape(shape)
    w = numbers.reshape(shape[::-1])  # (out, in)
    if name in (WQ, WK):
        w = half_split(w, config.head_width)
    return np.ascontiguousarray(w.T)  # (in, out)


def half_split(w: np.ndarray, d: int) -> np.ndarray:
    """Reorder the rows of each head of w (heads*d, in): from pairs (2i, 2i+1) to (i, i + d/2)."""
    pairs = w.reshape(-1, d // 2, 2, w.shape[-1])  # (heads, pair, which of the two, in)
    return pairs.swapaxes(1, 2).reshape(w.shape)
