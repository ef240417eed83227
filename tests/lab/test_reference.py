"""minitx computes what another framework computes: reference outputs in tests/reference, made by
Hugging Face transformers. What ``minitx check`` makes of models that differ: test_check.py."""

from pathlib import Path

import numpy as np
import pytest
from same import assert_same

import minitx
from minitx.checkpoints.find import shipped
from minitx.checkpoints.hf_config import read_config
from minitx.lab.check import check_model
from minitx.lab.comparison import AGREES
from minitx.lab.inside import STEPS, inside
from minitx.lab.reference import FOLDER, find_references, read_reference, seeded_model

FILES = find_references()
RANDOM = {n: read_reference(path) for n, path in FILES.items() if n.startswith("random-")}


# No other framework has skipless models.
COMPARED = [n for n, f in shipped().items() if not read_config(f / "config.json").skipless]


def test_shipped_models_and_references_match():
    assert set(FILES) == set(RANDOM) | set(COMPARED)
    assert set(shipped()) - set(COMPARED) == {"stories-skipless"}


@pytest.mark.parametrize("name", FILES)
def test_model_agrees_with_its_reference(name):
    found = check_model(name)
    layers = found.reference.sizes["layers"]
    assert len(found.stages) == layers + 3  # embedding, blocks, norm, logits
    for stage in found.stages:
        assert stage.largest > 0.1
        assert stage.relative["float32"] <= 2e-5, stage
        assert stage.relative["float64"] <= 1e-10, stage
    assert found.greedy == {"float32": 32, "float64": 32}
    assert found.wrong_text is None
    assert found.verdict == AGREES


@pytest.mark.parametrize("name", FILES)
def test_reference_matches_its_description(name):
    r = read_reference(FILES[name])
    T, rows = len(r.ids), r.rows
    assert T > 64, "longer than the block of queries that attention handles at a time"
    assert rows[0] == 0 and rows[-1] == T - 1 and (np.diff(rows) > 0).all() and len(rows) == 12
    assert set(r.about["versions"]) == {"torch", "transformers", "tokenizers", "numpy", "python"}
    assert len(set(r.greedy.tolist())) > 3, "a text that says something about the cache"
    single, double = r.stages("float32"), r.stages("float64")
    for name in double:
        assert single[name].dtype == np.float32 and double[name].dtype == np.float64
        assert np.isfinite(single[name]).all() and np.isfinite(double[name]).all()
        if name != "embedding":  # which is no more than rows of a table
            rounded = double[name].astype(np.float32)
            assert (double[name] != rounded).mean() > 0.9, "float64 from end to end"
            assert (single[name] != rounded).any(), "two runs, neither of them the other's copy"


@pytest.mark.parametrize("name", FILES)
def test_every_step_inside_the_blocks_agrees_with_the_reference(name):
    r = read_reference(FILES[name])
    if name in RANDOM:
        model = seeded_model(r.config, r.seed, "float64")
    else:
        model = minitx.load(name, dtype="float64").model
    absent = {"gpt2": {"rotated queries", "rotated keys", "FFN gate"}, "gpt_neox": {"FFN gate"}}
    absent = absent.get(model.config.family, set())
    if model.config.parallel:
        absent = absent | {"residual after attention"}
    assert set(r.inside) == set(STEPS) - absent
    assert r.inside_rows.tolist() == [round((len(r.ids) - 1) / 2), len(r.ids) - 1]
    for block in range(model.config.layers):
        found = inside(model, block, r.ids)
        assert set(found) - set(r.inside) <= absent | {"product with W_o"}
        for step, expected in r.inside.items():
            what = f"{step} in block {block} of {name}"
            assert abs(expected[block]).max() > 0.05 and expected.dtype == np.float64, what
            ours = found[step][r.inside_rows]
            assert_same(ours, expected[block], what, ("position", *STEPS[step]), 1e-12)
        weights = r.inside["attention weights"][block]  # (2, H, T)
        assert_same(weights.sum(-1), np.ones(weights.shape[:2]), "sums of weights", tolerance=1e-14)


@pytest.mark.parametrize("name", COMPARED)
def test_reference_prompt_is_text(name):
    r = read_reference(FILES[name])
    lm = minitx.load(name)
    (prompt, _), (story, _), (hard, _) = r.about["texts"]
    assert prompt == "Once upon a time" and not hard.isascii()
    assert lm.encode(prompt) == r.prompt.tolist()
    assert lm.encode(story)[: lm.model.config.context] == r.ids.tolist()


def test_random_models_cover_the_families():
    configs = [r.config for r in RANDOM.values()]
    llama = [c for c in configs if c.family == "llama"]
    assert {c.kv_heads == c.heads for c in llama} == {True, False}
    assert {c.kv_heads for c in llama if c.kv_heads < c.heads} == {1, 2}
    assert len({c.rope_base for c in configs}) >= 4 and len({c.norm_eps for c in configs}) >= 3
    assert any(c.heads * c.head_width > c.width for c in llama)
    assert any(c.heads * c.head_width < c.width for c in llama)
    assert any(c.qkv_bias and c.out_bias and c.ffn_bias for c in llama)
    gpt2 = [c for c in configs if c.family == "gpt2"]
    assert {c.activation for c in gpt2 if c.tied} == {"gelu_tanh", "relu"}
    neox = [c for c in configs if c.family == "gpt_neox"]
    assert {c.parallel for c in neox if c.rope_width < c.head_width} == {True, False}
    for family in (llama, gpt2, neox):
        assert {c.tied for c in family} == {True, False}


def test_reference_folder_is_small():
    files = [path for path in Path(FOLDER).rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 4_500_000
