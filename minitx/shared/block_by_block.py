"""Changing a model one block after another, each by what it reads once those before are changed.

What is left out of a block changes what the next ones read. So the calibration texts go through the
changed blocks, and every block is judged by the inputs that it will really get.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minitx.model import Linear, Stack, Transformer
from minitx.state import Layer
from minitx.technique import need
from minitx.tree import Part


def block_by_block(lm: Part, texts: list[list[int]], make: Callable, change: Callable) -> Part:
    """``lm`` with ``change(block, found)`` in the place of every block of its model.

    found: what each ``Linear`` of that block reads in the texts, behind the blocks that are changed
    already: by its ``id``, what ``make()`` gave, whose ``add(rows)`` got the inputs (n, in) of each
    text. Empty without texts.
    """
    from minitx.training.calibration import watched

    model = lm.model
    need(model, Transformer)
    need(model.stack, Stack)
    streams = [model.embed(np.asarray(ids), slice(0, len(ids))) for ids in texts]
    blocks = []
    for block in model.stack.blocks:
        found: dict[int, object] = {}
        if streams:
            witness, found = watched(block, Linear, make)
            run(witness, streams)
        blocks.append(change(block, found))
        streams = run(blocks[-1], streams)
    return replace(lm, model=replace(model, stack=replace(model.stack, blocks=tuple(blocks))))


def run(block: Part, streams: list) -> list:
    """Each of the streams (T, D), from the first token on, after that block."""
    with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
        return [block(x, Layer.once(len(x))) for x in streams]
