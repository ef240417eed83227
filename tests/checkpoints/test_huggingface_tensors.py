"""Missing, extra, misshapen, broken or torn tensors, and pickles: one clear error each."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import copied, edit_tensors

from minitx.checkpoints.huggingface import read_model
from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError


def test_missing_parts_of_a_folder(tmp_path):
    with pytest.raises(MinitxError, match="no such folder"):
        read_model(tmp_path / "nothing")
    with pytest.raises(MinitxError, match="config.json: there is no such file"):
        read_model(tmp_path)
    folder = copied("llama", tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MinitxError, match="neither model.safetensors nor"):
        read_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo no'\ntR.")
    with pytest.raises(MinitxError, match="pytorch_model.bin .* never does: save the model again"):
        read_model(folder)
    with pytest.raises(MinitxError, match="float32 or float64"):
        read_model(folder, np.float16)


Q = "model.layers.1.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"
BAD_TENSORS = {
    "missing": ("llama", lambda t: t.pop(Q), f"tensor '{Q}' is missing"),
    "extra": ("llama", lambda t: t.update(more=t[Q]), "tensor 'more' has no place"),
    "extra layer": ("llama", lambda t: t.update({Q.replace(".1.", ".2."): t[Q]}), "has no place"),
    "misshapen": ("llama", lambda t: t.update({Q: t[Q].T}), r"has shape \(16, 24\); .* \(24, 16\)"),
    "flat": ("llama", lambda t: t.update({Q: t[Q].ravel()}), r"has shape \(384,\)"),
    "NaN": ("llama", lambda t: t[Q].__setitem__((2, 3), np.nan), f"'{Q}' holds NaN or Inf"),
    "Inf": ("llama", lambda t: t[Q].__setitem__((2, 3), -np.inf), f"'{Q}' holds NaN or Inf"),
    "another head though tied": (
        "qwen2",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}),
        "but their numbers differ",
    ),
    "another shape though tied": (
        "qwen2",
        lambda t: t.update({"lm_head.weight": t[EMBEDDING][1:]}),
        "but their numbers differ",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_every_bad_tensor_is_one_clear_error(tmp_path, case):
    name, change, words = BAD_TENSORS[case]
    folder = copied(name, tmp_path)
    edit_tensors(folder, change)
    with pytest.raises(MinitxError, match=words) as caught:
        read_model(folder)
    assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def test_a_tied_head_may_be_stored_twice(tmp_path):
    folder = copied("qwen2", tmp_path)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING]}))
    model = read_model(folder)
    assert model.head.w is model.embed.w


def test_float64_too_large_for_float32(tmp_path):
    folder = copied("llama", tmp_path)
    tensors = read_tensors(folder / "model.safetensors")
    tensors[Q] = tensors[Q].astype(np.float64) * 1e300
    write_safetensors(folder / "model.safetensors", tensors, "F64")
    with pytest.raises(MinitxError, match="NaN or Inf .as float32."):
        read_model(folder)
    read_model(folder, np.float64)


def test_integer_weights_are_refused(tmp_path):
    folder = copied("gpt2-relu", tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"F16"', b'"I16"'))
    with pytest.raises(MinitxError, match="is I16; weights must be"):
        read_model(folder)


def test_truncated_weights(tmp_path):
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


def point_first(to):
    """Let the first tensor of the index lie in the file ``to``."""
    return lambda index: index["weight_map"].update({next(iter(index["weight_map"])): to})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i.pop("weight_map"), "has no 'weight_map'"),
        (lambda i: i.update(weight_map=[]), "has no 'weight_map'"),
        (point_first(3), "has no 'weight_map'"),
        (point_first("../model.safetensors"), "'../model.safetensors' is not the name of a .safe"),
        (point_first("/etc/passwd"), "'/etc/passwd' is not the name"),
        (point_first("sub/model.safetensors"), "is not the name"),
        (point_first(".."), "is not the name"),
        (point_first(""), "is not the name"),
        (point_first("model.bin"), "is not the name"),
        (point_first("..\\model.safetensors"), "is not the name"),
        (point_first("none.safetensors"), "'none.safetensors'; the shards do not belong together"),
        (point_first(SHARD), "do not belong together|has no tensor"),
        (lambda i: i["weight_map"].pop(EMBEDDING), f"'{EMBEDDING}', which .* do not belong"),
        (lambda i: i["weight_map"].update(more=SHARD), "has no tensor 'more'"),
    ],
)
def test_bad_index(tmp_path, change, words):
    folder = copied("llama-sharded", tmp_path)
    edit_index(folder, change)
    with pytest.raises(MinitxError, match=words) as caught:
        read_model(folder)
    assert "\n" not in str(caught.value)


def test_torn_shards(tmp_path):
    folder = copied("llama-sharded", tmp_path)
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-1])
    with pytest.raises(MinitxError, match=f"{SHARD}: .*truncated"):
        read_model(folder)
    (folder / SHARD).unlink()
    with pytest.raises(MinitxError, match=f"{SHARD}: there is no such file"):
        read_model(folder)
