"""Quantized weights and inputs, literally: one number at a time.

Python lists, floats and integers; nothing here is shared with minitx. A matrix w is a list of rows
(in, out), as everywhere in minitx; the groups of an output run down its column.
"""

import math


def round_to_nearest(a):
    """The nearest integer; ties go to the even one."""
    low = math.floor(a)
    if a - low == 0.5:
        return low if low % 2 == 0 else low + 1
    return low if a - low < 0.5 else low + 1


def clip(code, low, high):
    return max(low, min(high, code))


def symmetric(group, bits):
    """(codes, scale) of one group of numbers."""
    q = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in group) / q
    if scale == 0:
        scale = 1.0
    return [clip(round_to_nearest(a / scale), -q, q) for a in group], scale


def asymmetric(group, bits):
    """(codes from 0 to 2^bits - 1, scale, zero point) of one group of numbers."""
    low, high = min([0.0, *group]), max([0.0, *group])
    most = 2**bits - 1
    scale = (high - low) / most
    if scale == 0:
        scale = 1.0
    zero_point = round_to_nearest(-low / scale)
    codes = [clip(round_to_nearest(a / scale) + zero_point, 0, most) for a in group]
    return codes, scale, zero_point


def groups_of(inputs, group_size, bits):
    """(first, end) of each group: as few as possible, all of one size but for a shorter last one;
    that size is at most group_size, and even where two codes share a byte."""
    if bits == 4 and group_size % 2 == 1:
        group_size -= 1
    n = math.ceil(inputs / group_size)
    g = math.ceil(inputs / n)
    if bits == 4 and g % 2 == 1:
        g += 1
    return [(a, min(a + g, inputs)) for a in range(0, inputs, g)]


def quantized(w, bits, group_size, is_symmetric=True, channel_scales=None):
    """The matrix w (in, out) after quantizing and dequantizing it, group by group."""
    c = channel_scales or [1.0] * len(w)
    out = [[0.0] * len(w[0]) for _ in w]
    for o in range(len(w[0])):
        for a, b in groups_of(len(w), group_size, bits):
            group = [w[i][o] * c[i] for i in range(a, b)]
            if is_symmetric:
                codes, scale = symmetric(group, bits)
                zero_point = 0
            else:
                codes, scale, zero_point = asymmetric(group, bits)
            for i in range(a, b):
                out[i][o] = (codes[i - a] - zero_point) * scale / c[i]
    return out


def product(x, w):
    return [sum(x[i] * w[i][o] for i in range(len(x))) for o in range(len(w[0]))]


def integer_product(x, w, bits, group_size):
    """x (in,) times w, both quantized by groups, with integer sums (llama2.c's runq)."""
    y = [0.0] * len(w[0])
    for o in range(len(y)):
        for a, b in groups_of(len(w), group_size, bits):
            codes, scale = symmetric([w[i][o] for i in range(a, b)], bits)
            x_codes, x_scale = symmetric(x[a:b], 8)
            total = 0
            for code, x_code in zip(codes, x_codes):
                assert isinstance(code, int) and isinstance(x_code, int)
                total += code * x_code
            y[o] += total * scale * x_scale
    return y


def pack_int4(codes):
    """[-8, -1, 0, 7] -> [248, 112]: two's complement, the first of a pair in the low nibble."""
    nibbles = [code + 16 if code < 0 else code for code in codes]
    return [nibbles[i] + 16 * nibbles[i + 1] for i in range(0, len(nibbles), 2)]


def best_awq_ratio(w, inputs, bits, group_size):
    """(ratio, its squared output error, that of ratio 0) over the calibration inputs."""
    means = [sum(abs(x[j]) for x in inputs) / len(inputs) for j in range(len(w))]
    expected = [product(x, w) for x in inputs]
    errors = {}
    for step in range(20):
        ratio = step / 20
        c = [max(mean**ratio, 1e-4) for mean in means]
        middle = math.sqrt(max(c) * min(c))
        c = [a / middle for a in c]
        w_quantized = quantized(w, bits, group_size, channel_scales=c)
        found = [product(x, w_quantized) for x in inputs]
        errors[ratio] = sum((a - b) ** 2 for r, f in zip(expected, found) for a, b in zip(r, f))
    ratio = min(errors, key=errors.get)
    return ratio, errors[ratio], errors[0.0]
