"""4-bit integers, two to a byte: the first in the low nibble, both in two's complement.

So [-8, -1] becomes the byte 8 | 15 << 4 = 248. NumPy has no 4-bit type, so codes are unpacked to
int8 before they are used.
"""

import numpy as np

from minitx.errors import MinitxError


def join_nibbles(low, high):
    """Two integer arrays with values from -8 to 7 -> one uint8 array of the same shape."""
    low, high = low.astype(np.int8) & 15, high.astype(np.int8) << 4
    return low.view(np.uint8) | high.view(np.uint8)


def low_nibble(packed):
    """The low nibble of each byte (uint8), sign-extended to int8."""
    shifted = packed * np.uint8(16)  # NumPy multiplies bytes faster than it shifts them
    return shifted.view(np.int8) >> 4


def high_nibble(packed):
    """The high nibble of each byte (uint8), sign-extended to int8: a right shift keeps the sign."""
    return packed.view(np.int8) >> 4


def pack_int4(codes):
    """codes (..., n) from -8 to 7, n even -> bytes (..., n / 2): neighbours share a byte."""
    if codes.shape[-1] % 2:
        raise MinitxError(
            f"Expected an even number of 4-bit integers, two to a byte; got {codes.shape[-1]}."
        )
    return join_nibbles(codes[..., 0::2], codes[..., 1::2])


def unpack_int4(packed):
    """bytes (..., n / 2) -> int8 (..., n)."""
    codes = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.int8)
    codes[..., 0::2], codes[..., 1::2] = low_nibble(packed), high_nibble(packed)
    return codes
