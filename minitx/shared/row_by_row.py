"""Run the rows of a batch one after another, for stacks that do different work for each sequence.

A stack that skips tokens or layers by looking at one sequence cannot run a batch as one array:
every row would need another part of it. ``lm.generate`` decodes the prompts of a batch one by one
where a part says ``one_sequence``; a batch without a KV cache (``lm.logits`` of several texts, a
training step) comes here.
"""

from collections.abc import Callable

import numpy as np

from minitx.errors import MinitxError
from minitx.state import Layer, State
from minitx.tree import Part


def row_by_row(stack: Part, x, state: State, because: str):
    """``stack(row, ...)`` for each row of the batch x (..., T, D), as for a sequence alone: without
    its padding and with a state of its own. Returns (..., T, D'), zeros where padding was.

    because: how the message begins for a batch that has a KV cache, which cannot be divided:
    "NAME keeps different tokens for each sequence"."""

    def run(row, start: int):
        alone = State(len(state.layers), state.capacity, remember=False)
        alone.prompt = None if state.prompt is None else state.prompt - start
        alone.take(len(row))
        return stack(row, alone)

    return each_row(run, x, state.layers[0], because)


def each_sequence(run: Callable, x, layer: Layer, because: str):
    """``run(row, layer)`` for each row of the batch x (..., T, D), with a layer of its own."""
    return each_row(lambda row, _: run(row, Layer.once(len(row))), x, layer, because)


def each_row(run: Callable, x, layer: Layer, because: str):
    """``run(row, start)`` for each row of the batch x (..., T, D) without its ``start`` tokens of
    padding, put together again. layer: any of the batch's."""
    if layer.remember:
        raise MinitxError(
            f"{because} and got a batch of shape {x.shape[:-1]} with a KV cache; give one "
            "sequence, or use lm.generate, which decodes the prompts of a batch one by one."
        )
    *lead, T, width = x.shape
    rows = x.reshape(-1, T, width)
    starts = [0] * len(rows) if layer.start is None else layer.start.tolist()
    found = []
    for row, start in zip(rows, starts, strict=True):
        y = run(row[start:], start)
        found.append(np.pad(y, ((start, 0), (0, 0))))  # (T, D'): padding gives zeros
    return np.reshape(found, (*lead, T, -1))
