"""Norm skipping, literally: one token and one number at a time, in plain loops, nothing folded.

Only the dense model's embedding, matrices, attention and activations are taken from minitx.
"""

import math
from dataclasses import replace

import numpy as np


def centered(x, norm):
    """The token x, minus its mean if the norm is a LayerNorm."""
    mean = sum(x) / len(x) if hasattr(norm, "bias") else 0.0
    return [value - mean for value in x]


def rms(x, norm) -> float:
    x = centered(x, norm)
    return math.sqrt(sum(value * value for value in x) / len(x) + norm.eps)


class Fixed:
    """A norm whose 1/rms is a constant, as a function of x (T, D)."""

    def __init__(self, norm, constant):
        self.norm, self.constant = norm, constant

    def __call__(self, x):
        norm, rows = self.norm, []
        for token in x.tolist():
            row = [v * self.constant * g for v, g in zip(centered(token, norm), norm.gain)]
            bias = getattr(norm, "bias", None)
            rows.append(row if bias is None else [v + b for v, b in zip(row, bias)])
        return np.array(rows)


class Recorded:
    """A norm that notes the rms of its inputs."""

    def __init__(self, norm):
        self.norm, self.seen = norm, []

    def __call__(self, x):
        self.seen += [rms(token, self.norm) for token in x.tolist()]
        return self.norm(x)


def run(model, ids, norms: dict):
    """Logits (T, V) with other norms in some places: {("attn", 0): a function, ...}."""
    T, state = len(ids), model.new_state()
    x = model.embed(np.array(ids), slice(0, T))
    for index, block in enumerate(model.stack.blocks):
        layer = state.layers[index].take(T)
        attn = replace(block.attn, norm=norms.get(("attn", index), block.attn.norm))
        ffn = replace(block.ffn, norm=norms.get(("ffn", index), block.ffn.norm))
        y = attn(x, layer)
        if type(block).__name__ == "ParallelBlock":
            x = x + y + ffn(x, layer)
        else:
            x = x + y
            x = x + ffn(x, layer)
    return model.head(norms.get(("final", 0), model.norm)(x))


def norm_of(model, place):
    slot, index = place
    return model.norm if slot == "final" else getattr(model.stack.blocks[index], slot).norm


def places(model) -> list:
    blocks = range(len(model.stack.blocks))
    return [(slot, i) for i in blocks for slot in ("attn", "ffn")] + [("final", 0)]


def constant(model, place, skipped: dict, texts) -> float:
    """1 / the mean rms at this place, with the norms that are skipped already."""
    watch = Recorded(norm_of(model, place))
    for ids in texts:
        run(model, ids, skipped | {place: watch})
    return 1 / (sum(watch.seen) / len(watch.seen))


def loss(model, skipped: dict, texts) -> float:
    total, tokens = 0.0, 0
    for ids in texts:
        for row, target in zip(run(model, ids[:-1], skipped).tolist(), ids[1:]):
            top = max(row)
            total += math.log(sum(math.exp(z - top) for z in row)) + top - row[target]
            tokens += 1
    return total / tokens


def greedy(model, count: int, texts) -> dict:
    """The norms to skip, each with its function, in the order in which they are selected."""
    skipped: dict = {}
    for _ in range(count):
        best = None
        for place in places(model):
            if place not in skipped:
                c = constant(model, place, skipped, texts)
                tried = skipped | {place: Fixed(norm_of(model, place), c)}
                found = loss(model, tried, texts)
                if best is None or found < best[0]:
                    best = found, tried
        skipped = best[1]
    return skipped
