"""Precomputing the first layer, by loops: the table row by row, and block 0 token by token.

Python lists and floats; nothing is shared with minitx. Matrices are lists of rows (in, out).
"""

import math


def project(x, w, b=None):
    """x w + b"""
    y = [0.0] * len(w[0]) if b is None else list(b)
    for i in range(len(x)):
        for j in range(len(y)):
            y[j] += x[i] * w[i][j]
    return y


def plus(*rows):
    return [sum(column) for column in zip(*rows)]


def normed(x, kind, gain, bias, eps):
    if kind == "layer":
        mean = sum(x) / len(x)
        x = [a - mean for a in x]
    r = 1 / math.sqrt(sum(a * a for a in x) / len(x) + eps)
    return [a * r * g + b for a, g, b in zip(x, gain, bias)]


def activated(x, w):
    """The FFN's hidden neurons: silu with a gate, or the exact GELU without one."""
    up = project(x, w["w_up"], w["b_up"])
    if "w_gate" in w:
        gate = project(x, w["w_gate"], w["b_gate"])
        return [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
    return [u * (1 + math.erf(u / math.sqrt(2))) / 2 for u in up]


def ffn(x, w):
    """The FFN, its norm included."""
    n = normed(x, w["norm"], w["gain_2"], w["bias_2"], w["eps"])
    return project(activated(n, w), w["w_down"], w["b_down"])


def make_table(w, parallel):
    """One row [s, q, k, v] for each token of the embedding."""
    table = []
    for x in w["embedding"]:
        n = normed(x, w["norm"], w["gain_1"], w["bias_1"], w["eps"])
        s = plus(x, ffn(x, w)) if parallel else list(x)
        for name in "qkv":
            s = s + project(n, w["w_" + name], w["b_" + name])
        table.append(s)
    return table


def rope(row, position, rotated, base):
    """Rotate columns (i, i + rotated / 2) of one head by position * base^(-2 i / rotated)."""
    row, half = list(row), rotated // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rotated)
        a, b = row[i], row[i + half]
        row[i] = a * math.cos(angle) - b * math.sin(angle)
        row[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return row


def block_0(table, ids, w, heads, kv_heads, width, rotated, base, parallel):
    """The hidden state after block 0, one row for each of the ids, step by step."""
    d = (len(table[0]) - width) // (heads + 2 * kv_heads)
    keys, values, out = [], [], []
    for position, token in enumerate(ids):
        row = table[token]
        s, rest = row[:width], row[width:]
        pieces = [rest[i * d : (i + 1) * d] for i in range(heads + 2 * kv_heads)]
        q = [rope(p, position, rotated, base) for p in pieces[:heads]]
        keys.append([rope(p, position, rotated, base) for p in pieces[heads : heads + kv_heads]])
        values.append(pieces[heads + kv_heads :])
        attended = []
        for h in range(heads):
            group = h // (heads // kv_heads)
            scores = [sum(a * b for a, b in zip(q[h], k[group])) / math.sqrt(d) for k in keys]
            p = [math.exp(score - max(scores)) for score in scores]
            for column in range(d):
                part = sum(a * v[group][column] for a, v in zip(p, values))
                attended.append(part / sum(p))
        y = plus(s, project(attended, w["w_o"], w["b_o"]))
        out.append(y if parallel else plus(y, ffn(y, w)))
    return out


def split_qkv(t, position, w):
    """[q, k, v] = r(x) (y(tokens[t]) + y(positions[p])) + c of token t at learned position p, with
    y(x) = (x * g) W; a LayerNorm: x - mean(x) instead of x, in both r and y."""

    def less_mean(x):
        return [a - sum(x) / len(x) for a in x] if w["norm"] == "layer" else x

    e, p = w["embedding"][t], w["positions"][position]
    x = less_mean(plus(e, p))
    r = 1 / math.sqrt(sum(a * a for a in x) / len(x) + w["eps"])
    found = []
    for name in "qkv":
        matrix = w["w_" + name]
        y_e, y_p = (
            project([a * g for a, g in zip(less_mean(y), w["gain_1"])], matrix) for y in (e, p)
        )
        c = project(w["bias_1"], matrix, w["b_" + name])
        found += [(a + b) * r + z for a, b, z in zip(y_e, y_p, c)]
    return found
