"""merge_embeddings: bit for bit the dense model, and refused where a table is too large."""

import json
from dataclasses import replace

import literal_merge_embeddings as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx.build import random_model
from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import PositionEmbedding, TokenEmbedding
from minitx.technique import apply
from minitx.tree import nbytes

SIZES = dict(vocab_size=7, width=4, layers=1, heads=1, kv_heads=1, head_width=4, context=5)
SMALL = replace(FAMILIES["gpt2"], **SIZES, bos=None, eos=())
IDS = np.random.default_rng(0).integers(0, 258, 40)


def test_merged_embedding_worked_example_by_hand():
    """Rows [1, 2], [3, 4] for two tokens, [10, 20], [30, 40] for two positions:

    merged[0] = [1 + 10, 2 + 20], [1 + 30, 2 + 40] = [11, 22], [31, 42]
    merged[1] = [3 + 10, 4 + 20], [3 + 30, 4 + 40] = [13, 24], [33, 44]
    Tokens 1, 0: merged[1, 0], merged[0, 1] = [13, 24], [31, 42]
    """
    tokens, positions = np.array([[1, 2], [3, 4.0]]), np.array([[10, 20], [30, 40.0]])
    embed = PositionEmbedding(TokenEmbedding(tokens), positions)
    dense = LM(replace(random_model(SMALL, 3), embed=embed))
    merged = apply(dense, {"merge_embeddings": True}).model.embed
    assert_same(merged.w, [[[11, 22], [31, 42]], [[13, 24], [33, 44]]], "merged")
    found = merged(np.array([1, 0]), slice(0, 2))
    assert_same(found, [[13, 24], [31, 42]], "rows of tokens 1, 0")


def test_merged_embedding_equals_the_literal_version():
    dense = random_model(SMALL, 3, np.float64)
    merged = apply(LM(dense), {"merge_embeddings": True}).model.embed
    table = literal.merge(dense.embed.tokens.w.tolist(), dense.embed.w.tolist())
    assert_same(merged.w, table, "merged")
    ids = np.array([6, 0, 3])
    expected = literal.embed(table, ids.tolist(), first=2)
    assert_same(merged(ids, slice(2, 5)), expected, "rows from position 2 on")


def test_merged_embedding_rows_are_sums_of_two_float32_rows():
    lm = apply(LM(random_model(SMALL, 3)), {"merge_embeddings": True})
    dense = random_model(SMALL, 3)
    table = lm.model.embed.w
    assert table.shape == (7, 5, 4) and table.dtype == np.float32
    for t in range(7):
        for p in range(5):
            assert_same(table[t, p], dense.embed.tokens.w[t] + dense.embed.w[p])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_merge_embeddings_is_bit_for_bit_the_dense_model(dtype):
    dense = tiny_lm("gpt2", dtype)
    lm = apply(dense, {"merge_embeddings": True})
    assert_same(lm.logits(IDS), dense.logits(IDS))
    assert_same(lm.logits(IDS.astype(np.uint16)), dense.logits(IDS))
    both = np.stack([IDS, IDS[::-1]])
    assert_same(lm.logits(both), dense.logits(both))
    prompts = [[7, 2, 7, 0], [3], [10, 9]]  # padded on the left: positions of their own
    assert lm.generate(prompts, 8) == dense.generate(prompts, 8)


@pytest.mark.parametrize("tied", [True, False])
def test_merge_embeddings_memory_and_reads_are_as_predicted(tied):
    """V * context * D numbers instead of (V + context) D, V D more with a tied head; one row."""
    dense = LM(random_model(replace(SMALL, tied=tied), 3))
    lm = apply(dense, {"merge_embeddings": True})
    grown = 7 * 5 * 4 - (7 + 5) * 4 + (7 * 4 if tied else 0)
    assert nbytes(lm) - nbytes(dense) == 4 * grown
    read = []
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits([1, 2, 3])
        read.append(counts.total("model.embed").weight_bytes)
    assert read == [2 * 3 * 4 * 4, 3 * 4 * 4]


def test_merge_embeddings_tied_head_keeps_its_table():
    dense = tiny_lm("gpt2")
    lm = apply(dense, {"merge_embeddings": True})
    assert lm.model.head.w is dense.model.embed.tokens.w


def test_merge_embeddings_too_large_table_is_refused_with_its_size():
    lm = LM(random_model(SMALL, 3))
    with pytest.raises(
        MinitxError,
        match=r"^merge_embeddings.*7 tokens x 5 positions x 4 .*560 bytes.*max_bytes=559",
    ):
        apply(lm, {"merge_embeddings": {"max_bytes": 559}})
    apply(lm, {"merge_embeddings": {"max_bytes": 560}})


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_merge_embeddings_rotary_positions_are_refused(family):
    with pytest.raises(MinitxError, match="^merge_embeddings needs learned positions.*rotary"):
        apply(tiny_lm(family), {"merge_embeddings": True})


def test_merge_embeddings_beside_first_layer_is_refused():
    with pytest.raises(MinitxError, match="first_layer.*merge_embeddings.*use one of the two"):
        apply(tiny_lm("gpt2"), {"merge_embeddings": True, "first_layer": True})


# Cost formula ------------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
GPT2 |= {"vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None}


def test_merge_embeddings_cost_of_gpt2(tmp_path, capsys):
    """V * context * D numbers instead of (V + context) D: 40 billion for the smallest GPT-2."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2))
    c = cost("merge_embeddings", path)
    assert c.separate == (50257 + 1024) * 768
    assert c.merged == 50257 * 1024 * 768 + 50257 * 768
    path.write_text(json.dumps(GPT2 | {"tie_word_embeddings": False}))
    assert cost("merge_embeddings", path).merged == 50257 * 1024 * 768
    assert main(["cost", "merge-embeddings", "--config", str(path)]) == 0
    assert "1,003.6 times the memory saves 768 additions" in capsys.readouterr().out
    json.dumps(c.as_dict())


def test_merge_embeddings_cost_without_learned_positions_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(GPT2 | {"model_type": "gpt_neox", "intermediate_size": 3072}))
    with pytest.raises(MinitxError, match="adds no learned positions"):
        cost("merge_embeddings", path)
