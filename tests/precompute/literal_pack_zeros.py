"""A matrix as nonzero values and a bitmask, literally: one weight at a time.

Python lists, floats and integers; nothing here is shared with minitx.
"""


def pack(w):
    """Rows of weights -> (nonzero values, bytes of the mask), both row by row. The first weight's
    bit is the highest of its byte; the last byte is filled with 0 bits."""
    values, bits = [], []
    for row in w:
        for weight in row:
            if weight != 0:
                values.append(weight)
            bits.append(1 if weight != 0 else 0)
    while len(bits) % 8:
        bits.append(0)
    mask = []
    for first in range(0, len(bits), 8):
        byte = 0
        for bit in bits[first : first + 8]:
            byte = 2 * byte + bit
        mask.append(byte)
    return values, mask


def unpack(values, mask, inputs, outputs):
    """The matrix again."""
    w = [[0.0] * outputs for _ in range(inputs)]
    next_value = iter(values)
    for i in range(inputs):
        for j in range(outputs):
            number = i * outputs + j
            if mask[number // 8] >> (7 - number % 8) & 1:
                w[i][j] = next(next_value)
    return w
