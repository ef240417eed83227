"""TEAL's thresholds: how sparse the inputs of each matrix of a block may be (offline).

Greedy, block by block:

    p = 0 for each matrix
    until the sparsity of the block (the mean of p, weighted by the matrices' sizes) is the target:
        for each matrix: the error of the block's output if its p were one step higher
        take the step with the least error

A step skips ``step * D * D`` weights whichever matrix takes it, so it raises p by ``step`` for W_q
and by less for a larger matrix. The last one is shortened to meet the target.
"""

from collections.abc import Callable, Container

import numpy as np

from minitx.model import Linear, Stack, Transformer
from minitx.progress import bar
from minitx.shared.activation_threshold import AboveThreshold, Magnitudes
from minitx.shared.coarse import coarse
from minitx.shared.linears import change_linears, linears
from minitx.shared.observed_inputs import Rows, watched
from minitx.skip.teal import ThresholdedLinear
from minitx.state import Layer
from minitx.technique import need
from minitx.tree import Part, walk

MOST = 0.95  # share of its inputs that a matrix may skip, if the target is not higher
JUDGED = 0.25  # share of each text, at its end, on which the error is measured


def thresholds(lm, texts, sparsity: float, step: float | None) -> dict[int, float]:
    """The threshold of each matrix, by the ``id`` of its ``Linear``. step: None for the same
    sparsity everywhere.

    Each block is judged by itself, on what it gets in the dense model."""
    model = lm.model
    need(model, Transformer)
    need(model.stack, Stack)
    wanted, found = linears(model, "all"), {}
    inputs = [model.embed(np.asarray(ids), slice(0, len(ids))) for ids in texts]
    for index, block in enumerate(bar(model.stack.blocks, "teal", unit="block", delay=1.0)):
        judged = JudgedBlock(block, index, inputs, wanted)
        if not judged.matrices.keys() <= found.keys():  # else: a block that is used twice
            shares = dict.fromkeys(judged.matrices, sparsity)
            if step is not None:
                sizes = {key: linear.w.size for key, linear in judged.matrices.items()}
                shares = greedy(sizes, sparsity, step * model.config.width**2, judged.error)
            found |= judged.thresholds(shares)
        inputs = judged.outputs
    return found


def greedy(sizes: dict, sparsity: float, step: float, error: Callable) -> dict:
    """The share p of its inputs that each matrix skips. sizes: weights of each matrix, by any key;
    step: how many weights a step skips; error(shares): of the block. Ties go to the earlier
    matrix."""
    shares, most = dict.fromkeys(sizes, 0.0), max(MOST, sparsity)
    left = sparsity * sum(sizes.values())
    while left > 1e-6:  # less than one number, but for rounding
        errors, saved = {}, {}
        for key, size in sizes.items():
            saved[key] = min(step, left, size * (most - shares[key]))
            if saved[key] > 0:
                errors[key] = error(shares | {key: shares[key] + saved[key] / size})
        best = min(errors, key=errors.__getitem__)
        shares[best] += saved[best] / sizes[best]
        left -= saved[best]
    return shares


class JudgedBlock:
    """A block, and what it reads and writes in the dense model: lists of (T, D), one per text."""

    def __init__(self, block: Part, index: int, inputs: list, wanted: Container[int]):
        self.block, self.index, self.inputs = block, index, inputs
        self.matrices = {id(node): node for _, node in walk(block) if id(node) in wanted}
        recorder, seen = watched(block, Linear, Rows, wanted)
        self.outputs = [self.run(recorder, x, 0) for x in inputs]
        self.magnitudes = {key: Magnitudes(seen[key].all) for key in self.matrices}

    def thresholds(self, shares: dict[int, float]) -> dict[int, float]:
        return {key: self.magnitudes[key].threshold(share) for key, share in shares.items()}

    def error(self, shares: dict[int, float]) -> float:
        """The error of the block's output if each matrix skips its share of the inputs: the L2 norm
        over the last tokens of the texts, averaged over the features."""
        t = self.thresholds(shares)

        def skip(linear: Linear) -> Part:
            return ThresholdedLinear.of(linear, AboveThreshold(t[id(linear)]))

        block, errors = change_linears(self.block, self.matrices, skip), []
        for x, y in zip(self.inputs, self.outputs, strict=True):
            first = int(len(x) * (1 - JUDGED))
            errors.append(self.run(block, x, first) - y[first:])
        norms = np.linalg.norm(np.concatenate(errors).astype(np.float64), axis=0)  # (D,)
        return float(coarse([norms.mean()])[0])

    def run(self, block: Part, x, first: int):
        """What the block makes of the tokens from ``first`` on: of those before them it only needs
        keys and values."""
        layer = Layer(len(x), index=self.index)
        with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
            if first:
                block.backfill(x[:first], layer.take(first))
            return block(x[first:], layer.take(len(x) - first))
