"""AdamW and Muon, gradient clipping and learning rate schedules, on one flat vector of parameters.

All weights of a model are contiguous in that vector (``ParameterLayout``), and the arrays in the
model's tree are views of it: updates are in place, and any block can be updated by any process.
"""

import math

import numpy as np

from minitx import build
from minitx.config import Config
from minitx.model import Transformer
from minitx.tree import map_weights, weights


class ParameterLayout:
    """The slice of each weight in the flat vector: first the model's weights, then ``extra`` ones
    that are trained with it, such as detectors (shapes by path).

    tree: a model that is trained further, with techniques or without; its arrays of integers are
    not trained. None: the plain model of ``config``."""

    def __init__(
        self, config: Config, extra: dict[str, tuple] | None = None, tree: Transformer | None = None
    ):
        self.config, self.tree = config, tree
        self.extra = list(extra or {})
        self.slots: dict[str, tuple[slice, tuple]] = {}
        shapes = build.shapes(config) if tree is None else shapes_of(tree)
        self.model_size = self._append(shapes, 0)
        self.size = self._append(extra or {}, self.model_size)

    def _append(self, shapes: dict[str, tuple], end: int) -> int:
        for path, shape in shapes.items():
            self.slots[path] = slice(end, end + math.prod(shape)), shape
            end = self.slots[path][0].stop
        return end

    def view(self, flat: np.ndarray, path: str) -> np.ndarray:
        """The weight at this path, as a view of ``flat``."""
        where, shape = self.slots[path]
        return flat[where].reshape(shape)

    def model(self, flat: np.ndarray) -> Transformer:
        """The model whose weights are views of ``flat`` (size,): changing one changes the other."""
        if self.tree is None:
            return build.build(self.config, lambda path, shape: self.view(flat, path))
        paths = {id(array): path for path, array in weights(self.tree).items()}

        def view_of(array):
            return self.view(flat, paths[id(array)]) if is_trained(array) else array

        return map_weights(self.tree, view_of)

    def flatten(self, arrays: dict[str, np.ndarray], out: np.ndarray) -> None:
        """Copy arrays {path: array} into ``out`` (size,); missing paths become zeros."""
        for path, (where, _) in self.slots.items():
            out[where] = arrays[path].ravel() if path in arrays else 0

    def blocks(self, count: int) -> list[list[str]]:
        """The model's paths in order, split into ``count`` blocks of about the same size."""
        found: list[list[str]] = [[] for _ in range(count)]
        for path, (where, _) in self.slots.items():
            middle = (where.start + where.stop) / 2
            if path not in self.extra:
                found[int(count * middle / self.model_size)].append(path)
        return found

    def slice_of(self, paths: list[str]) -> slice:
        """The slice of adjacent paths together."""
        if not paths:
            return slice(0, 0)
        return slice(self.slots[paths[0]][0].start, self.slots[paths[-1]][0].stop)


def shapes_of(tree: Transformer) -> dict[str, tuple]:
    """The path and shape of every weight below ``tree`` that is trained."""
    return {path: array.shape for path, array in weights(tree).items() if is_trained(array)}


def is_trained(array) -> bool:
    return array.dtype.kind == "f"


def has_weight_decay(path: str) -> bool:
    """Weight decay applies to weight matrices, not to embeddings, biases, gains."""
    return path.endswith(".w") and not path.startswith("embed")


def is_block_matrix(path: str) -> bool:
    """Is it a weight matrix inside a block? Muon trains these; AdamW trains embeddings and the
    head."""
    return path.startswith("stack.") and has_weight_decay(path)


def learning_rate(step: int, steps: int, lr: float, warmup: int, schedule: str, final: float):
    """The learning rate at ``step`` (0 .. steps - 1): linear warmup to ``lr`` over ``warmup``
    steps, then ``constant``, or cosine decay to ``final * lr`` (Loshchilov and Hutter, 2017)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(steps - 1 - warmup, 1)
    return lr * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


def clip_factor(norm: float, limit: float) -> float:
    """The factor that scales gradients of this global norm down to at most ``limit`` (0: no
    limit)."""
    return limit / norm if limit and norm > limit else 1.0


EPSILON = 1e-8  # in the denominator of AdamW


def adamw(w, g, m, v, step: int, lr: float, betas, decay) -> None:
    """One step of AdamW (Loshchilov and Hutter, 2019), in place on w, m and v; g is overwritten.

    w, g, m, v (n,): weights, gradients, and the moving averages of g and g^2. step: starts at 1.
    decay: weight decay, a number or (n,); it is multiplied by lr.
    """
    b1, b2 = betas
    m *= b1
    m += (1 - b1) * g
    np.square(g, out=g)
    g *= 1 - b2
    v *= b2
    v += g
    w *= 1 - lr * decay
    # m and v start at zero: divide by 1 - b^step to correct the bias.
    np.divide(v, 1 - b2**step, out=g)
    np.sqrt(g, out=g)
    g += EPSILON
    np.divide(m, g, out=g)
    g *= lr / (1 - b1**step)
    w -= g


def muon(w, g, m, lr: float, beta: float, decay: float) -> None:
    """One step of Muon (Jordan et al., 2024) for a matrix, in place on w and m.

    w, g, m (in, out): weights, gradient, and momentum. The update is the orthogonalized momentum
    (Nesterov): all its singular values are about 1, so it also moves along directions that are rare
    in the gradients. The factor 0.2 sqrt(max(in, out)) gives it the RMS of an AdamW update, so that
    learning rates are comparable (Liu et al., 2025, arXiv:2502.16982).
    """
    w *= 1 - lr * decay
    m *= beta
    m += g
    if m.any():  # all zero in blocks that no stage has trained yet
        w -= (0.2 * max(w.shape) ** 0.5 * lr) * orthogonalize(g + beta * m)


# Coefficients of the Newton-Schulz iteration (Jordan et al.): five steps of a x + b x^3 + c x^5
# bring every singular value in [0.01, 1] close to 1. They are tuned for fast growth near 0 and do
# not converge to exactly 1.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315


def orthogonalize(g: np.ndarray) -> np.ndarray:
    """About U V^T for g = U S V^T (in, out): g with all singular values set to about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = g.shape[0] > g.shape[1]
    x = (g.T if tall else g) / (np.linalg.norm(g) + 1e-7)  # so that x @ x.T is the smaller product
    for _ in range(5):
        square = x @ x.T
        x = a * x + (b * square + c * (square @ square)) @ x
    return x.T if tall else x
