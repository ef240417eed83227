"""quantize_cache: rounding, the literal version, bytes, who fills and who reads the cache."""

import literal_quantize_cache as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, in_chunks, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.precompute.quantize_cache import QuantizedCache
from minitx.state import Layer
from minitx.technique import apply, find

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 258, 30)


def test_cache_row_by_hand():
    """d = 4, int8, one scale a head. The largest magnitude of the key is 12.7, so scale = 0.1:

        k                12.7   -6.35    0.02    0.96
        rint(k / 0.1)   127    -64       0      10        (-63.5 rounds to the even -64)
        code * 0.1       12.7   -6.4     0       1.0

    The row is 4 bytes of codes and the 4 bytes of a float32 scale: 8 instead of 16.
    """
    cache, layer = QuantizedCache(8, None, "float32"), Layer(4)
    k = np.array([[[12.7, -6.35, 0.02, 0.96]]], np.float32)  # (K, T, d)
    cache.store(k, 0 * k, layer.take(1))
    keys, values = cache.read(layer)
    assert_same(keys[0, 0], [12.7, -6.4, 0, 1.0], tolerance=1e-6, atol=1e-7)
    assert_same(values, 0, "a vector of zeros has scale 1 and stays zero")
    row = layer.rows()[0][0, 0]
    assert row[:4].view(np.int8).tolist() == [127, -64, 0, 10], "codes"
    assert row[4:].view(np.float32) == np.float32(0.1) and row.dtype == np.uint8, "scale"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [None, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_keys_and_values_read_back_equal_the_literal_version(bits, group_size, dtype):
    k, v = RNG.normal(size=(2, 3, 5, 6)).astype(dtype)  # K, T, d
    k[1, 2] = 0
    g = group_size or 6
    cache, layer = QuantizedCache(bits, group_size, np.dtype(dtype).name), Layer(8)
    cache.store(k[:, :4], v[:, :4], layer.take(4))
    first = cache.read(layer)
    cache.store(k[:, 4:], v[:, 4:], layer.take(1))
    found = cache.read(layer)
    for part, whole in zip(first, found):
        assert whole.dtype == dtype
        assert_same(part, whole[:, :4], "a later token changed a row")
    for head in range(3):
        expected = literal.Cache(bits, g)
        for t in range(5):
            expected.store(k[head, t].tolist(), v[head, t].tolist())
        for whole, rows in zip(found, expected.read()):
            assert_same(whole[head], rows, tolerance=1e-6)
    assert layer.keys.dtype == np.uint8
    assert layer.keys.shape[-1] == 6 * bits // 8 + 6 // g * np.dtype(dtype).itemsize


@pytest.mark.parametrize("bits, group_size", [(8, None), (4, None), (4, 2)])
@pytest.mark.parametrize("sizes", [(9,), (1,) * 9, (4, 1, 4)])
def test_attention_over_the_cache_equals_the_literal_version(bits, group_size, sizes):
    q, k, v = RNG.normal(size=(3, 2, 9, 8))  # two heads
    lm = apply(tiny_lm("gpt2"), {"quantize_cache": {"bits": bits, "group_size": group_size}})
    attend = lm.model.stack.blocks[0].attn.attend
    cache, layer, found, at = QuantizedCache(bits, group_size, "float64"), Layer(9), [], 0
    for size in sizes:
        new = slice(at, at + size)
        cache.store(k[:, new], v[:, new], layer.take(size))
        found.append(attend(q[:, new], *cache.read(layer), layer))
        at += size
    found = np.concatenate(found, 1)
    for head in range(2):
        rows = (a[head].tolist() for a in (q, k, v))
        expected = literal.attend(*rows, bits, group_size or 8)
        assert_same(found[head], expected, f"head {head}", tolerance=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "group_size": 2}], ids=str)
def test_one_pass_chunks_and_batches_see_the_same_quantized_keys(family, options):
    """A pass that keeps no cache attends over quantized keys too."""
    lm = apply(tiny_lm(family, dtype=np.float64), {"quantize_cache": options})
    whole = lm.logits(IDS)  # in one pass, without a cache
    assert abs(whole - tiny_lm(family, dtype=np.float64).logits(IDS)).max() > 1e-6
    largest = abs(whole).max()
    assert_same(in_chunks(lm, IDS, (9, 1, 20)), whole, atol=1e-10 * largest)
    start = np.array([0, 8])
    batch = np.stack([IDS, np.concatenate([np.zeros(8, int), IDS[:22]])])
    found = in_chunks(lm, batch, (20, 10), lm.model.new_state(start))
    assert_same(found[0], whole, atol=1e-10 * largest)
    assert_same(found[1, 8:], whole[:22], atol=1e-10 * largest)


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"group_size": 4}, {"bits": 32}], ids=str)
def test_bytes_per_token_are_those_of_the_formula(options):
    lm = apply(tiny_lm(), {"quantize_cache": options})
    state = lm.model.new_state()
    with counting(lm) as counts:
        lm.model(IDS, state)
    c, bits, d = lm.model.config, options.get("bits", 8), 8
    row = 4 * d if bits == 32 else d * bits // 8 + 4 * d // options.get("group_size", d)
    assert state.bytes_per_token == c.layers * 2 * c.kv_heads * row
    dense = tiny_lm()
    with counting(dense) as before:
        dense.logits(IDS)
    more = 0 if bits == 32 else len(IDS) * state.bytes_per_token  # codes, on top of their floats
    assert counts.total().cache_bytes == before.total().cache_bytes + more
    assert counts.total().multiply_adds == before.total().multiply_adds


def test_early_exit_backfills_quantized_keys():
    lm = tiny_lm(dtype=np.float64)
    changed = apply(lm, {"early_exit": {"threshold": 0.0}, "quantize_cache": {}})
    state = changed.model.new_state()
    changed.model(IDS[:20], state)
    for layer in state.layers:
        assert layer.keys.dtype == np.uint8, "layers that a token skipped are backfilled too"
    changed.generate(IDS[:5], 10)


def test_key_selection_reads_dequantized_keys():
    """With all keys kept, techniques that select keys change nothing."""
    lm = tiny_lm(dtype=np.float64)
    alone = apply(lm, {"quantize_cache": {}}).logits(IDS)
    for name in ("a3", "elsa", "predictive_attention"):
        both = apply(lm, {name: find(name).neutral, "quantize_cache": {}}).logits(IDS)
        assert_same(both, alone, name, atol=1e-12 * abs(alone).max())


def test_slim_attention_whose_keys_give_the_values_works():
    alone = apply(tiny_lm("gpt2"), {"slim_attention": True}).logits(IDS)
    found = apply(tiny_lm("gpt2"), {"slim_attention": True, "quantize_cache": {}}).logits(IDS)
    assert 0 < abs(found - alone).max() < 0.5 * abs(alone).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 3}, "group_size must be a divisor of the head width 8; got 3"),
        ({"group_size": 0}, "group_size must be an integer, at least 1, or None; got 0"),
        ({"bits": 4, "group_size": 1}, "must be even and a divisor of the head width 8; got 1"),
        ({"bits": 5}, "bits must be one of 8, 4, 32; got 5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"quantize_cache": options})
