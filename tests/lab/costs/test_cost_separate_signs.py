"""``minitx cost separate-signs``: by hand, and against the sums of real models."""

import json

import numpy as np
import pytest
from tiny import tiny_lm

from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.model import Linear
from minitx.precompute.separate_signs import UnsignedLinear
from minitx.technique import apply
from minitx.tree import walk, weights

MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
MISTRAL |= {"vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False}
WEIGHTS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # of the blocks


def test_large_model_by_hand(cost_of):
    """4,096 * 127 * 127 = 66,064,384 < 2^26; 14,336 * 127 * 127 = 231,225,344 < 2^28: unsigned, so
    no bit for a sign. At 2 bits the two copies are masks of one bit a weight."""
    c = cost_of("separate_signs", MISTRAL)
    assert (c.signed_bytes, c.split_bytes) == (WEIGHTS, WEIGHTS * 14 // 8)
    assert [c.accumulator(m) for m in c.matrices] == [26, 26, 26, 26, 28]
    c = cost_of("separate_signs", MISTRAL, "bits=2")
    assert c.signed_bytes == c.split_bytes == WEIGHTS // 4


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_sums_of_a_real_model_fit_as_predicted(tmp_path, bits):
    dense = tiny_lm()
    write_model(dense.model, tmp_path, "F32")
    c = cost("separate_signs", tmp_path, [f"bits={bits}"])
    block = dense.model.stack.blocks[0]
    full = Linear(np.ones_like(block.ffn.down.w))  # all weights as large as they can be
    up, down = UnsignedLinear.of(full, bits).sums(np.full((1, 24), 127), np.zeros((1, 24)))
    assert int(up.max()).bit_length() == c.accumulator(c.matrices[-1]) and not down.any()
    n = sum(w.size for path, w in weights(dense.model.stack).items() if path.endswith(".w"))
    assert c.multiply_adds == {"signed": n, "split": 2 * n, "inputs split too": 4 * n}
    lm = apply(dense, {"separate_signs": {"bits": bits}})
    stored = sum(node.plus.size for _, node in walk(lm) if type(node) is UnsignedLinear)
    assert stored == n


def test_report_names_experts_and_matrices(cost_of):
    c = cost_of("separate_signs", MISTRAL | {"model_type": "mixtral", "num_local_experts": 8})
    assert "experts of 3 matrices" in str(c) and "Note: all experts are counted" in str(c)
    assert "W_down" in str(c) and "14,336" in str(c)
    assert json.loads(json.dumps(c.as_dict()))["technique"] == "separate_signs"


def test_bad_options_are_refused(cost_of):
    message = "^cost separate_signs: bits must be an integer, 2 to 32; got 1.$"
    with pytest.raises(MinitxError, match=message):
        cost_of("separate_signs", MISTRAL, "bits=1")
