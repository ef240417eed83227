"""A matrix in few bits: whole numbers, and a scale for each group of inputs of each output.

All groups of a matrix are of one size, which is at most the one asked for: 352 inputs in groups of
64 become 6 groups of 59, and of the 354 rows the last two are zeros. (With 4 bits, two to a byte,
sizes are even: 6 groups of 60.) Where the size asked for divides the inputs, groups and scales are
those of llama2.c's Q8_0; elsewhere it lets a group run on from one output into the next, of which
its product then uses the whole groups alone: 128 of 172 inputs (read in its code, not tried).

What is done with such a matrix stands in precompute/quantize.py.
"""

import numpy as np

from minitx.errors import MinitxError
from minitx.shared import packing
from minitx.tree import Part, part


@part
class Codes(Part):
    """A matrix (in, out) as ``(codes - zeros) * scales / c``, n groups of G inputs for each output.

    codes: 8 bits each (int8), or 4 bits, two to a byte (uint8: inputs 2i and 2i+1 of a group).
    """

    codes: np.ndarray  # (n, G, out), or (n, G / 2, out) of two to a byte
    scales: np.ndarray  # (n, out), float32 or float16
    zeros: np.ndarray | None  # (n, out) int8: the code that means 0, where that is not 0
    c: np.ndarray | None  # (in,) what each input's weights were multiplied by beforehand
    inputs: int
    bits: int

    @property
    def group(self) -> int:
        """G"""
        return self.codes.shape[1] * (8 // self.bits)

    @property
    def width(self) -> int:
        """out"""
        return self.codes.shape[2]

    @property
    def stored_bytes(self) -> int:
        arrays = (self.codes, self.scales, self.zeros, self.c)
        return sum(a.nbytes for a in arrays if a is not None)

    def whole_numbers(self, groups, dtype):
        """The codes of some groups (a slice), as floats (m, G, out)."""
        return unpacked(self.codes[groups], self.bits, dtype)

    def floats(self):
        """The matrix itself (in, out), as near as it is kept."""
        dtype = np.result_type(self.scales, np.float32)  # float16 is for keeping, not for computing
        w = self.whole_numbers(slice(None), dtype)
        if self.zeros is not None:
            w -= self.zeros[:, None]
        w *= self.scales[:, None]
        w = w.reshape(-1, self.width)[: self.inputs]
        if self.c is not None:
            w /= self.c[:, None]
        return w

    def columns(self, ids, dtype):
        """The columns of these outputs, as rows: ids (...) -> (..., in)."""
        w = unpacked(self.codes[..., ids], self.bits, dtype)  # (n, G, ...)
        if self.zeros is not None:
            w -= self.zeros[:, None, ids]
        w *= self.scales[:, None, ids]
        w = w.reshape(-1, *np.shape(ids))[: self.inputs]
        return np.ascontiguousarray(np.moveaxis(w, 0, -1))

    def grouped(self, x):
        """Inputs x (..., in) by groups: (T, n, G), each divided by its c, with zeros at the end
        where the last group is not full. T is the number of all rows."""
        rows = x.reshape(-1, self.inputs)
        if self.c is not None:
            rows = rows / self.c
        n, G = len(self.codes), self.group
        if n * G > self.inputs:
            full = np.zeros((len(rows), n * G), x.dtype)
            full[:, : self.inputs] = rows
            rows = full
        return rows.reshape(-1, n, G)


def unpacked(codes, bits: int, dtype):
    """Codes (n, G or G / 2, ...) as they are kept -> floats (n, G, ...)."""
    if bits == 8:
        return codes.astype(dtype)
    n, half, *rest = codes.shape
    w = np.empty((n, 2 * half, *rest), dtype)
    w[:, 0::2], w[:, 1::2] = packing.first(codes), packing.second(codes)
    return w


# Offline -----------------------------------------------------------------------------------------


def group_size(inputs: int, most: int | None, bits: int) -> tuple[int, int]:
    """(how many groups, of how many inputs), all of one size: at most ``most``, or all."""
    most = most or inputs
    n = -(-inputs // most)
    size = -(-inputs // n)
    return n, size + size % 2 if bits == 4 else size


def in_groups(
    w, bits: int, group: int | None, symmetric: bool = True, half_scales: bool = False, c=None
) -> Codes:
    """The matrix w (in, out) in so many bits (8 or 4), each input's weights multiplied by c (in,)
    beforehand, if given. Computed in float64; scales are kept in the type of w, or in float16."""
    inputs, outputs = w.shape
    n, G = group_size(inputs, group, bits)
    rows = np.zeros((n * G, outputs))
    rows[:inputs] = w if c is None else w * c[:, None]
    rows = rows.reshape(n, G, outputs)
    kind = np.float16 if half_scales else w.dtype
    round_off = symmetric_codes if symmetric else asymmetric_codes
    codes, scales, zeros = round_off(rows, bits, kind)
    codes = codes.astype(np.int8)
    if bits == 4:
        codes = packing.pack(codes[:, 0::2], codes[:, 1::2])
    c = None if c is None else c.astype(w.dtype)
    return Codes(codes, scales, zeros, c, inputs, bits)


def symmetric_codes(rows, bits: int, kind=np.float64):
    """Groups rows (n, G, out) as whole numbers from -q to q, q = 127 or 7: (codes (n, G, out),
    scales (n, out) in the type ``kind``, None). The number of largest magnitude becomes q or -q."""
    largest = 2 ** (bits - 1) - 1
    scales = usable(abs(rows).max(1) / largest, kind)
    codes = np.rint(rows / scales[:, None].astype(np.float64))
    return codes.clip(-largest, largest), scales, None


def asymmetric_codes(rows, bits: int, kind=np.float64):
    """Groups rows (n, G, out) as whole numbers from -2^(bits-1) on, over the range from the
    smallest to the largest number and 0: (codes (n, G, out), scales (n, out) in the type ``kind``,
    zeros (n, out), the codes that mean 0).

    The usual codes begin at 0; these are the same less 2^(bits-1), so that int8 holds them. Without
    0 in the range, the code for it could lie outside, and cutting it off would move all the rest.
    """
    low, high = np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)
    scales = usable((high - low) / (2**bits - 1), kind)
    step = scales.astype(np.float64)
    least = -(2 ** (bits - 1))
    zeros = (np.rint(-low / step) + least).clip(least, -1 - least)
    codes = (np.rint(rows / step[:, None]) + zeros[:, None]).clip(least, -1 - least)
    return codes, scales, zeros.astype(np.int8)


def usable(scales, kind):
    """Scales in their type, and 1 where nothing but zeros (or less than the type can say) is to be
    scaled: 0 / 0 is no number."""
    with np.errstate(over="ignore"):
        scales = scales.astype(kind)
    if not np.isfinite(scales).all():
        raise MinitxError(
            f"quantize cannot keep scales as {np.dtype(kind)}: the weights are too large for it "
            "or no numbers; use half_scales=false."
        )
    scales[scales == 0] = 1
    return scales
