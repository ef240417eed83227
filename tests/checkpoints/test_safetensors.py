"""Reading safetensors: a worked example, every kind of invalid header, and random corruption."""

import json
import struct
import tracemalloc

import numpy as np
import pytest

from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.errors import MinitxError

STRUCT_CODES = {"F32": ("f", 4), "F64": ("d", 8), "F16": ("e", 2)}


def safetensors_bytes(header, data=b"", length=None) -> bytes:
    """The bytes of a file; ``header`` is a dict, or raw bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def write_file(tmp_path):
    """write_file(content) -> path of a file with that content."""

    def write(content: bytes):
        path = tmp_path / "t.safetensors"
        path.write_bytes(content)
        return path

    return write


# ---------------------------------------------------------------------------------------- reading


def test_read_worked_example(write_file):
    header = {"b": entry(shape=(2, 1)), "a": entry("F16", (), (8, 10)), "__metadata__": {"k": "v"}}
    path = write_file(safetensors_bytes(header, struct.pack("<ffe", 1.5, -2.0, 0.25)))
    found = read_tensors(path)
    assert found["b"].tolist() == [[1.5], [-2.0]] and found["b"].dtype == np.float32
    assert found["a"].tolist() == 0.25 and found["a"].shape == () and found["a"].dtype == np.float32
    assert read_header(path).metadata == {"k": "v"}
    info = read_header(path).tensors["a"]
    assert (info.dtype, info.shape, info.end) == ("F16", (), path.stat().st_size)


def test_bfloat16_bits_are_decoded(write_file):
    bits = [0x3F80, 0xC000, 0x7F80, 0xFFC0, 0x0001, 0x4049]
    path = write_file(
        safetensors_bytes({"a": entry("BF16", (6,), (0, 12))}, struct.pack("<6H", *bits))
    )
    one, minus_two, inf, nan, tiny, pi = read_tensors(path)["a"].tolist()
    assert (one, minus_two, inf, pi) == (1.0, -2.0, float("inf"), 3.140625)
    assert np.isnan(nan) and tiny == 2.0**-133


def test_unsupported_dtype_is_rejected_only_when_read(write_file):
    header = {"mask": entry("BOOL", (4,), (0, 4)), "w": entry("F32", (1,), (4, 8))}
    path = write_file(safetensors_bytes(header, b"\0\1\0\1" + struct.pack("<f", 7)))
    assert read_tensors(path, ["w"])["w"].tolist() == [7.0]
    with pytest.raises(MinitxError, match=r"'mask': the dtype of weights must be .* got BOOL"):
        read_tensors(path)
    with pytest.raises(MinitxError, match="no tensor 'x'"):
        read_tensors(path, ["x"])


def test_empty_file_and_empty_tensor_are_read(write_file):
    assert read_tensors(write_file(safetensors_bytes({}))) == {}
    found = read_tensors(write_file(safetensors_bytes({"a": entry(shape=(0, 3), offsets=(0, 0))})))
    assert found["a"].shape == (0, 3)


# Each case: the bytes of the file, a pattern of the error message.
EIGHT = b"\0" * 8
FAULTS = {
    "no bytes": (b"", "is empty .0 bytes.; download it again"),
    "Git LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n",
        "is a Git LFS pointer, .*; run 'git lfs pull'",
    ),
    "web page": (b"\n<!doctype html>\n<html><head>", "is a web page .HTML., not the file"),
    "pickle": (b"\x80\x02}q\0X\x04" * 9, "is a pickle of PyTorch"),
    "zip": (b"PK\x03\x04\0\0\x08\x08" * 9, "is a pickle of PyTorch"),
    "GGUF": (b"GGUF\x03\0\0\0\x10\x01\0\0\0\0\0\0", "is a GGUF file"),
    "five bytes": (b"\1\0\0\0\0", "at least 8 bytes, got 5"),
    "header longer than file": (
        safetensors_bytes({}, length=3),
        "expected a header of 3 bytes, got 2",
    ),
    "huge header": (
        safetensors_bytes({}, length=2**64 - 1),
        "expected a header of 18446744073709551615",
    ),
    "not json": (safetensors_bytes(b"{oops}"), "not valid JSON"),
    "empty header": (safetensors_bytes(b""), "not valid JSON"),
    "not utf-8": (safetensors_bytes(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (safetensors_bytes(b"[" * 200_000), "nested too deeply"),
    "NaN": (safetensors_bytes(b'{"a": NaN}'), "expected a JSON object, got nan"),
    "5000-digit number": (
        safetensors_bytes(b'{"a": ' + b"1" * 5000 + b"}"),
        "expected a JSON object, got inf",
    ),
    "a list": (safetensors_bytes(b"[]"), "must be a JSON object, got a list"),
    "a number": (safetensors_bytes(b"3"), "must be a JSON object, got a int"),
    "duplicate tensor": (safetensors_bytes(b'{"a": 1, "a": 1}'), "key 'a' occurs twice"),
    "duplicate field": (
        safetensors_bytes(b'{"a": {"dtype": 1, "dtype": 2}}'),
        "key 'dtype' occurs twice",
    ),
    "metadata not strings": (safetensors_bytes({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not an object": (safetensors_bytes({"__metadata__": "a"}), "__metadata__"),
    "entry not an object": (safetensors_bytes({"a": [1]}), "tensor 'a': expected a JSON object"),
    "no dtype": (
        safetensors_bytes({"a": {"shape": [], "data_offsets": [0, 0]}}),
        "tensor 'a' has no 'dtype'",
    ),
    "no shape": (
        safetensors_bytes({"a": {"dtype": "F32", "data_offsets": [0, 0]}}),
        "'a' has no 'shape'",
    ),
    "no offsets": (
        safetensors_bytes({"a": {"dtype": "F32", "shape": []}}),
        "'a' has no 'data_offsets'",
    ),
    "dtype must be": (
        safetensors_bytes({"a": entry("F33")}, EIGHT),
        "tensor 'a': the dtype must be .* got 'F33'",
    ),
    "dtype a number": (safetensors_bytes({"a": entry(32)}, EIGHT), "dtype must be .* got 32"),
    "dtype a list": (safetensors_bytes({"a": entry([])}, EIGHT), "dtype must be"),
    "negative shape": (
        safetensors_bytes({"a": entry(shape=(-1, -2))}, EIGHT),
        r"'a': the shape must .* got \[-1, -2\]",
    ),
    "fractional shape": (
        safetensors_bytes({"a": entry(shape=(2.0,))}, EIGHT),
        r"'a': the shape must .* got \[2.0\]",
    ),
    "boolean shape": (
        safetensors_bytes({"a": entry(shape=(True, 2))}, EIGHT),
        r"shape must .* got \[True, 2\]",
    ),
    "33 dimensions": (safetensors_bytes({"a": entry(shape=(1,) * 33)}, EIGHT), "at most 32"),
    "shape a number": (
        safetensors_bytes({"a": {**entry(), "shape": 2}}, EIGHT),
        "'a': the shape must be .* got 2",
    ),
    "product wraps around": (
        safetensors_bytes({"a": entry(shape=(2**32, 2**32 + 2))}, EIGHT),
        "do not match the 8 bytes",
    ),
    "empty but huge": (
        safetensors_bytes({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}),
        "too large for NumPy",
    ),
    "shape too small": (
        safetensors_bytes({"a": entry(shape=(1,))}, EIGHT),
        "'a'.* do not match the 8 bytes",
    ),
    "three offsets": (safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, EIGHT), "data_offsets"),
    "offsets reversed": (
        safetensors_bytes({"a": entry(offsets=(8, 0))}, EIGHT),
        "with begin <= end",
    ),
    "negative offset": (safetensors_bytes({"a": entry(offsets=(-8, 0))}, EIGHT), "data_offsets"),
    "fractional offset": (safetensors_bytes({"a": entry(offsets=(0, 8.0))}, EIGHT), "data_offsets"),
    "offset huge": (
        safetensors_bytes({"a": entry(offsets=(0, 10**30))}, EIGHT),
        "ends at byte 1000000000000000000000000000",
    ),
    "out of range": (
        safetensors_bytes({"a": entry(offsets=(8, 16))}, EIGHT),
        "'a' ends at byte .*truncated",
    ),
    "truncated": (safetensors_bytes({"a": entry()}, EIGHT[:-1]), "'a' ends at byte .*truncated"),
    "terabytes in header": (
        safetensors_bytes({"a": entry(shape=(2**40,), offsets=(0, 2**42))}),
        "truncated",
    ),
    "trailing bytes": (
        safetensors_bytes({"a": entry()}, EIGHT + b"!"),
        "expected no bytes after the last tensor, got 1",
    ),
    "only trailing": (
        safetensors_bytes({}, b"!!"),
        "expected no bytes after the last tensor, got 2",
    ),
    "gap at the start": (
        safetensors_bytes({"a": entry(offsets=(4, 12))}, EIGHT + b"1234"),
        "4 bytes before",
    ),
    "gap between tensors": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=(9, 17))}, b"." * 17),
        "1 bytes before tensor 'b'",
    ),
    "overlap": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, b"." * 12),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "the same bytes twice": (
        safetensors_bytes({"a": entry(), "b": entry()}, EIGHT),
        "'b' overlaps tensor 'a'",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_invalid_file_is_one_line_error(write_file, case):
    content, message = FAULTS[case]
    path = write_file(content)
    tracemalloc.start()
    with pytest.raises(MinitxError, match=message) as caught:
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # bytes: nothing of a size from the header was allocated
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400


def test_missing_file_or_folder_is_rejected(tmp_path):
    with pytest.raises(MinitxError, match="no such file"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(MinitxError, match="is a folder; expected a regular file"):
        read_header(tmp_path)


# ------------------------------------------------------------------------------------------- fuzz


def literal_read(content: bytes) -> dict:
    """The literal version, with struct and json alone: {name: list of values}."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    found = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        if info["dtype"] == "BF16":
            raw = struct.unpack(f"<{(end - begin) // 2}H", data[begin:end])
            found[name] = [struct.unpack("<f", struct.pack("<HH", 0, v))[0] for v in raw]
        else:
            code, size = STRUCT_CODES[info["dtype"]]
            found[name] = list(struct.unpack(f"<{(end - begin) // size}{code}", data[begin:end]))
    return found


def test_random_corruption_is_rejected_or_read_correctly(write_file):
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry(shape=(2, 3), offsets=(0, 24)),
        "b": entry("F16", (4,), (24, 32)),
        "c": entry("BF16", (2, 2), (32, 40)),
        "d": entry("F64", (1,), (40, 48)),
    }
    rng = np.random.default_rng(3)
    valid = safetensors_bytes(header, rng.integers(0, 256, 48, dtype=np.uint8).tobytes())
    outcomes = {"rejected": 0, "loaded": 0}
    for _ in range(1500):
        corrupted = bytearray(valid)
        for _ in range(rng.integers(0, 4)):
            position = rng.integers(len(valid))
            corrupted[position] = rng.choice([rng.integers(256), *b'0123456789"[]{},:-F'])
        if rng.random() < 0.2:
            corrupted = corrupted[: rng.integers(len(valid))]
        if rng.random() < 0.1:
            corrupted += b"\0" * rng.integers(1, 9)
        path = write_file(bytes(corrupted))
        try:
            found = read_tensors(path)
        except MinitxError as error:
            assert "\n" not in str(error)
            outcomes["rejected"] += 1
        else:
            expected = literal_read(bytes(corrupted))
            assert found.keys() == expected.keys()
            for name, array in found.items():
                np.testing.assert_array_equal(array.ravel(), expected[name])
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 150, outcomes
