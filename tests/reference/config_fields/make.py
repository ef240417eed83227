"""Record what each configuration field does in Hugging Face transformers: recorded.json.

    python tests/reference/config_fields/make.py [NAME...]    (needs torch, transformers; minutes)

Each NAME is a model type or "generation"; without one, all are recorded anew.

For a tiny model of each architecture (the folders in ../files) every case below changes some fields
of ``config.json`` and lets transformers compute logits and a greedy completion with a KV cache:

    "same"      the fields change nothing
    [numbers]   they do; these are the new logits of the last position
    "error"     transformers cannot load or run such a model

``generation`` holds cases of ``generation_config.json`` with the new tokens of ``generate``. The
names of all fields that transformers knows are recorded too, so that a test finds a forgotten one.
"""

import dataclasses
import json
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # all files are local
import numpy as np
import torch
import transformers

HERE = Path(__file__).parent
FILES = HERE.parent / "files"
IDS = torch.from_numpy(np.load(FILES / "ids.npy"))[None]  # (1, T)
FOLDERS = {  # model type: folder
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "gpt2": "gpt2",
    "gpt_neox": "gpt-neox",
}
SLIDING, FULL = "sliding_attention", "full_attention"
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=4.0)
ROPES = [
    *(None, {}, {"rope_type": "default"}, {"type": "default"}),
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "default", "rope_theta": 77.0, "factor": 3.0, "attention_factor": 2.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    *({"type": "linear", "factor": 4.0}, {"type": "linear", "rope_type": "default"}),
    LLAMA3,
    LLAMA3 | {"original_max_position_embeddings": 24, "rope_theta": 100.0},
    LLAMA3 | {"original_max_position_embeddings": 8, "rope_theta": 5000.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
    {"rope_type": "proportional", "factor": 2.0},
    {"rope_type": "none"},
    {FULL: {"rope_theta": 9.0}},
]
VALUES = {
    **dict.fromkeys(["sliding_window", "attention_chunk_size"], [4, 32, 64, None]),
    "layer_types": [[FULL] * 2, [SLIDING] * 2, [FULL, SLIDING], ["chunked_attention"] * 2],
    "per_layer_config": [{"1": {"skip": ["mlp"]}}, {"0": {"intermediate_size": 8}}, {}],
    "is_causal": [True, False],
    "is_encoder_decoder": [True, False],
    "is_decoder": [True, False],
    "add_cross_attention": [True, False],
    **dict.fromkeys(["hidden_act", "activation_function"], ["gelu", "relu", "silu", "gelu_new"]),
    **dict.fromkeys(["rope_parameters", "rope_scaling"], ROPES),
    **dict.fromkeys(["rope_theta", "rotary_emb_base"], [77.0, 500, 10000.0]),
    **dict.fromkeys(["partial_rotary_factor", "rotary_pct"], [0.25, 0.5, 1.0]),
    "original_max_position_embeddings": [16],
    "head_dim": [4, 6, 8, 16],
    "architectures": [None, []],
    **{name: [{"hidden_size": 8}] for name in ("text_config", "decoder", "generator")},
    "transformers_weights": ["other.safetensors", "model.safetensors"],
    "quantization_config": [None, {"quant_method": "gptq", "bits": 4}],
    **dict.fromkeys(["dtype", "torch_dtype"], ["float16", "float64"]),
    "attn_implementation": ["eager", "sdpa"],
    **dict.fromkeys(["num_attention_heads", "n_head", "num_key_value_heads"], [1, 2, 4, 8, None]),
    **dict.fromkeys(["hidden_size", "n_embd", "intermediate_size", "n_inner"], [8, 16, None]),
    **dict.fromkeys(["num_hidden_layers", "n_layer"], [1, 2, 3]),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx"], [32, 40]),
    **dict.fromkeys(["rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"], [1e-3]),
    "max_window_layers": [0, 1],
    "pad_token_id": [0, 5, -1],
    **dict.fromkeys(["bos_token_id", "eos_token_id"], [None, 3, 39, -1]),
    "auto_map": [{"AutoModelForCausalLM": "modeling_x.X"}],
    "id2label": [{"0": "a"}],
    "label2id": [{"a": 0}],
    "configuration_files": [["config.4.0.0.json"]],
    "kv_sharing_modes": [[1, 0]],
    "transformers_version": ["4.1.0"],
    **dict.fromkeys(["summary_type", "summary_activation", "problem_type"], ["regression"]),
}
GENERIC = [True, False, 3, 0.5]  # for fields without values of their own
PAIRS = [  # of fields that act together
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": [FULL, SLIDING]},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": None, "max_window_layers": 1},
    {"use_sliding_window": True, "sliding_window": 8, "layer_types": None},
    {"use_sliding_window": True, "sliding_window": 32, "layer_types": [SLIDING, FULL]},
    {"sliding_window": 8, "layer_types": [SLIDING, FULL]},
    {"sliding_window": 32, "layer_types": [SLIDING, FULL]},
    {"rope_parameters": None, "rope_theta": 77.0},
    {"rope_parameters": None, "rotary_emb_base": 77.0, "rotary_pct": 0.5},
    {"rope_parameters": None, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 99.0},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 12},
    {"rope_parameters": {"rope_theta": 77.0}, "rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "partial_rotary_factor": 0.5},
    {"n_head": 2, "num_attention_heads": 4},
    {"n_head": 4, "num_attention_heads": 4},
    {"n_layer": 2, "num_hidden_layers": 1},
    {"n_positions": 32, "max_position_embeddings": 32, "hidden_size": 16},
]
GENERATION = [
    *({}, {"eos_token_id": None}, {"eos_token_id": []}, {"eos_token_id": -1}),
    *({"eos_token_id": "FIFTH"}, {"eos_token_id": ["FIFTH", 39]}, {"eos_token_id": [39, 1000]}),
    *({"max_new_tokens": 3}, {"max_length": 16}, {"max_length": 16, "max_new_tokens": 6}),
    *({"min_length": 20, "eos_token_id": "FIFTH"}, {"min_new_tokens": 9, "eos_token_id": "FIFTH"}),
    *(
        {"min_length": 0},
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 3, "early_stopping": True},
    ),
    *({"repetition_penalty": 1.0}, {"repetition_penalty": 1.8}, {"no_repeat_ngram_size": 1}),
    *({"encoder_repetition_penalty": 3.0}, {"encoder_no_repeat_ngram_size": 1}),
    *(
        {"suppress_tokens": ["FIFTH"]},
        {"begin_suppress_tokens": ["FIRST"]},
        {"suppress_tokens": []},
    ),
    *({"bad_words_ids": [["FIFTH"]]}, {"forced_bos_token_id": 7}, {"forced_eos_token_id": 7}),
    {"sequence_bias": [[["FIFTH"], -50.0]]},
    *({"exponential_decay_length_penalty": [1, 3.0]}, {"guidance_scale": 2.0}),
    *({"temperature": 0.3}, {"top_k": 3}, {"top_p": 0.5}, {"typical_p": 0.5}, {"min_p": 0.3}),
    *({"epsilon_cutoff": 0.01}, {"eta_cutoff": 0.01}, {"do_sample": False}, {"top_h": 0.5}),
    *({"length_penalty": 2.0}, {"num_beam_groups": 1}, {"diversity_penalty": 0.0}),
    *({"use_cache": False}, {"use_cache": True}, {"renormalize_logits": True}),
    *(
        {"remove_invalid_values": True},
        {"num_return_sequences": 1},
        {"prompt_lookup_num_tokens": 2},
    ),
    *({"pad_token_id": 39}, {"bos_token_id": 5}, {"decoder_start_token_id": 5}),
    *({"output_scores": True}, {"output_attentions": True}, {"low_memory": True}),
    *({"is_assistant": True}, {"num_assistant_tokens": 3}, {"penalty_alpha": 0.6, "top_k": 4}),
    *({"dola_layers": "high"}, {"stop_strings": ["a"]}, {"token_healing": True}),
    {"watermarking_config": {"bias": 20.0, "seeding_scheme": "lefthash"}},
    *({"cache_implementation": "static"}, {"disable_compile": True}, {"max_cache_len": 64}),
    *({"prefill_chunk_size": 4}, {"cache_config": None}, {"chat_format": "chatml"}),
]
NEW_TOKENS = 10


def field_names(config_class) -> list[str]:
    """All fields that the class declares, and their aliases."""
    declared = {field.name for field in dataclasses.fields(config_class)}
    return sorted(declared | set(config_class.attribute_map))


def load(folder):
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    if found["missing_keys"] or found["unexpected_keys"]:
        raise ValueError("other tensors")
    return model.eval()


def outputs(folder) -> np.ndarray:
    """Logits of all positions in one pass, then those of a greedy completion, step by step."""
    model = load(folder)
    one_pass = model(IDS, return_dict=True).logits[0]
    model.generation_config = transformers.GenerationConfig()
    half = IDS[:, :12]
    options = dict(attention_mask=torch.ones_like(half), pad_token_id=0, max_new_tokens=8)
    options |= dict(return_dict_in_generate=True, output_logits=True)
    return np.concatenate([one_pass, *model.generate(half, **options).logits])


def outcome(folder, base: np.ndarray):
    try:
        found = outputs(folder)
    except Exception:
        return "error"
    if found.shape != base.shape:
        return "error"
    if np.abs(found - base).max() < 1e-6 * np.abs(base).max():
        return "same"
    return [float(f"{x:.6g}") for x in found[IDS.shape[1] - 1]]


def model_cases(model_type: str, given: dict) -> list[dict]:
    known = set(field_names(transformers.CONFIG_MAPPING[model_type]))
    cases = [{name: value} for name in sorted(VALUES) for value in VALUES[name]]
    cases += [{n: value} for n in sorted(known - set(VALUES)) for value in GENERIC]
    cases += [{name: "ABSENT"} for name in sorted(given)]
    return [case for case in cases + PAIRS if given | case != given]


def record_model(model_type: str, folder: Path) -> list:
    given = json.loads((folder / "config.json").read_text())
    base = outputs(folder)
    found = []
    for case in model_cases(model_type, given):
        fields = {k: v for k, v in (given | case).items() if v != "ABSENT"}
        (folder / "config.json").write_text(json.dumps(fields))
        found.append([case, outcome(folder, base)])
    return found


def record_generation(folder: Path) -> list:
    """Each case with its new tokens after the first 8 ids; "error" if transformers raises."""
    prompt = IDS[:, :8]
    plain = generated(folder, {"eos_token_id": None}, prompt)
    names = {"FIRST": plain[0], "FIFTH": plain[4]}
    found = []
    for case in GENERATION:
        case = _replace(case, names)
        try:
            tokens = generated(folder, case, prompt)
        except Exception:
            tokens = "error"
        found.append([case, tokens])
    return found


def generated(folder: Path, fields: dict, prompt) -> list[int]:
    limit = {} if {"max_new_tokens", "max_length"} & set(fields) else {"max_new_tokens": NEW_TOKENS}
    (folder / "generation_config.json").write_text(json.dumps(fields))
    found = load(folder).generate(prompt, attention_mask=torch.ones_like(prompt), **limit)
    found = found if isinstance(found, torch.Tensor) else found.sequences
    return found[0, prompt.shape[1] :].tolist()


def _replace(value, names: dict):
    if isinstance(value, dict):
        return {k: _replace(v, names) for k, v in value.items()}
    if isinstance(value, list):
        return [_replace(v, names) for v in value]
    return names.get(value, value) if isinstance(value, str) else value


def copied(name: str, to: str) -> Path:
    folder = Path(shutil.copytree(FILES / name, Path(to) / name))
    other = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for weight in other.parameters():
        weight.mul_(0.5)
    other.save_pretrained(Path(to) / "other")
    shutil.copy(Path(to) / "other" / "model.safetensors", folder / "other.safetensors")
    return folder


def main(names: list[str]) -> None:
    path = HERE / "recorded.json"
    found = json.loads(path.read_text()) if path.exists() else {"models": {}}
    found |= {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    found["fields"] = {t: field_names(transformers.CONFIG_MAPPING[t]) for t in FOLDERS}
    found["generation_fields"] = sorted(transformers.GenerationConfig().to_dict())
    for name in names or [*FOLDERS, "generation"]:
        with tempfile.TemporaryDirectory() as to:
            if name == "generation":
                found[name] = record_generation(copied("llama", to))
            else:
                found["models"][name] = record_model(name, copied(FOLDERS[name], to))
        print(name, file=sys.stderr)
        lines = json.dumps(found, separators=(",", ":")).replace("],[{", "],\n[{")
        path.write_text(lines + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)
    transformers.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main(sys.argv[1:])
