"""LaCo's merge, literally: one weight at a time, W_l + sum over k of (W_l+k - W_l).

Only the dense model's blocks, norms, embedding and head are taken from minitx.
"""

import math

import numpy as np

from minitx.tree import map_weights, weights


def merged(blocks):
    """One block for all of these."""
    base, *others = [weights(block) for block in blocks]
    new = {}
    for path, w in base.items():
        total = w.copy()
        for other in others:
            total = total + (other[path] - w)
        new[path] = total
    found = iter(new.values())
    return map_weights(blocks[0], lambda old: next(found))


def hidden(model, ids, first, size):
    """The last hidden states (T, D) when layers first .. first + size - 1 are one."""
    blocks = list(model.stack.blocks)
    if size > 1:
        blocks = blocks[:first] + [merged(blocks[first : first + size])] + blocks[first + size :]
    state = model.new_state()
    x = model.embed(np.array(ids), slice(0, len(ids)))
    for index, block in enumerate(blocks):
        x = block(x, state.layers[index].take(len(ids)))
    return x


def logits(model, ids, first, size):
    return model.head(model.norm(hidden(model, ids, first, size)))


def similarity(model, texts, first, size):
    """The mean over all tokens of the cosine between the hidden states of the two models."""
    found = []
    for ids in texts:
        dense, changed = hidden(model, ids, 0, 1), hidden(model, ids, first, size)
        for a, b in zip(dense, changed):
            dot = sum(float(p) * float(q) for p, q in zip(a, b))
            lengths = math.sqrt(sum(float(p) ** 2 for p in a) * sum(float(q) ** 2 for q in b))
            found.append(dot / lengths)
    return sum(found) / len(found)


def best_first(model, texts, size):
    """Where merging keeps the hidden states most similar; ties go to the lower index."""
    places = range(len(model.stack.blocks) - size + 1)
    return max(places, key=lambda first: (similarity(model, texts, first, size), -first))
