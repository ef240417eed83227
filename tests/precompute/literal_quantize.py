"""Weights, inputs, keys and values in few bits, literally: one number at a time.

Python lists, floats and whole numbers; nothing in it is shared with minitx. A matrix is a list of
rows (in, out), as everywhere; ``columns`` of it are what a group runs along.
"""

import math


def nearest(a):
    """The nearest whole number; halfway between two, the even one."""
    low = math.floor(a)
    if a - low == 0.5:
        return low if low % 2 == 0 else low + 1
    return low if a - low < 0.5 else low + 1


def symmetric(group, bits):
    """(codes, scale) of one group of numbers."""
    most = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in group) / most
    if scale == 0:
        scale = 1.0
    return [max(-most, min(most, nearest(a / scale))) for a in group], scale


def asymmetric(group, bits):
    """(codes from 0 on, scale, zero) of one group of numbers."""
    low, high = min([0.0, *group]), max([0.0, *group])
    most = 2**bits - 1
    scale = (high - low) / most
    if scale == 0:
        scale = 1.0
    zero = nearest(-low / scale)
    return [max(0, min(most, nearest(a / scale) + zero)) for a in group], scale, zero


def groups_of(count, most, bits):
    """(first, last) of each group: as many as are needed, all as large as the first but the last,
    and of an even size where two codes share a byte."""
    n = math.ceil(count / most)
    size = math.ceil(count / n)
    if bits == 4 and size % 2 == 1:
        size += 1
    return [(a, min(a + size, count)) for a in range(0, count, size)]


def kept(w, bits, most, is_symmetric=True, c=None):
    """The matrix that is left of w (in, out), group by group of each output."""
    out = [[0.0] * len(w[0]) for _ in w]
    for o in range(len(w[0])):
        for a, b in groups_of(len(w), most, bits):
            column = [w[i][o] * (c[i] if c else 1.0) for i in range(a, b)]
            if is_symmetric:
                codes, scale = symmetric(column, bits)
                zero = 0
            else:
                codes, scale, zero = asymmetric(column, bits)
            for i in range(a, b):
                out[i][o] = (codes[i - a] - zero) * scale / (c[i] if c else 1.0)
    return out


def times(x, w):
    return [sum(x[i] * w[i][o] for i in range(len(x))) for o in range(len(w[0]))]


def times_in_integers(x, w, bits, most):
    """x (in,) times w, both rounded by groups, with whole-number sums (llama2.c's runq)."""
    y = [0.0] * len(w[0])
    for o in range(len(y)):
        for a, b in groups_of(len(w), most, bits):
            codes, scale = symmetric([w[i][o] for i in range(a, b)], bits)
            x_codes, x_scale = symmetric(x[a:b], 8)
            total = 0
            for p, q in zip(codes, x_codes):
                assert isinstance(p, int) and isinstance(q, int)
                total += p * q
            y[o] += total * scale * x_scale
    return y


def two_in_a_byte(numbers):
    """[-8, -1, 0, 7] -> [248, 112]: two's complement, the first of a pair in the low half."""
    halves = [n + 16 if n < 0 else n for n in numbers]
    return [halves[i] + 16 * halves[i + 1] for i in range(0, len(halves), 2)]


def best_ratio(w, rows, bits, most):
    """(ratio, its squared output error, that of ratio 0) over the inputs ``rows``."""
    n = len(rows)
    means = [sum(abs(x[j]) for x in rows) / n for j in range(len(w))]
    right = [times(x, w) for x in rows]
    errors = {}
    for step in range(20):
        ratio = step / 20
        c = [max(a**ratio, 1e-4) for a in means]
        middle = math.sqrt(max(c) * min(c))
        c = [a / middle for a in c]
        w_kept = kept(w, bits, most, c=c)
        found = [times(x, w_kept) for x in rows]
        errors[ratio] = sum((a - b) ** 2 for r, f in zip(right, found) for a, b in zip(r, f))
    ratio = min(errors, key=errors.get)
    return ratio, errors[ratio], errors[0.0]
