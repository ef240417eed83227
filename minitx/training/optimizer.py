"""AdamW and Muon, gradient clipping and the learning rate over time, on one flat vector of weights.

All weights of a model lie one after another in that vector (``Layout``), of which the tree holds
views: so an update works in place, and any block of the vector can be updated by another process.
"""

import math

import numpy as np

from minitx import build
from minitx.config import Config
from minitx.model import Transformer


class Layout:
    """Where each weight of a model lies in the flat vector, and behind them those of what is
    trained ``beside`` it (shapes by path)."""

    def __init__(self, config: Config, beside: dict[str, tuple] | None = None):
        self.config = config
        self.beside = list(beside or {})
        self.slots: dict[str, tuple[slice, tuple]] = {}
        self.model_size = self._append(build.shapes(config), 0)
        self.size = self._append(beside or {}, self.model_size)

    def _append(self, shapes: dict[str, tuple], end: int) -> int:
        for path, shape in shapes.items():
            self.slots[path] = slice(end, end + math.prod(shape)), shape
            end = self.slots[path][0].stop
        return end

    def view(self, flat: np.ndarray, path: str) -> np.ndarray:
        """The weight of that path, as a view of ``flat``."""
        where, shape = self.slots[path]
        return flat[where].reshape(shape)

    def model(self, flat: np.ndarray) -> Transformer:
        """The model whose weights are views of ``flat`` (size,): what changes there changes it."""
        return build.build(self.config, lambda path, shape: self.view(flat, path))

    def pack(self, arrays: dict[str, np.ndarray], out: np.ndarray) -> None:
        """Copy arrays by path into ``out`` (size,); a path that is missing leaves zeros."""
        for path, (where, _) in self.slots.items():
            out[where] = arrays[path].ravel() if path in arrays else 0

    def blocks(self, count: int) -> list[list[str]]:
        """The model's paths in order, cut into so many blocks of about the same size."""
        found: list[list[str]] = [[] for _ in range(count)]
        for path, (where, _) in self.slots.items():
            middle = (where.start + where.stop) / 2
            if path not in self.beside:
                found[int(count * middle / self.model_size)].append(path)
        return found

    def slice_of(self, paths: list[str]) -> slice:
        """Where neighbours lie together."""
        if not paths:
            return slice(0, 0)
        return slice(self.slots[paths[0]][0].start, self.slots[paths[-1]][0].stop)


def decays(path: str) -> bool:
    """Does weight decay apply? Only to matrices that multiply the stream."""
    return path.endswith(".w") and not path.startswith("embed")


def is_hidden(path: str) -> bool:
    """Is it a matrix inside a block? Muon is for these; embeddings and the head have AdamW."""
    return path.startswith("stack.") and decays(path)


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


def muon(w, g, m, lr: float, beta: float, decay: float) -> None:
    """One step of Muon (Jordan et al., 2024) for a matrix, in place on w and m.

    w, g, m (in, out): weights, gradient, and its running sum. The step is that sum, made
    orthogonal: it changes what the matrix does to every direction by the same amount, also to
    those that the gradient hardly ever shows. 0.2 sqrt(longer side) makes a step as long as one of
    AdamW, so that learning rates can be compared (Liu et al., 2025, arXiv:2502.16982).
    """
    w *= 1 - lr * decay
    m *= beta
    m += g
    if m.any():  # blocks that wait for their stage have nothing to learn from yet
        w -= (0.2 * max(w.shape) ** 0.5 * lr) * orthogonal(g + beta * m)


# Five rounds with this polynomial bring every singular value from [0.01, 1] near 1 (Jordan et al.):
# a x + b x^3 + c x^5 is chosen to rise fast from 0, and need not end at exactly 1.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def orthogonal(g: np.ndarray) -> np.ndarray:
    """Roughly U V^T, where g = U S V^T (in, out): g with its singular values set to about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (np.linalg.norm(g) + 1e-7)  # the products below are smaller so
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if tall else x
