"""Layer fusion, literally: which set of weights each layer has, and one weight at a time.

Only the dense model's blocks, norms, embedding and head are taken from minitx.
"""

import numpy as np

from minitx.tree import map_weights, weights


def sequence(n, group):
    """0, 0, 1, 1, ...: each set serves ``group`` layers one after another."""
    found, number, used = [], 0, 0
    for _ in range(n):
        if used == group:
            number, used = number + 1, 0
        found.append(number)
        used += 1
    return found


def cycle(n, group):
    """0, 1, 2, 0, 1, 2, ...: as many sets, one after another, and again."""
    sets = len(set(sequence(n, group)))
    found, number = [], 0
    for _ in range(n):
        found.append(number)
        number = 0 if number == sets - 1 else number + 1
    return found


def weights_of(blocks, which):
    """Path -> array: those of the first block, of the last, or the mean of all."""
    each = [weights(block) for block in blocks]
    if which == "first":
        return each[0]
    if which == "last":
        return each[-1]
    return {path: sum(one[path] for one in each) / len(each) for path in each[0]}


def with_weights(block, arrays):
    """A copy of the block with these arrays, in the order of their paths."""
    found = iter(arrays.values())
    return map_weights(block, lambda old: next(found))


def run(model, ids, first, sets, which):
    """Logits (T, V): layers first, first + 1, ... have the sets of weights that ``sets`` tells."""
    dense = list(model.stack.blocks)
    blocks = list(dense)
    for i, number in enumerate(sets):
        those = [dense[first + j] for j, other in enumerate(sets) if other == number]
        blocks[first + i] = with_weights(dense[first + i], weights_of(those, which))
    return run_blocks(model, ids, blocks)


def run_blocks(model, ids, blocks):
    state = model.new_state()
    x = model.embed(np.array(ids), slice(0, len(ids)))
    for index, block in enumerate(blocks):
        layer = state.layers[index].take(len(ids))
        x = block(x, layer)
    return model.head(model.norm(x))
