"""``minitx cost quantize-cache``: the bytes of a running model's cache, and of published models by
hand."""

import json

import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.checkpoints.hf_config_write import config_fields
from minitx.errors import MinitxError
from minitx.lab.cost import cost
from minitx.technique import apply

LLAMA_2 = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "vocab_size": 32000}
LLAMA_2 |= {"num_attention_heads": 32, "intermediate_size": 11008, "max_position_embeddings": 4096}
WHISPER = {"model_type": "whisper", "is_encoder_decoder": True, "d_model": 384, "vocab_size": 51865}
WHISPER |= {"encoder_layers": 4, "decoder_layers": 4, "decoder_attention_heads": 6}
WHISPER |= {"decoder_ffn_dim": 1536, "max_source_positions": 1500, "max_target_positions": 448}


def costs(folder, fields, *words):
    path = folder / "config.json"
    path.write_text(json.dumps(fields))
    return cost("quantize-cache", path, words)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("words", [["bits=8"], ["bits=4"], ["bits=4", "group_size=2"]])
def test_predicted_bytes_equal_those_of_a_running_model(family, words, tmp_path):
    lm = tiny_lm(family)
    found = costs(tmp_path, config_fields(lm.model.config), *words)
    options = {name: int(value) for name, value in (word.split("=") for word in words)}
    quantized = apply(lm, {"quantize_cache": options})
    for expected, made in ((found.float32, lm), (found.quantized, quantized)):
        state = made.model.new_state()
        made.model(np.arange(5), state)
        assert state.bytes_per_token == expected


def test_bytes_of_published_models_by_hand(tmp_path):
    found = costs(tmp_path, LLAMA_2)
    assert found.float32 == 2 * 32 * 4096 * 4  # 1 MiB a token
    assert found.quantized == 2 * 32 * (4096 + 32 * 4) and found.positions == 4096
    assert " 4,295.0 MB" in str(found) and " 0.26x" in str(found)
    assert found.as_dict()["share"] == pytest.approx(1 / 4 + 1 / 128)
    four = costs(tmp_path, LLAMA_2, "bits=4", "group_size=32", "tokens=100")
    assert four.quantized == 2 * 32 * (2048 + 128 * 4) and four.positions == 100
    assert costs(tmp_path, WHISPER).positions == 448 + 1500


def test_bad_options_are_refused(tmp_path):
    for words, message in (
        (["group_size=3"], "must be a divisor of the head width 128; got 3"),
        (["bits=4", "group_size=1"], "must be even and a divisor"),
        (["tokens=0"], "tokens must be an integer, at least 1, or None; got 0"),
        (["bits=5"], "must be one of 8, 4"),
    ):
        with pytest.raises(MinitxError, match=message):
            costs(tmp_path, LLAMA_2, *words)
