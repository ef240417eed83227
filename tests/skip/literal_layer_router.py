"""A router that skips layers per sequence, literally: one layer, one text, one number at a time.

Only the dense model's blocks, norm and head are taken from minitx.
"""

import math

import numpy as np


def run(model, ids, skipped=()):
    """Logits (T, V) and the input of each layer, in one pass without the layers ``skipped``."""
    state, inputs = model.new_state(), []
    x = model.embed(np.array(ids), slice(0, len(ids)))
    for index, block in enumerate(model.stack.blocks):
        inputs.append(x)
        if index not in skipped:
            x = block(x, state.layers[index].take(len(ids)))
    return model.head(model.norm(x)), inputs


def mean(rows) -> list[float]:
    return [sum(float(row[i]) for row in rows) / len(rows) for i in range(len(rows[0]))]


def gate(w, b, s) -> float:
    return 1 / (1 + math.exp(-(sum(float(p) * q for p, q in zip(w, s)) + float(b))))


def route(model, prompt, gates, threshold):
    """The layers that a sequence with this prompt skips. gates: layer -> (w, b)."""
    skipped = []
    for index in range(len(model.stack.blocks)):
        if index in gates:
            x = run(model, prompt, skipped)[1][index]
            if gate(*gates[index], mean(x)) < threshold:
                skipped.append(index)
    return skipped


def divergence(model, ids, layer, n) -> float:
    """Mean KL divergence, over the tokens after the first n, of the model without a layer."""
    total = 0.0
    dense, other = run(model, ids)[0][n - 1 :], run(model, ids, [layer])[0][n - 1 :]
    for z, u in zip(dense, other):
        a, b = math.log(sum(map(math.exp, z))), math.log(sum(map(math.exp, u)))
        total += sum(math.exp(p - a) * ((p - a) - (q - b)) for p, q in zip(z, u))
    return total / len(dense)


def logistic_loss(w, b, examples, labels, ridge) -> float:
    """What a trained gate minimizes, on standardized examples: with Platt's targets."""
    n1 = sum(labels)
    n0 = len(labels) - n1
    columns = list(zip(*examples))
    means = [sum(c) / len(c) for c in columns]
    spreads = [math.sqrt(sum((v - m) ** 2 for v in c) / len(c)) for c, m in zip(columns, means)]
    total = 0.0
    for s, label in zip(examples, labels):
        target = (n1 + 1) / (n1 + 2) if label else 1 / (n0 + 2)
        p = gate(w, b, s)
        total -= target * math.log(p) + (1 - target) * math.log(1 - p)
    return total + ridge / 2 * sum((float(v) * spread) ** 2 for v, spread in zip(w, spreads))
