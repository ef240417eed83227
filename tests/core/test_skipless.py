"""Skipless models: blocks without residual adds, their initialization, files, training, and the
shipped one."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from same import assert_same
from tiny import SKIPLESS, tiny_model

import minitx
from minitx.build import random_model, shapes
from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.huggingface import read_model, write_model
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.lab.check import NO_OTHER, check_models, run_stages
from minitx.model import NoNorm, SkiplessBlock, SkiplessParallelBlock
from minitx.state import Layer, Tokens
from minitx.training.data import StoryEncoder
from minitx.training.loss import token_losses
from minitx.training.recipe import recipe_from
from minitx.training.skipless_init import initial_model
from minitx.training.stories import stories
from minitx.training.train import train
from minitx.tree import walk, weights

IDS = np.random.default_rng(0).integers(0, 258, 30)
PLAIN = Config("llama", 40, 32, 3, 4, 4, 8, 80, 64, rope_width=8, skipless=True)
CONFIGS = {
    "llama": PLAIN,
    "grouped": replace(PLAIN, kv_heads=2, tied=True),
    "gpt2": replace(
        PLAIN, family="gpt2", rope_width=0, qkv_bias=True, out_bias=True, ffn_bias=True,
        activation="gelu",
    ),
    "gpt_neox": replace(PLAIN, family="gpt_neox", rope_width=4, ffn_bias=True, activation="relu"),
}  # fmt: skip


# The model ---------------------------------------------------------------------------------------


def test_skipless_blocks_equal_the_formula():
    """ffn(attention(x)), or attention(x) + ffn(x) in a parallel block: no residual, no norm."""
    x = np.random.default_rng(1).standard_normal((5, 16))
    block = tiny_model("skipless", dtype=np.float64).stack.blocks[0]
    layer = Layer(48, remember=False).take(5)
    layer.count = 5
    attended = block.attn.out(
        np.concatenate(
            [block.attn.attend(*heads(block, x, h), layer)[0] for h in range(2)], axis=-1
        )
    )
    hidden = block.ffn.expand.activation(attended @ block.ffn.expand.up.w + block.ffn.expand.up.b)
    expected = hidden @ block.ffn.down.w + block.ffn.down.b
    assert_same(block(x, layer), expected, "serial block", atol=1e-12)
    parallel = SkiplessParallelBlock(block.attn, block.ffn)
    found = parallel(x, Layer(48).take(5))
    expected = attended + block.ffn(x, layer)
    assert_same(found, expected, "parallel block", atol=1e-12)


def heads(block, x, h):
    """q, k (rotated) and v of one head, (1, T, d)."""
    columns = slice(8 * h, 8 * h + 8)
    q, k, v = (part[:, columns][None] for part in block.attn.qkv(x))
    where = Tokens(slice(0, len(x)))
    return block.attn.rope(q, where), block.attn.rope(k, where), v


@pytest.mark.parametrize("kind", CONFIGS)
def test_skipless_models_have_no_norms(kind):
    model = random_model(CONFIGS[kind])
    names = {type(node).__name__ for _, node in walk(model)}
    assert {"NoNorm", "SkiplessBlock"} <= names
    assert not names & {"RMSNorm", "LayerNorm", "Block", "ParallelBlock"}
    assert not any("norm" in path for path in shapes(CONFIGS[kind]))
    parallel = random_model(replace(CONFIGS[kind], parallel=True))
    assert type(parallel.stack.blocks[0]) is SkiplessParallelBlock
    assert type(model.norm) is NoNorm and type(model.stack.blocks[0]) is SkiplessBlock


def test_skipless_backfill_caches_the_same_rows_as_a_full_run():
    for config in (SKIPLESS, replace(SKIPLESS, parallel=True)):
        block = random_model(config).stack.blocks[0]
        x = np.random.default_rng(1).standard_normal((5, 16)).astype(np.float32)
        layers = Layer(48).take(5), Layer(48).take(5)
        block(x, layers[0])
        block.backfill(x, layers[1])
        assert_same(layers[0].keys[:, :5], layers[1].keys[:, :5], "keys")
        assert_same(layers[0].values[:, :5], layers[1].values[:, :5], "values")


# Initialization ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox"])
def test_initial_model_is_near_the_identity(kind):
    """W_v W_o and the FFN are the identity, and a token attends mostly to itself: for nearly all
    tokens the hidden state after block 0 is nearest to the token's own embedding."""
    model = initial_model(CONFIGS[kind], 1, np.float64)
    x = np.random.default_rng(2).standard_normal((6, 32))
    for block in model.stack.blocks:
        v, o = block.attn.qkv.v.w, block.attn.out.w
        assert_same(v @ o, np.eye(32), "W_v W_o", atol=1e-12)
        assert_same(block.ffn(x, None), x, "FFN", atol=1e-12)
        assert_same(block.attn.qkv.q.w, block.attn.qkv.k.w, "W_k = W_q")
    ids = np.random.default_rng(3).permutation(40)
    stages = run_stages(model, ids)
    first, after = stages["embedding"], stages["block 0"]
    lengths = [np.linalg.norm(a, axis=1) for a in (after, first)]
    cosines = after @ first.T / np.outer(*lengths)
    assert (cosines.argmax(1) == np.arange(40)).mean() > 0.9


def test_normal_init_would_lose_the_input():
    """The control: the same model with the weights that a model with residual adds starts from."""
    config = replace(CONFIGS["gpt_neox"], layers=6)
    ids = np.random.default_rng(3).permutation(40)
    spread = {}
    for name, model in (("identity", initial_model(config)), ("normal", random_model(config))):
        stages = run_stages(model, ids)
        last = stages["block 5"] - stages["block 5"].mean(0)  # what distinguishes the tokens
        spread[name] = last.std() / stages["embedding"].std()
    assert spread["identity"] > 0.1 > 1e-3 > spread["normal"]


@pytest.mark.parametrize("kind", CONFIGS)
def test_initial_model_is_seeded_and_has_the_requested_dtype(kind):
    one, same, other = (weights(initial_model(CONFIGS[kind], s)) for s in (1, 1, 2))
    for path, w in one.items():
        assert w.dtype == np.float32 and w.flags["C_CONTIGUOUS"] and np.isfinite(w).all()
        assert_same(w, same[path])
        assert w.ndim == 1 or (w != other[path]).any()
    assert weights(initial_model(CONFIGS[kind], 1, np.float64))[path].dtype == np.float64


# Files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_skipless_files_round_trip(tmp_path, kind):
    config = CONFIGS[kind]
    model = initial_model(config, 4)
    write_model(model, tmp_path, "F32")
    again = read_model(tmp_path)
    assert again.config == config and repr(again) == repr(model)
    assert_same(again(IDS % 40), model(IDS % 40))
    fields = json.loads((tmp_path / "config.json").read_text())
    # A name that no other framework takes for a model that it has.
    assert fields["architectures"][0].startswith("Skipless")
    assert fields["model_type"].startswith("skipless_")


def test_skipless_file_with_norms_is_refused(tmp_path):
    dense = random_model(replace(CONFIGS["llama"], skipless=False))
    write_model(dense, tmp_path, "F32")
    path = tmp_path / "config.json"
    text = path.read_text().replace("LlamaFor", "SkiplessLlamaFor")
    text = text.replace('"llama"', '"skipless_llama"')
    path.write_text(text)
    assert read_config(path).skipless
    with pytest.raises(MinitxError, match="layernorm.weight' has no place"):
        read_model(tmp_path)
    path.write_text(text.replace("SkiplessLlama", "SkiplessBloom"))
    with pytest.raises(MinitxError, match="'architectures' is"):
        read_model(tmp_path)


# Training ----------------------------------------------------------------------------------------

RECIPE = {
    "name": "tiny",
    "shards": 2,
    "model": dict(
        family="gpt_neox", skipless=True, width=16, layers=2, heads=2, kv_heads=2, head_width=8,
        hidden=32, context=64, activation="relu", rope_width=4, qkv_bias=True, out_bias=True,
        ffn_bias=True,
    ),
    "stages": [
        dict(name="a", grades={"one_hop_tiny": 1}, row=32, batch=4, steps=8, lr=0.002, muon=0.004,
             every=4, check=4)
    ],
}  # fmt: skip


def test_skipless_training_lowers_the_loss(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    log = train(path, workers=1, bar=False)["log"]
    assert log[-1]["training_loss"] < log[0]["training_loss"]
    assert read_model(tmp_path).config.skipless


@pytest.mark.parametrize("change", [{"layers": 1}, {"layer_dropout": 0.1}])
def test_skipless_training_stages_that_leave_blocks_out_are_refused(change):
    stage = RECIPE["stages"][0] | change
    with pytest.raises(MinitxError, match="Stage 'a' skips blocks .*train all blocks"):
        recipe_from(RECIPE | {"stages": [stage]})
    dense = RECIPE["model"] | {"skipless": False}
    assert recipe_from(RECIPE | {"stages": [stage], "model": dense})


# The shipped model -------------------------------------------------------------------------------


def test_check_of_a_skipless_model_without_reference_is_no_failure(capsys):
    assert check_models(["stories-skipless", "random-llama-mqa"]) == 0
    text = capsys.readouterr().out
    assert "[--]   stories-skipless: not checked. stories-skipless is skipless" in text
    assert "no other framework" in text and "[??]" not in text
    assert check_models(["stories-skipless"], as_json=True) == 0
    (found,) = json.loads(capsys.readouterr().out)["models"]
    assert found["verdict"] == NO_OTHER


@pytest.fixture(scope="module")
def texts():
    """Ids of stories to count words in, and of held-out ones, each after <|endoftext|>."""
    encoder = StoryEncoder(minitx.load("stories-skipless").tokenizer)

    def read(split, count):
        drawn = islice(stories(split, "full", 0), count)
        return [np.array([encoder.end, *encoder.story(story)[0]]) for story in drawn]

    return read("train", 200), read("evaluation", 10)  # these are drawn 20 times as slowly


def test_shipped_skipless_model_beats_unigram_and_bigram_models(texts):
    counted, held_out = texts
    lm = minitx.load("stories-skipless")
    V = lm.model.config.vocab_size
    logits = np.concatenate([lm.logits(ids[:-1]) for ids in held_out])
    targets = np.concatenate([ids[1:] for ids in held_out])
    frequency = np.bincount(np.concatenate([ids[1:] for ids in counted]), minlength=V) + 1.0
    unigram = -np.log(frequency / frequency.sum())[targets].mean()
    loss = token_losses(logits, targets).mean()
    assert loss < unigram - 3 and loss < bigram_loss(counted, held_out, V) - 0.4
    assert (logits.argmax(-1) == targets).mean() > (targets == frequency.argmax()).mean() + 0.4


def bigram_loss(counted, held_out, V) -> float:
    """The mean negative log-likelihood under counts of which token follows which."""
    table = np.full((V, V), 0.01)
    for ids in counted:
        np.add.at(table, (ids[:-1], ids[1:]), 1)
    table /= table.sum(1, keepdims=True)
    return float(np.mean(-np.log(np.concatenate([table[i[:-1], i[1:]] for i in held_out]))))


@pytest.mark.parametrize("matrix", ["q", "k", "v"])
def test_remove_weights_of_the_shipped_skipless_model_is_exact(texts, matrix):
    lm = minitx.load("stories-skipless", dtype=np.float64)
    new = minitx.load("stories-skipless", dtype=np.float64, remove_weights={"matrix": matrix})
    ids = texts[1][0]
    expected = lm.logits(ids)
    assert abs(new.logits(ids) - expected).max() <= 1e-12 * abs(expected).max()
    assert all(block.attn.qkv.condition < 100 for block in new.model.stack.blocks)
    c, sizes = lm.model.config, [sum(w.size for w in weights(m.model).values()) for m in (lm, new)]
    biases = 2 * c.layers * c.width  # those of the two matrices, merged into others
    assert sizes[0] - sizes[1] == 2 * c.layers * c.width**2 + biases
    single = minitx.load("stories-skipless", remove_weights={"matrix": matrix})
    assert single.generate("Once", 30) == minitx.load("stories-skipless").generate("Once", 30)
