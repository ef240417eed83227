"""fuse_projections: the same queries, keys, values, gates and ups, from fewer products."""

from dataclasses import replace

import literal_fuse_projections as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import QKV, Attend, Linear, SwiGLU
from minitx.precompute.fuse_projections import FusedQKV, FusedSwiGLU, fuse_attention
from minitx.precompute.low_rank import low_rank
from minitx.technique import apply, swap
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(0).integers(0, 258, 30)
FUSED = {"fuse_projections": True}


def attention_of(lm, number=0):
    return lm.model.stack.blocks[number].attn


def test_fuse_projections_worked_example_by_hand():
    """Width 2, two query heads of width 1 and one key head; 1/sqrt(d) = 0.5, as if d were 4.

    W_q = [[2, 4], [6, 8]], W_k = [[1], [3]], W_v = [[5], [7]]
    W_qkv = [W_q / 2, W_k, W_v] = [1, 2, 1, 5], [3, 4, 3, 7]
    x = [1, 10]:  x W_qkv = [31, 42, 31, 75]:  q = [31, 42],  k = [31],  v = [75]
    """
    q, k, v = (np.array(w, float) for w in ([[2, 4], [6, 8]], [[1], [3]], [[5], [7]]))
    attn = replace(
        attention_of(tiny_lm()), qkv=QKV(Linear(q), Linear(k), Linear(v)), attend=Attend(0.5)
    )
    fused = fuse_attention(attn)
    assert_same(fused.qkv.all.w, [[1, 2, 1, 5], [3, 4, 3, 7]], "W_qkv")
    assert fused.qkv.all.b is None and fused.attend.scale == 1.0
    found = [part.tolist() for part in fused.qkv(np.array([1.0, 10.0]))]
    assert found == [[31, 42], [31], [75]], "queries, keys, values"


# Literal version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_qkv_equals_the_literal_version(family):
    dense = tiny_lm(family, np.float64)
    before, after = attention_of(dense, 1), attention_of(apply(dense, FUSED), 1)
    maps = before.qkv.q, before.qkv.k, before.qkv.v
    biases = [np.zeros(m.w.shape[1]) if m.b is None else m.b for m in maps]
    d = dense.model.config.head_width
    w, b = literal.fuse_qkv(*(a.tolist() for m, c in zip(maps, biases) for a in (m.w, c)), d)
    assert_same(after.qkv.all.w, w, "W_qkv", atol=1e-15)
    x = np.random.default_rng(1).normal(size=(3, 16))
    widths = [m.w.shape[1] for m in maps]
    for row, q, k, v in zip(x, *after.qkv(x)):
        expected = literal.split(literal.project(row.tolist(), w, b), *widths)
        for name, found, piece in zip("qkv", (q, k, v), expected):
            assert_same(found, piece, name, atol=1e-13)


def test_fused_swiglu_equals_the_literal_version():
    dense = tiny_lm("llama", np.float64)
    before, after = (lm.model.stack.blocks[1].ffn.expand for lm in (dense, apply(dense, FUSED)))
    w = literal.side_by_side(before.gate.w.tolist(), before.up.w.tolist())
    assert_same(after.both.w, w, "W_gu")
    x = np.random.default_rng(1).normal(size=(3, 16))
    for row, found in zip(x, after(x)):
        gate, up = literal.split(literal.project(row.tolist(), w, [0] * 48), 24, 24)
        expected = [g / (1 + np.exp(-g)) * u for g, u in zip(gate, up)]
        assert_same(found, expected, "silu(gate) * up", atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_queries_only_and_keys_and_values_only(family):
    qkv = attention_of(apply(tiny_lm(family, np.float64), FUSED)).qkv
    x = np.random.default_rng(1).normal(size=(3, 16))
    for name, found, expected in zip("qkv", (qkv.q(x), *qkv.kv(x)), qkv(x), strict=True):
        assert_same(found, expected, name, atol=1e-13)


# The model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_projections_keeps_the_logits(family, dtype, tolerance):
    dense = tiny_lm(family, dtype)
    lm = apply(dense, FUSED)
    for sizes in ((30,), (20, 1, 9), (1,) * 30):
        check_close(in_chunks(lm, IDS, sizes), dense.logits(IDS), tolerance, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_fuse_projections_saves_calls_but_no_multiply_adds_and_no_weights(family):
    dense = tiny_lm(family)
    lm = apply(dense, FUSED)
    gated = family == "llama"
    calls, totals = [], []
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits(IDS[:1])
        below = [p for p in counts.entries if ".blocks.0." in p and not p.endswith(".attend")]
        calls.append(len(below))
        totals.append(counts.total())
    assert calls == ([7, 4] if gated else [6, 4]), "products of a block"
    assert totals[0] == totals[1] and nbytes(lm) == nbytes(dense)
    kinds = [type(node) for _, node in walk(lm)]
    assert kinds.count(FusedQKV) == 2 and kinds.count(FusedSwiGLU) == (2 if gated else 0)


def test_fused_biases_are_zeros_where_a_projection_has_none():
    dense = tiny_lm("gpt2", np.float64)
    no_key_bias = swap(dense, QKV, lambda qkv: replace(qkv, k=replace(qkv.k, b=None)))
    lm = apply(no_key_bias, FUSED)
    check_close(lm.logits(IDS), no_key_bias.logits(IDS), 1e-12, "logits")
    assert not attention_of(lm).qkv.all.b[16:32].any(), "bias of the keys"


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, child", [(QKV, "v"), (SwiGLU, "up")])
def test_fuse_projections_of_what_is_no_plain_matrix_is_refused(kind, child):
    thin = low_rank(tiny_lm(), share=0.5).model.stack.blocks[0].attn.out
    lm = swap(tiny_lm(), kind, lambda part: replace(part, **{child: thin}))
    with pytest.raises(MinitxError, match="fuse_projections needs a part of type Linear"):
        apply(lm, FUSED)
