"""Writing safetensors: round trips, the exact bytes, rounding, and invalid input."""

import json
import struct

import numpy as np
import pytest

from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
def test_write_then_read_gives_same_tensors(tmp_path, dtype):
    rng = np.random.default_rng(1)
    # Few significant bits, so that they are exact in every dtype.
    tensors = {
        "z.matrix": rng.integers(-100, 100, (3, 5)).astype(np.float32) / 8,
        "scalar": np.array(1.5),
        "Ünïcode \ud800": np.arange(4.0),
        "none": np.zeros((0, 2), np.float32),
        "not contiguous": np.arange(12, dtype=np.float32).reshape(3, 4).T[::2],
        "special": np.array([np.inf, -np.inf, np.nan, -0.0], np.float32),
    }
    path = tmp_path / "t.safetensors"
    write_safetensors(path, tensors, dtype)
    found = read_tensors(path)
    assert list(found) == sorted(tensors) and list(tmp_path.iterdir()) == [path]
    for name, array in tensors.items():
        assert found[name].dtype == (np.float64 if dtype == "F64" else np.float32)
        np.testing.assert_array_equal(found[name], array, strict=False)
        assert found[name].shape == array.shape
    assert np.signbit(found["special"][3])


def test_written_bytes_worked_example(tmp_path):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"b": np.array([2.0]), "a": np.array([[1.0, 3.0]])})
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and content[8:9] == b"{" and content[8:].startswith(b'{"__metadata__"')
    assert header == {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
    }
    assert struct.unpack("<3f", content[8 + length :]) == (1.0, 3.0, 2.0)


def nearest_bfloat16(x: float) -> float:
    """By definition: the nearer of the two neighbors with 8 significant bits, ties to even."""
    if x == 0 or not np.isfinite(x):
        return x
    _, exponent = np.frexp(x)
    unit = 2.0 ** (max(int(exponent), -125) - 8)
    return float(np.round(x / unit) * unit)  # np.round ties to even


def test_bfloat16_rounds_to_nearest_even(tmp_path):
    rng = np.random.default_rng(2)
    exact = [1.0, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, -1 - 2.0**-8, 2.0**-133, 0]
    x = np.float32([*exact, 2.0**-134, 3 * 2.0**-134, *(rng.standard_normal(2000) * 10)])
    x = np.concatenate([x, np.exp2(rng.uniform(-130, 127, 2000)).astype(np.float32)])
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"x": x}, "BF16")
    np.testing.assert_array_equal(
        read_tensors(path)["x"], [nearest_bfloat16(float(v)) for v in x.astype(np.float64)]
    )


def test_any_nan_stays_nan_in_bfloat16(tmp_path):
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC00000], np.uint32)
    for array in (bits.view(np.float32), bits[:1].view(np.float32).reshape(())):
        write_safetensors(tmp_path / "t.safetensors", {"x": array}, "BF16")
        assert np.isnan(read_tensors(tmp_path / "t.safetensors")["x"]).all()


@pytest.mark.parametrize(
    ("dtype", "fits", "too_large"),
    [("F16", 65504.0, 65520.0), ("BF16", 3.3895e38, 3.4e38), ("F32", 3.4e38, 1e39)],
)
def test_overflow_is_rejected_and_keeps_old_file(tmp_path, dtype, fits, too_large):
    path = tmp_path / "t.safetensors"
    write_safetensors(path, {"a": np.array([1.0]), "b": np.array([-fits, np.nan])}, dtype)
    before = path.read_bytes()
    with pytest.raises(MinitxError, match=f"'b' has the value .* overflows {dtype}"):
        write_safetensors(path, {"a": np.array([1.0]), "b": np.array([-too_large, np.nan])}, dtype)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_invalid_input_is_rejected(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(MinitxError, match="dtype must be .* got 'I8'"):
        write_safetensors(path, {}, "I8")
    with pytest.raises(MinitxError, match="tensor of real numbers, got 'ids' .int64."):
        write_safetensors(path, {"ids": np.arange(3)})
    with pytest.raises(MinitxError, match="__metadata__"):
        write_safetensors(path, {"__metadata__": np.zeros(3)})
    with pytest.raises(MinitxError, match="__metadata__"):
        write_safetensors(path, {}, metadata={"step": 3})
    with pytest.raises(MinitxError, match="cannot be written"):
        write_safetensors(tmp_path / "no folder" / "t.safetensors", {})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "t.safetensors", {"a": np.zeros(3)})
    assert list(tmp_path.iterdir()) == []
