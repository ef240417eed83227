"""``minitx cost slim-attention``: the paper's tables 1, 2 and 7 come out."""

import json
import re

import pytest

from minitx.cli import main
from minitx.errors import MinitxError
from minitx.lab.cost import cost


def decoder(width, layers, heads, context, head_dim=None, **more):
    """The fields of a config.json that the formulas depend on, with some FFN and vocabulary."""
    fields = dict(model_type="llama", hidden_size=width, num_hidden_layers=layers)
    fields |= dict(num_attention_heads=heads, max_position_embeddings=context, hidden_act="silu")
    fields |= dict(intermediate_size=8192, vocab_size=32064, tie_word_embeddings=False)
    return fields | ({"head_dim": head_dim} if head_dim else {}) | more


def whisper(layers, width, hidden):
    fields = dict(model_type="whisper", is_encoder_decoder=True, d_model=width, vocab_size=51865)
    fields |= dict(encoder_layers=layers, decoder_layers=layers, decoder_ffn_dim=hidden)
    fields |= dict(decoder_attention_heads=width // 64, activation_function="gelu")
    return fields | dict(max_source_positions=1500, max_target_positions=448)


PHI_3 = decoder(3072, 32, 32, 131072, model_type="phi3")
CODEGEMMA = decoder(3072, 28, 16, 8192, head_dim=256, model_type="gemma")
T5_11B = dict(model_type="t5", is_encoder_decoder=True, d_model=1024, d_kv=128, num_heads=128)
T5_11B |= dict(num_layers=24, num_decoder_layers=24, d_ff=65536, vocab_size=32128, n_positions=512)
# Table 1: numbers in the KV cache, in billions.
CACHES = {
    "CodeLlama-7B": (decoder(4096, 32, 32, 16384), "4.3"),
    "CodeGemma-7B": (CODEGEMMA, "1.9"),  # keys are wider than the hidden state: 4,096 and 3,072
    "Aya-23-35B": (decoder(8192, 40, 64, 8192, model_type="cohere"), "5.4"),
    "SmolLM2-1.7B": (decoder(2048, 24, 32, 8192), "0.8"),
    "Evo-1-131k": (decoder(4096, 32, 32, 131072), "34.4"),
    "Phi-3-mini-128k": (PHI_3, "25.8"),
}
# Table 7, in millions: caches and weights of the three ways; reads and speedups at batch 1 and 64.
WHISPER = {
    (4, 384, 1536): (
        *("6.0 3.0 0.7", "28.2 28.8 29.4", "34.2 31.8 30.0", "1.08 1.14"),
        *("6.4 3.4 1.1", "1.9 5.6"),
    ),
    (6, 512, 2048): (
        *("12.0 6.0 1.4", "48.6 50.1 51.7", "60.5 56.1 53.1", "1.08 1.14"),
        *("12.7 6.8 2.2", "1.9 5.8"),
    ),
    (24, 1024, 4096): (
        *("95.7 47.9 11.0", "405.4 430.6 455.8", "501.2 478.5 466.8", "1.05 1.07"),
        *("102.1 54.6 18.1", "1.9 5.6"),
    ),
}
# Rows whose published cells we do not have, by hand: 2 (1500 + 448) 768 x 12 and so on.
BY_HAND = {
    (12, 768, 3072): (
        (35_905_536, 17_952_768, 4_128_768),
        (138_922_752, 146_000_640, 153_078_528),
    ),
    (32, 1280, 5120): (
        (159_580_160, 79_790_080, 18_350_080),
        (800_390_400, 852_819_200, 905_248_000),
    ),
}


@pytest.fixture
def costs(tmp_path):
    def of(fields, *words):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(fields))
        return cost("slim_attention", path, words)

    return of


@pytest.mark.parametrize("name", CACHES)
def test_slim_attention_cost_table_1(costs, name):
    fields, billions = CACHES[name]
    vanilla, slim = costs(fields).ways()
    assert f"{vanilla.cache / 1e9:.1f}" == billions
    assert slim.cache * 2 == vanilla.cache


def test_slim_attention_cost_of_wide_keys_in_a_cache_of_inputs(costs):
    """2.67 times smaller for CodeGemma, 32 times for T5-11B."""
    assert f"{costs(CODEGEMMA).input_cache_compression:.2f}" == "2.67"
    t5 = costs(T5_11B)
    assert (t5.aspect, t5.input_cache_compression) == (16, 32)


def test_slim_attention_cost_phi_3_reads_per_token(costs):
    """The paper has 28.8 and 16.3 GB at a byte each, which is 3.8 of weights and a cache of 25 cut
    in half; its own table 1 has a cache of 25.8. The ratio is the same: 1.8."""
    c = costs(PHI_3)
    vanilla, slim = c.ways()
    assert f"{c.speedup(slim, 1):.1f}" == "1.8"
    assert f"{(25 + 3.8) / (12.5 + 3.8):.1f}" == "1.8"
    weights = 32 * (4 * 3072**2 + 3 * 3072 * 8192) + 3072 * 32064
    assert vanilla.weights == slim.weights == weights
    assert vanilla.reads(1) == 2 * 3072 * 32 * 131072 + weights
    assert vanilla.reads(4) == 2 * 3072 * 32 * 131072 + weights / 4


@pytest.mark.parametrize("n", [1, 1000])
def test_slim_attention_cost_table_2(costs, n):
    d, h = 2048, 32
    found = costs(decoder(d, 24, h, 8192), f"tokens={n}").steps()
    expected = [
        (8 * d * d, 4 * d * d, 4 * n * d, 2 * n * d, 2),
        ((2 * n + 6) * d * d, 4 * d * d, 4 * n * d, n * d, 4),
        (8 * d * d, 4 * d * d, 2 * n * d * (h + 1), n * d, 2 * h + 2),
    ]
    for step, row in zip(found, expected):
        ops = step.projection_ops, step.projection_reads, step.attention_ops, step.attention_reads
        assert (*ops, step.ops_per_read) == row, step.name


@pytest.mark.parametrize("sizes", WHISPER)
def test_slim_attention_cost_table_7(costs, sizes):
    c = costs(whisper(*sizes))
    ways = c.ways()
    caches, weights, reads, speedups, reads_64, speedups_64 = WHISPER[sizes]
    assert " ".join(f"{w.cache / 1e6:.1f}" for w in ways) == caches
    assert " ".join(f"{w.weights / 1e6:.1f}" for w in ways) == weights
    for batch, cells, ratios in ((1, reads, speedups), (64, reads_64, speedups_64)):
        assert " ".join(f"{w.reads(batch) / 1e6:.1f}" for w in ways) == cells
        for way, ratio in zip(ways[1:], ratios.split()):
            digits = len(ratio.partition(".")[2])
            assert f"{c.speedup(way, batch):.{digits}f}" == ratio
    assert f"{ways[0].cache / ways[2].cache:.1f}" == "8.7"


@pytest.mark.parametrize("sizes", BY_HAND)
def test_slim_attention_cost_rows_of_table_7_by_hand(costs, sizes):
    ways = costs(whisper(*sizes)).ways()
    caches, weights = BY_HAND[sizes]
    assert tuple(w.cache for w in ways) == caches
    assert tuple(w.weights for w in ways) == weights
    assert ways[2].reads(64) == caches[2] + weights[2] / 64


def test_slim_attention_cost_wide_keys_take_more_weights(costs):
    """W_kv is (e, e): for T5-11B far more than the W_v (d, e) that it replaces."""
    vanilla, keys, stream = costs(T5_11B).ways()
    d, e, L = 1024, 16384, 24
    assert vanilla.weights == d * 32128 + L * (6 * d * e + 2 * d * 65536)
    assert keys.weights - vanilla.weights == L * (2 * e * e - d * e)
    assert stream.cache == e * L * 512


def test_slim_attention_cost_command(costs, tmp_path, capsys):
    costs(CODEGEMMA)
    path = str(tmp_path / "config.json")
    assert main(["cost", "slim-attention", "tokens=100", "--config", path]) == 0
    text = capsys.readouterr().out
    assert re.search(r"slim, keys first .* 34\b", text)
    assert "2.67 times smaller" in " ".join(text.split())
    found = costs(CODEGEMMA).as_dict()
    assert json.loads(json.dumps(found))["ways"][1]["cache"] == 4096 * 28 * 8192


@pytest.mark.parametrize(
    "fields, words, message",
    [
        (decoder(4096, 32, 32, 8192, num_key_value_heads=8), (), "8 key heads for 32 query"),
        (decoder(4096, 32, 32, 8192, head_dim=64), (), "2,048 wide, and a hidden state 4,096 wide"),
        (
            {k: v for k, v in PHI_3.items() if "max" not in k},
            (),
            "gives no context; give the number of cached tokens",
        ),
        (PHI_3, ("tokens=-1",), "tokens must be an integer, at least 0; got -1"),
    ],
)
def test_slim_attention_cost_refusals(costs, fields, words, message):
    with pytest.raises(MinitxError, match=message):
        costs(fields, *words)
