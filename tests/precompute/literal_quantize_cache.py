"""A quantized KV cache, literally: one head of one layer, one number at a time.

Python lists, floats and integers; nothing here is shared with minitx.
"""

import math


def round_to_nearest(a):
    """The nearest integer; ties go to the even one."""
    low = math.floor(a)
    if a - low == 0.5:
        return low if low % 2 == 0 else low + 1
    return low if a - low < 0.5 else low + 1


def quantize(group, bits):
    """(codes, scale) of one group of numbers."""
    q = 2 ** (bits - 1) - 1
    scale = max(abs(a) for a in group) / q
    if scale == 0:
        scale = 1.0
    return [round_to_nearest(a / scale) for a in group], scale


class Cache:
    """The keys and values of one head: ``store`` quantizes a token, ``read`` dequantizes all."""

    def __init__(self, bits, group_size):
        self.bits, self.group_size = bits, group_size
        self.keys, self.values = [], []  # of each token: a list of (codes, scale), one a group

    def store(self, key, value):
        for vector, rows in ((key, self.keys), (value, self.values)):
            g = self.group_size
            groups = [vector[a : a + g] for a in range(0, len(vector), g)]
            rows.append([quantize(group, self.bits) for group in groups])

    def read(self):
        """(keys, values) of all tokens so far, in floats."""
        return [
            [[code * scale for codes, scale in row for code in codes] for row in rows]
            for rows in (self.keys, self.values)
        ]


def attend(queries, keys, values, bits, group_size):
    """Causal attention of one head over its quantized cache: a token at a time, which is stored
    before its query reads."""
    cache, outputs = Cache(bits, group_size), []
    for q, k, v in zip(queries, keys, values):
        cache.store(k, v)
        cached_keys, cached_values = cache.read()
        weights = [
            math.exp(sum(a * b for a, b in zip(q, key)) / math.sqrt(len(q))) for key in cached_keys
        ]
        total = sum(weights)
        columns = zip(*cached_values)
        outputs.append([sum(w * x for w, x in zip(weights, col)) / total for col in columns])
    return outputs
