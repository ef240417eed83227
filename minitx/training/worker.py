"""What one training process computes; all of them work on one shared model (see team.py).

A batch is always cut into the same shards, whose gradients are summed in the same order, and the
flat vector of weights is always updated in the same blocks, as many as shards. So the result does
not depend on the number of processes, to the last bit. A step has three parts, between which all
wait for each other: gradients of the shards; sums over shards, block by block; update of blocks.
"""

import ctypes
import math
import multiprocessing

import numpy as np

from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally, batches, encode
from minitx.training.data import (
    NONE,
    PADDING,
    Batch,
    Rows,
    drawn_stories,
    end_id,
    mix,
    story_tokenizer,
)
from minitx.training.detector import detectors_of, joint_gradients, trained_shapes
from minitx.training.grad import gradients
from minitx.training.layerskip import (
    drop_layers,
    exit_logits,
    exit_loss,
    exit_weights,
    sample_layer_mask,
    shallow,
)
from minitx.training.loss import cross_entropy
from minitx.training.optimizer import (
    Layout,
    adamw,
    clip_factor,
    decays,
    is_hidden,
    learning_rate,
    muon,
)
from minitx.training.recipe import Recipe, Stage

ROWS, DROPOUT, CHECK = 1, 2, 3  # what a random number is for: part of its seed
MOMENTUM = 0.95  # of Muon
SUMS = LOSS, WEIGHT, TOKENS, SQUARES, ERROR = range(5)  # columns of sums that the workers share


class Memory:
    """What all processes share: P numbers for weights and moments, S * P for the gradients."""

    def __init__(self, size: int, shards: int):
        self.size, self.shards = size, shards
        self.raw = {
            name: multiprocessing.RawArray(kind, count)
            for name, kind, count in (
                ("weights", ctypes.c_float, size),
                ("m", ctypes.c_float, size),
                ("v", ctypes.c_float, size),
                ("gradients", ctypes.c_float, shards * size),
                ("sums", ctypes.c_double, (shards + 1) * len(SUMS)),
            )
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Views: weights, m, v (P,), gradients (S, P) float32, sums (S + 1, 5) float64: a row for
        each shard, and as there is a block for each of them, one for the block beside the model."""
        found = {name: np.frombuffer(raw, _TYPES[name]) for name, raw in self.raw.items()}
        found["gradients"] = found["gradients"].reshape(self.shards, self.size)
        found["sums"] = found["sums"].reshape(self.shards + 1, len(SUMS))
        return found


_TYPES = dict.fromkeys(("weights", "m", "v", "gradients"), np.float32) | {"sums": np.float64}


class Worker:
    """One process's share of the work.

    Gradients are the long part, so each worker takes the next shard that nobody has taken
    (``taken``, a shared number): who computes it makes no difference to the result. Of the rest it
    has a fixed share: blocks (and shards of calibration stories) rank, rank + workers, ...
    """

    def __init__(self, rank: int, workers: int, recipe: Recipe, memory: Memory, barrier, taken):
        self.recipe, self.barrier, self.taken = recipe, barrier, taken
        self.mine = range(rank, recipe.shards, workers)
        self.my_blocks = range(rank, recipe.shards + 1, workers)
        self.tokenizer = story_tokenizer()
        self.layout = layout_of(recipe, self.tokenizer)
        self.blocks = [*self.layout.blocks(recipe.shards), self.layout.beside]
        self.shared = memory.arrays()
        self.model = self.layout.model(self.shared["weights"])
        self.detectors = detectors_of(recipe, self.layout, self.shared["weights"])
        self.stage_number = -1

    def enter(self, number: int) -> Stage:
        """Make ready for a stage, if this is another than the last time."""
        stage = self.recipe.stages[number]
        if number != self.stage_number:
            self.stage_number = number
            seed = mix(self.recipe.seed, ROWS, number)
            self.rows = Rows(
                self.tokenizer,
                self.recipe.shares(stage),
                stage.row,
                seed,
                chain=stage.chain,
                answer_weight=stage.answer_weight,
            )
            self.calibration = {
                shard: self.calibration_stories(stage, shard) for shard in self.mine
            }
        return stage

    def step(self, number: int, step: int, total: int) -> tuple:
        """One step of training: ``step`` counts within the stage, ``total`` from the beginning.
        Returns the mean loss of the batch, how many tokens it had, and in a stage with a detector
        the mean of its squared errors."""
        stage = self.enter(number)
        while (shard := self.take()) < self.recipe.shards:
            self.shard_gradient(stage, step, shard)
        self.barrier.wait()
        for block in self.my_blocks:
            self.sum_block(block)
        self.barrier.wait()
        sums = map(math.fsum, self.shared["sums"].T)
        loss, weight, tokens, squares, error = sums
        norm = math.sqrt(squares) / weight
        if not math.isfinite(norm + loss):
            raise MinitxError(
                f"Stage {stage.name!r}: the loss or its gradient is not finite at step {step}; "
                "lower lr, or raise warmup."
            )
        scale = clip_factor(norm, stage.clip) / weight
        pace = learning_rate(step, stage.steps, 1.0, stage.warmup, stage.schedule, stage.final)
        for block in self.my_blocks:
            self.update_block(block, stage, total + 1, pace, scale)
        return loss / weight, int(tokens), *([error / weight] if stage.detector else [])

    def take(self) -> int:
        """The number of the next shard to work on."""
        with self.taken.get_lock():
            shard = self.taken.value
            self.taken.value = shard + 1
        return shard

    def shard_gradient(self, stage: Stage, step: int, shard: int) -> None:
        """Leave the shard's gradient (not yet divided by the weights), loss and weight for all."""
        count = stage.batch // self.recipe.shards
        rows = range(shard * count, (shard + 1) * count)
        batch = self.rows.batch(step, rows.start, rows.stop).trimmed()
        seed = mix(self.recipe.seed, DROPOUT, self.stage_number, step)
        sums = self.shared["sums"][shard]

        def loss(model):
            return batch_loss(model, batch, stage, step, rows, seed)

        if stage.detector is None:
            sums[LOSS], found, _ = gradients(self.model, loss)
        else:
            found, sums[LOSS], sums[ERROR] = joint_gradients(
                self.model, self.detectors, loss, stage.detector.weight, batch.weights
            )
        self.layout.pack(found, self.shared["gradients"][shard])
        sums[WEIGHT] = batch.weights.sum(dtype=np.float64)
        sums[TOKENS] = (batch.kinds != PADDING).sum()

    def sum_block(self, number: int) -> None:
        """Sum a block of the gradients over the shards, in their order, into the first shard's."""
        where = self.layout.slice_of(self.blocks[number])
        first, *others = self.shared["gradients"][:, where]
        for other in others:
            first += other
        squares = np.einsum("i,i->", first, first, dtype=np.float64)
        self.shared["sums"][number, SQUARES] = squares

    def update_block(self, number: int, stage: Stage, step: int, pace: float, scale: float):
        """Update the weights of a block. pace: what to multiply the stage's learning rates by."""
        if self.blocks[number] is self.layout.beside and stage.detector is None:
            return  # their turn comes, or has been
        for path in self.blocks[number]:
            where, shape = self.layout.slots[path]
            w, m, v = (self.shared[name][where] for name in ("weights", "m", "v"))
            g = self.shared["gradients"][0, where]
            g *= scale
            decay = stage.weight_decay * decays(path)
            if stage.muon is not None and is_hidden(path):
                w, g, m = (flat.reshape(shape) for flat in (w, g, m))
                muon(w, g, m, stage.muon * pace, MOMENTUM, decay)
            else:
                adamw(w, g, m, v, step, stage.lr * pace, stage.betas, decay)

    def check(self, number: int) -> dict[int, Tally]:
        """How the model does on each of my shards of the stage's calibration stories."""
        model = shallow(self.model, self.enter(number).layers)
        found = {}
        for shard, stories in self.calibration.items():
            found[shard] = tally = Tally.empty()
            for batch in batches(stories, None, 2048) if stories else ():
                tally.floor += batch.floor
                tally.add(model(batch.ids), batch.targets, batch.kinds)
        return found

    def calibration_stories(self, stage: Stage, shard: int) -> list:
        """The shard's calibration stories as ids, no longer than the rows that are trained on."""
        shards = self.recipe.shards
        numbers = range(stage.check * shard // shards, stage.check * (shard + 1) // shards)
        seed = mix(self.recipe.seed, CHECK, self.stage_number)
        stories = drawn_stories(self.recipe.shares(stage), "calibration", seed, numbers)
        return encode(self.tokenizer, stories, stage.row)


def layout_of(recipe: Recipe, tokenizer) -> Layout:
    """Where all that the recipe trains lies: the model, and detectors if some stage has them."""
    config = recipe.config(len(tokenizer), end_id(tokenizer))
    return Layout(config, trained_shapes(config, recipe.rank) if recipe.rank else None)


def batch_loss(model, batch: Batch, stage: Stage, step: int, rows: range, seed: int):
    """The weighted sum of the losses of some rows, with the stage's layer dropout, exits, hops."""
    ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
    model = shallow(model, stage.layers)
    layers = len(model.stack.blocks)
    if stage.layer_dropout:
        model = drop_layers(model, sample_layer_mask(layers, stage.layer_dropout, seed, rows))
    if stage.early_exit is None and stage.hops is None:
        return cross_entropy(model(ids), targets, batch.weights)
    on = {layers - 1: 1.0}
    if stage.early_exit is not None:
        on = exit_weights(layers, stage.early_exit.scale, stage.early_exit.rotation, step)
    logits_after = exit_logits(model, ids)
    total = exit_loss(
        logits_after, on, lambda logits: cross_entropy(logits, targets, batch.weights)
    )
    for after, via in zip(stage.hops or (), np.moveaxis(batch.via, -1, 0)):
        weights = (via != NONE) * np.float32(stage.answer_weight)
        total = total + cross_entropy(logits_after(after - 1), np.maximum(via, 0), weights)
    return total
