"""fold_norms: gains and biases of norms move into the matrices that read them, and nowhere else."""

from dataclasses import replace

import literal_fold_norms as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, tiny_lm

from minitx.errors import MinitxError
from minitx.model import QKV, LayerNorm, Linear, RMSNorm, SwiGLU
from minitx.precompute.fold_norms import fold_into
from minitx.precompute.low_rank import low_rank
from minitx.technique import apply, swap
from minitx.tree import walk

IDS = np.random.default_rng(0).integers(0, 258, 30)


def test_fold_norms_worked_example_by_hand():
    """Gain g = [2, 10], bias b = [1, 3], matrix W = [[1, 2], [3, 4]], its bias c = [5, 6]:

    W* = diag(g) W = [2 * 1, 2 * 2], [10 * 3, 10 * 4]      = [2, 4], [30, 40]
    c* = c + b W   = [5 + 1 * 1 + 3 * 3, 6 + 1 * 2 + 3 * 4] = [15, 20]     (by W, not by W*)
    """
    linear = Linear(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([5.0, 6.0]))
    found = fold_into(linear, np.array([2.0, 10.0]), np.array([1.0, 3.0]))
    assert_same(found.w, [[2, 4], [30, 40]], "W*")
    assert_same(found.b, [15, 20], "c*")


# Literal version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_norms_equal_the_literal_version(family):
    """Every projection of block 1, on random inputs: as before folding, and as folded by loops."""
    dense = tiny_lm(family, np.float64)
    lm = apply(dense, {"fold_norms": True})
    before, after = (model.model.stack.blocks[1] for model in (dense, lm))
    x = np.random.default_rng(1).normal(size=(3, 16))
    pairs = [(before.attn.norm, getattr(before.attn.qkv, n), after.attn.norm,
              getattr(after.attn.qkv, n)) for n in "qkv"]  # fmt: skip
    pairs.append((before.ffn.norm, before.ffn.expand.up, after.ffn.norm, after.ffn.expand.up))
    for norm, linear, weightless, folded in pairs:
        kind = "layer" if type(norm) is LayerNorm else "rms"
        bias = getattr(norm, "bias", np.zeros(16)).tolist()
        c = np.zeros(linear.w.shape[1]) if linear.b is None else linear.b
        arguments = norm.gain.tolist(), bias, linear.w.tolist(), c.tolist()
        w, c = literal.fold(*arguments)
        assert_same(folded.w, w, "W*", atol=1e-12)
        found = folded(weightless(x))
        for row, z in zip(x.tolist(), found):
            expected = literal.norm_then_project(row, *arguments, kind, norm.eps)
            assert_same(z, expected, "output before folding", atol=1e-12)
            expected = literal.folded(row, w, c, kind, norm.eps)
            assert_same(z, expected, "output after folding", atol=1e-12)


def test_folded_bias_goes_through_the_matrix():
    """z = (y g + b) W + c = y (diag(g) W) + (b W + c), number by number, in float32."""
    before = tiny_lm("gpt2").model.stack.blocks[1].attn
    after = apply(tiny_lm("gpt2"), {"fold_norms": True}).model.stack.blocks[1].attn
    g, b, (w, c) = before.norm.gain, before.norm.bias, (before.qkv.k.w, before.qkv.k.b)
    for o in range(w.shape[1]):
        column = [float(g[i]) * float(w[i, o]) for i in range(len(g))]
        bias = sum(float(b[i]) * float(w[i, o]) for i in range(len(b))) + float(c[o])
        assert_same(after.qkv.k.w[:, o], column, tolerance=1e-6)
        assert after.qkv.k.b[o] == pytest.approx(bias, rel=1e-5, abs=1e-6)


# The model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("family", FAMILIES)
def test_fold_norms_keeps_the_logits(family, dtype, tolerance):
    dense = tiny_lm(family, dtype)
    lm = apply(dense, {"fold_norms": True})
    check_close(lm.logits(IDS), dense.logits(IDS), tolerance, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_fold_norms_leaves_only_the_norm_before_a_tied_head(family):
    """Its gain would go into the embedding, which the head shares."""
    dense = tiny_lm(family)
    lm = apply(dense, {"fold_norms": True})
    left = [path for path, node in walk(lm.model) if type(node) in (RMSNorm, LayerNorm)]
    assert left == (["norm"] if dense.model.config.tied else [])
    if dense.model.config.tied:
        assert lm.model.head is dense.model.head, "a tied head is changed"


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, child", [(QKV, "v"), (SwiGLU, "up")])
def test_fold_norms_reader_that_is_no_plain_matrix_is_refused(kind, child):
    """It must not be left without its gain."""
    thin = low_rank(tiny_lm(), share=0.5).model.stack.blocks[0].attn.out
    lm = swap(tiny_lm(), kind, lambda part: replace(part, **{child: thin}))
    with pytest.raises(MinitxError, match="fold_norms needs a part of type Linear"):
        apply(lm, {"fold_norms": True})
