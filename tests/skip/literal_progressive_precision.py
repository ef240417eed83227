"""SpAtten's progressive quantization, literally: one query, one head and one key at a time.

Python lists, floats and integers; nothing here is shared with minitx.
"""

import math


def softmax(scores):
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b))


def quantized(x, largest):
    """Integers from -largest to largest, and the number that 1 stands for."""
    scale = max(abs(number) for number in x) / largest or 1.0
    return [round(number / scale) for number in x], scale


def split(code, low):
    """The high part (in units of 2^low) and the low part of an integer."""
    high = (code + 2**low // 2) // 2**low
    return high, code - high * 2**low


def attend(q, k, v, scale, key_head, high, low, threshold, choose="flat"):
    """Causal attention [head][query][feature], where the queries q [head][query] are the last ones
    of the keys k [key head][key]; and the (head, query) pairs whose scores were redone."""
    out, redone = [], []
    largest = ((2**high - 1) * 2 ** (low or 0) - 1) // 2
    for h, queries in enumerate(q):
        keys, values = k[key_head[h]], v[key_head[h]]
        out.append([])
        for t, query in enumerate(queries):
            q_code, q_scale = quantized(query, 127)
            of_high, of_all = [], []
            for key in keys[: len(keys) - len(queries) + t + 1]:
                code, k_scale = quantized(key, largest)
                parts = [split(number, low or 0) for number in code]
                unit = scale * q_scale * k_scale
                of_high.append(unit * 2 ** (low or 0) * dot(q_code, [a for a, _ in parts]))
                of_all.append(scale * dot(query, key) if low is None else unit * dot(q_code, code))
            p = softmax(of_high)
            if max(p) <= threshold if choose == "flat" else max(p) > threshold:
                redone.append((h, t))
                p = softmax(of_all)
            width = range(len(values[0]))
            out[-1].append(
                [sum(weight * values[j][i] for j, weight in enumerate(p)) for i in width]
            )
    return out, redone
