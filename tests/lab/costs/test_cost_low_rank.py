"""``minitx cost low-rank``: the break-even rank by hand, and the savings of real models."""

import json

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.hf_config_write import config_fields
from minitx.errors import MinitxError
from minitx.lab.block_matrices import Matrix
from minitx.lab.cost import cost as checked_cost
from minitx.lab.costs.low_rank import break_even, cost
from minitx.lab.layout import fit
from minitx.lab.shape import read_shape
from minitx.ledger import counting
from minitx.technique import apply
from minitx.tree import nbytes

MISTRAL = {
    "model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def mistral(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MISTRAL))
    return read_shape(tmp_path)


def test_break_even_by_hand():
    """in out / (in + out): half the width of a square; 72 of 288 is 34 % of a 768x288."""
    square, wide = Matrix("", 4096, 4096, 1), Matrix("", 768, 288, 1)
    assert break_even(square) == 2048
    assert break_even(wide) == pytest.approx(209.45, abs=0.01)
    assert round(72 / break_even(wide), 2) == 0.34


def test_rank_1000_of_mistral_by_hand(mistral):
    c = cost(mistral, rank=1000)  # W_k, W_v (4096, 1024) break even at 819, so they stay
    size = {m["name"]: m["size"] for m in c.as_dict()["matrices"]}
    assert size["W_q"] == size["W_o"] == 1000 * 8192
    assert size["W_k, W_v"] == 4096 * 1024
    assert size["W_gate, W_up"] == size["W_down"] == 1000 * (4096 + 14336)
    after = 32 * (2 * 8_192_000 + 2 * 4_194_304 + 3 * 18_432_000)
    assert c.after == after and c.before == 32 * (41_943_040 + 176_160_768)
    assert c.total == (c.before + 262_144_000, after + 262_144_000)
    assert c.multiply_adds == (c.before + 131_072_000, after + 131_072_000)
    assert "dense" in str(c) and "3,185.8" in str(c)
    assert cost(mistral, rank=5000).after == cost(mistral, share=1.0).after == c.before


def test_share_is_a_share_of_the_weights(mistral):
    for share in (0.25, 0.5, 0.9):
        c = cost(mistral, share=share)
        assert share - 0.001 < c.after / c.before <= share


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"rank": 5}, {"share": 0.5}, {"share": 0.05}, {"rank": 9}])
def test_predicted_savings_equal_those_of_a_model(tmp_path, family, options):
    lm = tiny_lm(family)
    (tmp_path / "config.json").write_text(json.dumps(config_fields(lm.model.config)))
    c = cost(read_shape(tmp_path), **options)
    factorized = apply(lm, {"low_rank": {"weighted": False} | options})
    assert nbytes(lm) - nbytes(factorized) == 4 * (c.before - c.after)
    work = []
    for model in (lm, factorized):
        with counting(model) as counts:
            model.logits(np.arange(7))
        work.append(counts.total().multiply_adds)
    before, after = c.multiply_adds
    assert work[0] - work[1] == 7 * (before - after)


def test_command_prints_the_cost_and_refuses_bad_options(run, workdir, mistral):
    (workdir / "config.json").write_text(json.dumps(MISTRAL))
    status, out, err = run("cost", "low-rank", "rank=1000", "--config", workdir)
    assert (status, out, err) == (0, f"{fit(str(cost(mistral, rank=1000)))}\n", "")
    found = json.loads(run("cost", "low-rank", "--config", workdir, "--json")[1])
    assert found == json.loads(json.dumps(cost(mistral).as_dict()))
    for words in (["rank=0"], ["share=0"], ["share=1.5"], ["energy=0.9"]):
        status, out, err = run("cost", "low-rank", *words, "--config", workdir)
        assert (status, out) == (2, "") and err.count("\n") == 1
    message = "cost low_rank: rank must be an integer, at least 1, or None; got 0"
    with pytest.raises(MinitxError, match=message):
        checked_cost("low_rank", workdir / "config.json", ["rank=0"])
