"""Keys and values in few bits: a literal twin, sizes, who fills and who reads them, refusals."""

import literal_quantize as literal
import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.precompute.quantize_cache import FewBitCache
from minitx.state import Layer
from minitx.technique import apply, find

RNG = np.random.default_rng(0)
IDS = RNG.integers(0, 258, 30)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [None, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_read_back_is_what_the_twin_keeps(bits, group, dtype):
    k, v = RNG.normal(size=(2, 3, 5, 6)).astype(dtype)  # K, T, d
    k[1, 2] = 0
    cache, layer = FewBitCache(bits, group, np.dtype(dtype).name), Layer(8)
    cache.store(k[:, :4], v[:, :4], layer.take(4))
    first = cache.read(layer)
    cache.store(k[:, 4:], v[:, 4:], layer.take(1))
    found = cache.read(layer)
    for part, whole, x in zip(first, found, (k, v)):
        assert whole.dtype == dtype
        np.testing.assert_array_equal(part, whole[:, :4])  # later tokens change nothing
        G = group or 6
        for at in np.ndindex(3, 5):
            for a in range(0, 6, G):
                codes, scale = literal.symmetric(x[at][a : a + G].tolist(), bits)
                expected = [code * scale for code in codes]
                np.testing.assert_allclose(whole[at][a : a + G], expected, rtol=1e-6)
    assert layer.keys.dtype == np.uint8
    assert layer.keys.shape[-1] == 6 * bits // 8 + 6 // G * np.dtype(dtype).itemsize


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"bits": 4, "group": 2}], ids=str)
def test_batches_chunks_and_whole_sequences(family, options):
    """A sequence of which nothing is remembered sees rounded keys too."""
    lm = apply(tiny_lm(family, dtype=np.float64), {"quantize_cache": options})
    whole = lm.logits(IDS)  # in one pass, without a memory
    assert abs(whole - tiny_lm(family, dtype=np.float64).logits(IDS)).max() > 1e-6
    state = lm.model.new_state()
    pieces = [lm.model(ids, state) for ids in (IDS[:9], IDS[9:10], IDS[10:])]
    np.testing.assert_allclose(np.concatenate(pieces), whole, atol=1e-10 * abs(whole).max())
    start = np.array([0, 8])
    batch = np.stack([IDS, np.concatenate([np.zeros(8, int), IDS[:22]])])
    state = lm.model.new_state(start)
    found = np.concatenate([lm.model(batch[:, :20], state), lm.model(batch[:, 20:], state)], 1)
    np.testing.assert_allclose(found[0], whole, atol=1e-10 * abs(whole).max())
    np.testing.assert_allclose(found[1, 8:], whole[:22], atol=1e-10 * abs(whole).max())


@pytest.mark.parametrize("options", [{}, {"bits": 4}, {"group": 4}, {"bits": 32}], ids=str)
def test_bytes_a_token_are_those_of_the_card(options):
    lm = apply(tiny_lm(), {"quantize_cache": options})
    state = lm.model.new_state()
    with counting(lm) as counts:
        lm.model(IDS, state)
    c, bits, d = lm.model.config, options.get("bits", 8), 8
    row = 4 * d if bits == 32 else d * bits // 8 + 4 * d // options.get("group", d)
    assert state.bytes_per_token == c.layers * 2 * c.kv_heads * row
    dense = tiny_lm()
    with counting(dense) as before:
        dense.logits(IDS)
    more = 0 if bits == 32 else len(IDS) * state.bytes_per_token  # codes, on top of their floats
    assert counts.total().cache_bytes == before.total().cache_bytes + more
    assert counts.total().multiply_adds == before.total().multiply_adds


def test_tokens_that_left_early_have_rounded_keys_too():
    lm = tiny_lm(dtype=np.float64)
    changed = apply(lm, {"early_exit": {"threshold": 0.0}, "quantize_cache": {}})
    state = changed.model.new_state()
    changed.model(IDS[:20], state)
    for layer in state.layers:
        assert layer.keys.dtype == np.uint8  # filled, where the token was not run
    changed.generate(IDS[:5], 10)


def test_with_techniques_that_read_keys():
    """What chooses keys sees those that are read back: with everything kept, nothing changes."""
    lm = tiny_lm(dtype=np.float64)
    alone = apply(lm, {"quantize_cache": {}}).logits(IDS)
    for name in ("a3", "elsa", "predictive_attention"):
        both = apply(lm, {name: find(name).neutral, "quantize_cache": {}}).logits(IDS)
        np.testing.assert_allclose(both, alone, atol=1e-12 * abs(alone).max())


def test_keys_that_give_the_values_too():
    alone = apply(tiny_lm("gpt2"), {"slim_attention": True}).logits(IDS)
    found = apply(tiny_lm("gpt2"), {"slim_attention": True, "quantize_cache": {}}).logits(IDS)
    assert 0 < abs(found - alone).max() < 0.5 * abs(alone).max()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group": 3}, "group is 3; it must be a divisor of the heads' width 8"),
        ({"group": 0}, "must be a divisor"),
        ({"bits": 4, "group": 1}, "must be even and a divisor"),
        ({"bits": 5}, "must be one of 8, 4, 32"),
    ],
)
def test_refusals(options, words):
    with pytest.raises(MinitxError, match=words):
        apply(tiny_lm(), {"quantize_cache": options})
