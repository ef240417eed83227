"""Missing, unexpected, wrong or truncated tensors, and pickles: a one-line error each."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import IDS, REFERENCE, copied, edit_tensors

from minitx.checkpoints.huggingface import read_model
from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError


def test_missing_files_are_rejected(tmp_path):
    with pytest.raises(MinitxError, match="no such folder"):
        read_model(tmp_path / "nothing")
    with pytest.raises(MinitxError, match="config.json: there is no such file"):
        read_model(tmp_path)
    folder = copied("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MinitxError, match="expected model.safetensors or .* got neither"):
        read_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo no'\ntR.")
    with pytest.raises(MinitxError, match="pytorch_model.bin; .* never does: save the model again"):
        read_model(folder)
    with pytest.raises(MinitxError, match="float32 or float64"):
        read_model(folder, np.float16)


Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
BAD_TENSORS = {
    "missing": (
        "llama",
        lambda t: t.pop(Q),
        f"tensor '{Q}' is missing .*; the folder has 'model.layers.1.self_attn.q_proj.bias', "
        "'model.layers.1.self_attn.* and 31 more",
    ),
    "unexpected": ("llama", lambda t: t.update(more=t[Q]), "tensor 'more' has no place"),
    "unexpected layer": (
        "llama",
        lambda t: t.update({Q.replace(".1.", ".2."): t[Q]}),
        "has no place",
    ),
    "transposed": ("llama", lambda t: t.update({Q: t[Q].T}), r"shape \(24, 16\) .* got \(16, 24\)"),
    "flat": ("llama", lambda t: t.update({Q: t[Q].ravel()}), r"got \(384,\)"),
    "NaN": ("llama", lambda t: t[Q].__setitem__((2, 3), np.nan), f"'{Q}' holds NaN or Inf"),
    "Inf": ("llama", lambda t: t[Q].__setitem__((2, 3), -np.inf), f"'{Q}' holds NaN or Inf"),
    "tied head with other values": (
        "qwen2",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}),
        "but their values differ",
    ),
    "tied head with another shape": (
        "qwen2",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING][1:]}),
        "but their values differ",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_invalid_tensor_is_one_line_error(tmp_path, case):
    name, change, message = BAD_TENSORS[case]
    folder = copied(name, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(MinitxError, match=message) as caught:
        read_model(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def renamed(change):
    """An edit that gives every tensor the name ``change(name)``."""

    def apply(tensors):
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return apply


LIKELY_CAUSES = {
    "a wrapper's prefix": (
        "llama",
        renamed(lambda name: f"module.{name}"),
        r"embed_tokens.weight' \(and 34 more\) is missing .* has 'module.*' and 32 more; "
        "'module.model.embed_tokens.weight' looks like it: the names have another prefix than "
        "'model.embed_tokens.weight'",
    ),
    "another family": (
        "gpt-neox",
        lambda t: (t.clear(), t.update(read_tensors(REFERENCE / "gpt2" / "model.safetensors"))),
        "these are names of the gpt2 family: config.json is of another model",
    ),
    "PEFT adapter": (
        "llama",
        lambda t: (t.clear(), t.update({f"base_model.{Q}.lora_A.weight": np.ones((2, 2))})),
        "weights of a PEFT adapter: merge it into its base model",
    ),
    "quantized": (
        "llama",
        renamed(lambda name: name.replace("proj.weight", "proj.qweight")),
        "these are quantized weights, which minitx does not dequantize",
    ),
    "no head": (
        "llama",
        lambda t: t.pop("lm_head.weight"),
        "'lm_head.weight' is missing .*; all other tensors are there: if the head shares the "
        "embedding table, set tie_word_embeddings to true",
    ),
}


@pytest.mark.parametrize("case", LIKELY_CAUSES)
def test_missing_tensor_message_shows_names_and_likely_cause(tmp_path, case):
    name, change, message = LIKELY_CAUSES[case]
    folder = copied(name, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(MinitxError, match=message) as caught:
        read_model(folder)
    assert len(str(caught.value)) < 900 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "qwen2"])
def test_names_without_prefix_are_accepted(tmp_path, name):
    """As transformers accepts them: a model saved without its head has no prefix."""
    folder = copied(name, tmp_path)
    prefixes = ("model.", "transformer.", "gpt_neox.")
    edit_tensors(
        folder, renamed(lambda n: n.removeprefix(next(filter(n.startswith, prefixes), "")))
    )
    assert repr(read_model(folder)) == repr(read_model(REFERENCE / name))
    np.testing.assert_array_equal(read_model(folder)(IDS), read_model(REFERENCE / name)(IDS))


def test_both_names_of_the_gpt_neox_head_are_accepted(tmp_path):
    folder = copied("gpt-neox", tmp_path)
    edit_tensors(folder, renamed(lambda name: name.replace("embed_out", "lm_head")))
    np.testing.assert_array_equal(read_model(folder)(IDS), read_model(REFERENCE / "gpt-neox")(IDS))
    edit_tensors(folder, lambda t: t.update({"embed_out.weight": t["lm_head.weight"]}))
    with pytest.raises(MinitxError, match="'embed_out.weight' and 'lm_head.weight' are both"):
        read_model(folder)


def test_adapter_beside_a_model_is_rejected(tmp_path):
    """transformers applies it where PEFT is installed."""
    folder = copied("llama", tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(MinitxError, match="adapter_config.json: .* a PEFT adapter, .* merge it"):
        read_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "run 'git lfs pull'"),
        (b"<html><head><title>Sign in</title>", "is a web page"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors"])
def test_what_a_download_left_behind_is_named(tmp_path, file, content, message):
    folder = copied("llama", tmp_path)
    (folder / file).write_bytes(content)
    with pytest.raises(MinitxError, match=f"{file}: {message}|{file}: .*{message}"):
        read_model(folder)


def test_other_weight_files_are_named(tmp_path):
    folder = copied("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(MinitxError, match="index.json, got 'consolidated.safetensors'"):
        read_model(folder)


def test_single_file_takes_precedence_over_an_index(tmp_path):
    """As in transformers."""
    folder = copied("llama", tmp_path)
    (folder / "model.safetensors.index.json").write_text("{}")
    np.testing.assert_array_equal(read_model(folder)(IDS), read_model(REFERENCE / "llama")(IDS))


def test_tied_head_stored_twice_is_accepted(tmp_path):
    folder = copied("qwen2", tmp_path)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}))
    model = read_model(folder)
    assert model.head.w is model.embed.w


def test_float64_overflow_in_float32_is_rejected(tmp_path):
    folder = copied("llama", tmp_path)
    tensors = read_tensors(folder / "model.safetensors")
    tensors[Q] = tensors[Q].astype(np.float64) * 1e300
    write_safetensors(folder / "model.safetensors", tensors, "F64")
    with pytest.raises(MinitxError, match="NaN or Inf .as float32."):
        read_model(folder)
    read_model(folder, np.float64)


def test_integer_weights_are_rejected(tmp_path):
    folder = copied("gpt2-relu", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F16"', b'"I16"'))
    with pytest.raises(MinitxError, match="dtype of weights must be one of .* got I16"):
        read_model(folder)


def test_truncated_weights_are_rejected(tmp_path):
    folder = copied("llama", tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(MinitxError, match="truncated"):
        read_model(folder)


# ------------------------------------------------------------------------------------------- shards

SHARD = "model-00002-of-00004.safetensors"


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def map_first(to):
    """Map the first tensor of the index to the file ``to``."""
    return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): to})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("weight_map"), "expected a 'weight_map'"),
        (lambda i: i.update(weight_map=[]), "expected a 'weight_map'"),
        (map_first(3), "expected a 'weight_map'"),
        (map_first("../model.safetensors"), "expected the name .* got '../model.safetensors'"),
        (map_first("/etc/passwd"), "expected the name .* got '/etc/passwd'"),
        (map_first("sub/model.safetensors"), "expected the name"),
        (map_first(".."), "expected the name"),
        (map_first(""), "expected the name"),
        (map_first("model.bin"), "expected the name"),
        (map_first("..\\model.safetensors"), "expected the name"),
        (map_first("none.safetensors"), "'none.safetensors'; the shards do not belong together"),
        (map_first(SHARD), "do not belong together|has no tensor"),
        (lambda i: i["weight_map"].pop(EMBEDDING), f"'{EMBEDDING}', but .* do not belong"),
        (lambda i: i["weight_map"].update(more=SHARD), "has no tensor 'more'"),
    ],
)
def test_invalid_index_is_rejected(tmp_path, change, message):
    folder = copied("llama-sharded", tmp_path)
    edit_index(folder, change)
    with pytest.raises(MinitxError, match=message) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)


def test_truncated_or_missing_shard_is_rejected(tmp_path):
    folder = copied("llama-sharded", tmp_path)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
    with pytest.raises(MinitxError, match=f"{SHARD}: .*truncated"):
        read_model(folder)
    (folder / SHARD).unlink()
    with pytest.raises(MinitxError, match=f"{SHARD}: there is no such file"):
        read_model(folder)
