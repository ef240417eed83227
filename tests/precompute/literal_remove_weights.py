"""A skipless transformer, whole and with two matrices removed from each block, from the formulas of
arXiv 2404.12362 (biases, which the paper leaves out: x' = x A + a for the removed A with bias a).

Python lists and floats; nothing is shared with minitx. Matrices are lists of rows (in, out). A
block is a dict with w_q w_k w_v w_o w_up w_down (and w_gate), and biases b_... of the same names.
"""

import math


def product(a, b):
    return [[sum(row[i] * b[i][j] for i in range(len(b))) for j in range(len(b[0]))] for row in a]


def plus(row, other):
    return [x + y for x, y in zip(row, other)]


def minus(row, other):
    return [x - y for x, y in zip(row, other)]


def inverse(a):
    """Gauss-Jordan elimination with partial pivoting."""
    n = len(a)
    rows = [list(map(float, row)) + [float(i == j) for j in range(n)] for i, row in enumerate(a)]
    for c in range(n):
        best = max(range(c, n), key=lambda i: abs(rows[i][c]))
        rows[c], rows[best] = rows[best], rows[c]
        rows[c] = [x / rows[c][c] for x in rows[c]]
        for i in range(n):
            if i != c:
                rows[i] = [x - rows[i][c] * y for x, y in zip(rows[i], rows[c])]
    return [row[n:] for row in rows]


def remove(embedding, blocks, name):
    """(embedding, blocks) without w_o and the projection ``name``: "q", "k" or "v"."""
    new = [dict(block) for block in blocks]
    first = blocks[0]
    embedding = [plus(row, first[f"b_{name}"]) for row in product(embedding, first[f"w_{name}"])]
    for i, block in enumerate(blocks):
        back = inverse(block[f"w_{name}"])
        for other in "qkv":
            if other != name:
                w = product(back, block[f"w_{other}"])
                moved = product([block[f"b_{name}"]], w)[0]
                new[i][f"w_{other}"], new[i][f"b_{other}"] = w, minus(block[f"b_{other}"], moved)
        for reader in ("up", "gate"):
            if f"w_{reader}" in block:
                moved = product([block["b_o"]], block[f"w_{reader}"])[0]
                new[i][f"w_{reader}"] = product(block["w_o"], block[f"w_{reader}"])
                new[i][f"b_{reader}"] = plus(moved, block[f"b_{reader}"])
        if i + 1 < len(blocks):
            after = blocks[i + 1]
            new[i]["w_down"] = product(block["w_down"], after[f"w_{name}"])
            moved = product([block["b_down"]], after[f"w_{name}"])[0]
            new[i]["b_down"] = plus(moved, after[f"b_{name}"])
        for gone in (name, "o"):
            del new[i][f"w_{gone}"], new[i][f"b_{gone}"]
    return embedding, new


def linear(block, name, x):
    """x W + b; x itself if the matrix is removed."""
    if f"w_{name}" not in block:
        return list(x)
    return plus(product([x], block[f"w_{name}"])[0], block[f"b_{name}"])


def forward(embedding, blocks, head, ids, heads, kv_heads, rotated, base):
    """Logits for each of the ids."""
    xs = [embedding[i] for i in ids]
    for block in blocks:
        qs, ks, vs = ([linear(block, name, x) for x in xs] for name in "qkv")
        d = len(qs[0]) // heads
        attended = []
        for t in range(len(xs)):
            row = []
            for h in range(heads):
                j = h // (heads // kv_heads)
                q = rope(qs[t][h * d : (h + 1) * d], t, rotated, base)
                scores = []
                for s in range(t + 1):
                    k = rope(ks[s][j * d : (j + 1) * d], s, rotated, base)
                    scores.append(sum(a * b for a, b in zip(q, k)) / math.sqrt(d))
                weights = [math.exp(score - max(scores)) for score in scores]
                for c in range(j * d, (j + 1) * d):
                    row.append(sum(p * vs[s][c] for s, p in enumerate(weights)) / sum(weights))
            attended.append(row)
        xs = [ffn(block, linear(block, "o", row)) for row in attended]
    return product(xs, head)


def ffn(block, x):
    up = linear(block, "up", x)
    if "w_gate" in block:
        gate = linear(block, "gate", x)
        hidden = [g / (1 + math.exp(-g)) * u for g, u in zip(gate, up)]
    else:
        hidden = [max(u, 0.0) for u in up]
    return linear(block, "down", hidden)


def rope(row, position, rotated, base):
    """Rotate columns (i, i + rotated / 2) of one head by position * base^(-2 i / rotated)."""
    row, half = list(row), rotated // 2
    for i in range(half):
        angle = position * base ** (-2 * i / rotated)
        a, b = row[i], row[i + half]
        row[i] = a * math.cos(angle) - b * math.sin(angle)
        row[i + half] = a * math.sin(angle) + b * math.cos(angle)
    return row
