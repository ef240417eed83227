"""``minitx cost`` of orders, of separated signs and of separated magnitudes: by hand, and against
the bytes and sums of real models."""

import json

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.model import Linear
from minitx.precompute.order_products.accumulator import bits_for
from minitx.precompute.separate_signs import UnsignedLinear
from minitx.technique import apply
from minitx.tree import nbytes, walk, weights

MISTRAL = {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32}
MISTRAL |= {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336}
MISTRAL |= {"vocab_size": 32000, "hidden_act": "silu", "tie_word_embeddings": False}
WEIGHTS = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)  # of the blocks


def test_orders_of_mistral_by_hand(cost_of):
    c = cost_of("order_products", MISTRAL)
    assert c.weights == WEIGHTS and c.orders == 2 * WEIGHTS  # 2 bytes beside 1
    # 12 bits for the index of one of 4,096 inputs, 14 for one of 14,336
    down = 32 * 4096 * 14336
    assert c.packed == ((WEIGHTS - down) * 12 + down * 14) // 8
    assert c.shared == 2 * 32 * (6 * 4096 + 14336)
    bits = [row["accumulator_bits"] for row in c.as_dict()["matrices"]]
    # 4,096 * 127 * 127 = 66,064,384 < 2^26; 14,336 * 127 * 127 = 231,225,344 < 2^28; and a sign
    assert bits == [27, 27, 27, 27, 29]
    four = cost_of("order_products", MISTRAL, "bits=4")
    assert four.weights == WEIGHTS // 2
    assert four.as_dict()["matrices"][0]["accumulator_bits"] == 23  # 4,096 * 7 * 127 = 3,641,344


def test_accumulator_width_holds_the_largest_sum(cost_of):
    for inputs in (8, 100, 128):
        c = cost_of("order_products", MISTRAL | {"hidden_size": inputs, "head_dim": 4})
        worst = inputs * 127 * 127
        assert c.as_dict()["matrices"][0]["accumulator_bits"] == bits_for(-worst, worst)


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_real_orders_and_magnitudes(tmp_path, family):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    c = cost("order_products", tmp_path)
    for order, expected in (("alternating", c.orders), ("largest_rows_first", c.shared)):
        lm = apply(dense, {"order_products": {"order": order}})
        assert nbytes(lm) - nbytes(dense) == expected
    c = cost("separate_magnitudes", tmp_path, ["share=0.2", "bits=3"])
    lm = apply(dense, {"separate_magnitudes": {"share": 0.2, "bits": 3}})
    assert nbytes(dense) - nbytes(lm) == c.bytes["float32"] - c.bytes["separated"]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_unsigned_sums_fit_as_predicted(tmp_path, bits):
    dense = tiny_lm()
    write_model(dense.model, tmp_path, "F32")
    c = cost("separate_signs", tmp_path, [f"bits={bits}"])
    block = dense.model.stack.blocks[0]
    full = Linear(np.ones_like(block.ffn.down.w))  # all weights as large as they may be
    up, down = UnsignedLinear.of(full, bits).sums(np.full((1, 24), 127), np.zeros((1, 24)))
    assert int(up.max()).bit_length() == c.accumulator(c.matrices[-1]) and not down.any()
    n = sum(w.size for path, w in weights(dense.model.stack).items() if path.endswith(".w"))
    assert c.multiply_adds == {"together": n, "zeros": 2 * n, "zeros and inputs": 4 * n}
    lm = apply(dense, {"separate_signs": {"bits": bits}})
    kept = sum(node.plus.size for _, node in walk(lm) if type(node) is UnsignedLinear)
    assert kept == n


def test_signs_of_a_large_model(cost_of):
    c = cost_of("separate_signs", MISTRAL)
    assert (c.together, c.apart) == (WEIGHTS, WEIGHTS * 14 // 8)
    assert [c.accumulator(m) for m in c.matrices] == [26, 26, 26, 26, 28]  # no sign to keep
    c = cost_of("separate_signs", MISTRAL, "bits=2")
    assert c.together == c.apart == WEIGHTS // 4  # two masks


def test_magnitudes_of_a_large_model(cost_of):
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
    none = cost_of("separate_magnitudes", MISTRAL, "share=0")
    assert none.bytes["plain"] == none.bytes["separated"] and none.group(first) == 4096


@pytest.mark.parametrize("name", ["order_products", "separate_signs", "separate_magnitudes"])
def test_texts(cost_of, name):
    c = cost_of(name, MISTRAL | {"model_type": "mixtral", "num_local_experts": 8})
    assert "experts of 3 matrices" in str(c) and "Note: all experts are counted" in str(c)
    assert "W_down" in str(c) and "14,336" in str(c)
    assert json.loads(json.dumps(c.as_dict()))["technique"] == name


@pytest.mark.parametrize(
    "name, words, message",
    [
        (
            "order_products",
            ["bits=1"],
            "cost order_products: bits must be an integer, 2 to 32; got 1",
        ),
        ("order_products", ["input-bits=40"], "input_bits must be an integer, 2 to 32; got 40"),
        ("separate_signs", ["bits=1"], "weights of 2 to 32 bits, not 1"),
        ("separate_magnitudes", ["bits=9"], "2 to 8 bits and a share of 0 to 1, not 9 and 0.01"),
        ("separate_magnitudes", ["share=2"], "not 4 and 2"),
    ],
)
def test_refusals(cost_of, name, words, message):
    with pytest.raises(MinitxError, match=message):
        cost_of(name, MISTRAL, *words)
