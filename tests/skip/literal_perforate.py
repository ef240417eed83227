"""Loop perforation of matrix products, literally: loops over outputs and inputs.

Python lists and floats; nothing here is shared with minitx.
"""

import math


def product(x, w, b=None):
    """y_j = sum over i of x_i w_ij, plus b_j."""
    inputs, outputs = range(len(w)), range(len(w[0]))
    return [sum(x[i] * w[i][j] for i in inputs) + (b[j] if b else 0.0) for j in outputs]


def perforated_product(x, w, b, kept, alpha, c):
    """The same loop, in which only the iterations ``kept`` run."""
    found = []
    for j in range(len(w[0])):
        y = 0.0
        for i in range(len(w)):
            if i not in kept:
                continue
            y += x[i] * w[i][j]
        found.append(alpha[j] * y + c[j] + (b[j] if b else 0.0))
    return found


def kept_inputs(pattern, size, skipped, scores=None):
    count = size - skipped
    if pattern == "truncate":
        return list(range(count))
    if pattern == "stride":
        return [math.floor(n * size / count) for n in range(count)]
    order = sorted(range(size), key=lambda i: (-scores[i], i))  # norm
    return sorted(order[:count])


def mean(numbers):
    return sum(numbers) / len(numbers)


def scores(rows, w, fill):
    """rms(x_i - fill_i) |W_i| of each input i, from calibration inputs."""
    found = []
    for i, weights in enumerate(w):
        seen = [x[i] for x in rows]
        instead = mean(seen) if fill == "mean" else 0.0
        rms = math.sqrt(mean([(value - instead) ** 2 for value in seen]))
        found.append(rms * math.sqrt(sum(weight * weight for weight in weights)))
    return found


def fills(rows, w, kept, fill):
    """alpha_j and c_j of each output j, from calibration inputs."""
    outputs, inputs = range(len(w[0])), range(len(w))
    alpha, c = [1.0 for _ in outputs], [0.0 for _ in outputs]
    for j in outputs:
        if fill == "rate":
            alpha[j] = len(w) / len(kept)
        if fill == "mean":
            for i in inputs:
                if i not in kept:
                    c[j] += mean([x[i] for x in rows]) * w[i][j]
        if fill == "scale":
            y = [product(x, w)[j] for x in rows]
            p = [sum(x[i] * w[i][j] for i in kept) for x in rows]
            alpha[j] = sum(a * b for a, b in zip(y, p)) / sum(a * a for a in p)
    return alpha, c


def combine(alone, sizes, rate, tried):
    """The greedy search: (rates, errors as if they added up)."""
    rates, budget = [0.0 for _ in sizes], rate * sum(sizes)
    while True:
        best = None
        for m, size in enumerate(sizes):
            skipped = sum(r * s for r, s in zip(rates, sizes))
            error = 0.0 if rates[m] == 0 else alone[m][tried.index(rates[m])]
            for n, new in enumerate(tried):
                saved = (new - rates[m]) * size
                if saved <= 0 or skipped + saved > budget + 1e-9:
                    continue
                price = (alone[m][n] - error) / saved
                if best is None or price < best[0]:
                    best = (price, m, new)
        if best is None:
            return rates
        rates[best[1]] = best[2]


def divergence(dense, changed):
    """KL(softmax(dense) || softmax(changed)) of two rows of logits."""
    p, q = ([math.exp(z) for z in row] for row in (dense, changed))
    p, q = [a / sum(p) for a in p], [a / sum(q) for a in q]
    return sum(a * math.log(a / b) for a, b in zip(p, q))
