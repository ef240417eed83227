"""lut_bit_serial, literally: one token, Python lists, one loop per sum.

Nothing in it is shared with minitx. u is a list of rows of integers, one for each input.
"""


def groups_of(x, group):
    """Lists of ``group``, the last padded with 0."""
    padded = x + [0] * (-len(x) % group)
    return [padded[i : i + group] for i in range(0, len(padded), group)]


def signed_sums(inputs):
    """Entry m: the sum of the inputs, +x_j where bit j of m is 1 and -x_j where it is 0."""
    return [
        sum(x_j if m >> j & 1 else -x_j for j, x_j in enumerate(inputs))
        for m in range(2 ** len(inputs))
    ]


def lut_bit_serial(x, u, zero, scale, bits, group):
    """(y, the tables, index by bit, group and output)."""
    tables = [signed_sums(inputs) for inputs in groups_of(x, group)]
    index = [[[] for _ in tables] for _ in range(bits)]
    y = []
    for o, column in enumerate(zip(*u)):  # one output
        dot = 0
        for i in range(bits):  # one bit of its weights
            plane = groups_of([value >> i & 1 for value in column], group)
            s = 0
            for g, weight_bits in enumerate(plane):
                m = sum(bit << j for j, bit in enumerate(weight_bits))
                index[i][g].append(m)
                s += tables[g][m]
            dot += 2**i * (s + sum(x)) / 2  # bit = (sign + 1) / 2
        y.append(scale[o] * (dot - zero[o] * sum(x)))
    return y, tables, index
