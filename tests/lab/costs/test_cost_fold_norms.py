"""``minitx cost fold-norms`` and ``fuse-projections``: FlashNorm's figures that follow from sizes
alone, and counts of real models."""

import json
from dataclasses import replace

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.ledger import counting
from minitx.model import LayerNorm, RMSNorm
from minitx.technique import apply
from minitx.tree import walk, weights

SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES |= {"intermediate_size": 11008, "vocab_size": 32000}
LLAMA = SIZES | {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
PYTHIA = SIZES | {"model_type": "gpt_neox", "hidden_act": "gelu", "tie_word_embeddings": False}
# arXiv 2407.09577's models of the latency table: n = 576, k = 960 and n = 512 of the timing example
SMOL = {"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "hidden_act": "silu"}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
SMOL |= {"vocab_size": 49152, "tie_word_embeddings": True}


def test_fold_norms_cost_timing_example(cost_of):
    """D = 512, vector width 128: 24 cycles in sequence, 8 of them waiting and 16 of the product."""
    c = cost_of("fold_norms", LLAMA | {"hidden_size": 512, "num_attention_heads": 8})
    assert (c.wait, c.product, c.as_dict()["sequential"]) == (8, 16, 24)
    c = cost_of(
        "fold_norms", LLAMA | {"hidden_size": 512, "num_attention_heads": 8}, "vector_width=64"
    )
    assert (c.wait, c.product) == (16, 64)


def test_fold_norms_cost_sizes_of_the_latency_table(cost_of):
    c = cost_of("fold_norms", SMOL)
    assert (c.shape.width, c.projections) == (576, 960)  # the paper's n, k of norm and projection


def test_fold_norms_cost_weights_and_multiplications(cost_of):
    """D weights and D multiplications for each gain, D weights for each bias."""
    c = cost_of("fold_norms", LLAMA)
    assert (c.norms, c.weights, c.multiplications, c.additions) == (65, 266240, 266240, 0)
    assert c.new_biases == 0
    c = cost_of("fold_norms", PYTHIA)
    assert (c.norms, c.weights, c.multiplications) == (65, 2 * 266240, 266240)
    assert c.additions == 266240
    assert c.new_biases == 32 * (3 * 4096 + 11008) + 32000
    c = cost_of("fold_norms", SMOL)
    assert c.norms == 60 and "the last norm stays" in c.notes()[0]
    assert c.relative == pytest.approx(60 * 576 / 134_515_008, rel=1e-9)  # of SmolLM2-135M


def test_fold_norms_cost_of_a_deferred_division(cost_of):
    """2 H d - d with 1 / rms in the rotary tables; F - D and 2 F - D in a gated FFN."""
    c = cost_of("fold_norms", LLAMA)
    assert c.rope == 2 * 128 * 32 - 128
    assert (c.glu, c.bilinear) == (11008 - 4096, 2 * 11008 - 4096)
    grouped = cost_of("fold_norms", LLAMA | {"num_key_value_heads": 8})
    assert grouped.rope == 128 * 40 - 128
    c = cost_of("fold_norms", PYTHIA)
    assert (c.glu, c.bilinear) == (0, 0) and "bilinear" not in str(c)


@pytest.mark.parametrize(
    "kind, norms, vectors",
    [
        ("mistral", 65, 1),
        ("t5", 65, 1),
        ("gpt2", 65, 2),
        ("olmo", 65, 0),
        ("cohere", 33, 1),
        ("phi", 33, 2),
    ],
)
def test_fold_norms_cost_of_kinds_of_norms(cost_of, kind, norms, vectors):
    fields = LLAMA | {"model_type": kind, "max_position_embeddings": 8}
    c = cost_of("fold_norms", fields)
    assert (c.norms, c.vectors) == (norms, vectors)
    assert (c.weights, c.multiplications > 0) == (norms * vectors * 4096, vectors > 0)
    if vectors in (1, 2) and kind != "cohere":
        other = cost_of("fold_norms", fields, f"norm={'layer' if vectors == 1 else 'rms'}")
        assert other.vectors == 3 - vectors


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_norms_cost_is_what_folding_a_model_saves(tmp_path, family):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    c = cost("fold_norms", tmp_path)
    lm = apply(dense, {"fold_norms": True})
    norms = [sum(type(n) in (RMSNorm, LayerNorm) for _, n in walk(m)) for m in (dense, lm)]
    assert norms[0] - norms[1] == c.norms
    sizes = [sum(w.size for w in weights(m).values()) for m in (dense, lm)]
    biases = 0 if lm.model.config.tied else lm.model.config.vocab_size  # a head gains one
    gained = biases if c.vectors == 2 else 0
    assert sizes[0] - sizes[1] == c.weights - gained


# fuse_projections --------------------------------------------------------------------------------


def test_fuse_projections_cost_products_and_reads(cost_of):
    c = cost_of("fuse_projections", LLAMA | {"num_key_value_heads": 8}, "tokens=10", "keys=20")
    assert c.qkv == (4096, 6144) and c.gate_up == (4096, 22016)
    assert c.products == (7, 4) and c.inputs_read == (5 * 4096, 2 * 4096)
    assert c.scalings == 32 * 32 * 10 * 20 and not c.bitwise  # sqrt(128)
    c = cost_of("fuse_projections", PYTHIA | {"num_attention_heads": 64})
    assert c.products == (6, 4) and c.gate_up is None and c.inputs_read == (4 * 4096, 2 * 4096)
    assert c.bitwise  # sqrt(64) = 8
    c = cost_of("fuse_projections", LLAMA | {"model_type": "mixtral", "num_local_experts": 8})
    assert c.products == (28, 18) and c.inputs_read == (19 * 4096, 9 * 4096)


@pytest.mark.parametrize("d, bitwise", [(16, True), (32, False), (36, False), (256, True)])
def test_fuse_projections_cost_scale_that_is_a_power_of_two(cost_of, d, bitwise):
    assert cost_of("fuse_projections", LLAMA | {"head_dim": d}).bitwise == bitwise


@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_projections_cost_is_what_fusing_a_model_saves(tmp_path, family, monkeypatch):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    c = cost("fuse_projections", tmp_path)
    called, totals = [], []
    for lm in (dense, apply(dense, {"fuse_projections": True})):
        with counting(lm) as counts:
            lm.logits(np.array([65]))
        below = [p for p in counts.entries if ".blocks." in p and not p.endswith(".attend")]
        called.append(len(below))
        totals.append(counts.total())
    assert called == [2 * n for n in c.products] and totals[0] == totals[1]


# Text, and refusals ------------------------------------------------------------------------------


def test_fold_norms_and_fuse_projections_cost_texts(cost_of):
    text = str(cost_of("fold_norms", LLAMA))
    assert "266,240" in text and "6,912" in text and "\n\n" in text
    text = str(cost_of("fuse_projections", LLAMA))
    assert "W_qkv is 4,096 x 12,288, W_gu is 4,096 x 22,016" in text and "may round" in text
    for name in ("fold_norms", "fuse_projections"):
        json.dumps(cost_of(name, SMOL).as_dict())
    gemma = cost_of("fold_norms", LLAMA | {"model_type": "gemma2", "tie_word_embeddings": True})
    assert len(gemma.notes()) == 2
    assert replace(gemma.shape, tied=False).tied is False


@pytest.mark.parametrize(
    "name, word, message",
    [
        ("fold_norms", "vector_width=0", "vector_width must be an integer, at least 1; got 0"),
        ("fold_norms", "norm=batch", "must be one of known, rms, layer"),
        ("fuse_projections", "tokens=0", "tokens must be an integer, at least 1; got 0"),
        ("fuse_projections", "n=1", "no option 'n'"),
    ],
)
def test_fold_norms_and_fuse_projections_cost_refusals(cost_of, name, word, message):
    with pytest.raises(MinitxError, match=message):
        cost_of(name, LLAMA, word)
