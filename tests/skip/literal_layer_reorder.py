"""Layers in another order, literally: one layer after another, a list of groups of layer numbers.

Only the dense model's blocks, norm and head are taken from minitx.
"""

import numpy as np


def run(model, ids, groups, mean=False):
    """Logits (T, V). groups: lists of layers that read the same x; their updates are added."""
    state = model.new_state()
    x = model.embed(np.array(ids), slice(0, len(ids)))
    for group in groups:
        updates = []
        for index in group:
            layer = state.layers[index].take(len(ids))
            updates.append(model.stack.blocks[index](x, layer) - x)
        total = updates[0]
        for update in updates[1:]:
            total = total + update
        x = x + (total / len(group) if mean else total)
    return model.head(model.norm(x))


def groups_of(order, L, first, last, group=2):
    """The groups of layers 0 .. L - 1 for an order that needs no random numbers."""
    before, middle, after = [], [], []
    for index in range(L):
        if index < first:
            before.append([index])
        elif index >= L - last:
            after.append([index])
        else:
            middle.append(index)
    groups = []
    if order == "reverse":
        while middle:
            groups.append([middle.pop()])
    elif order == "swap":
        while len(middle) >= 2:
            a, b, *middle = middle
            groups += [[b], [a]]
        groups += [[index] for index in middle]
    else:
        while middle:
            groups.append(middle[:group])
            middle = middle[group:]
    return before + groups + after
