"""function_tables, literally: one number at a time, with the standard library's float16 ("e").

Nothing in it is shared with minitx.
"""

import math
import struct


def from_bits(i):
    """The float16 with the bits i."""
    return struct.unpack("<e", struct.pack("<H", i))[0]


def to_bits(x):
    """The bits of the float16 nearest to x; beyond the largest, those of Inf."""
    try:
        return struct.unpack("<H", struct.pack("<e", x))[0]
    except OverflowError:
        return 0x7C00 if x > 0 else 0xFC00


def function_table(f):
    """f at every float16 that is a number; None for NaN."""
    inputs = map(from_bits, range(2**16))
    return [None if math.isnan(x) else f(x) for x in inputs]


def look_up(table, x, f):
    """f of the float16 nearest to x; beyond the largest, f(x) itself."""
    bits = to_bits(x)
    return f(x) if bits in (0x7C00, 0xFC00) else table[bits]
