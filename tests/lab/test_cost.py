"""``minitx cost first-layer``: the paper's tables come out, and faulty files are refused."""

import json
from dataclasses import replace

import pytest

from minitx.errors import MinitxError
from minitx.lab.block_matrices import block_weights
from minitx.lab.costs.first_layer import FirstLayerCost
from minitx.lab.layout import fit
from minitx.lab.shape import KINDS, read_shape

# As such models' files have it, but for what costs do not depend on. The paper gives Pythia the
# vocabulary of GPT-J; files derived from Pythia-6.9B have 50,432.
SIZES = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
FILES = {
    "pythia": SIZES
    | {"model_type": "gpt_neox", "intermediate_size": 16384, "vocab_size": 50400}
    | {"hidden_act": "gelu", "use_parallel_residual": True, "tie_word_embeddings": False},
    "mistral": SIZES
    | {"model_type": "mistral", "intermediate_size": 14336, "vocab_size": 32000}
    | {"hidden_act": "silu", "num_key_value_heads": 8, "tie_word_embeddings": False},
}
FILES["mixtral"] = FILES["mistral"] | {"model_type": "mixtral", "num_local_experts": 8}
# arXiv 2402.13388, section 3: Pythia-6.9B, Mistral-7B, Mixtral-8x7B as if it were parallel.
PUBLISHED = {
    "qp_weights": (33_554_432, 33_554_432, 33_554_432),
    "kv_weights": (33_554_432, 8_388_608, 8_388_608),
    "ffn_weights": (134_217_728, 176_160_768, None),
    "embedding_weights": (None, 262_144_000, 262_144_000),
    "eliminated": (184_549_376, 25_165_824, None),
    "growth": (619_315_200, 196_608_000, 196_608_000),
    "net": (434_765_824, None, None),
}
READS = {  # at batch 1: without, with
    "pythia": (184_553_472, 16_384),
    "mistral": (25_169_920, 10_240),
    "mixtral": (None, 10_240),
}
FACTORS = {  # at batch 1, 16, 256, 1024
    "pythia": (11_264, 704, None, 11),
    "mistral": (2_458, None, 10, 3),
    "mixtral": (None, None, 548, None),
}
# The cells that are None above, by hand: 3 * 4096 * 14336 * 8 and so on.
BY_HAND = {
    "ffn_weights": ("mixtral", 1_409_286_144),
    "embedding_weights": ("pythia", 412_876_800),
    "eliminated": ("mixtral", 1_409_286_144 + 25_165_824),
}


def write(folder, fields):
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return path


@pytest.fixture
def costs(tmp_path):
    """The paper's three models."""
    return {
        name: FirstLayerCost(read_shape(write(tmp_path, fields), parallel=name == "mixtral"))
        for name, fields in FILES.items()
    }


@pytest.mark.parametrize("row", PUBLISHED)
def test_published_cells(costs, row):
    for name, cell in zip(FILES, PUBLISHED[row]):
        assert cell is None or getattr(costs[name], row) == cell, name


def test_published_totals_reads_and_factors(costs):
    assert [f"{c.total_weights / 1e9:.1f}" for c in costs.values()] == ["6.9", "7.2", "46.7"]
    assert f"{costs['mistral'].relative:.0%}" == "2%"
    for name, c in costs.items():
        found = (c.reads_without(1), c.reads_with(1))
        assert all(cell in (None, n) for cell, n in zip(READS[name], found))
        rounded = [round(c.factor(batch)) for batch in (1, 16, 256, 1024)]
        assert all(cell in (None, n) for cell, n in zip(FACTORS[name], rounded))


def test_cells_that_the_paper_leaves_open(costs):
    for row, (name, expected) in BY_HAND.items():
        assert getattr(costs[name], row) == expected
    mistral, mixtral = costs["mistral"], costs["mixtral"]
    assert mistral.net == 196_608_000 - 25_165_824
    assert mixtral.net == 196_608_000 - mixtral.eliminated < 0  # less memory, not more
    assert mixtral.reads_without(1) == mixtral.eliminated + 4096
    assert mistral.reads_with(16) == 16 * mistral.reads_with(1)


def test_break_even_and_bound(costs):
    assert costs["mistral"].break_even == 4096  # the width: it is serial
    assert round(costs["pythia"].break_even, 1) == 15_018.7
    for c in costs.values():
        at = int(c.break_even)
        assert c.factor(at) >= 1 > c.factor(at + 1)
        fewer = replace(c, shape=replace(c.shape, vocab_size=at))
        assert fewer.net <= 0 < replace(c, shape=replace(c.shape, vocab_size=at + 1)).net
        assert c.as_dict()["upper_bound"] == 1 / 32  # "3 %" in the abstract
    four = replace(costs["pythia"].shape, layers=4)
    assert FirstLayerCost(four).as_dict()["upper_bound"] == 0.25


# Beyond the paper --------------------------------------------------------------------------------

GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
GPT2 |= {"vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None}


def test_learned_positions_and_a_tied_head(tmp_path):
    s = read_shape(write(tmp_path, GPT2))
    assert (s.hidden, s.positions, s.tied, s.parallel) == (3072, 1024, True, False)
    c = FirstLayerCost(s)
    assert c.total_weights == 12 * (4 * 768**2 + 2 * 768 * 3072) + 768 * (50257 + 1024)
    assert c.eliminated == 3 * 768 * 768
    assert c.growth == 3 * 768 * (50257 + 1024) + 768 * 50257
    assert c.reads_with(2) == 2 * 2 * 4 * 768
    assert c.reads_without(2) == 3 * 768 * 768 + 2 * 2 * 768
    assert "keeps the embedding" in c.notes()[0]
    parallel = FirstLayerCost(read_shape(tmp_path, parallel=True))
    assert parallel.eliminated == c.eliminated and any(
        "keep the FFN" in n for n in parallel.notes()
    )


def test_heads_narrower_than_the_width(tmp_path):
    fields = FILES["mistral"] | {"hidden_size": 5000, "head_dim": 100, "num_key_value_heads": 4}
    c = FirstLayerCost(read_shape(write(tmp_path, fields)))
    assert c.eliminated == 5000 * (32 + 2 * 4) * 100
    assert c.growth == 32000 * (32 + 2 * 4) * 100
    assert c.break_even == 5000


def test_known_model_types(tmp_path):
    base = SIZES | {"vocab_size": 1000, "intermediate_size": 9, "max_position_embeddings": 64}
    for kind, known in KINDS.items():
        fields = base | {"model_type": kind, "num_key_value_heads": 8}
        s = read_shape(write(tmp_path, fields))
        assert s.ffn_matrices == (3 if known.gated else 2)
        assert (s.parallel, s.tied) == (known.parallel, known.tied)
        assert s.positions == (64 + known.more_positions if known.adds_positions else 0)
        assert s.kv_heads == (8 if known.shares_keys else 32), "a field that the model ignores"
        assert s.notes == ()
    serial = FILES["pythia"] | {"use_parallel_residual": False}
    assert not read_shape(write(tmp_path, serial)).parallel


def test_unknown_model_type_is_guessed_with_a_note(tmp_path):
    fields = FILES["mistral"] | {"model_type": "novel"}
    s = read_shape(write(tmp_path, fields))
    assert s.ffn_matrices == 3 and not s.parallel
    assert (
        "unknown model_type 'novel': assumed to be serial" in s.notes[0]
        and "with a gate" in s.notes[0]
    )
    s = read_shape(write(tmp_path, fields | {"hidden_act": "relu"}))
    assert s.ffn_matrices == 2 and "without a gate" in s.notes[0]
    s = read_shape(write(tmp_path, FILES["mistral"]), parallel=True)
    assert s.parallel and "this model is not" in s.notes[0]
    assert read_shape(write(tmp_path, FILES["pythia"]), parallel=True).notes == ()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": None}, "one of 'hidden_size', 'n_embd', 'd_model', got none"),
        ({"hidden_size": 4096.0}, "'hidden_size' is 4096.0; expected a positive integer"),
        ({"hidden_size": 4100}, "4100 is not a multiple of 32 heads; give 'head_dim'"),
        ({"num_key_value_heads": 5}, "32 query heads cannot share 5"),
        ({"vocab_size": 0}, "'vocab_size' is 0"),
        ({"vocab_size": True}, "'vocab_size' is True"),
        ({"intermediate_size": None}, "'intermediate_size', 'n_inner'"),
        ({"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'"),
        ({"model_type": ["mistral"]}, "'model_type' is"),
        ({"kv_lora_rank": 512}, "'kv_lora_rank' is 512, which these formulas do not cover"),
        ({"n_shared_experts": 2}, "'n_shared_experts'"),
        ({"is_encoder_decoder": True}, "'is_encoder_decoder'"),
        ({"num_local_experts": -1}, "'num_local_experts' is -1"),
        ({"word_embed_proj_dim": 512}, "'word_embed_proj_dim' is 512"),
    ],
)
def test_bad_config_is_refused_by_field(tmp_path, change, message):
    path = write(tmp_path, FILES["mistral"] | change)
    with pytest.raises(MinitxError) as caught:
        read_shape(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


WHISPER = {"model_type": "whisper", "is_encoder_decoder": True, "d_model": 384, "vocab_size": 51865}
WHISPER |= {"encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 1000}
WHISPER |= {"decoder_layers": 4, "decoder_attention_heads": 6, "decoder_ffn_dim": 1536}
WHISPER |= {"num_hidden_layers": 3, "max_source_positions": 1500, "max_target_positions": 448}
T5 = {"model_type": "t5", "is_encoder_decoder": True, "d_model": 1024, "vocab_size": 32128}
T5 |= {"d_kv": 128, "num_heads": 128, "d_ff": 65536, "num_layers": 24, "n_positions": 512}


def test_models_with_an_encoder(tmp_path):
    """Where formulas cover an encoder, sizes are the decoder's."""
    with pytest.raises(MinitxError, match="'is_encoder_decoder' is True, which these formulas do"):
        read_shape(write(tmp_path, WHISPER))
    s = read_shape(tmp_path, encoders=True)
    assert (s.layers, s.heads, s.head_width, s.hidden, s.ffn_matrices) == (4, 6, 64, 1536, 2)
    assert (s.encoder_layers, s.source, s.context, s.positions) == (3, 1500, 448, 448)
    assert "4 serial blocks after an encoder of 3 of width 384" in s.describe()
    s = read_shape(write(tmp_path, T5), encoders=True)
    assert (s.layers, s.encoder_layers, s.heads, s.head_width) == (24, 24, 128, 128)
    assert (s.hidden, s.source, s.context, s.positions) == (65536, 512, 512, 0)


@pytest.mark.parametrize("kind", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("form, matrices", [("relu", 2), ("gated-gelu", 3), ("gated-silu", 3)])
def test_t5_has_a_gate_if_its_file_says_so(tmp_path, kind, form, matrices):
    """T5 1.1 is of the same model_type as T5. By hand, one block: four matrices of attention and
    two or three of the FFN, as transformers has them."""
    fields = T5 | {"model_type": kind, "feed_forward_proj": form, "tie_word_embeddings": False}
    s = read_shape(write(tmp_path, fields), encoders=True)
    assert s.ffn_matrices == matrices and not s.tied
    assert block_weights(s) == 24 * (4 * 1024 * 128 * 128 + matrices * 1024 * 65536)
    guessed = read_shape(write(tmp_path, fields | {"model_type": "novel"}), encoders=True)
    assert guessed.ffn_matrices == matrices


# The command -------------------------------------------------------------------------------------


def test_cost_command(run, workdir, costs):
    path = write(workdir, FILES["pythia"])
    status, out, err = run("cost", "first-layer", "--config", path)
    assert (status, out, err) == (0, f"{fit(str(costs['pythia']))}\n", "")
    for cell in ("184,549,376", "619,315,200", "434,765,824", "11,264x", "704x", "11x", "15,019"):
        assert f" {cell}" in out, cell
    found = json.loads(run("cost", "first-layer", "--config", path, "--json")[1])
    assert found == json.loads(json.dumps(costs["pythia"].as_dict()))
    assert found["reads"][0] == {
        "batch": 1, "without": 184_553_472, "with": 16_384, "factor": 184_553_472 / 16_384,
    }  # fmt: skip
    write(workdir, FILES["mixtral"])
    out = run("cost", "first-layer", "--config", workdir, "--parallel")[1]  # a folder will do
    assert out == f"{fit(str(costs['mixtral']))}\n" and " 548x" in out and "too favorable" in out


def test_cost_command_with_bad_input(run, workdir):
    for words, message in (
        (["first-layer"], "--config"),
        (["last-layer", "--config", "toy"], "first-layer"),
        (["first-layer", "--config", "nowhere.json"], "nowhere.json"),
        (["first-layer", "--config", "toy/model.safetensors"], "is not valid JSON"),
        (["first-layer", "--config", "toy", "--fold-norms"], "takes no techniques"),
        (["first-layer", "depth=2", "--config", "toy"], "has no option 'depth'; it takes none"),
    ):
        status, out, err = run("cost", *words)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert run("cost", "first-layer", "--config", "toy")[0] == 0
