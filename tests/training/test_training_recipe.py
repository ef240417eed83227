"""Recipes: a valid one is read with its defaults; each fault is reported in one sentence."""

import copy
import json
from dataclasses import asdict

import pytest

from minitx.errors import MinitxError
from minitx.training import stories as stories_module
from minitx.training.data import story_tokenizer
from minitx.training.recipe import EarlyExitLoss, read_recipe, recipe_from
from minitx.training.stories.grades import GRADES
from minitx.training.worker import layout_of

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


# Every field with every type ---------------------------------------------------------------------

FULL = copy.deepcopy(GOOD)
FULL["model"] |= {
    "activation": "silu", "norm_eps": 1e-5, "rope_base": 1e4, "parallel": False, "skipless": False,
    "tied": False, "qkv_bias": False, "out_bias": False, "ffn_bias": False, "vocab_size": 2000,
}  # fmt: skip
FULL["stages"][0] |= {
    "every": 100, "check": 4, "warmup": 0, "schedule": "constant", "final": 0.1, "chain": True,
    "answer_weight": 1.0, "weight_decay": 0.0, "clip": 1.0, "muon": None, "layer_dropout": 0.0,
    "hops": [1], "detector": {"k": 2, "weight": 0.01},
}  # fmt: skip
FULL["grades"]["mine"] = asdict(GRADES["one_hop"])
FULL |= {"dtype": "float16", "shards": 16, "save_every": 1.0}
VALUES = [
    None, True, 0, -1, 1, 10**9, 2**63, 10**400, 0.5, 1e308, 1e-320, float("nan"), float("inf"), "",
    "no", "\x1b[2J", "x" * 10**5, [], [1], {}, {"x": 1}, [[]],
]  # fmt: skip


def paths_of(value, path=()):
    if path:
        yield path
    inner = (
        value if isinstance(value, dict) else dict(enumerate(value if type(value) is list else ()))
    )
    for key, item in inner.items():
        yield from paths_of(item, (*path, key))


def test_every_field_with_a_value_of_any_type_is_refused_or_makes_a_model():
    """``rope_base: {}`` or ``tied: "no"`` is found before the first step, not after an hour."""
    tokenizer = story_tokenizer()
    for path in paths_of(FULL):
        for value in VALUES:
            recipe = copy.deepcopy(FULL)
            inner = recipe
            for step in path[:-1]:
                inner = inner[step]
            inner[path[-1]] = value
            try:
                accepted = recipe_from(recipe)
                layout_of(accepted, tokenizer)  # what the workers make of it
            except MinitxError as error:
                text = str(error)
                assert text.isprintable() and len(text) <= 400, f"{path}: {text}"
                continue
            kind = type(inner[path[-1]])
            assert kind in (type(None), bool, int, float, str, list, dict), path
            assert accepted.config(len(tokenizer), 0).tied in (True, False)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("rope_base", {}, "rope_base = {}; expected a finite number"),
        ("rope_base", -1.0, "expected a base above"),
        ("tied", "no", "tied = 'no'; expected true or false"),
        ("norm_eps", float("nan"), "norm_eps = nan; expected a finite number"),
        ("layers", 10**6, "has 1000000 layers"),
        ("width", 10**9, "weights; training"),
        ("context", 10**9, "rotary tables"),
        ("activation", "gelu", "cannot be written"),  # no llama of transformers has it
        ("parallel", True, "cannot be written"),
    ],
)
def test_model_that_cannot_be_made_or_written_is_refused(field, value, words):
    with pytest.raises(MinitxError, match=words):
        recipe_from(GOOD | {"model": GOOD["model"] | {field: value}})


def test_split_that_no_story_falls_into_is_refused_instead_of_searched_for_ever(monkeypatch):
    monkeypatch.setattr(stories_module, "split_of", lambda text: "train")
    next(stories_module.stories("train", "one_hop", 0))
    with pytest.raises(MinitxError, match="None of 2000 stories of this grade is in the split"):
        next(stories_module.stories("evaluation", "one_hop_tiny", 0))
