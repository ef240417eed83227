"""Whole numbers of few bits in as little memory as they need: one plane for each of their bits."""

import numpy as np


def pack(codes, bits: int):
    """codes (in, out) whole numbers from 0 to 2^bits - 1 -> (in, bits, out / 8 rounded up) uint8:
    a row's lowest bits first, those of 8 neighbours in a byte."""
    codes = codes.astype(np.uint8)
    return np.stack([np.packbits(codes >> i & 1, axis=1) for i in range(bits)], axis=1)


def unpack(planes, outputs: int):
    """The codes (in, out) of ``pack``, as uint8."""
    codes = np.zeros((len(planes), outputs), np.uint8)
    for i in range(planes.shape[1]):
        codes |= np.unpackbits(planes[:, i], axis=1, count=outputs) << np.uint8(i)
    return codes
