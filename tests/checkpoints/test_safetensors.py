"""Reading safetensors: worked bytes, every lie a header can tell, and random damage."""

import json
import struct
import tracemalloc

import numpy as np
import pytest

from minitx.checkpoints.safetensors import read_header, read_tensors
from minitx.errors import MinitxError

FILE_KINDS = {"F32": ("f", 4), "F64": ("d", 8), "F16": ("e", 2)}


def pack(header, data=b"", length=None) -> bytes:
    """A file by hand: ``header`` is a dict, or bytes taken as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def put(tmp_path):
    """put(content) -> the path of a file that holds it."""

    def write(content: bytes):
        path = tmp_path / "t.safetensors"
        path.write_bytes(content)
        return path

    return write


# ---------------------------------------------------------------------------------------- reading


def test_worked_example_bytes(put):
    header = {"b": entry(shape=(2, 1)), "a": entry("F16", (), (8, 10)), "__metadata__": {"k": "v"}}
    path = put(pack(header, struct.pack("<ffe", 1.5, -2.0, 0.25)))
    found = read_tensors(path)
    assert found["b"].tolist() == [[1.5], [-2.0]] and found["b"].dtype == np.float32
    assert found["a"].tolist() == 0.25 and found["a"].shape == () and found["a"].dtype == np.float32
    assert read_header(path).metadata == {"k": "v"}
    info = read_header(path).tensors["a"]
    assert (info.dtype, info.shape, info.end) == ("F16", (), path.stat().st_size)


def test_bfloat16_known_bits(put):
    bits = [0x3F80, 0xC000, 0x7F80, 0xFFC0, 0x0001, 0x4049]
    path = put(pack({"a": entry("BF16", (6,), (0, 12))}, struct.pack("<6H", *bits)))
    one, minus_two, inf, nan, tiny, pi = read_tensors(path)["a"].tolist()
    assert (one, minus_two, inf, pi) == (1.0, -2.0, float("inf"), 3.140625)
    assert np.isnan(nan) and tiny == 2.0**-133


def test_other_dtypes_may_be_there_but_are_no_weights(put):
    header = {"mask": entry("BOOL", (4,), (0, 4)), "w": entry("F32", (1,), (4, 8))}
    path = put(pack(header, b"\0\1\0\1" + struct.pack("<f", 7)))
    assert read_tensors(path, ["w"])["w"].tolist() == [7.0]
    with pytest.raises(MinitxError, match=r"'mask' is BOOL; weights must be"):
        read_tensors(path)
    with pytest.raises(MinitxError, match="no tensor 'x'"):
        read_tensors(path, ["x"])


def test_empty_file_and_empty_tensors(put):
    assert read_tensors(put(pack({}))) == {}
    found = read_tensors(put(pack({"a": entry(shape=(0, 3), offsets=(0, 0))})))
    assert found["a"].shape == (0, 3)


# Every case: the file's bytes, and words that the one error must contain.
EIGHT = b"\0" * 8
FAULTS = {
    "no bytes": (b"", "0 bytes long"),
    "five bytes": (b"\1\0\0\0\0", "5 bytes long"),
    "header longer than file": (pack({}, length=3), "announces a header of 3 bytes, but only 2"),
    "absurd header": (pack({}, length=2**64 - 1), "announces a header of 18446744073709551615"),
    "not json": (pack(b"{oops}"), "not valid JSON"),
    "empty header": (pack(b""), "not valid JSON"),
    "not utf-8": (pack(b'{"\xff": 1}'), "not valid JSON"),
    "deep nesting": (pack(b"[" * 200_000), "nested too deeply"),
    "NaN": (pack(b'{"a": NaN}'), "NaN is not JSON"),
    "endless number": (pack(b'{"a": ' + b"1" * 5000 + b"}"), "is not JSON"),
    "a list": (pack(b"[]"), "JSON list, not an object"),
    "a number": (pack(b"3"), "JSON int, not an object"),
    "duplicate tensor": (pack(b'{"a": 1, "a": 1}'), "key 'a' occurs twice"),
    "duplicate field": (pack(b'{"a": {"dtype": 1, "dtype": 2}}'), "key 'dtype' occurs twice"),
    "metadata not strings": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not an object": (pack({"__metadata__": "a"}), "__metadata__"),
    "entry not an object": (pack({"a": [1]}), "tensor 'a' is not described"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 0]}}), "tensor 'a' has no 'dtype'"),
    "no shape": (pack({"a": {"dtype": "F32", "data_offsets": [0, 0]}}), "'a' has no 'shape'"),
    "no offsets": (pack({"a": {"dtype": "F32", "shape": []}}), "'a' has no 'data_offsets'"),
    "unknown dtype": (pack({"a": entry("F33")}, EIGHT), "tensor 'a' has the unknown dtype 'F33'"),
    "dtype a number": (pack({"a": entry(32)}, EIGHT), "unknown dtype 32"),
    "dtype a list": (pack({"a": entry([])}, EIGHT), "unknown dtype"),
    "negative shape": (pack({"a": entry(shape=(-1, -2))}, EIGHT), r"'a' has the shape \[-1, -2\]"),
    "fractional shape": (pack({"a": entry(shape=(2.0,))}, EIGHT), r"'a' has the shape \[2.0\]"),
    "boolean shape": (pack({"a": entry(shape=(True, 2))}, EIGHT), r"shape \[True, 2\]"),
    "33 dimensions": (pack({"a": entry(shape=(1,) * 33)}, EIGHT), "at most 32"),
    "shape a number": (pack({"a": {**entry(), "shape": 2}}, EIGHT), "'a' has the shape 2"),
    "wraps to fit": (pack({"a": entry(shape=(2**32, 2**32 + 2))}, EIGHT), "does not fill the 8"),
    "empty but vast": (
        pack({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}),
        "impossible shape",
    ),
    "shape too small": (pack({"a": entry(shape=(1,))}, EIGHT), "'a' .*does not fill the 8 bytes"),
    "three offsets": (pack({"a": entry(offsets=(0, 8, 8))}, EIGHT), "data_offsets"),
    "offsets reversed": (pack({"a": entry(offsets=(8, 0))}, EIGHT), "begin <= end"),
    "negative offset": (pack({"a": entry(offsets=(-8, 0))}, EIGHT), "data_offsets"),
    "fractional offset": (pack({"a": entry(offsets=(0, 8.0))}, EIGHT), "data_offsets"),
    "offset huge": (pack({"a": entry(offsets=(0, 10**30))}, EIGHT), "is not JSON"),
    "out of range": (pack({"a": entry(offsets=(8, 16))}, EIGHT), "'a' ends at byte .*truncated"),
    "truncated": (pack({"a": entry()}, EIGHT[:-1]), "'a' ends at byte .*truncated"),
    "terabytes announced": (pack({"a": entry(shape=(2**40,), offsets=(0, 2**42))}), "truncated"),
    "trailing bytes": (pack({"a": entry()}, EIGHT + b"!"), "1 bytes follow the last tensor"),
    "only trailing": (pack({}, b"!!"), "2 bytes follow"),
    "hole at the start": (pack({"a": entry(offsets=(4, 12))}, EIGHT + b"1234"), "4 bytes before"),
    "hole between": (
        pack({"a": entry(), "b": entry(offsets=(9, 17))}, b"." * 17),
        "1 bytes before tensor 'b'",
    ),
    "overlap": (
        pack({"a": entry(), "b": entry(offsets=(4, 12))}, b"." * 12),
        "tensor 'b' overlaps tensor 'a'",
    ),
    "the same bytes twice": (pack({"a": entry(), "b": entry()}, EIGHT), "'b' overlaps tensor 'a'"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_every_lie_is_one_clear_error(put, case):
    content, words = FAULTS[case]
    path = put(content)
    tracemalloc.start()
    with pytest.raises(MinitxError, match=words) as caught:
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # bytes: nothing was allocated on the header's word
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 400


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(MinitxError, match="no such file"):
            read_header(path)


# ------------------------------------------------------------------------------------------- fuzz


def plain_reading(content: bytes) -> dict:
    """What the bytes say, read with struct and json alone: {name: list of numbers}."""
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
            code, size = FILE_KINDS[info["dtype"]]
            found[name] = list(struct.unpack(f"<{(end - begin) // size}{code}", data[begin:end]))
    return found


def test_random_damage_is_an_error_or_a_correct_reading(put):
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry(shape=(2, 3), offsets=(0, 24)),
        "b": entry("F16", (4,), (24, 32)),
        "c": entry("BF16", (2, 2), (32, 40)),
        "d": entry("F64", (1,), (40, 48)),
    }
    rng = np.random.default_rng(3)
    good = pack(header, rng.integers(0, 256, 48, dtype=np.uint8).tobytes())
    outcomes = {"refused": 0, "read": 0}
    for _ in range(1500):
        damaged = bytearray(good)
        for _ in range(rng.integers(0, 4)):
            place = rng.integers(len(good))
            damaged[place] = rng.choice([rng.integers(256), *b'0123456789"[]{},:-F'])
        if rng.random() < 0.2:
            damaged = damaged[: rng.integers(len(good))]
        if rng.random() < 0.1:
            damaged += b"\0" * rng.integers(1, 9)
        path = put(bytes(damaged))
        try:
            found = read_tensors(path)
        except MinitxError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            expected = plain_reading(bytes(damaged))
            assert found.keys() == expected.keys()
            for name, array in found.items():
                np.testing.assert_array_equal(array.ravel(), expected[name])
            outcomes["read"] += 1
    assert min(outcomes.values()) > 150, outcomes
