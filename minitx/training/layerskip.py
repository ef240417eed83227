"""LayerSkip's training recipe: layer dropout that grows with depth, and an early-exit loss.

Elhoushi et al., "LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding", 2024,
arXiv 2404.16710. Layers are numbered l = 0 .. L-1; t counts the steps. Both wrap the blocks of a
model for one forward pass, which is otherwise the one of inference. Exiting early at inference is
minitx/skip/early_exit.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.state import Layer
from minitx.technique import owner, wrap
from minitx.training.data import as_uniform, hash_integers
from minitx.tree import Part, part


@part
class LayerDropout(Part):
    """A block that some samples of the batch skip: x + M (block(x) - x), with M 0 or 1 per sample.

    As in the paper, nothing is rescaled: with M = 1 for all samples this is the block itself.
    """

    block: Part
    mask: np.ndarray  # M (B,), 1 or 0

    def __call__(self, x, layer: Layer):
        if self.mask.all():
            return self.block(x, layer)
        M = self.mask[:, None, None]
        return self.block(x, layer) * M + x * (1 - M)  # (B, T, D)


@part
class Recorded(Part):
    """A block that also appends its output to the list ``into``."""

    block: Part
    into: list

    def __call__(self, x, layer: Layer):
        self.into.append(self.block(x, layer))
        return self.into[-1]


def shallow(model: Transformer, layers: int | None) -> Transformer:
    """The model with only its first ``layers`` blocks: cheap to train before the rest is added.
    None: all of them."""
    if layers is None:
        return model
    return replace(model, stack=replace(model.stack, blocks=model.stack.blocks[:layers]))


def record(model: Transformer) -> tuple[Transformer, list]:
    """A copy of the model that appends the hidden states (B, T, D) after each block to the list.
    MinitxError for a model whose blocks do not simply run one after another on all tokens."""
    stack = getattr(model, "stack", None)
    if stack is not None and type(stack) is not Stack:
        name = owner(stack)
        raise MinitxError(
            f"With {name}, blocks do not run one after another on the same tokens, so there is no "
            f"hidden state after each of them to read; leave {name} out, or what reads them "
            "(--depths; early_exit and hops in a recipe)."
        )
    into: list[Any] = []
    return wrap(model, "block", lambda block, i: Recorded(block, into)), into


# Layer dropout -----------------------------------------------------------------------------------


def dropout_by_depth(layers: int) -> list[float]:
    """D(l) = exp(l ln 2 / (L-1)) - 1: from 0 at the first layer to 1 at the last."""
    return [math.expm1(i * math.log(2) / max(layers - 1, 1)) for i in range(layers)]


def sample_layer_mask(layers: int, p_max: float, seed: int, rows: range) -> np.ndarray:
    """M (L, B): 0 with probability D(l) * p_max, where a row skips layer l; else 1."""
    p = np.array(dropout_by_depth(layers))[:, None] * p_max
    u = [[as_uniform(hash_integers(seed, row, i)) for row in rows] for i in range(layers)]
    return (np.array(u) >= p).astype(np.float32)


def drop_layers(model: Transformer, mask: np.ndarray) -> Transformer:
    """The model with layers skipped where mask (L, B) is 0."""
    return wrap(model, "block", lambda block, i: LayerDropout(block, mask[i]))


# Early-exit loss ---------------------------------------------------------------------------------


def exit_scales(layers: int, scale: float) -> list[float]:
    """e(l) = scale * l(l+1)/2, and for the last layer e(L-1) = L-1 + scale * (L-2)(L-1)/2."""
    e = [scale * i * (i + 1) / 2 for i in range(layers)]
    e[-1] = layers - 1 + scale * (layers - 2) * (layers - 1) / 2
    return e if layers > 1 else [1.0]


def exit_weights(layers: int, scale: float, rotation: int, t: int) -> dict[int, float]:
    """e~(t, l), normalized to sum 1, of the layers with a loss at step t: those with l = t modulo
    ``rotation``, and always the last one (l = 0 alone has weight 0, which would give 0/0)."""
    e = exit_scales(layers, scale)
    on = [i for i in range(layers) if i % rotation == t % rotation or i == layers - 1]
    total = sum(e[i] for i in on)
    return {i: e[i] / total for i in on if e[i] > 0}


def exit_logits(model: Transformer, ids) -> Callable[[int], Any]:
    """Run ids (B, T) through the model once. Returns a function of l: the logits (B, T, V) of final
    norm and head from the hidden states after layer l."""
    recorded, hidden = record(model)
    recorded.hidden(ids)
    return lambda i: model.head(model.norm(hidden[i]))


def exit_loss(logits_after: Callable[[int], Any], weights: dict[int, float], loss: Callable):
    """sum over l of e~(l) * loss(logits_after(l)), with ``logits_after`` from ``exit_logits``.

    loss(logits (B, T, V)) -> a number, or traced number.
    """
    return sum(w * loss(logits_after(i)) for i, w in weights.items())
