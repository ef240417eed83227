"""Run some of a sequence's tokens through a group of layers, for stacks that prune tokens.

A token keeps the position that it has in the text, for RoPE and for the causal mask, whatever else
is left out around it.
"""

import math
from collections.abc import Sequence

import numpy as np

from minitx.state import Layer, Tokens
from minitx.tree import Part


def rounded_up(share: float, n: int) -> int:
    """This share of n tokens: ceil(share * n), safe from floating-point error."""
    return math.ceil(share * n - 1e-9)


def last_and_best(scores, count: int):
    """The indices of the last token and of those with the best of the scores (n,), ``count`` in
    all, in ascending order. Ties go to the lower index."""
    best = np.argsort(-scores[:-1], kind="stable")[: count - 1]
    return np.sort(np.append(best, len(scores) - 1))


def consecutive(positions) -> Tokens:
    """Tokens at these ascending positions (T,), as a slice if they have no gap."""
    first, last = positions[0], positions[-1]
    return Tokens(slice(first, last + 1) if last - first + 1 == len(positions) else positions)


def run_subset(blocks: Sequence[Part], layers: Sequence[Layer], x, tokens: Tokens, seen):
    """Run the blocks on these tokens x (T, D), which attend to no others than those at the
    positions ``seen`` (ascending; the tokens of x are among them)."""
    for block, layer in zip(blocks, layers, strict=True):
        layer.tokens, layer.visible = tokens, rows_of(seen, tokens, layer)
        x = block(x, layer)
        layer.visible = None
    return x  # (T, D)


def rows_of(seen, tokens: Tokens, layer: Layer):
    """The cache rows of the tokens at the positions ``seen``, in that order, once those of the
    current tokens are stored. None: all rows, which are in that order."""
    held = np.arange(layer.count) if layer.row_positions is None else layer.row_positions
    held = np.concatenate([held, tokens.array])  # the position of each row
    row = np.full(max(held[-1], seen[-1]) + 1, -1)  # a layer without attention stores no rows
    row[held] = np.arange(len(held))
    rows = row[seen]
    rows = rows[rows >= 0]
    return None if np.array_equal(rows, np.arange(len(held))) else rows
