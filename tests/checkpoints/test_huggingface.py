"""Reading Hugging Face folders: logits must equal those of transformers."""

import json

import numpy as np
import pytest
from hf_folders import IDS, NAMES, REFERENCE, copied, edit, edit_tensors, relative_error

from minitx.build import shapes
from minitx.checkpoints.hf_config import read_config
from minitx.checkpoints.huggingface import read_model
from minitx.checkpoints.safetensors import read_header
from minitx.config import Config
from minitx.tree import map_weights, weights


def test_reference_folders_are_complete_and_small():
    assert len(NAMES) == 12
    assert sum(f.stat().st_size for f in REFERENCE.rglob("*") if f.is_file()) < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_transformers(name):
    expected = np.load(REFERENCE / name / "logits.npy")
    for dtype in (np.float32, np.float64):
        model = read_model(REFERENCE / name, dtype)
        assert all(w.dtype == dtype and w.flags.c_contiguous for w in weights(model).values())
        logits = model(IDS)
        assert logits.dtype == dtype and relative_error(logits, expected) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weight_changes_logits(name):
    """Changing any single weight tensor changes the logits, so a wrong one would be detected.

    The exception is the key bias without rotary positions: it adds a constant to all scores of a
    query, which cancels in the softmax. The round-trip tests cover it.
    """
    model = read_model(REFERENCE / name)
    expected = np.load(REFERENCE / name / "logits.npy")
    for path, target in weights(model).items():
        if not (name.startswith("gpt2") and path.endswith("qkv.k.b")):
            changed = map_weights(model, lambda w, target=target: _rolled(w, target))
            assert relative_error(changed(IDS), expected) > 1e-3, path


def _rolled(w, target):
    return np.roll(w, 1, axis=-1) if w is target else w


def test_config_fields_are_read():
    llama = read_model(REFERENCE / "llama").config
    assert llama == Config(
        family="llama",
        vocab_size=40,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_width=6,
        hidden=20,
        context=32,
        norm_eps=1e-6,
        rope_width=6,
        rope_base=500.0,
        qkv_bias=True,
        out_bias=True,
        ffn_bias=True,
        bos=1,
        eos=(2,),
    )
    neox = read_model(REFERENCE / "gpt-neox").config
    assert (neox.rope_width, neox.head_width, neox.parallel, neox.activation) == (
        2,
        8,
        True,
        "gelu",
    )
    gpt2 = read_model(REFERENCE / "gpt2").config
    assert (gpt2.hidden, gpt2.tied, gpt2.activation, gpt2.rope_width) == (64, True, "gelu_tanh", 0)
    assert (gpt2.bos, gpt2.eos) == (None, ())  # 50256 is outside its vocabulary of 40
    assert read_model(REFERENCE / "qwen2").config.rope_base == 1e6


OLDER_SPELLINGS = {
    "llama": dict(rope_parameters=..., rope_theta=500.0, rope_scaling=None, eos_token_id=[2, 3]),
    "llama-sharded": dict(rope_parameters=..., head_dim=..., num_key_value_heads=...),
    "qwen2": dict(rope_parameters=None, rope_theta=1_000_000, rope_scaling={"type": "default"}),
    "mistral": dict(rope_parameters=..., sliding_window=None),
    "gpt-neox": dict(rope_parameters=..., rotary_emb_base=10000, rotary_pct=0.25),
    "gpt-neox-tied": dict(rope_parameters=..., attention_bias=..., use_parallel_residual=...),
    "gpt-neox-serial": dict(rope_parameters=..., rotary_emb_base=100, rotary_pct=1.0),
    "gpt2": dict(tie_word_embeddings=..., n_ctx=32, n_inner=..., scale_attn_weights=...),
}


@pytest.mark.parametrize("name", OLDER_SPELLINGS)
def test_older_config_spellings_give_same_model(tmp_path, name):
    folder = copied(name, tmp_path)
    edit(folder, **OLDER_SPELLINGS[name])
    np.testing.assert_array_equal(read_model(folder)(IDS), read_model(REFERENCE / name)(IDS))


def test_missing_prefix_and_buffers_are_accepted(tmp_path):
    """OpenAI's GPT-2 file has no "transformer." prefix, and old files contain buffers."""
    folder = copied("gpt2", tmp_path)

    def remove_prefix(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32)))
        tensors["h.1.attn.masked_bias"] = np.array(-1e4)

    edit_tensors(folder, remove_prefix)
    np.testing.assert_array_equal(read_model(folder)(IDS), read_model(REFERENCE / "gpt2")(IDS))

    folder = copied("gpt-neox", tmp_path)
    prefix = "gpt_neox.layers.0.attention."
    edit_tensors(
        folder,
        lambda t: t.update(
            {f"{prefix}{n}": np.zeros(3) for n in ("bias", "masked_bias", "rotary_emb.inv_freq")}
        ),
    )
    read_model(folder)


def test_boolean_buffer_is_not_read(tmp_path):
    folder = copied("gpt2", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    offsets = [len(data), len(data) + 4]
    header["transformer.h.0.attn.bias"] = {"dtype": "BOOL", "shape": [4], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data + b"\0\0\0\1")
    read_model(folder)


def test_header_sizes_match_config_shapes():
    """The sizes in the file header add up to those of ``shapes``: no weight is missing."""
    config = read_config(REFERENCE / "gpt-neox" / "config.json")
    header = read_header(REFERENCE / "gpt-neox" / "model.safetensors")
    ours = sum(int(np.prod(shape)) for shape in shapes(config).values())
    assert ours == sum(int(np.prod(info.shape)) for info in header.tensors.values())
