"""AdamW, gradient clipping and the learning rate over time, on flat vectors of numbers.

All weights of a model lie one after another in one vector (``Layout``), of which the tree holds
views: so an update is a few long in-place operations, and any slice of the vector can be updated by
another process.
"""

import math

import numpy as np

from minitx import build
from minitx.config import Config
from minitx.model import Transformer


class Layout:
    """Where each weight of a model lies in the flat vector."""

    def __init__(self, config: Config):
        self.config = config
        self.slots: dict[str, tuple[slice, tuple]] = {}
        end = 0
        for path, shape in build.shapes(config).items():
            self.slots[path] = slice(end, end + math.prod(shape)), shape
            end = self.slots[path][0].stop
        self.size = end

    def model(self, flat: np.ndarray) -> Transformer:
        """The model whose weights are views of ``flat`` (size,): what changes there changes it."""

        def view(path, shape):
            return flat[self.slots[path][0]].reshape(shape)

        return build.build(self.config, view)

    def pack(self, arrays: dict[str, np.ndarray], out: np.ndarray) -> None:
        """Copy arrays by path into ``out`` (size,); a path that is missing leaves zeros."""
        for path, (where, _) in self.slots.items():
            out[where] = arrays[path].ravel() if path in arrays else 0

    def decays(self) -> np.ndarray:
        """(size,) 1 where weight decay applies and 0 where not: gains, biases and embeddings."""
        mask = np.zeros(self.size, np.float32)
        for path, (where, _) in self.slots.items():
            mask[where] = decays(path)
        return mask


def decays(path: str) -> bool:
    """Does weight decay apply? Only to matrices that multiply the stream."""
    return path.endswith(".w") and not path.startswith("embed")


def learning_rate(step: int, steps: int, lr: float, warmup: int, schedule: str, final: float):
    """The rate at ``step`` (0 .. steps - 1): rising evenly to ``lr`` over ``warmup`` steps, then
    ``constant``, or falling to ``final * lr`` along half a cosine (Loshchilov and Hutter, 2017)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(steps - 1 - warmup, 1)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def clip_factor(norm: float, limit: float) -> float:
    """What to multiply all gradients by so that their joint norm is at most ``limit`` (0: any)."""
    return limit / norm if limit and norm > limit else 1.0


EPSILON = 1e-8  # keeps the division of AdamW finite


def adamw(w, g, m, v, step: int, lr: float, betas, decay) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), in place on w, m and v; g is used up.

    w, g, m, v (n,): weights, gradients, and the running means of g and g^2. step: 1 for the first.
    decay: a number or (n,), the part of w that is taken off, times lr.
    """
    b1, b2 = betas
    m *= b1
    m += (1 - b1) * g
    np.square(g, out=g)
    g *= 1 - b2
    v *= b2
    v += g
    w *= 1 - lr * decay
    # The means start at zero; the two corrections 1 - b^step undo what that takes off them.
    np.divide(v, 1 - b2**step, out=g)
    np.sqrt(g, out=g)
    g += EPSILON
    np.divide(m, g, out=g)
    g *= lr / (1 - b1**step)
    w -= g
