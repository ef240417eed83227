"""``minitx cost separate-magnitudes``: by hand, and against the bytes of real models."""

import json

import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.technique import apply
from minitx.tree import nbytes

MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
MISTRAL |= {"vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False}
WEIGHTS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # of the blocks


def test_large_model_by_hand(cost_of):
    """1 % of 4,096 inputs are 41, of 14,336 are 143; each takes 32 bits and a row number of 16."""
    c = cost_of("separate_magnitudes", MISTRAL)
    first, down = c.matrices[0], c.matrices[-1]
    assert c.extra(first) == 32 + 41 * 48 and c.extra(down) == 32 + 143 * 48
    assert c.per_weight(first) == 4 + 2000 / 4096
    assert c.group(first) == 32 * 4096 / 2000  # 65.5
    outputs = 32 * (4096 + 2 * 1024 + 4096 + 2 * 14336)
    bits = WEIGHTS * 4 + outputs * 2000 + 32 * 4096 * (32 + 143 * 48)
    assert c.bytes == {
        "float32": 4 * WEIGHTS,
        "plain": (WEIGHTS * 4 + (outputs + 32 * 4096) * 32) // 8,
        "separated": bits // 8,
    }


def test_share_0_is_plain_rounding(cost_of):
    none = cost_of("separate_magnitudes", MISTRAL, "share=0")
    assert none.bytes["plain"] == none.bytes["separated"]
    assert none.group(none.matrices[0]) == 4096


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_equal_those_of_a_real_model(tmp_path, family):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    c = cost("separate_magnitudes", tmp_path, ["share=0.2", "bits=3"])
    lm = apply(dense, {"separate_magnitudes": {"share": 0.2, "bits": 3}})
    assert nbytes(dense) - nbytes(lm) == c.bytes["float32"] - c.bytes["separated"]


def test_report_names_experts_and_matrices(cost_of):
    c = cost_of("separate_magnitudes", MISTRAL | {"model_type": "mixtral", "num_local_experts": 8})
    assert "experts of 3 matrices" in str(c) and "Note: all experts are counted" in str(c)
    assert "W_down" in str(c) and "14,336" in str(c)
    assert json.loads(json.dumps(c.as_dict()))["technique"] == "separate_magnitudes"


@pytest.mark.parametrize(
    "word, message",
    [
        ("bits=9", "bits must be an integer, 2 to 8; got 9."),
        ("share=2", "share must be a number, 0 to 1; got 2.0."),
    ],
)
def test_bad_options_are_refused(cost_of, word, message):
    with pytest.raises(MinitxError, match=f"^cost separate_magnitudes: {message}$"):
        cost_of("separate_magnitudes", MISTRAL, word)
