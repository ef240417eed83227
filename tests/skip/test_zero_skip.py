"""zero_skip: which rows are read, what that computes, and what it saves on stories-relu."""

from functools import cache

import literal_zero_skip as literal
import numpy as np
import pytest
from same import assert_same
from tiny import WIDE, check_close, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.layer_events import layer_events
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.skip.zero_skip import KINDS, DensePrompts, ZeroSkippingLinear
from minitx.technique import apply, blocks_of, find

RNG = np.random.default_rng(8)
IDS = RNG.integers(0, 258, 40)


@cache
def loaded():
    return minitx.load("stories-relu")


def run(part, h):
    """The product, multiply-adds and bytes of weights."""
    with counting(part) as counts:
        y = part(h)
    work = counts.total()
    return y, work.multiply_adds, work.weight_bytes, dict(counts.events)


def test_worked_example_by_hand():
    """h = 2 0 0 3 reads rows 0 and 3 of four: 2 (1, 2) + 3 (7, 8) + (10, 20) = (33, 48). Work: 4
    comparisons and 2 * 2 multiply-adds, of 8 dense."""
    w = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]])
    b = np.array([10.0, 20])
    y, work, read, events = run(ZeroSkippingLinear(w, b, 0.0), np.array([[2.0, 0, 0, 3]]))
    assert y.tolist() == [[33, 48]]
    assert (work, read) == (4 + 4, 2 * 2 * 8)
    assert events == {"rows of W_down": 4, "rows of W_down read": 2}
    assert literal.down([2.0, 0, 0, 3], w.tolist(), b.tolist()) == ([33, 48], 2)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 1.0])
def test_equals_the_literal_version(sparsity):
    h = RNG.standard_normal((3, 5, 30)) * (RNG.random((3, 5, 30)) >= sparsity)
    w, b = RNG.standard_normal((30, 7)), RNG.standard_normal(7)
    found, work, _, events = run(ZeroSkippingLinear(w, b, 0.0), h)
    rows = [literal.down(row.tolist(), w.tolist(), b.tolist()) for row in h.reshape(-1, 30)]
    expected = np.reshape([y for y, _ in rows], (3, 5, 7))
    assert_same(found, expected, "W_down's output", atol=1e-12)
    read = sum(n for _, n in rows)
    assert events["rows of W_down read"] == read, "other rows were read"
    assert work == read * 7 + 15 * 30, "r D + F multiply-adds per token"


@pytest.mark.parametrize("zeros, read", [(5, 10), (6, 4), (10, 0)])
def test_token_with_too_few_zeros_is_dense(zeros, read):
    """min_sparsity=0.6: from 6 zeros of 10 on, only the other rows are read."""
    h = np.ones((1, 10))
    h[0, :zeros] = 0
    w = RNG.standard_normal((10, 3))
    y, work, _, events = run(ZeroSkippingLinear(w, None, 0.6), h)
    assert events["rows of W_down read"] == read and work == 10 + 3 * read
    assert_same(y, h @ w, tolerance=1e-7)


def test_prompt_is_dense_if_asked_and_a_single_token_is_not():
    h, w = np.maximum(RNG.standard_normal((6, 12)), 0), RNG.standard_normal((12, 4))
    part = DensePrompts(w, None, 0.0)
    y, work, _, events = run(part, h)
    assert work == 6 * 12 * 4 and events["rows of W_down read"] == 72
    assert_same(y, h @ w)
    assert run(part, h[:1])[1] == 12 + 4 * np.count_nonzero(h[0])


def test_model_reads_as_many_rows_as_neurons_are_not_zero():
    dense = tiny_lm("gpt2", dtype=np.float64)
    lm = apply(dense, {"zero_skip": {}})
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")
    zeros, x = [], dense.model.embed(IDS, np.arange(40))
    state = dense.model.new_state(remember=False)
    state.take(40)
    for block, layer in zip(dense.model.stack.blocks, state.layers):
        layer.tokens = state.tokens
        after = x + block.attn(x, layer)
        zeros.append((block.ffn.expand(block.ffn.norm(after)) == 0).sum())
        x = after + block.ffn(after, layer)
    with counting(lm) as counts:
        lm.logits(IDS)
    for i, count in enumerate(zeros):
        work = counts.entries[f"model.stack.blocks.{i}.ffn.down"].multiply_adds
        assert work == 40 * 24 + (40 * 24 - count) * 16, f"layer {i}"


def test_large_matrix_is_stored_row_major():
    dense = to_column_major(tiny_lm(model=tiny_model("gpt2", dtype=np.float64, **WIDE)))
    lm = apply(dense, {"zero_skip": {}})
    for block in blocks_of(lm):
        assert block.ffn.down.w.flags.c_contiguous, "rows of W_down are not contiguous"
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")


def test_models_without_relu_are_refused():
    for family, activation in (("llama", "SwiGLU"), ("gpt_neox", "gelu"), ("skipless", "gelu")):
        with pytest.raises(MinitxError, match=f"zero_skip needs FFNs with ReLU.*{activation}"):
            apply(tiny_lm(family), {"zero_skip": {}})


@pytest.mark.parametrize("other", ["quantize", "low_rank", "function_tables"])
def test_other_formats_are_refused_by_name(other):
    options = {"share": 0.5, "weighted": False} if other == "low_rank" else {}
    with pytest.raises(MinitxError, match=f"zero_skip.*{other}"):
        apply(tiny_lm("gpt2"), {"zero_skip": {}, other: options})


def test_zeros_of_stories_relu():
    """Three of four neurons are 0, in the second layer nearly nine of ten."""
    found = layer_events(loaded(), find("zero_skip"), {}, stories=1).events
    read = [found[i]["rows of W_down read"] / found[i]["rows of W_down"] for i in "0123"]
    assert 0.2 < np.mean(read) < 0.3, f"mean share of neurons that are not 0: {np.mean(read):.2f}"
    assert read.index(min(read)) == 1 and min(read) < 0.18


def test_step_without_tokens_has_no_rows():
    w = RNG.standard_normal((6, 3))
    for prompts in ("skip", "dense"):
        found = KINDS[prompts](w, None, 0.0)(np.ones((0, 6)))
        assert found.shape == (0, 3), f"prompts={prompts}"
