"""Recipes: a valid one is read with its defaults; each fault is reported in one sentence."""

import copy
import json

import pytest

from minitx.errors import MinitxError
from minitx.training.recipe import EarlyExitLoss, read_recipe, recipe_from
from minitx.training.stories.grades import GRADES

GOOD = {
    "name": "toy",
    "seed": 3,
    "model": {
        "family": "llama", "width": 16, "layers": 2, "heads": 2, "kv_heads": 1,
        "head_width": 8, "hidden": 32, "context": 64, "rope_width": 8,
    },
    "grades": {"mine": {"from": "one_hop", "max_people": 3}},
    "stages": [
        {"name": "a", "grades": {"one_hop_tiny": 1, "mine": 2}, "row": 64, "batch": 32,
         "steps": 100, "lr": 0.001, "until": {"where1": 0.9}},
        {"name": "b", "grades": {"full": 1}, "row": 64, "batch": 16, "steps": 5, "lr": 1e-4,
         "early_exit": {"scale": 0.2, "rotation": 4}, "betas": [0.9, 0.99],
         "layers": 2},
    ],
}  # fmt: skip


def test_recipe_is_read_with_defaults():
    recipe = recipe_from(GOOD)
    a, b = recipe.stages
    assert (recipe.seed, recipe.shards, recipe.dtype) == (3, 16, "float16")
    assert (a.until, a.chain, a.early_exit) == ({"where1": 0.9}, True, None)
    assert (b.early_exit, b.betas) == (EarlyExitLoss(0.2, 4), (0.9, 0.99))
    (tiny, one), (mine, two) = recipe.shares(a)
    assert (tiny, one, two) == (GRADES["one_hop_tiny"], 1, 2)
    assert mine.max_people == 3 and mine.questions == GRADES["one_hop"].questions
    assert (a.layers, b.layers) == (None, 2)
    config = recipe.config(500, 499)
    assert (config.vocab_size, config.bos, config.eos) == (500, 499, (499,))


def test_recipe_is_read_from_a_file_or_folder(tmp_path):
    (tmp_path / "recipe.json").write_text(json.dumps(GOOD))
    assert read_recipe(tmp_path) == read_recipe(tmp_path / "recipe.json") == recipe_from(GOOD)


def test_recipe_survives_a_round_trip():
    recipe = recipe_from(GOOD)
    assert recipe_from(recipe.as_dict()) == recipe


FAULTS = [
    ((), "colour", 1, "colour"),
    (("name",), None, None, "'name'"),
    (("model",), None, None, "'model'"),
    (("stages",), None, None, "'stages'"),
    ((), "stages", [], "at least one stage"),
    (("stages", 1), "hops", [], "list of integers"),
    (("stages", 1), "hops", [0], "list of integers"),
    (("stages", 1), "hops", [1, 3], "each at most 2 (the blocks it trains)"),
    (("stages", 1), "hops", [1, 1, 2], "at most 2 integers"),
    ((), "seed", -1, "integer"),
    ((), "seed", True, "integer"),
    ((), "shards", 5, "multiple of shards"),
    ((), "dtype", "int8", "float16, bfloat16, float32"),
    ((), "dtype", [], "'dtype'"),
    ((), "grades", {"mine": {"max_poeple": 3}}, "max_poeple"),
    ((), "grades", {}, "mine"),
    (("model",), "widht", 8, "did you mean 'width'"),
    (("model",), "eos", 1, "eos"),
    (("model", "width"), None, None, "width"),
    (("model",), "kv_heads", 3, "kv_heads"),
    (("model",), "context", 32, "context"),
    (("stages", 0), "lernrate", 1, "lernrate"),
    (("stages", 0, "lr"), None, None, "'lr'"),
    (("stages", 0), "lr", "fast", "above 0"),
    (("stages", 0), "lr", float("nan"), "above 0"),
    (("stages", 0), "steps", 1.5, "integer"),
    (("stages", 0), "grades", {"hard": 1}, "hard"),
    (("stages", 0), "grades", {"full": 0}, "share above 0"),
    (("stages", 0), "grades", {}, "share above 0"),
    (("stages", 0), "until", {"where9": 0.5}, "where9"),
    (("stages", 0), "until", {"where1": 1.5}, "accuracy"),
    (("stages", 0), "until", {"where3": 0.5}, "where3"),  # its grades never ask it
    (("stages", 0), "schedule", "linear", "cosine"),
    (("stages", 0), "chain", 1, "true or false"),
    (("stages", 0), "betas", [0.9], "two numbers"),
    (("stages", 0), "betas", [0.9, 1.0], "two numbers"),
    (("stages", 0), "layer_dropout", 1, "below 1"),
    (("stages", 0), "warmup", -1, "integer"),
    (("stages", 0), "layers", 0, "integer >= 1"),
    (("stages", 0), "layers", True, "integer >= 1"),
    (("stages", 1), "layers", 3, "Stage 'b': layers must be at most 2, as the model has; got 3"),
    (("stages", 1), "early_exit", 3, "scale and rotation"),
    (("stages", 1), "early_exit", {"scale": 1.0}, "'rotation'"),
    (("stages", 1, "early_exit"), "rotation", 0, "integer"),
    (("stages", 1, "early_exit"), "rate", 0, "rate"),
    (("stages",), 1, "b", "stage 2"),
]  # fmt: skip


@pytest.mark.parametrize("path, name, value, word", FAULTS)
def test_recipe_fault_is_named(path, name, value, word):
    recipe = copy.deepcopy(GOOD)
    inner = recipe
    *path, last = path if name is None else (*path, name)
    for step in path:
        inner = inner[step]
    if name is None:
        del inner[last]
    else:
        inner[last] = value
    with pytest.raises(MinitxError) as caught:
        recipe_from(recipe)
    message = str(caught.value)
    assert word.lower() in message.lower() and "\n" not in message and message.endswith((".", "?"))


def test_until_mention_is_reachable_by_a_recap():
    """A target accuracy for mentions is allowed, although no sentence is of the kind "mention"."""
    stage = GOOD["stages"][0] | {"grades": {"told_twice": 1}, "until": {"mention": 0.9}}
    assert recipe_from(GOOD | {"stages": [stage]}).stages[0].until == {"mention": 0.9}
    grade = {"from": "told_twice", "recap": ""}
    recipe = GOOD | {"stages": [stage], "grades": {"told_twice": grade}}
    with pytest.raises(MinitxError, match="never ask; they have no answers"):
        recipe_from(recipe)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": 1, "name": 2}', "nul"])
def test_recipe_file_without_an_object_is_refused(tmp_path, text):
    path = tmp_path / "recipe.json"
    path.write_text(text)
    with pytest.raises(MinitxError, match="recipe.json"):
        read_recipe(path)


def test_recipe_fault_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(GOOD | {"dtype": "int4"}))
    with pytest.raises(MinitxError, match=r"recipe\.json: .*int4"):
        read_recipe(path)
    with pytest.raises(MinitxError, match="missing.json"):
        read_recipe(tmp_path / "missing.json")
