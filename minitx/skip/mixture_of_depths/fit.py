"""router=fitted: routers by least squares, for a model that was not trained with them.

For each routed block, over the tokens of the calibration texts in the dense model:

    s_i = |f(X)_i| / |x_i|           how much the block changes token i (f: without the residual)
    y_i = +1 for the share ``capacity`` of the tokens with the largest s, -1 for the others
    w   = argmin sum_i (w . x_i - y_i)^2 + ridge |w|^2

It is also where training starts from (a recipe with ``start`` and this technique): with capacity 1
every token has y = 1, so that all tokens enter with a weight r near 1, as in the dense model.
"""

import math

import numpy as np

from minitx.model import Stack
from minitx.progress import bar
from minitx.shared.block_by_block import Stream
from minitx.technique import need

RIDGE = 1e-6  # of the mean diagonal: equal columns would make the equations singular


def fit_routers(lm, texts, blocks, capacity: float) -> dict[int, tuple[np.ndarray, float]]:
    """The router of each of these blocks: a vector (D,) and its scale, w = scale * vector."""
    need(lm.model.stack, Stack)
    streams = [Stream(lm.model.embed, ids) for ids in texts]
    found = {}
    shown = bar(lm.model.stack.blocks, "mixture of depths: fit routers", unit="block", delay=1.0)
    for index, block in enumerate(shown):
        before = [stream.x for stream in streams]
        for stream in streams:
            stream.x = stream.through(block, index)
        if index in blocks:
            x, y = (np.concatenate(rows) for rows in (before, [stream.x for stream in streams]))
            scale = float(1 / np.sqrt(np.mean(x * x, dtype=np.float64)))
            found[index] = fit_router(x * scale, y - x, capacity).astype(x.dtype), scale
    return found


def fit_router(x, f, capacity: float) -> np.ndarray:
    """w (D,) for a block that adds f (tokens, D) to x (tokens, D), or to a multiple of it."""
    x, f = x.astype(np.float64), f.astype(np.float64)
    labels = np.where(changed_most(x, f, capacity), 1.0, -1.0)
    squares = x.T @ x
    squares[np.diag_indices_from(squares)] += RIDGE * np.trace(squares) / len(squares)
    return np.linalg.solve(squares, x.T @ labels)


def changed_most(x, f, capacity: float) -> np.ndarray:
    """(tokens,) booleans: is it among the ceil(capacity * tokens) that f changes most? Ties go to
    the lower index."""
    change = np.linalg.norm(f, axis=-1) / np.linalg.norm(x, axis=-1)
    chosen = np.zeros(len(x), bool)
    chosen[np.argsort(-change, kind="stable")[: math.ceil(capacity * len(x))]] = True
    return chosen
