"""LayerSkip's training recipe (Elhoushi et al., 2024, arXiv 2404.16710): layers that are dropped
more often the deeper they lie, and a loss on what the head reads after the layers before the last.

Both wrap the blocks of a model for the length of one pass; the forward stays the one of inference.
Layers are numbered l = 0 .. L-1, and t counts the steps. How the trained model is then left
early is no matter of training.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minitx.model import Transformer
from minitx.state import Layer
from minitx.technique import wrap
from minitx.training.data import as_uniform, hash_integers
from minitx.tree import Part, part


@part
class Dropped(Part):
    """A block that some samples of the batch pass by: x + M (block(x) - x), M being 0 or 1.

    Nothing is rescaled, as in the paper: with all samples kept this is the block itself.
    """

    block: Part
    keep: np.ndarray  # (B,) 1 or 0

    def __call__(self, x, layer: Layer):
        if self.keep.all():
            return self.block(x, layer)
        keep = self.keep[:, None, None]
        return self.block(x, layer) * keep + x * (1 - keep)  # (B, T, D)


@part
class Recorded(Part):
    """A block whose result is also put into the list ``into``."""

    block: Part
    into: list

    def __call__(self, x, layer: Layer):
        self.into.append(self.block(x, layer))
        return self.into[-1]


def shallow(model: Transformer, layers: int | None) -> Transformer:
    """The model with its first blocks alone: cheap to train before the rest joins in."""
    return replace(model, stack=replace(model.stack, blocks=model.stack.blocks[:layers]))


def record(model: Transformer) -> tuple[Transformer, list]:
    """A copy of the model that puts the hidden state (B, T, D) after each block into the list."""
    into: list[Any] = []
    return wrap(model, "block", lambda block, i: Recorded(block, into)), into


# Layer dropout -----------------------------------------------------------------------------------


def dropout_by_depth(layers: int) -> list[float]:
    """D(l) = exp(l ln 2 / (L-1)) - 1: from 0 at the first layer to 1 at the last."""
    return [math.expm1(i * math.log(2) / max(layers - 1, 1)) for i in range(layers)]


def kept(layers: int, highest: float, seed: int, rows: range) -> np.ndarray:
    """M (L, B): 0 where a row passes by a layer, which has probability D(l) * highest, else 1."""
    chance = np.array(dropout_by_depth(layers))[:, None] * highest
    drawn = [[as_uniform(hash_integers(seed, row, i)) for row in rows] for i in range(layers)]
    return (np.array(drawn) >= chance).astype(np.float32)


def drop_layers(model: Transformer, keep: np.ndarray) -> Transformer:
    """The model with the layers dropped where keep (L, B) is 0."""
    return wrap(model, "block", lambda block, i: Dropped(block, keep[i]))


# Early-exit loss ---------------------------------------------------------------------------------


def exit_scales(layers: int, scale: float) -> list[float]:
    """e(l): scale * l(l+1)/2, but L-1 + scale * (L-2)(L-1)/2 for the last layer."""
    e = [scale * i * (i + 1) / 2 for i in range(layers)]
    e[-1] = layers - 1 + scale * (layers - 2) * (layers - 1) / 2
    return e if layers > 1 else [1.0]


def exit_weights(layers: int, scale: float, rotation: int, t: int) -> dict[int, float]:
    """e~(t, l) of the layers that are on at step t: those with l = t modulo ``rotation`` (each is
    on once in so many steps), and always the last, without which l = 0 alone would give 0/0."""
    e = exit_scales(layers, scale)
    on = [i for i in range(layers) if i % rotation == t % rotation or i == layers - 1]
    total = sum(e[i] for i in on)
    return {i: e[i] / total for i in on if e[i] > 0}


def read_after(model: Transformer, ids) -> Callable[[int], Any]:
    """Run ids (B, T) through the model once; gives a function of l: what the head reads after
    layer l, logits (B, T, V)."""
    recorded, hidden = record(model)
    recorded.hidden(ids)
    return lambda i: model.head(model.norm(hidden[i]))


def exit_loss(read: Callable[[int], Any], weights: dict[int, float], loss: Callable):
    """sum over l of e~(l) * loss(read(l)): see ``read_after``.

    loss(logits (B, T, V)) -> a number, or traced number.
    """
    return sum(w * loss(read(i)) for i, w in weights.items())
