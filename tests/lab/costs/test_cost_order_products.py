"""``minitx cost order-products``: by hand, and against the bytes of real models."""

import json

import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.precompute.order_products.accumulator import bits_for
from minitx.technique import apply
from minitx.tree import nbytes

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
def test_bytes_of_real_orders(tmp_path, family):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    c = cost("order_products", tmp_path)
    for order, expected in (("alternating", c.orders), ("largest_rows_first", c.shared)):
        lm = apply(dense, {"order_products": {"order": order}})
        assert nbytes(lm) - nbytes(dense) == expected


@pytest.mark.parametrize("name", ["order_products"])
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
    ],
)
def test_refusals(cost_of, name, words, message):
    with pytest.raises(MinitxError, match=message):
        cost_of(name, MISTRAL, *words)
