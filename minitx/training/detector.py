"""DOTA's joint training: detectors learn together with their model (Qu et al., 2022).

    loss = L_model + weight * mean (s - s~)^2,    s = q . k / sqrt(d),    s~ = q~ . k~

The mean is over blocks, query heads, and pairs of a query and a key that it sees. Both sides learn:
the detectors to estimate the scores, and the model to have scores that can be estimated.

s is what the softmax reads: rotated and divided by sqrt(d). The paper's S = Q K^T is not divided,
so its weight would be d times smaller than ours for the same loss; its value is not known. What a
detector is: ``minitx.skip.dota.detector``; its file: ``minitx.skip.dota.file``.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from minitx import fast
from minitx.config import Config
from minitx.model import Transformer
from minitx.ops import op
from minitx.skip.dota.detector import (
    Detector,
    Recording,
    narrow_rope,
    projection,
    record_attention,
    shapes,
)
from minitx.skip.dota.file import FILE, write_detectors
from minitx.state import Tokens
from minitx.training.autograd import gradients
from minitx.training.autograd.array import Traced, rule
from minitx.training.data import hash_integers
from minitx.training.optimizer import ParameterLayout
from minitx.training.recipe import Recipe
from minitx.tree import Part, part, weights

# The loss ----------------------------------------------------------------------------------------


@part
class Joint(Part):
    """A model and its detectors in one tree, so that gradients are taken of both."""

    model: Transformer | None
    detectors: tuple  # of ``Detector``, one for each block


def joint_gradients(model, detectors, loss, weight: float, rows) -> tuple[dict, float, float]:
    """The gradients of ``joint_loss`` by path, those of the model as it has them and those of the
    detectors as in ``trained_shapes``; the model's loss; and the estimation error."""
    _, found, (value, error) = gradients(
        Joint(model, detectors), lambda joint: joint_loss(joint, loss, weight, rows)
    )
    found = {path.removeprefix("model."): gradient for path, gradient in found.items()}
    return found, float(value), float(error)


def joint_loss(joint: Joint, loss, weight: float, rows):
    """(loss + weight * W * error, (loss, W * error)) for ``loss(model)``, a sum over tokens whose
    weights add up to W, and the mean squared error of the module's docstring.

    rows (B, T): each token's weight in the loss; queries of weight 0 are left out of the error. The
    caller divides by W, or by the W of several parts of a batch: their errors then weigh as their
    tokens do.
    """
    model, recordings = record_attention(joint.model)
    value = loss(model)
    error = mean_error(recordings, joint.detectors, rows > 0) * float(rows.sum(dtype=np.float64))
    return value + error * weight, (value, error)


def mean_error(recordings: list[Recording], detectors, rows):
    """The mean of (s - s~)^2 in the last pass; rows (B, T) booleans say whose queries count."""
    total, pairs = 0, 0
    for block, detector in zip(recordings, detectors):
        x, q, k = block.last()
        rope = narrow_rope(block.attn.rope, detector.rank, q.shape[-1])
        low_q, low_k = detector(x, rope, Tokens(slice(0, q.shape[-2])))
        # s~ - s in one product: [q~, -q / sqrt(d)] . [k~, k]
        left = np.concatenate([low_q, q * -block.attn.attend.scale], -1)
        total = total + squared_products(left, np.concatenate([low_k, k], -1), rows)
        pairs += q.shape[1] * int(rows.sum(0) @ np.arange(1, rows.shape[1] + 1))
    return total * (1 / max(pairs, 1))


@op
def squared_products(a, b, rows):
    """The sum of (a_i . b_j)^2 over heads and j <= i, for a (B, H, T, n) and b (B, K, T, n), of the
    queries i where rows (B, T) is True."""
    return np.sum([(e * e).sum() for *_, e in products(a, b, rows)])


@rule(squared_products)
def _squared_products(a, b, rows):
    """With e_ij = a_i . b_j: da_i = 2 g sum_j e_ij b_j and db_j = 2 g sum_i e_ij a_i. e is computed
    again in the backward pass, so that nothing of size T x T is kept."""

    def backward(g):
        B, H, T, n = a.shape
        K = b.shape[1]
        da, db = np.empty_like(a.value), np.zeros_like(b.value)
        for queries, keys, e in products(a.value, b.value, rows):
            e *= 2 * g
            e = e.reshape(B, K, -1, e.shape[-1])  # (B, K, G*t, s)
            block = a.value[..., queries, :]
            da[..., queries, :] = (e @ b.value[..., keys, :]).reshape(block.shape)
            db[..., keys, :] += e.swapaxes(-1, -2) @ block.reshape(B, K, -1, n)
        yield a, da
        yield b, db

    return Traced(squared_products(a.value, b.value, rows), backward)


def products(a, b, rows):
    """(queries, keys, e) in causal blocks: slices, and the products e (B, K, G, t, s), 0 where they
    do not count."""
    B, H, T, n = a.shape
    K = b.shape[1]
    for first, last, end in fast.causal_blocks(T, T):
        queries, keys = slice(first, last), slice(0, end)
        e = a[..., queries, :].reshape(B, K, -1, n) @ b[..., keys, :].swapaxes(-1, -2)
        e = e.reshape(B, K, H // K, last - first, end)
        np.copyto(e[..., first:], 0, where=fast.block_mask(last - first))
        e *= rows[:, None, None, queries, None]
        yield queries, keys, e


# The detectors of a training run -----------------------------------------------------------------

TRAINED = ("w_q", "w_k")
SEED = 4  # part of the seed, beside those of worker.py: what the random numbers are for


def trained_shapes(config: Config, rank: int) -> dict[str, tuple]:
    """The path in ``Joint`` and the shape of every detector array that is trained."""
    found = shapes(config, rank)
    return {f"detectors.{i}.{name}": found[name] for i in range(config.layers) for name in TRAINED}


def initial_detectors(recipe: Recipe, config: Config) -> tuple[Detector, ...]:
    """The detectors that the recipe trains, before training; none if it trains none."""
    if recipe.rank is None:
        return ()
    return random_detectors(config, recipe.rank, hash_integers(recipe.seed, SEED))


def random_detectors(config: Config, rank: int, seed) -> tuple[Detector, ...]:
    """One for each block. If x has variance 1, so have the estimates q~ . k~, as the scores of a
    randomly initialized model have."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(config.layers):
        p = projection(config.width, rank, rng)
        scale = config.width**-0.5 * rank**-0.25
        w_q, w_k = (
            rng.standard_normal((rank, heads * rank)).astype(np.float32) * scale
            for heads in (config.heads, config.kv_heads)
        )
        found.append(Detector(p, w_q, w_k))
    return tuple(found)


def initial_weights(recipe: Recipe, config: Config) -> dict[str, np.ndarray]:
    """Their trained arrays, by path in ``Joint``."""
    return weights(Joint(None, initial_detectors(recipe, config)))


def detectors_of(recipe: Recipe, layout: ParameterLayout, flat: np.ndarray) -> tuple[Detector, ...]:
    """The detectors that the recipe trains, as views of ``flat``; p follows from the recipe's
    seed."""
    return tuple(
        replace(d, **{name: layout.view(flat, f"detectors.{i}.{name}") for name in TRAINED})
        for i, d in enumerate(initial_detectors(recipe, layout.config))
    )


def write_trained(recipe: Recipe, layout: ParameterLayout, flat: np.ndarray, folder: Path) -> None:
    """Write the detectors' file; if the recipe trains none, delete that of an earlier training."""
    if detectors := detectors_of(recipe, layout, flat):
        write_detectors(detectors, folder)
    else:
        (folder / FILE).unlink(missing_ok=True)
