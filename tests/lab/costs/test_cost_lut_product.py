"""``minitx cost lut-product``: table sizes, one matrix of 768 x 3072, and a model."""

import json

import pytest

from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.lab.costs.lut_product import lut_product
from minitx.lab.lookup_work import dense

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
BLOCK = 768 * (768 + 256 + 256 + 768 + 3 * 3072)  # weights


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def test_dense_matrix_multiplies_every_weight():
    work = dense(768, 3072)
    assert (work.multiplications, work.additions, work.weight_bytes) == (
        *(2_359_296, 2_359_296),
        9 << 20,
    )


def test_matrix_takes_a_read_for_every_code():
    """Pairs: 768 / 2 reads for each of 3,072 outputs; half a byte a weight."""
    work = lut_product(768, 3072, 4, 2)
    assert (work.reads, work.additions) == (384 * 3072, 384 * 3072)
    assert work.multiplications == 768 + 2 * 3072
    assert work.weight_bytes == 768 * 3072 // 2
    assert lut_product(768, 3072, 2, 4).reads == 192 * 3072


@pytest.mark.parametrize(
    "options, size",
    [
        ("input_bits=8 weight_bits=8 length=1", 128 << 10),  # entries of 16 bits
        ("input_bits=4 weight_bits=4 length=1", 256),
        ("input_bits=4 weight_bits=4 length=2", 64 << 10),
        ("input_bits=4 weight_bits=4 length=3", 32 << 20),  # entries of 16 bits
        ("input_bits=3 weight_bits=4 length=2", 16 << 10),
        ("input_bits=3 weight_bits=3 length=3", 256 << 10),
        ("input_bits=2 weight_bits=2 length=4", 64 << 10),
    ],
)
def test_table_bytes(config, options, size):
    found = cost("lut_product", config, options.split())
    assert found.work.table_bytes == size
    assert f"so it takes {size:,} bytes" in str(found)


def test_model_is_the_sum_of_its_matrices(config):
    found = cost("lut_product", config)
    assert found.dense.multiplications == 12 * BLOCK
    assert found.work.reads == 12 * BLOCK // 2
    assert found.work.table_bytes == 65536, "one table for all matrices"
    text = str(found)
    assert "entries reach 98, so it takes 65,536 bytes" in text and "lut-product" in text
    assert json.loads(json.dumps(found.as_dict()))["work"]["reads"] == found.work.reads
    wide = cost("lut_product", config, ["input_bits=8", "weight_bits=8", "length=1"])
    assert "reach 16,129, so it takes 131,072 bytes" in str(wide)


def test_bad_options_are_refused(config):
    message = "^cost lut_product: input_bits must be an integer, 2 to 8; got 9.$"
    with pytest.raises(MinitxError, match=message):
        cost("lut_product", config, ["input_bits=9"])
    with pytest.raises(MinitxError, match="^cost lut_product has no option 'c'"):
        cost("lut_product", config, ["c=9"])
