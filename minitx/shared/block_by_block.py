"""Change a model one block at a time, judging each block by the inputs that it really gets.

Pruning a block changes the inputs of all later blocks. So the calibration texts run through the
earlier blocks after these were changed, and what comes out is what the next block is judged by.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minitx.model import Linear, Stack, Transformer
from minitx.state import Layer
from minitx.technique import need
from minitx.tree import Part


def block_by_block(lm: Part, texts: list[list[int]], make: Callable, change: Callable) -> Part:
    """A copy of ``lm`` with ``change(block, seen)`` instead of each block.

    seen: what each ``Linear`` of the block gets as inputs when the texts run through the changed
    earlier blocks. It maps the ``id`` of the Linear to an object from ``make()``, whose
    ``add(rows)`` was called with the inputs (n, in) of each text. Empty if there are no texts.
    """
    from minitx.training.calibration import watched

    model = lm.model
    need(model, Transformer)
    need(model.stack, Stack)
    streams = [model.embed(np.asarray(ids), slice(0, len(ids))) for ids in texts]  # (T, D) each
    blocks = []
    for block in model.stack.blocks:
        seen: dict[int, object] = {}
        if streams:
            recorder, seen = watched(block, Linear, make)  # the block, recording inputs in seen
            run(recorder, streams)  # its output is not used
        blocks.append(change(block, seen))
        streams = run(blocks[-1], streams)
    return replace(lm, model=replace(model, stack=replace(model.stack, blocks=tuple(blocks))))


def run(block: Part, streams: list) -> list:
    """The residual streams (T, D) of whole texts after this block."""
    with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
        return [block(x, Layer.once(len(x))) for x in streams]
