"""The shipped weights reach the accuracy in their READMEs, measured on held-out stories."""

import json
import re

import numpy as np
import pytest

import minitx
from minitx.checkpoints.find import shipped
from minitx.lab.evaluate import evaluate_model
from minitx.training.recipe import read_recipe
from minitx.tree import weights

NAMES = [
    "stories", "stories-draft", "stories-mod", "stories-parallel", "stories-relu",
    "stories-skipless",
]  # fmt: skip
WITH = {"stories-mod": {"mixture_of_depths": True}}  # trained for it


def test_shipped_models_are_complete_and_small():
    assert sorted(shipped()) == NAMES
    assert (shipped()["stories"] / "dota.safetensors").exists()
    assert (shipped()["stories-mod"] / "mixture_of_depths.safetensors").exists()
    size = sum(f.stat().st_size for folder in shipped().values() for f in folder.iterdir())
    assert size < 16e6


@pytest.mark.parametrize("name", NAMES)
def test_folder_matches_recipe(name):
    folder = shipped()[name]
    recipe = read_recipe(folder / "recipe.json")
    model = minitx.load(name).model
    assert recipe.name == name
    for field, value in recipe.model.items():
        assert getattr(model.config, field) == value, field
    assert {"tokenizer.json", "tokenizer_config.json", "README.md"} <= {
        f.name for f in folder.iterdir()
    }


def test_shipped_models_cover_families():
    families = {name: minitx.load(name).model.config for name in NAMES}
    assert families["stories"].family == "llama"
    assert 8 <= families["stories"].layers <= 12
    assert families["stories"].group > 1 and families["stories"].context >= 512
    assert (families["stories-relu"].family, families["stories-relu"].activation) == (
        "gpt2",
        "relu",
    )
    assert families["stories-parallel"].family == "gpt_neox"
    assert families["stories-parallel"].parallel and families["stories-parallel"].layers == 4
    assert families["stories-draft"].layers == 2
    assert [name for name in NAMES if families[name].skipless] == ["stories-skipless"]


def multiply_adds(model) -> int:
    """Multiply-adds per token: every matrix once, and the tied head."""
    matrices = [w for path, w in weights(model).items() if w.ndim == 2 and "embed" not in path]
    return sum(w.size for w in matrices) + model.head.w.size


def test_draft_model_takes_a_tenth_of_multiply_adds():
    stories, draft = (minitx.load(n).model for n in ("stories", "stories-draft"))
    assert multiply_adds(draft) <= multiply_adds(stories) / 10


def test_story_models_share_tokenizer():
    text = "Once upon a time there was a girl named Eva. Where is the basket? Zürich 42!"
    ids = [minitx.load(name).tokenizer.encode(text) for name in NAMES]
    assert all(i == ids[0] for i in ids)


@pytest.fixture(scope="module")
def profile():
    """Metrics on 120 held-out stories for an exit after every block."""
    return evaluate_model(minitx.load("stories"), 120, depths=True).depths


def test_stories_recall_accuracy(profile):
    full = profile[-1]
    assert full.by_hops[1] >= 0.97 and full.by_hops[2] >= 0.85  # 99 and 93 % on 500 stories
    guess = full.guess["where3"]
    assert full.by_hops[3] > guess + 0.5, (full.by_hops[3], guess)
    assert full.by_kind["colour"] > 0.9 and full.by_kind["count"] > 0.7
    assert full.gap <= 0.03  # 0.027 nats above the entropy of the text


def test_earlier_exit_lowers_accuracy(profile):
    L = len(profile)
    quarter, three_quarters, full = profile[L // 4 - 1], profile[3 * L // 4 - 1], profile[-1]
    assert quarter.by_hops[2] <= full.by_hops[2] - 0.10
    assert three_quarters.by_hops[2] >= full.by_hops[2] - 0.03  # 0.2 points on 500 stories
    assert three_quarters.loss < quarter.loss


@pytest.mark.parametrize("name", NAMES)
def test_readme_accuracy_matches_evaluation(name):
    """The table in weights/NAME/README.md must match `minitx evaluate` for the same weights."""
    text = (shipped()[name] / "README.md").read_text(encoding="utf-8")
    stated = {k: float(v) / 100 for k, v in re.findall(r"^(\w+) +\d +\d+ +([\d.]+) %", text, re.M)}
    found = evaluate_model(minitx.load(name, **WITH.get(name, {})), 40)
    assert set(found.by_kind) <= set(stated)
    for kind, accuracy in found.by_kind.items():
        # 40 stories have few answers of some kinds: allow 4 standard errors of a fraction.
        assert abs(accuracy - stated[kind]) < 2 / found.answers[kind] ** 0.5, kind


def test_weights_are_16_bit_on_disk_and_float32_in_memory():
    for folder in shipped().values():
        header = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(header[:8], "little")
        tensors = json.loads(header[8 : 8 + length])
        tensors.pop("__metadata__", None)
        assert {t["dtype"] for t in tensors.values()} <= {"F16", "BF16"}
    assert minitx.load("stories").model.embed.w.dtype == np.float32
