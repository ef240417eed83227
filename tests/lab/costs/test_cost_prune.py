"""``minitx cost prune``: published sizes, formulas by hand, and the savings of real models."""

import json

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.hf_config_write import config_fields
from minitx.errors import MinitxError
from minitx.lab.cost import cost as checked_cost
from minitx.lab.costs.prune import cost
from minitx.lab.layout import fit
from minitx.lab.shape import read_shape
from minitx.ledger import counting
from minitx.shared.linears import linears
from minitx.technique import apply
from minitx.tree import nbytes

# The sizes of the llama2.c models, tied heads: width, hidden, layers, heads, key/value heads,
# vocabulary; then weights in millions, float32 MB, and MB at 2:4 with 2-bit indices.
LLAMA2C = {
    "260K": ((64, 172, 5, 8, 4, 512), (0.259, 1.04, 0.55)),
    "15M": ((288, 768, 6, 6, 6, 32000), (15.2, 60.8, 32.3)),
    "42M": ((512, 1376, 8, 8, 8, 32000), (41.7, 166.7, 88.6)),
    "110M": ((768, 2048, 12, 12, 12, 32000), (109.5, 438.0, 232.7)),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size")
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
GPT2 |= {"vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None}
MIXTRAL = dict(zip(NAMES, (4096, 14336, 32, 32, 8, 32000))) | {
    "model_type": "mixtral", "num_local_experts": 8, "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}  # fmt: skip


def shape_of(folder, fields):
    (folder / "config.json").write_text(json.dumps(fields))
    return read_shape(folder)


def llama2c(folder, name):
    fields = dict(zip(NAMES, LLAMA2C[name][0])) | {"model_type": "llama"}
    fields |= {"max_position_embeddings": 256, "tie_word_embeddings": True}
    return shape_of(folder, fields)


def rounded(number, like):
    digits = len(str(like).partition(".")[2])
    return round(number, digits) == like


@pytest.mark.parametrize("name", LLAMA2C)
def test_sizes_of_llama2c_models_equal_the_table(tmp_path, name):
    """All matrices pruned, the embedding too."""
    c = cost(llama2c(tmp_path, name), embeddings=True)
    millions, dense, two_four = LLAMA2C[name][1]
    assert rounded(c.weights / 1e6, millions)
    assert rounded(c.dense_bytes / 1e6, dense)
    assert rounded(c.two_four_bytes / 1e6, two_four)
    assert c.two_four_bytes == c.packed_bytes == c.weights * 2.125  # a bit a weight, either way
    assert c.csr_bytes == c.dense_bytes  # at half: an index as large as a value


def test_gpt2_small_by_hand(tmp_path):
    """124.4 M weights, 497.8 MB: with the norms and biases, which are left out here."""
    c = cost(shape_of(tmp_path, GPT2))
    biases = 12 * (3 * 768 + 768 + 3072 + 768)
    norms = 12 * 4 * 768 + 2 * 768
    assert rounded((c.weights + biases + norms) / 1e6, 124.4)
    assert rounded(4 * (c.weights + biases + norms) / 1e6, 497.8)
    assert c.pruned == 12 * (4 * 768**2 + 2 * 768 * 3072)
    assert c.multiply_adds == c.pruned + 768 * 50257
    assert c.packed_bytes == c.pruned * 2.125 + (c.weights - c.pruned) * 4


def test_only_smaller_arrays_take_fewer_multiply_adds(tmp_path):
    c = cost(shape_of(tmp_path, MIXTRAL), sparsity=0.3)
    assert (c.structured.hidden, c.structured.heads, c.structured.kv_heads) == (14336 - 4300, 24, 6)
    head = 4096 * 32000
    assert c.structured_multiply_adds == head + 32 * (
        2 * 4096 * (24 + 6) * 128 + 8 * 3 * 4096 * (14336 - 4300)
    )
    assert {work for _, _, work in c.rows()[:-1]} == {c.multiply_adds}
    assert "all experts are counted" in str(c)
    assert cost(c.shape, sparsity=0.99).structured.kv_heads == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_savings_equal_those_of_pruned_models(tmp_path, family):
    """Bytes and multiply-adds of all matrices against those of real trees."""
    lm = tiny_lm(family)
    c = cost(shape_of(tmp_path, config_fields(lm.model.config)))
    ids = np.arange(20)

    def work(model):
        with counting(model) as counts:
            model.logits(ids)
        groups = counts.entries.items()
        return sum(e.multiply_adds for path, e in groups if not path.endswith(".attend"))

    pruned = apply(lm, {"prune": {"method": "magnitude", "sparsity": 0.5}})
    packed = apply(pruned, {"pack_zeros": True})
    assert nbytes(lm) - nbytes(packed) == c.dense_bytes - c.packed_bytes
    for model in (lm, pruned, packed):
        assert work(model) == len(ids) * c.multiply_adds
    options = {"neurons": 0.5, "heads": 0.5, "score": "weights"}
    smaller = apply(lm, {"prune_structure": options})
    assert work(smaller) == len(ids) * c.structured_multiply_adds
    sizes = [sum(m.w.nbytes for m in linears(each.model, "all").values()) for each in (lm, smaller)]
    assert sizes[0] - sizes[1] == c.dense_bytes - c.structured_bytes


def test_command_prints_the_cost_and_refuses_bad_options(run, workdir):
    (workdir / "config.json").write_text(json.dumps(MIXTRAL))
    status, out, err = run("cost", "prune", "sparsity=0.75", "--config", workdir)
    expected = cost(read_shape(workdir), sparsity=0.75)
    assert (status, out, err) == (0, f"{fit(str(expected))}\n", "")
    assert "75% of the 46,439,333,888 weights" in out
    found = json.loads(run("cost", "prune", "sparsity=0.75", "--config", workdir, "--json")[1])
    assert found == json.loads(json.dumps(expected.as_dict()))
    assert "embeddings" in run("cost", "prune", "embeddings=true", "--config", workdir)[1]
    for words in (["sparsity=1"], ["sparsity=-1"], ["embeddings=head"], ["rank=3"]):
        status, out, err = run("cost", "prune", *words, "--config", workdir)
        assert (status, out) == (2, "") and err.count("\n") == 1


def test_sparsity_1_is_refused(tmp_path):
    shape_of(tmp_path, GPT2)
    message = "cost prune: sparsity must be a number, at least 0 and below 1; got 1.0"
    with pytest.raises(MinitxError, match=message):
        checked_cost("prune", tmp_path / "config.json", ["sparsity=1.0"])
