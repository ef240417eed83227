"""lut_product, literally: one token, Python lists, one loop per sum.

Nothing in it is shared with minitx. A matrix w is a list of rows, one for each input.
"""


def quantize(x, bits):
    """(integers, scale) of a list. Halves are rounded to even, as Python's round does."""
    largest = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in x) / largest or 1.0
    return [max(-largest, min(largest, round(a / scale))) for a in x], scale


def groups_of(integers, length):
    """Lists of ``length``, the last padded with the value 0."""
    padded = integers + [0] * (-len(integers) % length)
    return [padded[i : i + length] for i in range(0, len(padded), length)]


def pack(group, bits):
    """A code: the first integer in the low bits, each shifted so that it is not negative."""
    code = 0
    for j, integer in enumerate(group):
        code += (integer + 2 ** (bits - 1)) << (bits * j)
    return code


def unpack(code, bits, length):
    return [(code >> (bits * j)) % 2**bits - 2 ** (bits - 1) for j in range(length)]


def dot(a, b):
    return sum(p * q for p, q in zip(a, b))


def product_table(input_bits, weight_bits, length):
    """table[cx][cw]: the dot product of the integers that two codes stand for."""
    return [
        [
            dot(unpack(cx, input_bits, length), unpack(cw, weight_bits, length))
            for cw in range(2 ** (weight_bits * length))
        ]
        for cx in range(2 ** (input_bits * length))
    ]


def lut_product(x, w, input_bits, weight_bits, length):
    """(y, acc, input codes, weight codes by output)."""
    table = product_table(input_bits, weight_bits, length)
    xi, xs = quantize(x, input_bits)
    cx = [pack(group, input_bits) for group in groups_of(xi, length)]
    y, acc, cw = [], [], []
    for column in zip(*w):  # one output
        wi, ws = quantize(list(column), weight_bits)
        codes = [pack(group, weight_bits) for group in groups_of(wi, length)]
        total = 0
        for g, code in enumerate(codes):
            total += table[cx[g]][code]
        y.append(total * (xs * ws))
        acc.append(total)
        cw.append(codes)
    return y, acc, cx, cw
