"""What one worker process computes; all of them share the arrays of one model (see worker_pool.py).

The result does not depend on the number of processes, to the last bit: a batch is always split into
the same shards, whose gradients are summed in the same order, and the flat vector of weights is
always updated in the same blocks, as many as shards. A step has three phases, separated by
barriers: gradients of the shards; sums over shards, block by block; updates of the blocks.
"""

import ctypes
import math
import multiprocessing

import numpy as np

from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally, batches, encode
from minitx.training.autograd import gradients
from minitx.training.data import (
    NO_BRIDGE,
    PADDING,
    Batch,
    StoryDataset,
    end_id,
    hash_integers,
    sample_stories,
    story_tokenizer,
)
from minitx.training.detector import detectors_of, joint_gradients, trained_shapes
from minitx.training.distillation import TeacherText, TextArrays, load_teacher, teacher_loss
from minitx.training.layerskip import (
    drop_layers,
    exit_logits,
    exit_loss,
    exit_weights,
    sample_layer_mask,
    shallow,
)
from minitx.training.loss import cross_entropy
from minitx.training.mixture_of_depths import routed_gradients
from minitx.training.optimizer import (
    ParameterLayout,
    adamw,
    clip_factor,
    has_weight_decay,
    is_block_matrix,
    learning_rate,
    muon,
)
from minitx.training.recipe import Recipe, Stage
from minitx.training.start import starting_model

ROWS, DROPOUT, CHECK, TEXT = 1, 2, 3, 4  # purposes of random numbers, part of their seeds
MOMENTUM = 0.95  # of Muon
SUMS = LOSS, WEIGHT, TOKENS, SQUARES, ERROR = range(5)  # columns of the shared array of sums


class SharedArrays:
    """Memory shared by all processes. P parameters and S shards: weights, moments, gradients,
    sums; and a teacher's text."""

    def __init__(self, size: int, shards: int, text: TextArrays | None = None):
        self.size, self.shards, self.text = size, shards, text or TextArrays()
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
        """Views: weights, m, v (P,) and gradients (S, P) float32; sums (S + 1, 5) float64. Row i of
        the sums is for shard i and for block i; the last is for the block of extra parameters."""
        found = {name: np.frombuffer(raw, _TYPES[name]) for name, raw in self.raw.items()}
        found["gradients"] = found["gradients"].reshape(self.shards, self.size)
        found["sums"] = found["sums"].reshape(self.shards + 1, len(SUMS))
        return found


_TYPES = dict.fromkeys(("weights", "m", "v", "gradients"), np.float32) | {"sums": np.float64}


class Worker:
    """One process's part of the work.

    Gradients take the most time, so shards are balanced dynamically: each worker claims the next
    one (``next_shard``, a shared integer). The rest is assigned statically: blocks, and shards of
    calibration stories, with numbers rank, rank + workers, ...
    """

    def __init__(
        self, rank: int, workers: int, recipe: Recipe, shared: SharedArrays, barrier, next_shard
    ):
        self.rank, self.workers = rank, workers
        self.recipe, self.barrier, self.next_shard = recipe, barrier, next_shard
        self.my_shards = range(rank, recipe.shards, workers)
        self.my_blocks = range(rank, recipe.shards + 1, workers)
        self.tokenizer = story_tokenizer()
        self.layout = layout_of(recipe, self.tokenizer)
        self.blocks = [*self.layout.blocks(recipe.shards), self.layout.extra]
        self.shared, self.text_arrays = shared.arrays(), shared.text
        self.model = self.layout.model(self.shared["weights"])
        self.detectors = detectors_of(recipe, self.layout, self.shared["weights"])
        self.stage_number = -1

    def enter_stage(self, number: int) -> Stage:
        """Load a stage's data if it is not the current stage."""
        stage = self.recipe.stages[number]
        if number != self.stage_number:
            self.stage_number = number
            seed = hash_integers(self.recipe.seed, ROWS, number)
            self.rows = StoryDataset(
                self.tokenizer,
                self.recipe.shares(stage),
                stage.row,
                seed,
                chain=stage.chain,
                answer_weight=stage.answer_weight,
            )
            self.text = None if stage.teacher is None else self.teacher_text(stage)
            self.calibration = {
                shard: self.calibration_stories(stage, shard) for shard in self.my_shards
            }
        return stage

    def teacher_text(self, stage: Stage) -> TeacherText:
        """The text of the stage's teacher, of which each worker writes some groups of rows."""
        lm = load_teacher(stage, self.tokenizer, self.model.config.vocab_size)
        seed = hash_integers(self.recipe.seed, TEXT, self.stage_number)
        text = TeacherText(stage, lm, self.text_arrays, seed)
        for group in range(self.rank, len(text.groups()), self.workers):
            text.write(group, self.rows.encoder, self.recipe.shares(stage))
        self.barrier.wait()
        return text

    def step(self, number: int, step: int, total: int) -> tuple:
        """One training step: ``step`` counts within the stage, ``total`` over all stages. Returns
        the mean loss of the batch, its number of tokens, and in a stage with a detector or a
        router the loss of that."""
        stage = self.enter_stage(number)
        while (shard := self.claim_shard()) < self.recipe.shards:
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
                "lower lr or increase warmup."
            )
        scale = clip_factor(norm, stage.clip) / weight
        lr_scale = learning_rate(step, stage.steps, 1.0, stage.warmup, stage.schedule, stage.final)
        for block in self.my_blocks:
            self.update_block(block, stage, total + 1, lr_scale, scale)
        return loss / weight, int(tokens), *([error / weight] if stage.beside else [])

    def claim_shard(self) -> int:
        """The next shard that no worker has claimed."""
        with self.next_shard.get_lock():
            shard = self.next_shard.value
            self.next_shard.value = shard + 1
        return shard

    def shard_gradient(self, stage: Stage, step: int, shard: int) -> None:
        """Store the shard's gradient and loss (sums, not yet divided by the weight) and its
        weight."""
        count = stage.batch // self.recipe.shards
        rows = range(shard * count, (shard + 1) * count)
        if self.text is None:
            batch = self.rows.batch(step, rows.start, rows.stop).trimmed()
        else:
            batch, logits = self.text.batch(step, rows)
        seed = hash_integers(self.recipe.seed, DROPOUT, self.stage_number, step)
        sums = self.shared["sums"][shard]

        def loss(model):
            if self.text is not None:
                return teacher_loss(model, batch, logits, stage.teacher)
            return batch_loss(model, batch, stage, step, rows, seed)

        if stage.router is not None:
            found, sums[LOSS], sums[ERROR] = routed_gradients(
                self.model, loss, stage.router.capacity, stage.router.weight, batch.weights
            )
        elif stage.detector is None:
            sums[LOSS], found, _ = gradients(self.model, loss)
        else:
            found, sums[LOSS], sums[ERROR] = joint_gradients(
                self.model, self.detectors, loss, stage.detector.weight, batch.weights
            )
        self.layout.flatten(found, self.shared["gradients"][shard])
        sums[WEIGHT] = batch.weights.sum(dtype=np.float64)
        sums[TOKENS] = (batch.kinds != PADDING).sum()

    def sum_block(self, number: int) -> None:
        """Sum a block of the gradients over the shards, in order, into the first shard's row."""
        where = self.layout.slice_of(self.blocks[number])
        first, *others = self.shared["gradients"][:, where]
        for other in others:
            first += other
        squares = np.einsum("i,i->", first, first, dtype=np.float64)
        self.shared["sums"][number, SQUARES] = squares

    def update_block(self, number: int, stage: Stage, step: int, lr_scale: float, scale: float):
        """Update a block of weights. lr_scale: the factor of the schedule; scale: of the
        gradients."""
        if self.blocks[number] is self.layout.extra and stage.detector is None:
            return  # trained in another stage
        for path in self.blocks[number]:
            where, shape = self.layout.slots[path]
            w, m, v = (self.shared[name][where] for name in ("weights", "m", "v"))
            g = self.shared["gradients"][0, where]
            g *= scale
            decay = stage.weight_decay * has_weight_decay(path)
            if stage.muon is not None and is_block_matrix(path):
                w, g, m = (flat.reshape(shape) for flat in (w, g, m))
                muon(w, g, m, stage.muon * lr_scale, MOMENTUM, decay)
            else:
                adamw(w, g, m, v, step, stage.lr * lr_scale, stage.betas, decay)

    def check(self, number: int) -> dict[int, Tally]:
        """Evaluate the model on this worker's shards of the stage's calibration stories."""
        model = shallow(self.model, self.enter_stage(number).layers)
        found = {}
        for shard, stories in self.calibration.items():
            found[shard] = tally = Tally.empty()
            for batch in batches(stories, None, 2048) if stories else ():
                tally.floor += batch.floor
                tally.add(model(batch.ids), batch.targets, batch.kinds)
        return found

    def calibration_stories(self, stage: Stage, shard: int) -> list:
        """The shard's calibration stories as ids, truncated to the stage's row length."""
        shards = self.recipe.shards
        numbers = range(stage.check * shard // shards, stage.check * (shard + 1) // shards)
        seed = hash_integers(self.recipe.seed, CHECK, self.stage_number)
        stories = sample_stories(self.recipe.shares(stage), "calibration", seed, numbers)
        return encode(self.tokenizer, stories, stage.row)


def layout_of(recipe: Recipe, tokenizer) -> ParameterLayout:
    """The layout of all parameters that the recipe trains: the model's, then the detectors' if
    any."""
    if recipe.start is not None:
        tree = starting_model(recipe, tokenizer).model
        return ParameterLayout(tree.config, tree=tree)
    config = recipe.config(len(tokenizer), end_id(tokenizer))
    return ParameterLayout(config, trained_shapes(config, recipe.rank) if recipe.rank else None)


def batch_loss(model, batch: Batch, stage: Stage, step: int, rows: range, seed: int):
    """The weighted sum of the losses of some rows, with the stage's layer dropout, early exit loss
    and supervised bridge entities."""
    ids, targets = batch.ids[:, :-1], batch.ids[:, 1:]
    model = shallow(model, stage.layers)
    layers = len(model.stack.blocks)
    if stage.layer_dropout:
        model = drop_layers(model, sample_layer_mask(layers, stage.layer_dropout, seed, rows))
    if stage.early_exit is None and stage.hops is None:
        return cross_entropy(model(ids), targets, batch.weights)
    exits = {layers - 1: 1.0}
    if stage.early_exit is not None:
        exits = exit_weights(layers, stage.early_exit.scale, stage.early_exit.rotation, step)
    logits_after = exit_logits(model, ids)
    total = exit_loss(
        logits_after, exits, lambda logits: cross_entropy(logits, targets, batch.weights)
    )
    for after, bridges in zip(stage.hops or (), np.moveaxis(batch.bridges, -1, 0)):
        weights = (bridges != NO_BRIDGE) * np.float32(stage.answer_weight)
        total = total + cross_entropy(logits_after(after - 1), np.maximum(bridges, 0), weights)
    return total
