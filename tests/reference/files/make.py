"""Generate the tiny checkpoints in this folder and their logits with Hugging Face transformers.

    python tests/reference/files/make.py [NAME...]      (requires torch and transformers; seconds)

Each folder holds the output of save_pretrained for a small random model, plus ``logits.npy`` (T, V)
for the ids (T,) in ``ids.npy``, computed in float32 from the stored weights. All weights are
reinitialized: the defaults of transformers, gains of 1 and biases of 0, would hide errors.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

HERE = Path(__file__).parent
IDS = np.random.default_rng(0).integers(0, 40, 24)
COMMON = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, max_position_embeddings=32)
SMALL = COMMON | dict(intermediate_size=20, num_attention_heads=4, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def rope(base, **more):
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, **more}}


# name: (configuration, dtype of the stored weights, maximum shard size)
MODELS = {
    "llama": (
        LlamaConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=6,
            attention_bias=True,
            mlp_bias=True,
            **rope(500.0),
        ),
        F32,
        None,
    ),
    "llama-sharded": (
        LlamaConfig(**SMALL, num_key_value_heads=4, tie_word_embeddings=True, rms_norm_eps=1e-5),
        BF16,
        "3KB",
    ),
    "mistral": (
        MistralConfig(**SMALL, num_key_value_heads=1, head_dim=6, sliding_window=32),
        F16,
        None,
    ),
    "qwen2": (
        Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True, **rope(1e6)),
        F32,
        None,
    ),
    "gpt2": (GPT2Config(**GPT2), F32, None),
    "gpt2-relu": (
        GPT2Config(**GPT2, n_inner=20, activation_function="relu", tie_word_embeddings=False),
        F16,
        None,
    ),
    "gpt2-gelu": (GPT2Config(**GPT2, n_inner=20, activation_function="gelu"), BF16, None),
    "gpt-neox": (GPTNeoXConfig(**SMALL | {"num_attention_heads": 2}), F32, None),
    "gpt-neox-serial": (
        GPTNeoXConfig(
            **SMALL,
            hidden_act="gelu_new",
            use_parallel_residual=False,
            attention_bias=False,
            **rope(100.0, partial_rotary_factor=1.0),
        ),
        F16,
        None,
    ),
    "gpt-neox-tied": (
        GPTNeoXConfig(**SMALL | {"num_attention_heads": 2}, tie_word_embeddings=True),
        F16,
        None,
    ),
    "llama-rope-linear": (
        LlamaConfig(
            **SMALL, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
        ),
        F16,
        None,
    ),
    # Of its four frequencies (1, 1/5, 1/25, 1/125) the first stays, the second is interpolated
    # and two are divided: they make 3.8, 0.8, 0.2 and 0.03 turns in 24 tokens.
    "llama-rope-llama3": (
        LlamaConfig(
            **SMALL,
            head_dim=8,
            num_key_value_heads=2,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 625.0,
                "factor": 8.0,
                "low_freq_factor": 0.5,
                "high_freq_factor": 2.0,
                "original_max_position_embeddings": 24,
            },
        ),
        F16,
        None,
    ),
}


def randomize(model, seed: int) -> None:
    """Gains near 1, non-zero biases, matrices that keep the scale of the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        is_norm = "norm" in name or "ln_" in name
        with torch.no_grad():
            weight.copy_(1 + 0.3 * noise if is_norm and name.endswith("weight") else 0.4 * noise)


def make(name: str, config, dtype, shard: str | None, seed: int) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomize(model, seed)
    model = model.to(dtype)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    # Reloaded, because the rotary angles of the model above are rounded to ``dtype`` too.
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=F32, attn_implementation="eager")
    with torch.no_grad():
        logits = model(torch.tensor(IDS)[None]).logits[0]
    np.save(folder / "logits.npy", logits.numpy())
    print(f"{name}: logits up to {logits.abs().max():.2f}")


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    np.save(HERE / "ids.npy", IDS)
    for seed, (name, (config, dtype, shard)) in enumerate(MODELS.items()):
        if name in (sys.argv[1:] or MODELS):
            make(name, config, dtype, shard, seed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
