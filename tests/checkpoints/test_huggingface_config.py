"""Every invalid config.json gives a one-line error."""

import json
import tracemalloc

import numpy as np
import pytest
from hf_folders import IDS, copied, edit

from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.huggingface import read_model
from minitx.errors import MinitxError

LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3 |= dict(rope_theta=500.0, original_max_position_embeddings=8)

# Each case: a reference folder, changed fields (... removes one), a pattern of the error message.
BAD_CONFIGS = {
    "no architecture": (
        "llama",
        dict(architectures=..., model_type=...),
        "'architectures' is None and 'model_type' None; expected one of LlamaForCausalLM",
    ),
    "unknown architecture": (
        "llama",
        dict(architectures=["T5Model"]),
        r"\['T5Model'\] and 'model_type' 'llama'; expected one of",
    ),
    "two architectures": ("llama", dict(architectures=["A", "B"]), "'architectures' is"),
    "architecture a string": (
        "llama",
        dict(architectures="LlamaForCausalLM"),
        "'architectures' is",
    ),
    "unknown model type": (
        "llama",
        dict(architectures=None, model_type="gemma"),
        "'architectures' is None and 'model_type' 'gemma'",
    ),
    "model type of another architecture": (
        "llama",
        dict(model_type="gemma"),
        r"'model_type' is 'gemma' but 'architectures' is \['LlamaForCausalLM'\], whose model_type",
    ),
    "model type a number": ("llama", dict(model_type=3), "'model_type' is 3"),
    "skipless model type only": (
        "llama",
        dict(model_type="skipless_llama"),
        "'model_type' is 'skipless_llama' but",
    ),
    "quantized": ("llama", dict(quantization_config={"bits": 4}), "quantization_config"),
    "no width": ("llama", dict(hidden_size=...), r"must have shape \(40, 4096\) by config.json"),
    "null width": ("llama", dict(hidden_size=None), "has no 'hidden_size'"),
    "null layers": ("llama", dict(num_hidden_layers=None), "has no 'num_hidden_layers'"),
    "null context": ("llama", dict(max_position_embeddings=None), "no 'max_position_embeddings'"),
    "null epsilon": ("llama", dict(rms_norm_eps=None), "has no 'rms_norm_eps'"),
    "null activation": ("llama", dict(hidden_act=None), "has no 'hidden_act'"),
    "width a string": (
        "llama",
        dict(hidden_size="16"),
        "'hidden_size' is '16'; expected a positive",
    ),
    "width a float": ("llama", dict(hidden_size=16.0), "'hidden_size' is 16.0"),
    "width true": ("llama", dict(hidden_size=True), "'hidden_size' is True"),
    "zero heads": ("llama", dict(num_attention_heads=0), "'num_attention_heads' is 0"),
    "negative layers": ("llama", dict(num_hidden_layers=-2), "'num_hidden_layers' is -2"),
    "huge vocabulary": ("llama", dict(vocab_size=10**15), "'vocab_size' is 1000000000000000"),
    "epsilon 0": ("llama", dict(rms_norm_eps=0), "'rms_norm_eps' is 0"),
    "epsilon a string": ("llama", dict(rms_norm_eps="1e-5"), "'rms_norm_eps' is '1e-5'"),
    "tied a number": ("llama", dict(tie_word_embeddings=1), "'tie_word_embeddings' is 1"),
    "width not divisible": (
        "llama",
        dict(head_dim=..., hidden_size=18),
        "multiple of 'num_attention_heads' 4, got 18",
    ),
    "heads not shared evenly": ("llama", dict(num_key_value_heads=3), "cannot share 3"),
    "odd rotary": ("llama", dict(head_dim=5), "5 rotary columns"),
    "unknown activation": ("gpt2", dict(activation_function="mish"), "'mish'; expected one of"),
    "llama with gelu": ("llama", dict(hidden_act="gelu"), "not 'silu', the only"),
    "activation a number": ("gpt2", dict(activation_function=3), "'activation_function' is 3"),
    "eos a string": ("llama", dict(eos_token_id="</s>"), "'eos_token_id' is '</s>'"),
    "bos a list": ("llama", dict(bos_token_id=[1]), r"'bos_token_id' is \[1\]"),
    "yarn": (
        "llama",
        dict(rope_parameters={"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4}),
        "'rope_parameters' asks for RoPE scaling that is not supported .*yarn.*; expected",
    ),
    "dynamic, older": (
        "llama",
        dict(rope_parameters=..., rope_scaling={"type": "dynamic", "factor": 2.0}),
        "'rope_scaling' asks for RoPE scaling that is not supported .*dynamic",
    ),
    "linear without a factor": (
        "llama",
        dict(rope_parameters={"rope_type": "linear"}),
        "has no 'factor'",
    ),
    "linear by almost 0": (
        "llama",
        dict(rope_parameters={"rope_type": "linear", "factor": 1e-300}),
        "'factor' must be from 1e-06 to",
    ),
    "llama3 without its fields": (
        "llama",
        dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
        "has no 'low_freq_factor'",
    ),
    "llama3 upside down": (
        "llama",
        dict(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 1.0}),
        "'low_freq_factor' must be below 'high_freq_factor', got 4.0 and 1.0",
    ),
    "two trained contexts": (
        "llama",
        dict(rope_parameters=LLAMA3, original_max_position_embeddings=16),
        "two values of 'original_max_position_embeddings' disagree",
    ),
    "rope_scaling beside rope_parameters": (
        "llama",
        dict(rope_scaling={"type": "linear", "factor": 2.0}),
        "'rope_scaling' .*linear.* and 'rope_parameters' .* disagree",
    ),
    "base that gpt_neox does not read": (
        "gpt-neox",
        dict(rope_theta=77.0),
        "'rope_theta' 77.0 and the value that counts in this architecture, 10000.0 disagree",
    ),
    "alias that disagrees": (
        "gpt2",
        dict(num_attention_heads=4),
        "'num_attention_heads' 4 and 'n_head' 2 disagree",
    ),
    "gpt_neox heads of another width": (
        "gpt-neox",
        dict(head_dim=16),
        "'head_dim' is 16, which is not hidden_size / num_attention_heads = 8",
    ),
    "not causal": ("llama", dict(is_causal=False), "'is_causal' is False, which lets tokens see"),
    "chunked": ("gpt-neox", dict(attention_chunk_size=8), "'attention_chunk_size' is 8 but the"),
    "llama window": ("llama", dict(sliding_window=8), "'sliding_window' is 8 but the context"),
    "other layer types": (
        "llama",
        dict(layer_types=["full_attention", "sliding_attention"]),
        "'layer_types' is .* asks for other attention",
    ),
    "layers that differ": (
        "llama",
        dict(per_layer_config={"1": {"skip": ["mlp"]}}),
        "'per_layer_config' is .* gives layers different settings",
    ),
    "weights in another file": (
        "llama",
        dict(transformers_weights="other.safetensors"),
        "'transformers_weights' is 'other.safetensors', which names another file",
    ),
    "scaling a string": ("llama", dict(rope_scaling="linear"), "'rope_scaling' is 'linear'"),
    "rotary per layer": (
        "llama",
        dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
        "RoPE scaling",
    ),
    "two bases": ("llama", dict(rope_theta=10000.0), "'rope_theta' 500.0 and .* disagree"),
    "two rotary fractions": ("gpt-neox", dict(rotary_pct=0.5), "disagree"),
    "base negative": ("gpt-neox", dict(rope_parameters=..., rotary_emb_base=-1), "rotary_emb_base"),
    "base tiny": (
        "llama",
        dict(rope_parameters=..., rope_theta=1e-300),
        "'rope_theta' must be from 1 to 1e30, got 1e-300",
    ),
    "rotary fraction above 1": (
        "gpt-neox",
        dict(rope_parameters=..., rotary_pct=1.5),
        "must be at most 1, got 1.5",
    ),
    "no rotary column": (
        "gpt-neox",
        dict(rope_parameters=..., rotary_pct=0.1),
        "'rotary_pct' 0.1 of heads of width 8 are 0 rotary columns; expected an even",
    ),
    "one rotary column": ("gpt-neox", dict(rope_parameters=..., rotary_pct=0.2), "1 rotary col"),
    "partial llama": ("llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "mistral window": (
        "mistral",
        dict(sliding_window=31),
        "'sliding_window' is 31 but the context",
    ),
    "qwen2 window": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=8, layer_types=None, max_window_layers=1),
        "'sliding_window' is 8 but the context",
    ),
    "mistral default window": (
        "mistral",
        dict(sliding_window=..., max_position_embeddings=8192),
        "'sliding_window' is 4096",
    ),
    "gpt2 unscaled": ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights"),
    "gpt2 scaled by layer": (
        "gpt2",
        dict(scale_attn_by_inverse_layer_idx=True),
        "scale_attn_by_inverse_layer_idx",
    ),
    "gpt2 cross attention": ("gpt2", dict(add_cross_attention=True), "add_cross_attention"),
    "huge rotary table": (
        "llama",
        dict(max_position_embeddings=2**31 - 1),
        "rotary tables of more",
    ),
    "huge head": ("llama", dict(head_dim=2**30), "rotary tables of more"),
    # Valid, but not matching the tensors: rejected by their shapes, before any is read.
    "huge width": ("llama", dict(hidden_size=2**30), "by config.json, got .40, 16."),
    "huge layers": ("llama", dict(num_hidden_layers=2**30), "1073741824 layers but the folder"),
    "one layer too many": (
        "llama",
        dict(num_hidden_layers=3),
        r"layers.2.input_layernorm.weight' \(and 15 more\) is miss",
    ),
    "one layer too few": ("llama", dict(num_hidden_layers=1), "layers.1.* has no place"),
    "untied without head": (
        "qwen2",
        dict(tie_word_embeddings=False),
        "'lm_head.weight' is missing",
    ),
    "bias in tensors only": ("llama", dict(attention_bias=False), "has no place"),
    "bias in config only": (
        "mistral",
        dict(architectures=["Qwen2ForCausalLM"], model_type="qwen2"),
        r"q_proj.bias' \(and 5 more\) is missing",
    ),
    "other heads": ("llama", dict(num_key_value_heads=4), r"k_proj.weight' must .* got \(12, 16\)"),
    "gpt2 context": ("gpt2", dict(n_positions=64), "wpe.weight' must have shape"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_invalid_config_is_one_line_error(tmp_path, case):
    name, changes, message = BAD_CONFIGS[case]
    folder = copied(name, tmp_path)
    edit(folder, **changes)
    tracemalloc.start()
    with pytest.raises(MinitxError, match=message) as caught:
        read_model(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # bytes: nothing of a size from the file was allocated
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "gpt-neox"])
def test_any_value_in_any_field_is_rejected_or_loads(tmp_path, name):
    folder = copied(name, tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    outcomes = {"rejected": 0, "loaded": 0}
    for field in [*fields, "rope_scaling", "rope_theta", "head_dim"]:
        for value in (..., None, True, 0, -1, 3, 2**31 - 1, 2**40, 0.5, 1e-300, "x", [], [1], {}):
            edit(folder, **fields | {"rope_scaling": ..., "rope_theta": ..., field: value})
            try:
                logits = read_model(folder)(IDS[:3])
            except MinitxError as error:
                assert "\n" not in str(error)
                outcomes["rejected"] += 1
            else:
                assert logits.shape == (3, 40) and np.isfinite(logits).all()
                outcomes["loaded"] += 1
    assert min(outcomes.values()) > 50, outcomes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty .0 bytes.; download it again"),
        ('{"rms_norm_eps": 1e-5, "hidden', "not valid JSON .*; it ends too early, so download it"),
        ("Entry not found", "not valid JSON"),
        ("<!DOCTYPE html><html>", "is a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "run 'git lfs pull'"),
        ("[1]", "expected a JSON object, got a list"),
        ('{"model_type": "llama", "rms_norm_eps": NaN}', "'rms_norm_eps' is nan; expected a pos"),
        ('{"model_type": "llama", "rms_norm_eps": 1e400}', "'rms_norm_eps' is inf; expected"),
        (
            '{"model_type": "llama", "vocab_size": 1' + "0" * 99 + "}",
            "'vocab_size' is an integer of",
        ),
        ('{"model_type": "llama", "vocab_size": 1' + "0" * 99_999 + "}", "'vocab_size' is inf"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_config_invalid_json_is_rejected(tmp_path, text, message):
    folder = copied("llama", tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(MinitxError, match=message):
        read_model(folder)


def test_mistral_window_as_long_as_context_is_accepted(tmp_path):
    folder = copied("mistral", tmp_path)
    edit(folder, sliding_window=32, max_position_embeddings=32)
    assert read_config(folder / "config.json").context == 32


def test_legal_json_in_unused_fields_never_matters(tmp_path):
    """transformers writes integers of 30 digits; other tools write what they like."""
    folder = copied("llama", tmp_path)
    text = (folder / "config.json").read_text().rstrip().removesuffix("}")
    unused = [
        '"a": 1000000000000000019884624838656',
        '"b": ' + "9" * 1_000_000,  # converted to an integer, this would take minutes
        '"c": -1e400',
        '"d": {"e": 1, "e": 2}',
        '"f": "\\ud800 \\u0000"',
        '"g": ' + "[" * 200 + "]" * 200,
        '"hidden_size": 99, "hidden_size": 16',  # of equal keys, the last one counts
    ]
    (folder / "config.json").write_text(text + "," + ",".join(unused) + "}")
    assert read_config(folder / "config.json").width == 16
