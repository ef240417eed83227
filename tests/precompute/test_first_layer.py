"""first_layer: block 0 from a table is the dense block 0, and saves what is predicted."""

from dataclasses import replace

import literal_first_layer as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, error, tiny_lm

from minitx import model as core
from minitx.build import random_model
from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.lab.costs.first_layer import FirstLayerCost
from minitx.lab.shape import read_shape
from minitx.ledger import counting
from minitx.lm import LM
from minitx.precompute.first_layer import (
    FirstBlock,
    FirstLayerTable,
    FirstParallelBlock,
    FirstParallelBlockAndFFN,
    InTable,
    token_table,
)
from minitx.technique import apply, swap
from minitx.tree import Part, map_weights, part, walk, weights

# Token 7 occurs at three positions.
SIZES = dict(vocab_size=11, width=24, layers=2, heads=4, head_width=6, hidden=20, context=16)
IDS = np.array([7, 2, 7, 0, 10, 3, 7, 5])
BIASES = dict(qkv_bias=True, out_bias=True, ffn_bias=True)
LLAMA, GPT2, NEOX = (
    replace(FAMILIES[family], **SIZES, **BIASES, rope_width=rope_width, bos=None, eos=())
    for family, rope_width in (("llama", 6), ("gpt2", 0), ("gpt_neox", 4))
)
KINDS = {
    "serial": LLAMA,
    "parallel": NEOX,
    "learned": GPT2,
    "learned-rms": replace(LLAMA, rope_width=0),
    "learned-parallel": replace(GPT2, parallel=True),
}


def make(kind, dtype=np.float64, **changes):
    """A model whose biases are not zero and whose gains are not one."""
    rng = np.random.default_rng(5)
    random = random_model(replace(KINDS[kind], **changes), 3, dtype)

    def change(w):
        return (w + rng.normal(0, 0.3, w.shape) if w.ndim == 1 else 2 * w).astype(dtype)

    return LM(map_weights(random, change))


def after_block_0(lm, ids=IDS):
    m, state = lm.model, lm.model.new_state(remember=False)
    return m.stack.run(m.embed(ids, state.take(len(ids)).lookup), state, 0, 1)


def test_first_layer_worked_example_by_hand():
    """Width 2, one token with x = E[0] = [3, 4], RMSNorm with gain [5, 10] and eps 0.

    rms(x) = sqrt((9 + 16) / 2) = 5 / sqrt(2);  n = x / rms(x) * gain = sqrt(2) * [3, 8]
    q = n W_q = sqrt(2) * [3 + 8, 8] = sqrt(2) * [11, 8]     with W_q = [[1, 0], [1, 1]]
    k = n W_k = sqrt(2) * [3]                                with W_k = [[1], [0]]
    v = n W_v = sqrt(2) * [16]                               with W_v = [[0], [2]]
    serial block: s = x, so  table[0] = [3, 4, q, k, v]
    """
    norm = core.RMSNorm(np.array([5.0, 10.0]), 0.0)
    matrices = [[1, 0], [1, 1]], [[1], [0]], [[0], [2]]
    qkv = core.QKV(*(core.Linear(np.array(w, float)) for w in matrices))
    table = token_table(np.array([[3.0, 4.0]]), norm, qkv, None)
    root = 2**0.5
    expected = [[3, 4, root * 11, root * 8, root * 3, root * 16]]
    assert_same(table, expected, "[s, q, k, v]", tolerance=1e-15)


# Literal version ---------------------------------------------------------------------------------


def literal_weights(lm):
    """Block 0's weights by the literal version's names."""
    block, found = lm.model.stack.blocks[0], {}
    attn, ffn = block.attn, block.ffn
    maps = dict(zip("qkv", (attn.qkv.q, attn.qkv.k, attn.qkv.v)), o=attn.out)
    maps |= dict(up=ffn.expand.up, down=ffn.down)
    if hasattr(ffn.expand, "gate"):
        maps["gate"] = ffn.expand.gate
    for name, linear in maps.items():
        bias = np.zeros(linear.w.shape[1]) if linear.b is None else linear.b
        found |= {f"w_{name}": linear.w.tolist(), f"b_{name}": bias.tolist()}
    for number, norm in ((1, attn.norm), (2, ffn.norm)):
        bias = getattr(norm, "bias", np.zeros_like(norm.gain))
        found |= {f"gain_{number}": norm.gain.tolist(), f"bias_{number}": bias.tolist()}
    found["eps"] = attn.norm.eps
    found["norm"] = "layer" if type(attn.norm) is core.LayerNorm else "rms"
    tokens = getattr(lm.model.embed, "tokens", lm.model.embed)
    found["embedding"] = tokens.w.tolist()
    if tokens is not lm.model.embed:
        found["positions"] = lm.model.embed.w.tolist()
    return found


@pytest.mark.parametrize("kind, kv_heads", [("serial", 2), ("serial", 1), ("parallel", 4)])
def test_first_layer_table_and_block_0_equal_the_literal_version(kind, kv_heads):
    dense = make(kind, kv_heads=kv_heads)
    lm, w, c = apply(dense, {"first_layer": True}), literal_weights(dense), dense.model.config
    table = literal.make_table(w, c.parallel)
    assert_same(lm.model.embed.w, table, "table", atol=1e-12)
    sizes = (c.heads, c.kv_heads, c.width, c.rope_width, c.rope_base, c.parallel)
    expected = literal.block_0(table, IDS, w, *sizes)
    assert_same(after_block_0(lm), expected, "block 0", atol=1e-12)


@pytest.mark.parametrize("kind", ["learned", "learned-rms"])
def test_first_layer_learned_positions_equal_the_literal_version(kind):
    dense = make(kind)
    w, embed = literal_weights(dense), apply(dense, {"first_layer": True}).model.embed
    rows = embed(IDS, slice(3, 3 + len(IDS)))
    for t, row in zip(IDS, enumerate(rows)):
        position = 3 + row[0]
        assert_same(row[1][24:], literal.split_qkv(t, position, w), atol=1e-12)
        x = np.array(w["embedding"][t]) + w["positions"][position]
        assert_same(row[1][:24], x, "x", atol=1e-15)


# The dense model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, allowed", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_first_layer_keeps_block_0_logits_and_decoding(kind, kv_heads, dtype, allowed):
    dense = make(kind, dtype, kv_heads=kv_heads)
    lm = apply(dense, {"first_layer": True})
    check_close(after_block_0(lm), after_block_0(dense), allowed, "hidden state after block 0")
    expected = dense.logits(IDS)
    check_close(lm.logits(IDS), expected, allowed, "logits of a prompt")
    state = lm.model.new_state()
    single = np.concatenate([lm.model(IDS[t : t + 1], state) for t in range(len(IDS))])
    check_close(single, expected, allowed, "logits token by token")
    assert single.dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_first_layer_heads_that_do_not_fill_the_width(kind):
    dense = make(kind, kv_heads=2, head_width=10)
    lm = apply(dense, {"first_layer": True})
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")
    embed = lm.model.embed
    rows = embed.w if type(embed) is FirstLayerTable else embed.tokens
    assert rows.shape == (11, 24 + 4 * 10 + 2 * 2 * 10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fold, fuse", [(True, False), (False, True), (True, True)])
def test_first_layer_table_of_folded_or_fused_weights_is_exact(kind, fold, fuse):
    dense = make(kind, kv_heads=2)
    lm = apply(dense, {"fold_norms": fold, "fuse_projections": fuse, "first_layer": True})
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_first_layer_row_of_a_batch_is_the_row_alone(kind):
    """In rows of equal length, and padded on the left."""
    lm = apply(make(kind), {"first_layer": True})
    both = lm.logits(np.stack([IDS, IDS[::-1]]))
    check_close(both[1], lm.logits(IDS[::-1]), 1e-12, "second row of the batch")
    prompts = [[7, 2, 7, 0], [3], [10, 9]]
    assert lm.generate(prompts, 8) == [lm.generate(prompt, 8) for prompt in prompts]


def test_first_layer_table_made_in_pieces_is_the_whole_table(monkeypatch):
    whole = apply(make("parallel"), {"first_layer": True}).model.embed.w
    monkeypatch.setattr("minitx.precompute.first_layer.ROWS", 4)
    assert_same(apply(make("parallel"), {"first_layer": True}).model.embed.w, whole, atol=1e-13)


@pytest.mark.parametrize("control", ["rotated keys", "normalized x", "no x", "one position"])
def test_first_layer_mistakes_change_the_logits(control):
    """Negative controls: each of these mistakes changes the logits by a fifth or more."""
    kind = "learned" if control == "one position" else "serial"
    lm = apply(make(kind, kv_heads=2), {"first_layer": True})
    field = "positions" if kind == "learned" else "w"
    w = getattr(lm.model.embed, field).copy()
    if control == "rotated keys":
        rotated = [literal.rope(k, 5, 6, 10000.0) for k in w[:, 48:60].reshape(-1, 6)]
        w[:, 48:60] = np.reshape(rotated, (11, 12))
    elif control == "normalized x":
        w[:, :24] /= np.sqrt((w[:, :24] ** 2).mean(-1, keepdims=True))
    elif control == "no x":
        w[:, :24] = 0
    else:  # as if one table over tokens could hold learned positions
        w[:] = w[0]
    wrong = swap(lm, type(lm.model.embed), lambda table: replace(table, **{field: w}))
    assert error(wrong.logits(IDS), lm.logits(IDS)) > 0.2


# The tree, and the savings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, first",
    [
        ("serial", FirstBlock),
        ("parallel", FirstParallelBlock),
        ("learned", FirstBlock),
        ("learned-parallel", FirstParallelBlockAndFFN),
    ],
)
def test_first_layer_tree_shows_the_parts_that_stay(kind, first):
    dense = make(kind)
    lm = apply(dense, {"first_layer": True})
    block, *others = lm.model.stack.blocks
    assert type(block) is first and others == list(dense.model.stack.blocks[1:])
    assert type(block.attn.norm) is type(block.attn.qkv) is InTable
    assert block.attn.out is dense.model.stack.blocks[0].attn.out
    assert hasattr(block, "ffn") == (kind != "parallel")
    with pytest.raises(MinitxError, match="first_layer's table"):
        block.attn(after_block_0(dense), None)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch, T", [(1, 1), (1, 9), (5, 1), (60, 1)])
def test_first_layer_counted_savings_are_the_predicted_ones(tmp_path, family, fused, batch, T):
    """The prediction is made by ``minitx cost``, from the config.json of the same model."""
    dense = tiny_lm(family)
    if fused:
        dense = apply(dense, {"fold_norms": True, "fuse_projections": True})
    write_model(tiny_lm(family).model, tmp_path, "F32")
    cost = FirstLayerCost(read_shape(tmp_path))
    totals = []
    for lm in (dense, apply(dense, {"first_layer": True})):
        with counting(lm) as counts:
            lm.model(np.full((batch, T), 65), lm.model.new_state())
        totals.append(counts.total())
    tokens = batch * T
    saved = totals[0].multiply_adds - totals[1].multiply_adds
    assert saved == tokens * cost.eliminated > 0
    bytes_saved = totals[0].weight_bytes - totals[1].weight_bytes
    predicted = 4 * (cost.reads_without(tokens) - cost.reads_with(tokens))
    assert (predicted > 0) == (tokens < cost.break_even)
    if cost.shape.positions:  # predicted for different positions; in a batch they are shared
        predicted += 4 * (tokens - T) * cost.extra
    assert bytes_saved == predicted
    assert totals[0].cache_bytes == totals[1].cache_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_first_layer_memory_grows_as_predicted(tmp_path, family):
    dense = tiny_lm(family)
    write_model(dense.model, tmp_path, "F32")
    cost = FirstLayerCost(read_shape(tmp_path))

    def matrices(lm):
        return sum(w.size for w in weights(lm.model).values() if w.ndim == 2)

    assert matrices(dense) == cost.total_weights
    assert matrices(apply(dense, {"first_layer": True})) - matrices(dense) == cost.net


# Parts of other techniques, and refusals ---------------------------------------------------------


@part
class Wrapped(Part):
    inner: Part

    def __call__(self, x, layer):
        return self.inner(x, layer)


@pytest.mark.parametrize("kind", KINDS)
def test_first_layer_wrapped_ffn_stays_out_of_the_table(kind):
    dense = make(kind)
    lm = apply(swap(dense, core.FFN, Wrapped), {"first_layer": True})
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")
    assert sum(type(node) is Wrapped for _, node in walk(lm)) == 2


def test_first_layer_of_a_replaced_block_is_refused():
    dense = make("serial")
    wrapped = swap(dense, core.Attention, Wrapped)
    with pytest.raises(
        MinitxError, match="^first_layer needs .* Attention where the model has a Wr"
    ):
        apply(wrapped, {"first_layer": True})
    with pytest.raises(
        MinitxError, match="^first_layer needs .* Block or ParallelBlock where .* see its tree"
    ):
        apply(swap(dense, core.Block, Wrapped), {"first_layer": True})
    with pytest.raises(MinitxError, match="^first_layer needs .* TokenEmbedding"):
        apply(apply(dense, {"first_layer": True}), {"first_layer": True})


@part
class Unscaled(Part):
    """A norm that is not linear up to a scalar of x's mean square: it divides by the largest."""

    def __call__(self, x):
        return x / (1 + abs(x).max(-1, keepdims=True))


def test_first_layer_unknown_norm_is_refused_only_with_learned_positions():
    change = dict(first_layer=True)
    lm = swap(make("learned"), core.LayerNorm, lambda norm: Unscaled())
    with pytest.raises(
        MinitxError,
        match="^first_layer needs .* RMSNorm or LayerNorm where the model has a Unscaled",
    ):
        apply(lm, change)
    lm = swap(make("serial"), core.RMSNorm, lambda norm: Unscaled())
    check_close(apply(lm, change).logits(IDS), lm.logits(IDS), 1e-12, "logits")
