"""Training that starts from an existing model, with techniques or without."""

import json

import numpy as np
import pytest
from tiny import tiny_folder

import minitx
from minitx.checkpoints.precomputed import read_origin
from minitx.errors import MinitxError
from minitx.technique import apply
from minitx.training.autograd import gradients
from minitx.training.data import story_tokenizer
from minitx.training.recipe import Recipe, recipe_from
from minitx.training.start import starting_model
from minitx.training.train import train
from minitx.training.worker import layout_of
from minitx.tree import map_weights, weights

TOKENIZER = story_tokenizer()
MODEL = {
    "family": "llama", "width": 16, "layers": 3, "heads": 2, "kv_heads": 1, "head_width": 8,
    "hidden": 32, "context": 64, "rope_width": 8, "rope_base": 500.0,
}  # fmt: skip
STAGE = {
    "name": "first", "grades": {"one_hop_tiny": 1}, "row": 40, "batch": 8, "steps": 20, "every": 20,
    "check": 8, "lr": 0.01, "chain": False,
}  # fmt: skip
SKIP = {"layer_skip": {"drop": "1"}}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model that was trained for a few steps, to start from."""
    folder = tmp_path_factory.mktemp("start")
    run({"name": "toy", "model": MODEL, "shards": 2, "stages": [STAGE]}, folder)
    return folder


def run(recipe: dict, folder, workers=1) -> dict:
    folder.mkdir(exist_ok=True)
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe))
    return train(path, workers=workers, bar=False)


def from_start(start, **changes) -> dict:
    base = {"name": "tuned", "start": str(start), "shards": 2, "stages": [STAGE]}
    return base | changes


def test_training_starts_from_the_weights_of_the_model(start, tmp_path):
    still = STAGE | {"steps": 1, "every": 1, "lr": 1e-9}
    assert run(from_start(start, stages=[still]), tmp_path)["finished"]
    before, after = minitx.load(start), minitx.load(tmp_path)
    assert type(before.model.stack.blocks[1]) is type(after.model.stack.blocks[1])
    for path, w in weights(after.model).items():
        np.testing.assert_allclose(w, weights(before.model)[path], atol=2e-8, err_msg=path)


def test_technique_is_trained_and_the_folder_loads_with_it(start, tmp_path):
    found = run(from_start(start, techniques=SKIP), tmp_path)
    before, after = minitx.load(start, **SKIP), minitx.load(tmp_path)
    assert repr(after.model) == repr(before.model), "the tree with the technique is what is trained"
    earlier = json.loads((start / "training_log.json").read_text())
    assert found["log"][-1]["loss"] < earlier["log"][-1]["loss"] - 0.1, "20 steps lower the loss"
    words = str(read_origin(tmp_path))
    assert "--layer-skip drop=1" in words and "trained further by the recipe 'tuned'" in words


def test_result_does_not_depend_on_the_number_of_workers(start, tmp_path):
    recipe = from_start(start, techniques=SKIP, stages=[STAGE | {"steps": 3}])
    for workers in (1, 2):
        run(recipe, tmp_path / str(workers), workers)
    one, two = (weights(minitx.load(tmp_path / str(n)).model) for n in (1, 2))
    for path in one:
        np.testing.assert_array_equal(one[path], two[path], path)


def test_layout_of_a_tree_is_its_weights_and_integers_are_left_alone(start):
    recipe = Recipe("q", (), start=str(start), techniques={"quantize": {"bits": 8}})
    tree, layout = starting_model(recipe, TOKENIZER).model, layout_of(recipe, TOKENIZER)
    kinds = {path: w.dtype.kind for path, w in weights(tree).items()}
    assert set(layout.slots) == {path for path, kind in kinds.items() if kind == "f"}
    assert set(kinds.values()) > {"f"}, "quantize has arrays of integers"
    flat = np.zeros(layout.size, np.float32)
    layout.flatten(weights(tree), flat)
    again = layout.model(flat)
    for path, w in weights(again).items():
        np.testing.assert_array_equal(w, weights(tree)[path], path)
    flat += 1
    assert all(np.shares_memory(weights(again)[path], flat) for path in layout.slots)


def test_weights_shared_by_two_layers_get_the_sum_of_both_gradients(start):
    """Layers 1 and 2 run the same part: its gradient is that of layer 1 plus that of layer 2."""
    from dataclasses import replace

    dense = minitx.load(start, dtype=np.float64).model
    first, second, _ = dense.stack.blocks
    shared = replace(dense, stack=replace(dense.stack, blocks=(first, second, second)))
    copied = map_weights(second, np.copy)
    apart = replace(dense, stack=replace(dense.stack, blocks=(first, second, copied)))
    ids = np.arange(12)

    def loss(model):
        return (model(ids) * model(ids)).mean()

    _, together, _ = gradients(shared, loss)
    _, alone, _ = gradients(apart, loss)
    name = "ffn.down.w"
    expected = alone[f"stack.blocks.1.{name}"] + alone[f"stack.blocks.2.{name}"]
    np.testing.assert_allclose(together[f"stack.blocks.1.{name}"], expected, rtol=1e-9)
    assert f"stack.blocks.2.{name}" not in together


FAULTS = [
    ({"model": MODEL}, "give one of them"),
    ({"start": None, "model": {}}, "add one"),
    ({"start": None, "model": MODEL, "techniques": SKIP}, "no model to start from"),
    ({"start": "storeis"}, "storeis"),
    ({"start": 3}, "'start'"),
    ({"techniques": {"layer_skp": {}}}, "did you mean 'layer_skip'"),
    ({"techniques": {"layer_skip": {"drop": "7"}}}, "drop has '7'"),
    ({"techniques": {"layer_skip": True}}, "object of technique"),
    ({"techniques": ["layer_skip"]}, "object of technique"),
    ({"stages": [STAGE | {"layers": 2}]}, "from random weights"),
    ({"stages": [STAGE | {"detector": {"k": 4}}]}, "from random weights"),
    ({"stages": [STAGE | {"row": 100}]}, "at most the model's context"),
]


@pytest.mark.parametrize("change, words", FAULTS, ids=[words for _, words in FAULTS])
def test_fault_is_named(start, change, words):
    with pytest.raises(MinitxError) as caught:
        recipe_from(from_start(start) | change)
    assert words in str(caught.value) and str(caught.value).isprintable()


def test_model_with_another_vocabulary_is_refused(tmp_path):
    with pytest.raises(MinitxError, match="another vocabulary"):
        recipe_from(from_start(tiny_folder(tmp_path / "other")))


def test_techniques_are_applied_as_by_their_flags(start):
    recipe = recipe_from(from_start(start, techniques=SKIP))
    expected = apply(minitx.load(start), SKIP)
    assert repr(starting_model(recipe, TOKENIZER).model) == repr(expected.model)


# What cannot be trained, or not as it is ----------------------------------------------------------


@pytest.mark.parametrize("name, options", [("quantize", {"bits": 8}), ("value_prune", {})])
def test_technique_without_a_gradient_is_refused_before_the_first_step(start, name, options):
    with pytest.raises(MinitxError, match=f"^Training through {name} is not possible") as caught:
        recipe_from(from_start(start, techniques={name: options}))
    assert "train first" in str(caught.value) and str(caught.value).isprintable()


def test_early_exit_loss_needs_blocks_that_run_one_after_another(start):
    """Else "after block 3" would be the output of one block of a group, and not of the model."""
    groups = {"layer_reorder": {"order": "parallel", "first": 0, "last": 0}}
    stage = STAGE | {"early_exit": {"scale": 1.0, "rotation": 2}}
    with pytest.raises(MinitxError, match="With layer_reorder, blocks do not run"):
        recipe_from(from_start(start, techniques=groups, stages=[stage]))


def test_technique_in_two_spellings_is_refused(start):
    twice = {"kv_share": {}, "kv-share": {"size": 2}}
    with pytest.raises(MinitxError, match="have 'kv_share' twice"):
        recipe_from(from_start(start, techniques=twice))
    with pytest.raises(MinitxError, match="kv_share is given twice"):
        apply(minitx.load(start), twice)
    recipe = recipe_from(from_start(start, techniques={"kv-share": {"size": 2}}))
    assert recipe.techniques == {"kv_share": {"size": 2}}


def test_trained_model_with_techniques_can_be_trained_further(start, tmp_path):
    short = STAGE | {"steps": 1, "every": 1}
    run(from_start(start, techniques=SKIP, stages=[short]), tmp_path / "one")
    run(from_start(tmp_path / "one", stages=[short]), tmp_path / "two")
    first, second = minitx.load(tmp_path / "one"), minitx.load(tmp_path / "two")
    assert repr(first.model) == repr(second.model)
    assert "--layer-skip drop=1" in str(read_origin(tmp_path / "two"))
