"""Stages that train only the first blocks: the others stay identities and are added without a
jump."""

import json

import numpy as np
import pytest
from test_training import FIRST, MODEL, SECOND, TOKENIZER, recipe_of, run_of, worker_of, write

from minitx.build import random_model
from minitx.checkpoints.huggingface import read_model
from minitx.lab.evaluate import Tally
from minitx.training.layerskip import exit_weights, sample_layer_mask, shallow
from minitx.training.optimizer import has_weight_decay
from minitx.training.recipe import recipe_from
from minitx.training.train import train
from minitx.training.worker import DROPOUT, batch_loss
from minitx.tree import weights

IDS = np.arange(60).reshape(2, 30)
GPT2 = MODEL | {
    "family": "gpt2", "kv_heads": 2, "rope_width": 0, "activation": "relu",
    "qkv_bias": True, "out_bias": True, "ffn_bias": True,
}  # fmt: skip
GPT2.pop("rope_base")
NEOX = GPT2 | {"family": "gpt_neox", "rope_width": 4, "parallel": True}


def block_of(path: str) -> int:
    """The index of the block that a weight belongs to; -1 if it is in none."""
    return int(path.split(".")[2]) if path.startswith("stack.blocks.") else -1


def initial_model(folder, *stages, model=MODEL):
    """The initial model of a training with these stages."""
    run = run_of(folder, recipe_of(*stages, model=model))
    run.initialize()
    return run.layout.model(run.arrays["weights"])


# Initial weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [MODEL, GPT2, NEOX], ids=["llama", "gpt2", "gpt_neox"])
def test_untrained_blocks_start_as_identities(tmp_path, sizes):
    model = initial_model(tmp_path, FIRST | {"layers": 1}, FIRST, model=sizes)
    np.testing.assert_array_equal(model(IDS), shallow(model, 1)(IDS))
    assert (model.hidden(IDS) != model.embed(IDS, slice(0, 30))).any()
    plain = weights(random_model(model.config, 4))
    for path, w in weights(model).items():
        zero = block_of(path) >= 1 and path.endswith((".attn.out.w", ".ffn.down.w"))
        np.testing.assert_array_equal(w, 0 * plain[path] if zero else plain[path])


@pytest.mark.parametrize("stages", [[FIRST], [FIRST, FIRST | {"layers": 1}]])
def test_blocks_start_random_if_the_first_stage_trains_all(tmp_path, stages):
    model = initial_model(tmp_path, *stages)
    for path, w in weights(random_model(model.config, 4)).items():
        np.testing.assert_array_equal(weights(model)[path], w)


# One stage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [FIRST, SECOND], ids=["plain", "LayerSkip"])
def test_untrained_blocks_only_decay(stage):
    stage = stage | {"layers": 2, "warmup": 0, "schedule": "constant"}
    worker = worker_of(recipe_of(stage))
    before = {path: w.copy() for path, w in weights(worker.model).items()}
    for step in range(3):
        worker.step(0, step, step)
    rate = stage.get("muon", stage["lr"])
    shrunk = (1 - rate * stage["weight_decay"]) ** 3
    for path, w in weights(worker.model).items():
        if block_of(path) < 2:
            assert (w != before[path]).any(), path
        else:
            np.testing.assert_allclose(
                w, before[path] * (shrunk if has_weight_decay(path) else 1), 1e-6
            )


def test_shallow_step_equals_that_of_a_smaller_model():
    deep = worker_of(recipe_of(FIRST | {"layers": 2}))
    small = worker_of(recipe_of(FIRST, model=MODEL | {"layers": 2}))
    for path, w in weights(small.model).items():
        w[:] = weights(deep.model)[path]
    # Clipping is the same, too: untrained blocks add nothing to the gradient norm.
    assert deep.step(0, 0, 0) == small.step(0, 0, 0)
    for path, w in weights(small.model).items():
        np.testing.assert_allclose(weights(deep.model)[path], w, rtol=1e-5, atol=1e-7)
    one, other = (sum(w.check(0).values(), Tally.empty()) for w in (deep, small))
    assert (one.right == other.right).all() and one.count[0] > 0
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-4)


def test_dropout_and_exits_use_the_layers_of_the_stage():
    """With layers=2, layer 1 counts as the last: dropped most often, and always with a loss."""
    stage = recipe_from(recipe_of(SECOND | {"layers": 2, "layer_dropout": 0.9})).stages[0]
    config = recipe_from(recipe_of(SECOND)).config(len(TOKENIZER), TOKENIZER.eos)
    deep = random_model(config, 3)
    worker = worker_of(recipe_of(SECOND | {"layers": 2}))
    worker.enter_stage(0)
    batch = worker.rows.batch(0, 0, 8)
    full = recipe_from(recipe_of(SECOND | {"layer_dropout": 0.9})).stages[0]
    assert list(exit_weights(2, 0.2, 2, 1)) == [1]
    assert sample_layer_mask(2, 0.9, DROPOUT, range(8)).min() == 0
    alone = batch_loss(shallow(deep, 2), batch, full, 1, range(8), DROPOUT)
    assert batch_loss(deep, batch, stage, 1, range(8), DROPOUT) == alone
    assert batch_loss(deep, batch, full, 1, range(8), DROPOUT) != alone


# Several stages ----------------------------------------------------------------------------------


def test_untrained_blocks_learn_in_a_later_stage(tmp_path):
    """After a shallow stage the whole model equals the shallow one; the next stage trains all."""
    short = FIRST | {"steps": 2, "every": 2, "weight_decay": 0.0}
    path = write(tmp_path, recipe_of(short | {"layers": 1}, dtype="float32"))
    train(path, tmp_path / "out", workers=1, bar=False)
    model = read_model(tmp_path / "out")
    np.testing.assert_array_equal(model(IDS), shallow(model, 1)(IDS))

    path.write_text(json.dumps(recipe_of(short | {"layers": 1}, short, dtype="float32")))
    train(path, tmp_path / "out", workers=1, bar=False)
    model = read_model(tmp_path / "out")
    for number in (1, 2):
        assert (shallow(model, number + 1)(IDS) != shallow(model, number)(IDS)).any()
