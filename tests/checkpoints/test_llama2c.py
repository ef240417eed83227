"""llama2.c checkpoints: agreement with literal_llama2c.py, and invalid files."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from literal_llama2c import NAMES, SHAPES, WRITERS, LiteralLlama2c, make_weights, write_header

from minitx.checkpoints.llama2c import half_split, read_llama2c
from minitx.errors import MinitxError
from minitx.tree import weights

# ------------------------------------------------------------------------------------- agreement


@pytest.fixture
def write_file(tmp_path):
    """write_file(content) -> path of a file with that content."""

    def write(content: bytes):
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        return path

    return write


GRID = [(v, shape, tied) for v in WRITERS for shape in SHAPES for tied in (True, False)]


@pytest.mark.parametrize(("version", "shape", "tied"), GRID)
def test_logits_and_greedy_ids_equal_literal_version(write_file, version, shape, tied):
    sizes = SHAPES[shape]
    w = make_weights(sizes, tied)
    path = write_file(WRITERS[version](w, sizes, tied))
    literal = LiteralLlama2c(w, sizes)
    expected, greedy = [], [1]
    while len(greedy) <= sizes[-1]:
        expected.append(literal(greedy[-1]))
        greedy.append(int(np.argmax(expected[-1])))

    float64, float32 = read_llama2c(path, np.float64), read_llama2c(path)
    scale = np.abs(expected).max()
    assert np.abs(float64(greedy[:-1]) - expected).max() < 1e-12 * scale
    logits = float32(greedy[:-1])
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < 1e-5 * scale
    state, ids = float32.new_state(), [1]
    while len(ids) <= sizes[-1]:
        ids.append(int(np.argmax(float32.next_logits(ids[-1:], state))))
    assert ids == greedy
    assert len(set(greedy)) > 2  # otherwise the comparison is too weak


@pytest.mark.parametrize("version", WRITERS)
def test_config_and_weights_are_read(write_file, version):
    w = make_weights(SHAPES["grouped"], tied=False)
    model = read_llama2c(write_file(WRITERS[version](w, SHAPES["grouped"], False)))
    c = model.config
    assert (c.width, c.hidden, c.layers, c.heads, c.kv_heads) == (24, 20, 2, 4, 2)
    assert (c.vocab_size, c.context, c.head_width, c.rope_width) == (28, 16, 6, 6)
    assert (c.norm_eps, c.rope_base, c.tied, c.bos, c.eos) == (1e-5, 10000.0, False, 1, (1,))
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in weights(model).values())
    # Matrices without a permutation of rotary columns are equal bit by bit.
    ours = weights(model)
    for path, name in (("attn.out", "wo"), ("ffn.down", "w2"), ("attn.qkv.v", "wv")):
        expected = w[name][1].T.astype(np.float32)
        np.testing.assert_array_equal(ours[f"stack.blocks.1.{path}.w"], expected)


def test_half_split_worked_example():
    """Two heads of width 4: pairs (0 1) (2 3) become columns 0, 2 | 1, 3."""
    rows = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])
    assert half_split(rows, 4).ravel().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


# ----------------------------------------------------------------------------------- invalid files

SIZES = SHAPES["plain"]


def valid_file(version: int, tied: bool = True) -> bytes:
    return WRITERS[version](make_weights(SIZES, tied), SIZES, tied)


def with_size(version: int, name: str, value: int) -> bytes:
    content = bytearray(valid_file(version))
    struct.pack_into("<i", content, 4 * NAMES.index(name) + (8 if version else 0), value)
    return bytes(content)


BAD_SIZES = [
    ("dim", 0, "invalid header"),
    ("dim", -12, "invalid header"),
    ("dim", 13, "width must be a multiple of the heads, got 13 and 2"),
    ("dim", 14, "7 rotary columns"),
    ("dim", 2**31 - 4, "needs rotary tables of more"),
    ("hidden_dim", -1, "hidden = -1"),
    ("hidden_dim", 2**31 - 1, "bytes by its header"),
    ("n_layers", 0, "layers = 0"),
    ("n_layers", 3, "by its header, .* truncated"),
    ("n_layers", 1, "by its header, .* too long"),
    ("n_layers", 2**31 - 1, "by its header, .* truncated"),
    ("n_heads", 0, "multiple of the heads, got 12 and 0"),
    ("n_heads", -2, "multiple of the heads, got 12 and -2"),
    ("n_heads", 5, "multiple of the heads, got 12 and 5"),
    ("n_kv_heads", 0, "kv_heads = 0"),
    ("n_kv_heads", 3, "cannot share 3"),
    ("n_kv_heads", 4, "cannot share 4"),
    ("vocab_size", 0, "vocab_size = 0"),
    ("vocab_size", 21, "by its header, .* truncated"),
    ("seq_len", 0, "context = 0"),
    ("seq_len", -1, "context = -1"),
    ("seq_len", 2**31 - 1, "needs rotary tables of more"),
]


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(("name", "value", "message"), BAD_SIZES)
def test_inconsistent_header_is_one_line_error(write_file, version, name, value, message):
    path = write_file(with_size(version, name, value))
    tracemalloc.start()
    with pytest.raises(MinitxError, match=message) as caught:
        read_llama2c(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # bytes: nothing of a size from the header was allocated
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("tied", [True, False])
def test_wrong_file_size_is_rejected(write_file, version, tied):
    content = valid_file(version, tied)
    for length in (*range(0, 300, 7), len(content) // 2, len(content) - 4, len(content) - 1):
        with pytest.raises(MinitxError, match="truncated|expected a llama2.c header"):
            read_llama2c(write_file(content[:length]))
    with pytest.raises(MinitxError, match="too long"):
        read_llama2c(write_file(content + b"\0"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (write_header(3, SIZES, True), "version must be 1 or 2, got 3"),
        (write_header(0, SIZES, True), "version must be 1 or 2, got 0"),
        (write_header(-1, SIZES, True), "version must be 1 or 2, got -1"),
        (b"24ka", "version must be 1 or 2, got 0"),
        (valid_file(1)[:36] + b"\2" + valid_file(1)[37:], "flag must be 0 or 1, got 2"),
        (valid_file(1)[:36] + b"\0" + valid_file(1)[37:], "truncated"),
        (valid_file(2)[:37] + struct.pack("<i", 0) + valid_file(2)[41:], "group size .* got 0"),
        (valid_file(2)[:37] + struct.pack("<i", -4) + valid_file(2)[41:], "group size .* got -4"),
        (
            valid_file(2)[:37] + struct.pack("<i", 5) + valid_file(2)[41:],
            "group size must divide the 144 values .* got 5",
        ),
        (valid_file(2)[:37] + struct.pack("<i", 2) + valid_file(2)[41:], "truncated"),
        (
            valid_file(2)[:37] + struct.pack("<i", 2**31 - 1) + valid_file(2)[41:],
            "group size must divide",
        ),
        (with_size(1, "vocab_size", -20), "vocab_size = -20"),
        (b'{"model": "not this"}' * 20, "invalid header"),
        (b"\0" * 1000, "invalid header"),
    ],
)
def test_invalid_header_is_rejected(write_file, content, message):
    with pytest.raises(MinitxError, match=message):
        read_llama2c(write_file(content))


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_inf_in_weights_is_rejected(write_file, version, bad):
    w = make_weights(SIZES, True)
    w["rms_ffn"][1, 3] = bad
    with pytest.raises(MinitxError, match="'stack.blocks.1.ffn.norm.gain' holds NaN or Inf"):
        read_llama2c(write_file(WRITERS[version](w, SIZES, True)))


def test_missing_file_and_wrong_dtype_are_rejected(write_file, tmp_path):
    with pytest.raises(MinitxError, match="no such file"):
        read_llama2c(tmp_path / "none.bin")
    with pytest.raises(MinitxError, match="is a folder; expected a regular file"):
        read_llama2c(tmp_path)
    with pytest.raises(MinitxError, match="float32 or float64"):
        read_llama2c(write_file(valid_file(0)), np.float16)


@pytest.mark.parametrize("version", WRITERS)
def test_random_corruption_is_rejected_or_loads(write_file, version):
    rng = np.random.default_rng(version)
    content = valid_file(version)
    outcomes = {"rejected": 0, "loaded": 0}
    for _ in range(300):
        corrupted = bytearray(content)
        end = 64 if rng.random() < 0.5 else len(content)
        corrupted[rng.integers(end)] = rng.integers(256)
        if rng.random() < 0.1:
            corrupted = corrupted[: rng.integers(len(content))]
        try:
            model = read_llama2c(write_file(bytes(corrupted)))
        except MinitxError as error:
            assert "\n" not in str(error)
            outcomes["rejected"] += 1
        else:
            assert all(np.isfinite(w).all() for w in weights(model).values())
            outcomes["loaded"] += 1
    assert min(outcomes.values()) > 50, outcomes
