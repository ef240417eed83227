"""Writing Hugging Face folders: round trips, unsupported models, and loading in transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hf_folders import NAMES, REFERENCE, relative_error

from minitx.build import random_model
from minitx.checkpoints.hf_weights import fused_by_head
from minitx.checkpoints.huggingface import read_model, write_model
from minitx.checkpoints.safetensors import read_tensors
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import SwiGLU
from minitx.tree import map_weights, rebuild, weights

BASE = Config(
    family="llama",
    vocab_size=30,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=6,
    hidden=20,
    context=32,
    rope_width=6,
)
LLAMA3 = dict(rope_factor=8.0, rope_trained_context=16, rope_low_turns=0.1, rope_high_turns=2.0)
GPT2 = replace(BASE, family="gpt2", kv_heads=4, rope_width=0, activation="gelu_tanh", tied=True)
GPT2 = replace(GPT2, qkv_bias=True, out_bias=True, ffn_bias=True)
NEOX = replace(GPT2, family="gpt_neox", tied=False, rope_width=2, parallel=True, activation="gelu")
WRITABLE = {
    "llama": replace(BASE, bos=1, eos=(2, 3)),
    "llama biased": replace(BASE, qkv_bias=True, out_bias=True, rope_base=500.0, eos=(4,)),
    "llama ffn bias, tied": replace(BASE, ffn_bias=True, tied=True, norm_eps=1e-6),
    "heads that do not divide the width": replace(
        BASE, heads=5, kv_heads=1, head_width=8, rope_width=8
    ),
    "qwen2": replace(BASE, qkv_bias=True, heads=7, kv_heads=7),
    "llama, RoPE scaled linearly": replace(BASE, rope_factor=4.0, rope_base=500.0),
    "llama, RoPE scaled as in Llama 3": replace(BASE, **LLAMA3, max_length=20),
    "limited length": replace(BASE, max_new_tokens=7),
    "gpt2": GPT2,
    "gpt2 relu, untied": replace(GPT2, activation="relu", tied=False),
    "gpt2 gelu": replace(GPT2, activation="gelu"),
    "gpt_neox": NEOX,
    "gpt_neox serial": replace(NEOX, parallel=False, rope_width=6, activation="relu", tied=True),
    "gpt_neox inexact rotary fraction": replace(
        NEOX, heads=1, kv_heads=1, head_width=24, rope_width=14
    ),
    "gpt_neox, RoPE scaled as in Llama 3": replace(NEOX, **LLAMA3 | {"rope_base": 30.0}),
    "gpt_neox no attention bias": replace(NEOX, qkv_bias=False, out_bias=False, activation="silu"),
}


def noisy_model(config: Config, seed: int = 5):
    """A random model with gains other than 1 and biases other than 0, exact in float16."""
    rng = np.random.default_rng(seed)
    model = random_model(config, seed)
    return map_weights(
        model,
        lambda w: (w + 0.2 * rng.standard_normal(w.shape)).astype(np.float16).astype(np.float32),
    )


@pytest.mark.parametrize("name", WRITABLE)
def test_write_then_read_gives_same_model(tmp_path, name):
    model = noisy_model(WRITABLE[name])
    for dtype in ("F16", "F32", "F64"):
        write_model(model, tmp_path / "new" / dtype, dtype)
        back = read_model(tmp_path / "new" / dtype)
        assert back.config == model.config and repr(back) == repr(model)
        theirs = weights(back)
        assert list(theirs) == list(weights(model))
        for path, w in weights(model).items():
            np.testing.assert_array_equal(theirs[path], w)
        names = {path.name for path in (tmp_path / "new" / dtype).iterdir()}
        assert names == {"config.json", "model.safetensors"}


def test_scaled_rope_is_written_for_older_versions_too(tmp_path):
    """transformers 4 reads ``rope_theta`` and ``rope_scaling``, with "type" in place of
    "rope_type"."""
    for name, kind in (("linearly", "linear"), ("as in Llama 3", "llama3")):
        write_model(noisy_model(WRITABLE[f"llama, RoPE scaled {name}"]), tmp_path)
        fields = json.loads((tmp_path / "config.json").read_text())
        old, new = fields["rope_scaling"], fields["rope_parameters"]
        assert old["type"] == old["rope_type"] == new["rope_type"] == kind
        assert old["factor"] == new["factor"] and fields["rope_theta"] == new["rope_theta"]


def test_bfloat16_keeps_eight_significant_bits(tmp_path):
    model = noisy_model(BASE)
    write_model(model, tmp_path, "BF16")
    back = weights(read_model(tmp_path))
    for path, w in weights(model).items():
        assert np.all(np.abs(back[path] - w) <= np.abs(w) * 2.0**-8)


@pytest.mark.parametrize("name", NAMES)
def test_read_then_write_gives_same_tensors(tmp_path, name):
    """transformers file -> minitx model -> minitx file: same names, same bits."""
    write_model(read_model(REFERENCE / name), tmp_path, "F32")
    theirs = {}
    for file in (REFERENCE / name).glob("*.safetensors"):
        theirs.update(read_tensors(file))
    ours = read_tensors(tmp_path / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for tensor, array in theirs.items():
        np.testing.assert_array_equal(ours[tensor], array)


def test_fused_by_head_worked_example():
    """Two heads of width 1: rows q0 k0 v0 q1 k1 v1."""
    fused = np.array([[10.0], [20], [30], [11], [21], [31]])  # (H*3*d, in=1)
    q, k, v = fused_by_head(2).split(fused, 3)
    assert q.tolist() == [[10, 11]] and k.tolist() == [[20, 21]] and v.tolist() == [[30, 31]]
    np.testing.assert_array_equal(fused_by_head(2).join([q, k, v]), fused)


UNWRITABLE = {
    "parallel llama": replace(BASE, parallel=True),
    "partial rotary llama": replace(BASE, rope_width=4),
    "llama with out bias only": replace(BASE, out_bias=True),
    "gpt2 without a bias": replace(GPT2, ffn_bias=False),
    "gpt2 with shared keys": replace(GPT2, kv_heads=2),
    "gpt2 with wide heads": replace(GPT2, head_width=8),
    "gpt_neox without positions": replace(NEOX, rope_width=0),
    "gpt_neox with one bias": replace(NEOX, out_bias=False),
    "gpt_neox with shared keys": replace(NEOX, kv_heads=2),
}


@pytest.mark.parametrize("name", UNWRITABLE)
def test_config_without_architecture_is_rejected(tmp_path, name):
    with pytest.raises(MinitxError, match="cannot be written"):
        write_model(random_model(UNWRITABLE[name]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_modified_or_non_finite_model_is_rejected(tmp_path):
    model = noisy_model(BASE)

    class Skipping(SwiGLU):
        pass

    swapped = rebuild(model, lambda p: Skipping(p.gate, p.up) if type(p) is SwiGLU else None)
    with pytest.raises(MinitxError, match="Expected an unmodified model"):
        write_model(swapped, tmp_path / "new")
    narrower = replace(model, config=replace(BASE, hidden=19))
    with pytest.raises(MinitxError, match="Expected an unmodified model"):
        write_model(narrower, tmp_path / "new")
    infinite = map_weights(model, lambda w: w * np.float32(np.inf))
    with pytest.raises(MinitxError, match="NaN or Inf"):
        write_model(infinite, tmp_path / "new")
    large = map_weights(model, lambda w: w * np.float32(1e6))
    with pytest.raises(MinitxError, match="overflows F16"):
        write_model(large, tmp_path / "new")
    with pytest.raises(MinitxError, match="dtype must be .* got 'I8'"):
        write_model(model, tmp_path / "new", "I8")
    assert not list(tmp_path.glob("new/*"))
    (tmp_path / "file").write_text("")
    with pytest.raises(MinitxError, match="cannot be created"):
        write_model(model, tmp_path / "file")


@pytest.mark.parametrize("name", WRITABLE)
def test_transformers_loads_written_folder(tmp_path, name):
    """Skipped without the `reference` extra (torch, transformers)."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = noisy_model(WRITABLE[name])
    ids = np.random.default_rng(6).integers(0, 30, 25)
    for dtype in ("F16", "F32"):
        write_model(model, tmp_path / dtype, dtype)
        theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / dtype, output_loading_info=True
        )
        assert not any(report.values()), report
        with torch.no_grad():
            logits = theirs(torch.tensor(ids)[None]).logits[0].numpy()
        assert logits.dtype == np.float32  # also for float16 files
        assert relative_error(model(ids), logits) < 1e-5
        config = theirs.config
        eos = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        assert (config.bos_token_id, eos) == (model.config.bos, list(model.config.eos) or [None])
