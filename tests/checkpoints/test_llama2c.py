"""llama2.c checkpoints: agreement with a literal writer and twin (slow/llama2c.py); bad files."""

import math
import struct
import tracemalloc

import numpy as np
import pytest
from literal_llama2c import NAMES, SHAPES, WRITERS, Twin, make_weights, write_header

from minitx.checkpoints.llama2c import half_split, read_llama2c
from minitx.errors import MinitxError
from minitx.tree import weights

# ------------------------------------------------------------------------------------- agreement


@pytest.fixture
def put(tmp_path):
    """put(content) -> the path of a file that holds it."""

    def write(content: bytes):
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        return path

    return write


GRID = [(v, shape, tied) for v in WRITERS for shape in SHAPES for tied in (True, False)]


@pytest.mark.parametrize(("version", "shape", "tied"), GRID)
def test_logits_and_greedy_ids_are_those_of_the_twin(put, version, shape, tied):
    sizes = SHAPES[shape]
    w = make_weights(sizes, tied)
    path = put(WRITERS[version](w, sizes, tied))
    twin = Twin(w, sizes)
    expected, greedy = [], [1]
    while len(greedy) <= sizes[-1]:
        expected.append(twin(greedy[-1]))
        greedy.append(int(np.argmax(expected[-1])))

    exact, used = read_llama2c(path, np.float64), read_llama2c(path)
    scale = np.abs(expected).max()
    assert np.abs(exact(greedy[:-1]) - expected).max() < 1e-12 * scale
    logits = used(greedy[:-1])
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() < 1e-5 * scale
    state, ids = used.new_state(), [1]
    while len(ids) <= sizes[-1]:
        ids.append(int(np.argmax(used.next_logits(ids[-1:], state))))
    assert ids == greedy
    assert len(set(greedy)) > 2  # or the comparison says little


@pytest.mark.parametrize("version", WRITERS)
def test_the_configuration_and_the_weights(put, version):
    w = make_weights(SHAPES["grouped"], tied=False)
    model = read_llama2c(put(WRITERS[version](w, SHAPES["grouped"], False)))
    c = model.config
    assert (c.width, c.hidden, c.layers, c.heads, c.kv_heads) == (24, 20, 2, 4, 2)
    assert (c.vocab_size, c.context, c.head_width, c.rope_width) == (28, 16, 6, 6)
    assert (c.norm_eps, c.rope_base, c.tied, c.bos, c.eos) == (1e-5, 10000.0, False, 1, (1,))
    assert all(x.dtype == np.float32 and x.flags.c_contiguous for x in weights(model).values())
    # Matrices that are not reordered, exactly.
    ours = weights(model)
    for path, name in (("attn.out", "wo"), ("ffn.down", "w2"), ("attn.qkv.v", "wv")):
        expected = w[name][1].T.astype(np.float32)
        np.testing.assert_array_equal(ours[f"stack.blocks.1.{path}.w"], expected)


def test_half_split_worked_example():
    """Two heads of width 4: pairs (0 1) (2 3) become columns 0, 2 | 1, 3."""
    rows = np.array([[0], [1], [2], [3], [10], [11], [12], [13]])
    assert half_split(rows, 4).ravel().tolist() == [0, 2, 1, 3, 10, 12, 11, 13]


# -------------------------------------------------------------------------------------- bad files

SIZES = SHAPES["plain"]


def good(version: int, tied: bool = True) -> bytes:
    return WRITERS[version](make_weights(SIZES, tied), SIZES, tied)


def with_size(version: int, name: str, value: int) -> bytes:
    content = bytearray(good(version))
    struct.pack_into("<i", content, 4 * NAMES.index(name) + (8 if version else 0), value)
    return bytes(content)


BAD_SIZES = [
    ("dim", 0, "makes no model"),
    ("dim", -12, "makes no model"),
    ("dim", 13, "2 heads do not divide a width of 13"),
    ("dim", 14, "7 rotary columns"),
    ("dim", 2**31 - 4, "needs tables of more"),
    ("hidden_dim", -1, "hidden = -1"),
    ("hidden_dim", 2**31 - 1, "calls for"),
    ("n_layers", 0, "layers = 0"),
    ("n_layers", 3, "calls for .* truncated"),
    ("n_layers", 1, "calls for .* too long"),
    ("n_layers", 2**31 - 1, "calls for .* truncated"),
    ("n_heads", 0, "0 heads do not divide"),
    ("n_heads", -2, "-2 heads do not divide"),
    ("n_heads", 5, "5 heads do not divide"),
    ("n_kv_heads", 0, "kv_heads = 0"),
    ("n_kv_heads", 3, "cannot share 3"),
    ("n_kv_heads", 4, "cannot share 4"),
    ("vocab_size", 0, "vocab_size = 0"),
    ("vocab_size", 21, "calls for .* truncated"),
    ("seq_len", 0, "context = 0"),
    ("seq_len", -1, "context = -1"),
    ("seq_len", 2**31 - 1, "needs tables of more"),
]


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize(("name", "value", "words"), BAD_SIZES)
def test_a_lying_header_is_one_clear_error(put, version, name, value, words):
    path = put(with_size(version, name, value))
    tracemalloc.start()
    with pytest.raises(MinitxError, match=words) as caught:
        read_llama2c(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6  # bytes: nothing was allocated on the header's word
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("tied", [True, False])
def test_every_wrong_length_is_refused(put, version, tied):
    content = good(version, tied)
    for length in (*range(0, 300, 7), len(content) // 2, len(content) - 4, len(content) - 1):
        with pytest.raises(MinitxError, match="truncated|less than the header"):
            read_llama2c(put(content[:length]))
    with pytest.raises(MinitxError, match="too long"):
        read_llama2c(put(content + b"\0"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (write_header(3, SIZES, True), "marked as llama2.c version 3"),
        (write_header(0, SIZES, True), "marked as llama2.c version 0"),
        (write_header(-1, SIZES, True), "marked as llama2.c version -1"),
        (b"24ka", "marked as llama2.c version 0"),
        (good(1)[:36] + b"\2" + good(1)[37:], "flag is 2"),
        (good(1)[:36] + b"\0" + good(1)[37:], "truncated"),
        (good(2)[:37] + struct.pack("<i", 0) + good(2)[41:], "groups weights by 0"),
        (good(2)[:37] + struct.pack("<i", -4) + good(2)[41:], "groups weights by -4"),
        (good(2)[:37] + struct.pack("<i", 5) + good(2)[41:], "groups weights by 5, .* 144 numbers"),
        (good(2)[:37] + struct.pack("<i", 2) + good(2)[41:], "truncated"),
        (good(2)[:37] + struct.pack("<i", 2**31 - 1) + good(2)[41:], "groups weights by"),
        (with_size(1, "vocab_size", -20), "vocab_size = -20"),
        (b'{"model": "not this"}' * 20, "makes no model"),
        (b"\0" * 1000, "makes no model"),
    ],
)
def test_other_bad_headers(put, content, words):
    with pytest.raises(MinitxError, match=words):
        read_llama2c(put(content))


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_no_numbers(put, version, bad):
    w = make_weights(SIZES, True)
    w["rms_ffn"][1, 3] = bad
    with pytest.raises(MinitxError, match="'stack.blocks.1.ffn.norm.gain' holds NaN or Inf"):
        read_llama2c(put(WRITERS[version](w, SIZES, True)))


def test_missing_file_and_wrong_type(put, tmp_path):
    with pytest.raises(MinitxError, match="no such file"):
        read_llama2c(tmp_path / "none.bin")
    with pytest.raises(MinitxError, match="no such file"):
        read_llama2c(tmp_path)
    with pytest.raises(MinitxError, match="float32 or float64"):
        read_llama2c(put(good(0)), np.float16)


@pytest.mark.parametrize("version", WRITERS)
def test_random_damage_is_an_error_or_a_model(put, version):
    rng = np.random.default_rng(version)
    content = good(version)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(300):
        damaged = bytearray(content)
        end = 64 if rng.random() < 0.5 else len(content)
        damaged[rng.integers(end)] = rng.integers(256)
        if rng.random() < 0.1:
            damaged = damaged[: rng.integers(len(content))]
        try:
            model = read_llama2c(put(bytes(damaged)))
        except MinitxError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert all(np.isfinite(w).all() for w in weights(model).values())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 50, outcomes
