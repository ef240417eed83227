"""slim_attention: values computed from cached keys are the values, at half of the cache."""

import itertools
from dataclasses import replace

import literal_slim_attention as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, error, in_chunks, tiny_lm, tiny_model

from minitx import fast, ops
from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Attention, NoRope, split_heads
from minitx.precompute.slim_attention import AttendKeys, solve
from minitx.technique import apply, swap, wrap
from minitx.tree import map_weights, walk

# Notes that a check can never pay: these models are tiny.
pytestmark = pytest.mark.filterwarnings("ignore::minitx.errors.MinitxWarning")

SIZES = dict(vocab_size=11, width=16, layers=2, heads=4, kv_heads=4, head_width=4, context=40)
PLAIN = dict(bos=None, eos=())
KINDS = {
    "learned": replace(FAMILIES["gpt2"], **SIZES, **PLAIN),
    "rotary": replace(FAMILIES["llama"], **SIZES, **PLAIN, rope_width=4),
    "rotary-biases": replace(FAMILIES["llama"], **SIZES, **PLAIN, rope_width=4, qkv_bias=True),
    "parallel": replace(FAMILIES["gpt_neox"], **SIZES, **PLAIN, rope_width=2),
}
KINDS["one head"] = replace(KINDS["parallel"], heads=1, kv_heads=1, head_width=16)
KINDS["wide"] = replace(KINDS["parallel"], head_width=6)
KINDS["wide-learned"] = replace(KINDS["learned"], head_width=6)
IDS = np.array([7, 2, 7, 0, 10, 3, 7, 5] * 4)
kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, dtype=np.float64, condition=30.0, **changes):
    """A model whose biases are not zero, whose gains are not one, and whose W_k have a condition
    number of that size."""
    rng = np.random.default_rng(5)
    random = random_model(replace(KINDS[kind], **changes), 3, dtype)

    def change(w):
        return (w + rng.normal(0, 0.3, w.shape) if w.ndim == 1 else 2 * w).astype(dtype)

    lm = LM(map_weights(random, change))
    return lm if condition is None else with_condition(lm, condition)


def with_condition(lm, condition, only=None):
    """W_k = U diag(1 .. 1 / condition) V^T, in the layer ``only`` or in all."""

    def change(attn, number):
        if only not in (None, number):
            return attn
        k = attn.qkv.k
        u, s, v = np.linalg.svd(k.w.astype(np.float64), full_matrices=False)
        w = (u * np.logspace(0, -np.log10(condition), len(s)) * s[0]) @ v
        return replace(attn, qkv=replace(attn.qkv, k=replace(k, w=w.astype(k.w.dtype))))

    return wrap(lm, "attn", change)


def test_slim_attention_worked_example_by_hand():
    """Width 2, one head. W_k = [[2, 0], [0, 4]], W_v = [[6, 2], [8, 4]]:

    W_kv = W_k^-1 W_v = [6 / 2, 2 / 2], [8 / 4, 4 / 4] = [3, 1], [2, 1]
    n = [1, 1]:  k = n W_k = [2, 4],  v = n W_v = [14, 6]
    v = k W_kv = [2 * 3 + 4 * 2, 2 * 1 + 4 * 1] = [14, 6]
    The condition number of W_k is 4 / 2 = 2.
    """
    w_k, w_v = np.array([[2.0, 0.0], [0.0, 4.0]]), np.array([[6.0, 2.0], [8.0, 4.0]])
    w_kv, condition = solve(w_k, w_v)
    assert_same(w_kv, [[3, 1], [2, 1]], "W_kv", tolerance=1e-15)
    assert_same(np.array([2, 4]) @ w_kv, [14, 6], "value", tolerance=1e-15)
    assert condition == pytest.approx(2)


# Literal version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "rotary", "parallel", "wide"])
def test_slim_attention_equals_the_literal_version(kind):
    dense = make(kind)
    lm = apply(dense, {"slim_attention": True})
    plain, slim = (model.model.stack.blocks[1].attn for model in (dense, lm))
    rows = np.random.default_rng(1).normal(0, 1, (12, 16))
    maps = dict(zip("qkvo", (plain.qkv.q, plain.qkv.k, plain.qkv.v, plain.out)))
    w = {f"W_{name}": m.w for name, m in maps.items()}
    w |= {f"b_{n}": np.zeros(m.w.shape[1]) if m.b is None else m.b for n, m in maps.items()}
    expected, keys = literal.attend(plain.norm(rows), w, plain.heads, dense.model.config.rope_width)
    layer = lm.model.new_state().layers[1].take(len(rows))
    check_close(slim(rows, layer), expected, 1e-12, "attention output")
    cached = layer.keys[0, :12]
    if kind == "learned":  # b_k is dropped there
        cached = cached + w["b_k"]
    check_close(cached, keys, 1e-13, "cached keys")
    assert layer.values.size == 0


@kinds
def test_slim_attention_both_orders_of_products_agree(kind):
    lm = apply(make(kind), {"slim_attention": True})
    attn = lm.model.stack.blocks[0].attn
    H, E, d = attn.attend.w_kv.shape
    rng = np.random.default_rng(2)
    q, raw = rng.normal(size=(H, 3, d)), rng.normal(size=(1, 20, E))
    k = split_heads(raw[0], H)
    keys_first = attn.attend.sum_keys_first(q, k, raw, fast.newest_mask(3))
    values_first = ops.attention(q, k, attn.attend.values(raw), attn.attend.scale)
    check_close(keys_first, values_first, 1e-12, "both orders")


def test_slim_attention_rotated_keys_or_a_forgotten_bias_change_the_logits():
    dense = make("parallel")
    lm = apply(dense, {"slim_attention": True})
    expected, rope = dense.logits(IDS), dense.model.stack.blocks[0].attn.rope

    def rotate_first(attn):
        return replace(attn, rope=rope, attend=replace(attn.attend, rope=NoRope()))

    def forget(attn):
        return replace(attn, out=replace(attn.out, b=np.zeros(16)))

    for change in (rotate_first, forget):
        assert error(swap(lm, Attention, change).logits(IDS), expected) > 0.01


# The dense model ---------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("dtype, allowed", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_slim_attention_keeps_logits_of_prompts_chunks_and_single_tokens(kind, dtype, allowed):
    dense = make(kind, dtype)
    lm = apply(dense, {"slim_attention": True})
    expected = dense.logits(IDS)
    for sizes in ((32,), (20, 2, 9, 1), (1,) * 32):
        check_close(in_chunks(lm, IDS, sizes), expected, allowed, "logits")


@kinds
def test_slim_attention_cache_is_half_as_large(kind):
    dense = make(kind)
    sizes = []
    for lm in (dense, apply(dense, {"slim_attention": True})):
        state = lm.model.new_state()
        lm.model(IDS, state)
        sizes.append(state.bytes_per_token)
    assert 2 * sizes[1] == sizes[0] > 0


@kinds
def test_slim_attention_row_of_a_batch_is_the_row_alone(kind):
    """In rows of equal length, and padded on the left."""
    lm = apply(make(kind), {"slim_attention": True})
    both = lm.logits(np.stack([IDS, IDS[::-1]]))
    check_close(both[1], lm.logits(IDS[::-1]), 1e-12, "second row of the batch")
    prompts = [[7, 2, 7, 0] * 5, [3], [10, 9]]
    state = lm.model.new_state(np.array([0, 19, 18]))
    ids = np.zeros((3, 20), int)
    for row, prompt in zip(ids, prompts):
        row[20 - len(prompt) :] = prompt
    logits = [lm.model(ids, state), lm.model(np.array([[4], [4], [4]]), state)]
    for row, prompt in enumerate(prompts):
        alone = lm.logits([*prompt, 4])
        check_close(logits[0][row, -1], alone[-2], 1e-12, "row of a prompt")
        check_close(logits[1][row, -1], alone[-1], 1e-12, "row of a step")
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("kind", ["learned", "rotary-biases", "parallel"])
def test_slim_attention_with_any_exact_techniques_is_exact(kind):
    dense = make(kind)
    expected = dense.logits(IDS)
    others = ["fold_norms", "fuse_projections", "first_layer", "exact_head"]
    others += ["merge_embeddings"] * (kind == "learned")
    for count in range(len(others) + 1):
        for chosen in itertools.combinations(others, count):
            try:
                lm = apply(dense, dict.fromkeys((*chosen, "slim_attention"), True))
            except MinitxError as refusal:
                assert {"first_layer", "merge_embeddings"} <= set(chosen), refusal
                continue
            check_close(lm.logits(IDS), expected, 1e-12, f"with {chosen}")
            check_close(in_chunks(lm, IDS, (25, 1, 6)), expected, 1e-12, f"with {chosen}")


@pytest.mark.parametrize("fuse", [False, True])
def test_slim_attention_backfills_tokens_that_skip_a_layer(fuse):
    exit_early = {"measure": "softmax", "threshold": 0.0, "first": 1, "warm_up": 8}
    wanted = {"early_exit": exit_early, "fuse_projections": fuse}
    dense = make("parallel")
    expected = apply(dense, wanted).logits(IDS)
    lm = apply(dense, wanted | {"slim_attention": True})
    check_close(lm.logits(IDS), expected, 1e-12, "logits")
    assert error(dense.logits(IDS), expected) > 1e-3


# Costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["learned", "parallel", "one head", "wide"])
def test_slim_attention_token_costs_what_the_card_says(kind):
    """With E = H d: (H + 1) S E instead of 2 S E, E^2 instead of D E; the cache is read once."""
    dense = make(kind, np.float32)
    lm = apply(dense, {"slim_attention": True})
    H, d = dense.model.config.heads, dense.model.config.head_width
    D, E, S = 16, H * d, 30
    found = []
    for model in (dense, lm):
        state = model.model.new_state()
        model.model(IDS[: S - 1], state)
        with counting(model) as counts:
            model.model(IDS[S - 1 : S], state)
        found.append(counts.total("model.stack.blocks.0.attn"))
    before, after = found
    assert before.multiply_adds == 4 * D * E + 2 * S * E
    assert after.multiply_adds == 3 * D * E + E * E + (H + 1) * S * E
    assert after.weight_bytes == 4 * (3 * D * E + E * E)
    assert (before.cache_bytes, after.cache_bytes) == (2 * 4 * S * E, 4 * S * E)


def test_slim_attention_prompt_costs_what_the_dense_one_does():
    dense = make("parallel")
    lm = apply(dense, {"slim_attention": True})
    found = []
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits(IDS)
        found.append(counts.total("model.stack.blocks.0.attn").multiply_adds)
    assert found[0] == found[1]


# Conditioning ------------------------------------------------------------------------------------


def test_slim_attention_condition_numbers_are_in_the_tree():
    lm = apply(with_condition(make("parallel"), 777.0, only=1), {"slim_attention": True})
    kept = [node.condition for _, node in walk(lm) if type(node) is AttendKeys]
    assert kept == [30.0, 777.0]
    assert "condition=30)" in repr(lm.model) and "condition=777)" in repr(lm.model)


def test_slim_attention_ill_conditioned_layer_is_refused_by_number():
    lm = with_condition(make("parallel"), 1e6, only=1)
    with pytest.raises(MinitxError, match=r"layer 1: the condition number of its W_k is 1e\+06"):
        apply(lm, {"slim_attention": True})
    expected = lm.logits(IDS)
    allowed = apply(lm, {"slim_attention": {"max_condition": 2e6}})
    assert 1e-14 < error(allowed.logits(IDS), expected) < 1e-8
    with pytest.raises(MinitxError, match="layer 0"):
        apply(lm, {"slim_attention": {"max_condition": 20.0}})


@pytest.mark.parametrize("fault", [np.zeros_like, lambda w: w[:, [0] * 16], lambda w: w * np.nan])
def test_slim_attention_singular_w_k_is_refused(fault):
    def change(attn):
        k = attn.qkv.k
        return replace(attn, qkv=replace(attn.qkv, k=replace(k, w=fault(k.w))))

    lm = swap(make("parallel"), Attention, change)
    with pytest.raises(MinitxError, match="slim_attention .* layer 0"):
        apply(lm, {"slim_attention": {"max_condition": 1e12}})


@pytest.mark.parametrize("condition, about", [(1e0, 4e-8), (1e2, 4e-7), (1e4, 2e-5), (1e6, 1e-3)])
def test_slim_attention_value_errors_grow_with_the_condition_number(condition, about):
    """d = 128, keys and W_kv in float32: within a factor of 10 of the card's figures."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(128, 128)))[0] for _ in range(2))
    w_k = (u * np.logspace(0, -np.log10(condition), 128)) @ v
    w_v, x = rng.normal(size=(128, 128)), rng.normal(size=(50, 128))
    w_kv, found = solve(w_k, w_v)
    assert found == pytest.approx(condition, rel=1e-6)
    values = (x @ w_k).astype(np.float32).astype(float) @ w_kv.astype(np.float32).astype(float)
    off = np.linalg.norm(values - x @ w_v) / np.linalg.norm(x @ w_v)
    assert about / 10 < off < about * 10


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lm, words",
    [
        (lambda: tiny_lm("llama"), "has 1 for 2 query heads.*2 times smaller"),
        (lambda: make("rotary", condition=None, kv_heads=2), "has 2 for 4 query heads"),
        (lambda: make("rotary", head_width=2, rope_width=2), "are 8 wide and its hidden state 16"),
    ],
)
def test_slim_attention_keys_that_hold_too_little_are_refused(lm, words):
    with pytest.raises(MinitxError, match=f"^slim_attention.*{words}"):
        apply(lm(), {"slim_attention": True})


def test_slim_attention_beside_techniques_of_the_same_parts_is_refused():
    for name in ("shrink", "a3"):
        with pytest.raises(MinitxError, match=f"slim_attention.*{name}.*use one of the two"):
            apply(make("parallel"), {name: True, "slim_attention": True})


def test_slim_attention_without_w_q_is_refused():
    """remove_weights leaves two of the three matrices in a parallel skipless model."""
    lm = tiny_lm(model=tiny_model("skipless", parallel=True))
    with pytest.raises(MinitxError, match="^slim_attention needs .* remove_weights has put"):
        apply(lm, {"slim_attention": True, "remove_weights": True})


def test_slim_attention_tree_shows_its_parts():
    lm = apply(make("parallel"), {"slim_attention": True})
    assert "QueriesAndKeys(q_width=16)" in repr(lm.model)
    assert "w_kv 4x16x4" in repr(lm.model)
