"""The dense model: every way of feeding a sequence gives the same numbers, in every family."""

import numpy as np
import pytest
from same import assert_same
from tiny import padded_mask, tiny_model

from minitx import ops
from minitx.build import build, random_model, shapes
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.state import Layer, State
from minitx.tree import children, draw, map_weights, rebuild, walk, weights

LLAMA = dict(family="llama", vocab_size=50, width=24, layers=3, heads=4, kv_heads=2, head_width=8)
LLAMA |= dict(hidden=40, context=160, rope_width=8)
GPT2 = dict(family="gpt2", vocab_size=50, width=24, layers=2, heads=3, kv_heads=3, head_width=8)
GPT2 |= dict(hidden=48, context=160, activation="gelu_tanh")
GPT2 |= dict(tied=True, qkv_bias=True, out_bias=True, ffn_bias=True)
NEOX = GPT2 | dict(family="gpt_neox", activation="gelu", tied=False, rope_width=4)
MODELS = {
    "llama": LLAMA,
    "llama MQA, tied, biases": LLAMA | dict(kv_heads=1, tied=True, qkv_bias=True, ffn_bias=True),
    "llama, heads of another width": LLAMA | dict(head_width=6, rope_width=6, rope_base=100.0),
    "gpt2": GPT2,
    "gpt2 relu": GPT2 | dict(activation="relu", tied=False),
    "gpt_neox parallel": NEOX | dict(parallel=True),
    "gpt_neox serial": NEOX,
}


@pytest.fixture(params=MODELS, ids=list(MODELS))
def model(request):
    """Random weights everywhere, biases and gains too: a zero bias would hide that it is lost."""
    rng = np.random.default_rng(3)
    plain = random_model(Config(**MODELS[request.param]), seed=1, dtype=np.float64)
    return map_weights(plain, lambda w: w + 0.3 * rng.standard_normal(w.shape))


@pytest.fixture
def ids():
    return np.random.default_rng(5).integers(0, 50, 150)


def close(a, b):
    return np.abs(a - b).max() <= 1e-12 * np.abs(b).max()


def test_prefill_chunks_and_single_tokens_agree(model, ids):
    full = model(ids)
    state = model.new_state()
    parts = [model(ids[:70], state), model(ids[70:71], state), model(ids[71:140], state)]
    parts += [model(ids[i : i + 1], state) for i in range(140, 150)]
    assert close(np.concatenate(parts), full)


def test_next_logits_equal_last_row_of_logits(model, ids):
    assert close(model.next_logits(ids), model(ids)[-1])


def test_ragged_batch_row_equals_row_alone(model, ids):
    rows = [ids[:60], ids[20:50], ids[100:101]]
    start = np.array([60 - len(r) for r in rows])
    batch = np.stack([np.concatenate([np.full(s, 7), r]) for s, r in zip(start, rows)])
    state = model.new_state(start)
    prefill = model(batch, state)
    step = model(np.array([[1], [2], [3]]), state)
    for i, (s, row) in enumerate(zip(start, rows)):
        alone = model(np.append(row, i + 1))
        assert close(prefill[i, s:], alone[:-1])
        assert close(step[i, 0], alone[-1])


def test_rewind_and_replay_gives_same_logits(model, ids):
    state = model.new_state()
    before = model(ids[:40], state)
    model(ids[90:110], state)  # a wrong turn
    state.rewind(30)
    again = model(ids[30:40], state)
    assert close(again, before[30:40])
    with pytest.raises(MinitxError, match="Cannot rewind to position 41"):
        state.rewind(41)


def test_two_interleaved_sequences_are_independent(model, ids):
    one, two = model.new_state(), model.new_state()
    model(ids[:20], one)
    model(ids[50:90], two)
    assert close(model(ids[20:30], one), model(ids[:30])[20:])


def test_later_tokens_do_not_change_earlier_logits(model, ids):
    changed = ids.copy()
    changed[80:] = (changed[80:] + 1) % 50
    assert_same(model(ids)[:64], model(changed)[:64])  # whole blocks of rows
    assert close(model(ids)[:80], model(changed)[:80])
    assert not close(model(ids)[80:], model(changed)[80:])


def test_float32_stays_float32(model, ids):
    single = map_weights(model, lambda w: w.astype(np.float32))
    single = build(model.config, lambda path, shape: weights(single)[path])  # rotary tables too
    assert single(ids).dtype == np.float32
    error = np.abs(single(ids) - model(ids)).max() / np.abs(model(ids)).max()
    assert 0 < error < 1e-4


def test_every_weight_changes_the_logits(model, ids):
    """No weight is loaded and then forgotten: changing any one array changes the logits."""
    full = model(ids)
    for path in weights(model):
        if model.config.family == "gpt2" and path.endswith("qkv.k.b"):
            continue  # adds the same to all scores of a row: softmax cannot see it
        target = weights(model)[path]
        nudge = np.random.default_rng(0).standard_normal(target.shape)
        changed = map_weights(model, lambda w: w + nudge if w is target else w)  # noqa: B023
        assert not np.allclose(changed(ids), full, rtol=1e-9), path


def test_sequence_longer_than_context_is_refused(model):
    state = model.new_state()
    model.next_logits(np.zeros(160, int), state)
    with pytest.raises(MinitxError, match="161 tokens"):
        model.next_logits([0], state)
    assert state.position == 160 and {layer.count for layer in state.layers} == {160}


def test_shapes_equal_those_of_the_built_model(model):
    assert shapes(model.config) == {path: w.shape for path, w in weights(model).items()}


def test_tied_head_shares_the_embedding():
    model = random_model(Config(**LLAMA | dict(tied=True)))
    assert model.head.w is model.embed.w
    assert "head.w" not in weights(model)
    changed = map_weights(model, np.copy)
    assert changed.head.w is changed.embed.w is not model.embed.w


# Attention by its definition, one number at a time.


def slow_attention(q, k, v, scale):
    H, T, d = q.shape
    K, S, _ = k.shape
    out = np.zeros_like(q)
    for h in range(H):
        for t in range(T):
            seen = S - T + t + 1
            key_head = h // (H // K)
            scores = [scale * float(q[h, t] @ k[key_head, s]) for s in range(seen)]
            total = sum(np.exp(s) for s in scores)
            for s in range(seen):
                out[h, t] += np.exp(scores[s]) / total * v[key_head, s]
    return out


@pytest.mark.parametrize("H, K", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("T, S", [(1, 1), (1, 9), (5, 5), (5, 9), (70, 70), (130, 140)])
def test_attention_equals_its_definition(H, K, T, S):
    rng = np.random.default_rng(T + S)
    q, k, v = (rng.standard_normal(s) for s in [(H, T, 6), (K, S, 6), (K, S, 6)])
    assert np.allclose(ops.attention(q, k, v, 0.4), slow_attention(q, k, v, 0.4), atol=1e-12)


def test_attention_with_large_scores_does_not_overflow():
    q = np.full((1, 3, 4), 300, np.float32)
    k = np.stack([q[0] * 0.1, q[0]])[None, 1]
    assert np.isfinite(ops.attention(q, k, k, 1.0)).all()


def test_padding_row_gives_finite_numbers():
    q = np.ones((2, 1, 4, 2))
    out = ops.attention(q, q, q, 1.0, padded_mask(np.array([0, 3]), 4))
    assert np.isfinite(out).all()


def test_erf_equals_math_erf():
    import math

    x = np.concatenate([np.linspace(-7, 7, 20001), [0.0, 1e-300, 30.0, -1e6]])
    exact = np.array([math.erf(v) for v in x])
    assert np.abs(ops.erf(x) - exact).max() < 1e-15
    assert np.abs(ops.erf(x.astype(np.float32)) - exact).max() < 2e-7
    found = ops.erf(np.array([np.nan, np.inf, -np.inf]))
    assert_same(found, [np.nan, 1, -1])  # what is no number stays visible


def test_swiglu_equals_silu_times_up():
    x, y = np.random.default_rng(0).standard_normal((2, 50))
    assert np.allclose(ops.swiglu(x, y), ops.silu(x) * y, rtol=1e-14)


def test_rewind_reaches_layer_memory():
    class Count:
        def __init__(self):
            self.seen = 5

        def rewind(self, position):
            self.seen = min(self.seen, position)

    layer = Layer(10).take(5)
    assert layer.memory.recall("me", Count) is layer.memory.recall("me", Count)
    layer.rewind(2)
    assert (layer.tokens.end, layer.memory.recall("me", Count).seen) == (2, 2)

    state = State(2, 10)
    state.position = 5
    seen = state.layers[0].shared.recall("me", Count)
    assert state.layers[1].shared.recall("me", Count) is seen
    state.rewind(3)
    assert seen.seen == 3


# The tree.


def test_drawing_folds_equal_blocks():
    model = random_model(Config(**LLAMA))
    text = draw(model)
    assert "blocks.0-2: Block" in text and text.count("SwiGLU") == 1
    assert "down: Linear(w 40x24)" in text

    two = rebuild(model, lambda p: model.norm if p is model.stack.blocks[1].ffn.norm else None)
    assert draw(two) == text  # equal looks, other part
    assert two.stack.blocks[1].ffn.norm is model.norm
    assert two.stack.blocks[0] is model.stack.blocks[0]  # untouched parts are shared
    assert rebuild(model, lambda p: None) is model


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(family="bert"), "Unknown model family 'bert'"),
        (dict(activation="swish"), "Unknown activation"),
        (dict(kv_heads=3), "cannot share 3"),
        (dict(rope_width=7), "7 rotary columns"),
        (dict(rope_width=10), "10 rotary columns"),
        (dict(width=0), "width = 0"),
        (dict(layers=2.0), "layers = 2.0"),
        (dict(context=True), "context = True"),
    ],
)
def test_bad_config_is_refused(change, words):
    with pytest.raises(MinitxError, match=words):
        Config(**LLAMA | change)


def test_next_argmax_equals_argmax_of_last_row(model, ids):
    assert model.next_argmax(ids) == model(ids)[-1].argmax()


def test_backfill_stores_the_same_keys_and_values_as_running(model, ids):
    """A block's ``backfill`` leaves the keys and values that the block would, and no more."""
    block = model.stack.blocks[0]
    x = model.embed(ids, slice(0, len(ids)))
    ran, filled = model.new_state().layers[0], model.new_state().layers[0]
    S = len(ids)
    block(x, ran.take(S))
    assert block.backfill(x, filled.take(S)) is None
    assert close(filled.keys[:, :S], ran.keys[:, :S])
    assert close(filled.values[:, :S], ran.values[:, :S])


def test_random_model_refuses_a_bad_seed_or_dtype():
    config = Config(**MODELS[next(iter(MODELS))])
    same = random_model(config, np.uint8(255)), random_model(config, 255)
    assert_same(same[0].embed.w, same[1].embed.w)
    for seed in (-1, 1.5, True, "1", 2**64):
        with pytest.raises(MinitxError, match="seed must be an integer"):
            random_model(config, seed)
    for dtype in ("foo", None, np.float16, int):
        with pytest.raises(MinitxError, match="dtype must be float32 or float64"):
            random_model(config, dtype=dtype)


def test_walk_visits_a_part_before_its_children_and_these_in_order():
    def plain(path, node):
        found = [(path, node)]
        for name, child in children(node):
            found += plain(f"{path}.{name}" if path else name, child)
        return found

    model = tiny_model()
    found = list(walk(model))
    assert found == plain("", model)
    assert [path for path, _ in found][:4] == ["", "embed", "stack", "stack.blocks.0"], found[:4]
    assert [path for path, _ in walk(model.norm, "here")] == ["here"]
