"""``minitx cost lut``: the table sizes and the example of D = 768, N = 3072."""

import json

import pytest

from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.lab.costs import lut as costs

CONFIG = {
    "model_type": "llama",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 3072,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
D, N = 768, 3072


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.mark.parametrize(
    "bits, one_byte, real",
    [
        ((8, 8, 1), 64 << 10, 128 << 10),  # entries of 16 bits
        ((4, 4, 1), 256, 256),
        ((4, 4, 2), 64 << 10, 64 << 10),
        ((4, 4, 3), 16 << 20, 32 << 20),  # entries of 16 bits
        ((3, 4, 2), 16 << 10, 16 << 10),
        ((3, 3, 3), 256 << 10, 256 << 10),
        ((2, 2, 4), 64 << 10, 64 << 10),
    ],
)
def test_sizes_of_the_shared_table(bits, one_byte, real):
    assert costs.shared_table(*bits, entry=1) == one_byte
    assert costs.shared_table(*bits) == real


def test_one_matrix():
    dense = costs.dense(D, N)
    assert (dense.multiplications, dense.weight_bytes) == (2_359_296, 9 << 20)
    centroid = costs.centroid(D, N, 16, 32, 1)
    assert (centroid.multiplications, centroid.additions) == (12_288, 73_728)
    assert centroid.table_bytes - 4 * D * 16 == 1.125 * 2**20  # without the prototypes
    assert costs.folded(D, N, 4, 2, 1).table_bytes == 288 << 20
    assert costs.folded(D, N, 4, 1, 1).table_bytes == 36 << 20
    product = costs.product(D, N, 4, 4, 2)
    assert (product.reads, product.weight_bytes) == (D // 2 * N, D * N // 2)
    assert costs.product(D, N, 2, 2, 4).reads == D // 4 * N
    bits = costs.bit_serial(D, N, 4, 4, True)
    assert (bits.reads, bits.made, bits.weight_bytes) == (D * N, D // 4 * 8, D * N // 2)
    assert costs.bit_serial(D, N, 4, 4, False).made == D // 4 * 16


def test_a_model(config):
    found = cost("lut", config)
    block = 768 * (768 + 256 + 256 + 768 + 3 * 3072)
    assert found.kinds["dense"].multiplications == 12 * block
    assert found.kinds["product"].reads == 12 * block // 2
    assert found.kinds["product"].table_bytes == found.shared == 65536
    assert found.kinds["bit-serial"].reads == 12 * block
    inputs = 6 * 768 + 3072
    assert found.kinds["centroid"].multiplications == 12 * inputs * 16
    text = str(found)
    assert "reach 98, so it takes 65,536 bytes" in text and "bit-serial" in text
    assert json.loads(json.dumps(found.as_dict()))["kinds"]["folded"]["reads"] > 0
    wide = cost("lut", config, ["ba=8", "bw=8", "d=1"])
    assert "reach 16,129, so it takes 131,072 bytes" in str(wide)


def test_refusals(config):
    with pytest.raises(MinitxError, match="^lut: ba is 9; it must be from 2 to 8.$"):
        cost("lut", config, ["ba=9"])
    with pytest.raises(MinitxError, match="^cost lut has no option 'c'"):
        cost("lut", config, ["c=9"])
