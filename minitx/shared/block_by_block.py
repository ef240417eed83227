"""Change a model one block at a time, judging each block by the inputs that it really gets.

The calibration texts run through one block after the other, and each block is changed as soon as
its inputs are known. So only what one block's matrices read is in memory, not that of all blocks.

Pruning a block changes the inputs of all later blocks. With ``after_changes``, the texts run
through the earlier blocks as they were changed, and what comes out is what the next block is judged
by.
"""

from collections.abc import Callable, Container
from dataclasses import replace

import numpy as np

from minitx.model import Linear, Stack, Transformer
from minitx.progress import bar
from minitx.shared.observed_inputs import watched
from minitx.state import Layer, Memory
from minitx.technique import need
from minitx.tree import Part


def block_by_block(
    lm: Part,
    texts: list[list[int]],
    make: Callable,
    change: Callable,
    *,
    label: str,
    wanted: Container[int] | None = None,
    after_changes: bool = True,
) -> Part:
    """A copy of ``lm`` with ``change(block, seen)`` instead of each block.

    seen: what each ``Linear`` of the block gets as inputs when the texts run through the earlier
    blocks (the changed ones, or with after_changes=False the original ones). It maps the ``id`` of
    the Linear to an object from ``make()``, whose ``add(rows)`` was called with the inputs (n, in)
    of each text. Empty if there are no texts. wanted: ids of the Linears to watch; None: all.
    label: of the progress bar.
    """
    model = lm.model
    need(model, Transformer)
    need(model.stack, Stack)
    streams = [Stream(model.embed, ids) for ids in texts]
    blocks = []
    for index, block in enumerate(bar(model.stack.blocks, label, unit="block", delay=1.0)):
        seen: dict[int, object] = {}
        outputs = []
        if streams:
            recorder, seen = watched(block, Linear, make, wanted)
            outputs = [stream.through(recorder, index) for stream in streams]
        blocks.append(change(block, seen))
        if after_changes and blocks[-1] is not block:
            outputs = [stream.through(blocks[-1], index) for stream in streams]
        for stream, x in zip(streams, outputs):
            stream.x = x
    return replace(lm, model=replace(model, stack=replace(model.stack, blocks=tuple(blocks))))


class Stream:
    """The residual stream x (T, D) of a whole text, on its way through the blocks."""

    def __init__(self, embed: Part, ids: list[int]):
        self.x = embed(np.asarray(ids), slice(0, len(ids)))
        self.shared = Memory()  # what techniques remember of this text across blocks

    def through(self, block: Part, index: int):
        """What the block makes of it, (T, D)."""
        T = len(self.x)
        layer = Layer(T, None, False, self.shared, index).take(T)
        with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
            return block(self.x, layer)
