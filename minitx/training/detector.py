"""Training a detector together with its model: DOTA's joint loss (Qu et al., 2022).

    L = L_model + weight * mean (S - S~)^2,   S = q k^T / sqrt(d),   S~ = Q~ K~^T

The mean is over blocks, query heads, and pairs of a query and a key that it sees. S is what the
softmax reads: rotated, and divided by sqrt(d), which the paper's Q K^T is not (its weight would be
d times smaller than ours for the same loss; its value is not known). Both sides learn: the detector
to foretell the scores, and the model to have scores that can be foretold. What detectors are, and
their file: ``minitx.skip.dota.detector``.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minitx import fast
from minitx.config import Config
from minitx.model import Attention, Transformer
from minitx.ops import op
from minitx.skip.dota.detector import (
    FILE,
    Detector,
    narrow_rope,
    random_detectors,
    shapes,
    write_detectors,
)
from minitx.state import Tokens
from minitx.technique import need, wrap
from minitx.training.data import mix
from minitx.training.grad import gradients
from minitx.training.optimizer import Layout
from minitx.training.recipe import Recipe
from minitx.training.traced import Traced, rule
from minitx.tree import Part, part, weights


@part
class Joint(Part):
    """A model and its detectors, so that gradients are taken of both."""

    model: Transformer | None
    detectors: tuple  # of ``Detector``, one a block


@part
class Noted(Part):
    """A part of which all that goes in, and what comes out last, is also put into a list."""

    inner: Part
    into: list

    def __call__(self, *given):
        result = self.inner(*given)
        self.into.append((*given, result))
        return result


class Watched:
    """What a block's projections read, and its queries and keys, in the last pass."""

    def __init__(self, attn: Attention):
        self.attn = attn
        self.norms: list = []
        self.scores: list = []

    def part(self) -> Part:
        attn, attend = self.attn, Noted(self.attn.attend, self.scores)
        return replace(attn, norm=Noted(attn.norm, self.norms), attend=attend)

    def last(self):
        """x (..., T, D), q (..., H, T, d), k (..., K, T, d), both rotated; and they are let go."""
        (_, x), (q, k, *_) = self.norms.pop(), self.scores.pop()
        self.norms.clear()
        self.scores.clear()
        return x, q, k


def watch(model: Transformer) -> tuple[Transformer, list[Watched]]:
    """A copy of the model that notes what detectors have to do with, and where, block by block."""
    found: list[Watched] = []

    def change(attn, index):
        need(attn, Attention)
        found.append(Watched(attn))
        return found[-1].part()

    return wrap(model, "attn", change), found


TRAINED = ("w_q", "w_k")
SEED = 4  # part of the seed, beside those of worker.py: what the random numbers are for


def trained_shapes(config: Config, k: int) -> dict[str, tuple]:
    """The path in ``Joint`` and the shape of all that is trained of the detectors."""
    found = shapes(config, k)
    return {f"detectors.{i}.{name}": found[name] for i in range(config.layers) for name in TRAINED}


def first_detectors(recipe: Recipe, config: Config) -> tuple[Detector, ...]:
    """The detectors that the recipe trains, as they are before; none if it trains none."""
    if recipe.rank is None:
        return ()
    return random_detectors(config, recipe.rank, mix(recipe.seed, SEED))


def first_weights(recipe: Recipe, config: Config) -> dict[str, np.ndarray]:
    """What is trained of them, by its path in ``Joint``."""
    return weights(Joint(None, first_detectors(recipe, config)))


def detectors_of(recipe: Recipe, layout: Layout, flat: np.ndarray) -> tuple[Detector, ...]:
    """The detectors that the recipe trains, as views of ``flat``; their P follow from its seed."""
    return tuple(
        replace(d, **{name: layout.view(flat, f"detectors.{i}.{name}") for name in TRAINED})
        for i, d in enumerate(first_detectors(recipe, layout.config))
    )


def write_trained(recipe: Recipe, layout: Layout, flat: np.ndarray, folder: Path) -> None:
    """Write the detectors' file, or if there are none take away that of another training."""
    if detectors := detectors_of(recipe, layout, flat):
        write_detectors(detectors, folder)
    else:
        (folder / FILE).unlink(missing_ok=True)


def joint_gradients(model, detectors, loss, weight: float, rows) -> tuple[dict, float, float]:
    """The gradients of ``joint_loss`` by path, those of the model as it has them and those of the
    detectors as in ``trained_shapes``; the loss without the errors, and the errors."""
    _, found, (value, error) = gradients(
        Joint(model, detectors), lambda joint: joint_loss(joint, loss, weight, rows)
    )
    found = {path.removeprefix("model."): gradient for path, gradient in found.items()}
    return found, float(value), float(error)


def joint_loss(joint: Joint, loss, weight: float, rows):
    """(loss + weight * W * error, (loss, W * error)) for ``loss(model)``, a sum over tokens that
    weigh W in all, and the error of the module's docstring.

    rows (B, T): what each token weighs in the loss; the queries of those that weigh nothing are
    left out. The caller divides by W, or by the W of several parts of a batch: their errors then
    weigh as their tokens do.
    """
    model, watched = watch(joint.model)
    value = loss(model)
    error = mean_error(watched, joint.detectors, rows > 0) * float(rows.sum(dtype=np.float64))
    return value + error * weight, (value, error)


def mean_error(watched: list[Watched], detectors, rows):
    """The mean of (S - S~)^2 in the last pass; rows (B, T) booleans say whose queries count."""
    total, pairs = 0, 0
    for block, detector in zip(watched, detectors):
        x, q, k = block.last()
        rope = narrow_rope(block.attn.rope, detector.k, q.shape[-1])
        a, b = detector(x, rope, Tokens(slice(0, q.shape[-2])))
        # S~ - S in one product: [Q~, -q/sqrt(d)] [K~, k]^T
        left = np.concatenate([a, q * -block.attn.attend.scale], -1)
        total = total + squares(left, np.concatenate([b, k], -1), rows)
        pairs += q.shape[1] * int(rows.sum(0) @ np.arange(1, rows.shape[1] + 1))
    return total * (1 / max(pairs, 1))


@op
def squares(a, b, rows):
    """sum of (a_i . b_j)^2 over heads and j <= i: a (B, H, T, n), b (B, K, T, n); of queries i
    where rows (B, T) is true."""
    return np.sum([(e * e).sum() for *_, e in products(a, b, rows)])


@rule(squares)
def _squares(a, b, rows):
    """With E the products that count: da = 2 g E b, db = 2 g E^T a. E is made again on the way
    back, so nothing of size T x T is kept."""

    def pull(g):
        B, H, T, n = a.shape
        K = b.shape[1]
        da, db = np.empty_like(a.value), np.zeros_like(b.value)
        for mine, seen, e in products(a.value, b.value, rows):
            e *= 2 * g
            e = e.reshape(B, K, -1, e.shape[-1])  # (B, K, G*t, s)
            part = a.value[..., mine, :]
            da[..., mine, :] = (e @ b.value[..., seen, :]).reshape(part.shape)
            db[..., seen, :] += e.swapaxes(-1, -2) @ part.reshape(B, K, -1, n)
        yield a, da
        yield b, db

    return Traced(squares(a.value, b.value, rows), pull)


def products(a, b, rows):
    """(queries, keys, E) in blocks: E (B, K, G, t, s) the products, 0 where they do not count."""
    B, H, T, n = a.shape
    K = b.shape[1]
    for first, last, end in fast.causal_blocks(T, T):
        mine, seen = slice(first, last), slice(0, end)
        e = a[..., mine, :].reshape(B, K, -1, n) @ b[..., seen, :].swapaxes(-1, -2)
        e = e.reshape(B, K, H // K, last - first, end)
        np.copyto(e[..., first:], 0, where=fast.block_mask(last - first))
        e *= rows[:, None, None, mine, None]
        yield mine, seen, e
