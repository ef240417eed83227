"""Whole numbers of four bits, two to a byte: the first in the low half, both in two's complement.

So [-8, -1] is the byte 8 | 15 << 4 = 248. NumPy has no type of four bits; all that reads such bytes
takes them apart first.
"""

import numpy as np

from minitx.errors import MinitxError


def pack(first, second):
    """Two arrays of whole numbers from -8 to 7 -> one array of bytes, like them in shape."""
    low, high = first.astype(np.int8) & 15, second.astype(np.int8) << 4
    return low.view(np.uint8) | high.view(np.uint8)


def first(packed):
    """The first number of each byte (uint8), as int8."""
    high = packed * np.uint8(16)  # NumPy multiplies bytes faster than it shifts
    return high.view(np.int8) >> 4


def second(packed):
    """The second number of each byte (uint8), as int8: a shift to the right keeps the sign."""
    return packed.view(np.int8) >> 4


def pack_rows(codes):
    """codes (..., n) from -8 to 7 -> bytes (..., n / 2), neighbours together. n must be even."""
    if codes.shape[-1] % 2:
        raise MinitxError(
            f"{codes.shape[-1]} numbers of four bits do not fill whole bytes; their number must be "
            "even."
        )
    return pack(codes[..., 0::2], codes[..., 1::2])


def unpack_rows(packed):
    """bytes (..., n / 2) -> the whole numbers (..., n), as int8."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    codes[..., 0::2], codes[..., 1::2] = first(packed), second(packed)
    return codes
