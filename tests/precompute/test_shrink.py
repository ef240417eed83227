"""MatShrink: pairs against a literal twin, the identity that is not kept, savings, refusals."""

from dataclasses import replace

import literal_shrink as literal
import numpy as np
import pytest
from tiny import FAMILIES, KINDS, error, tiny_lm

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Attention, Linear
from minitx.precompute.shrink import (
    ShrunkKeys,
    ShrunkOutput,
    free_columns,
    order_of,
    shrink_keys,
    shrink_output,
)
from minitx.technique import apply, swap
from minitx.tree import map_weights, walk, weights

IDS = np.random.default_rng(0).integers(0, 258, 30)
SIZES = dict(vocab_size=19, width=24, layers=2, heads=4, head_width=6, hidden=20, context=40)
GROUPED = replace(
    FAMILIES["llama"], **SIZES, kv_heads=2, rope_width=4, qkv_bias=True, out_bias=True
)


def made(config, dtype=np.float64, seed=3):
    rng = np.random.default_rng(seed)
    model = random_model(replace(config, bos=None, eos=()), seed, dtype)
    return LM(map_weights(model, lambda w: (2 * w + rng.normal(0, 0.2, w.shape)).astype(dtype)))


def attention_of(lm) -> Attention:
    return lm.model.stack.blocks[0].attn


def parts(lm, kind):
    return [node for _, node in walk(lm) if type(node) is kind]


# The pair ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_v_and_o_are_the_literal_pair(kind):
    """W_v,j W_o,j of each first head, from what is kept of them, row by row."""
    attn = attention_of(tiny_lm(kind, dtype=np.float64))
    new = shrink_output(attn, "pivoted", 0)
    K, G, d = attn.kv_heads, attn.heads // attn.kv_heads, 8
    D = attn.out.w.shape[1]
    for j in range(K):
        a = attn.qkv.v.w[:, j * d : (j + 1) * d]
        b = attn.out.w[j * G * d : (j * G + 1) * d]
        a_new, rest, p = literal.pair(a.tolist(), b.tolist())
        np.testing.assert_allclose(new.qkv.v.w[:, j * d : (j + 1) * d], a_new, atol=1e-11)
        np.testing.assert_allclose(new.out.rest[j], rest, atol=1e-11)
        assert np.argsort(new.out.where[j]).tolist() == p
        for x in np.eye(D)[:3]:
            applied = literal.apply(a_new, rest, p, x.tolist())
            np.testing.assert_allclose(applied, x @ a @ b, atol=1e-11)


def test_greedy_pivots_are_the_literal_ones():
    rng = np.random.default_rng(1)
    for r, n in ((1, 1), (3, 3), (4, 9), (6, 24)):
        matrix = rng.standard_normal((r, n))
        assert order_of(matrix, "pivoted").tolist() == literal.pivots(matrix.tolist())
        assert order_of(matrix, "first").tolist() == list(range(n))
    low = np.outer([1.0, 2, 3], [1.0, 1, 0, 1])  # rank 1: still an order of all columns
    assert sorted(order_of(low, "pivoted")) == [0, 1, 2, 3]


def test_pivoting_against_the_first_block_and_the_transposed_routine():
    """Over random draws; the paper's Algorithm 1 pivots the transpose, which only reorders the
    leading block: its condition number is that of the first block."""
    rng = np.random.default_rng(2)
    first, pivoted = [], []
    for _ in range(100):
        matrix = rng.standard_normal((16, 64))
        first.append(np.linalg.cond(matrix[:, :16]))
        pivoted.append(np.linalg.cond(matrix[:, order_of(matrix, "pivoted")[:16]]))
        rows = order_of(matrix[:, :16].T, "pivoted")  # an order of the rows of the block
        assert np.isclose(np.linalg.cond(matrix[rows, :16]), first[-1])
    assert np.median(pivoted) < 10 < np.median(first) and max(pivoted) < 15 < max(first) / 10


# The model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "options", [{}, {"vo": False}, {"qk": False}, {"choice": "first"}], ids=str
)
def test_exact_with_groups_biases_and_partial_rotation(dtype, tolerance, options):
    if dtype == "float32" and "choice" in options:
        tolerance = 1e-3  # that is what pivoting is for
    lm = made(GROUPED, np.dtype(dtype))
    new = apply(lm, {"shrink": options})
    assert error(new.logits(IDS % 19), lm.logits(IDS % 19)) <= tolerance
    assert bool(parts(new, ShrunkKeys)) == options.get("qk", True)
    assert bool(parts(new, ShrunkOutput)) == options.get("vo", True)


def test_a_batch_padded_on_the_left_and_single_tokens():
    lm = made(GROUPED)
    new = apply(lm, {"shrink": {}})
    ids = np.stack([IDS[:12], IDS[12:24]]) % 19
    start = np.array([0, 5])
    found, expected = (x.model(ids, x.model.new_state(start)) for x in (new, lm))
    np.testing.assert_allclose(found[1, 5:], expected[1, 5:], atol=1e-11)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-11)
    state = new.model.new_state()
    one = [new.model(ids[0, t : t + 1], state)[0] for t in range(12)]
    np.testing.assert_allclose(one, expected[0], atol=1e-11)


def test_the_outputs_of_a_part_can_be_asked_for_by_column():
    attn = attention_of(made(GROUPED))
    x = np.random.default_rng(3).standard_normal((2, 5, 24))
    keys, out = shrink_keys(attn, "pivoted", 0).qkv.k, shrink_output(attn, "pivoted", 0).out
    np.testing.assert_array_equal(keys.outputs(x, slice(3, None)), keys(x)[..., 3:])
    np.testing.assert_array_equal(out.outputs(x, slice(3, None)), out(x)[..., 3:])


def test_the_scores_are_the_same_though_queries_and_keys_are_not():
    attn = attention_of(made(GROUPED))
    new = shrink_keys(attn, "pivoted", 0)
    x = np.random.default_rng(3).standard_normal((5, 24))
    (q, k, _), (q2, k2, _) = attn.qkv(x), new.qkv(x)
    assert abs(q2 - q).max() > 0.1 and abs(k2 - k).max() > 0.1
    for h in range(4):  # columns 4 and 5 of each head of 6 are not rotated; the others stay
        j = h // 2
        for a, b, same in ((4, 6, False), (0, 4, True)):
            qs, ks = slice(6 * h + a, 6 * h + b), slice(6 * j + a, 6 * j + b)
            np.testing.assert_allclose(q2[:, qs] @ k2[:, ks].T, q[:, qs] @ k[:, ks].T, atol=1e-10)
            assert np.array_equal(q2[:, qs], q[:, qs]) == same
    for j in range(2):  # the identity: those keys are numbers of x, and their bias
        order = new.qkv.k.order[j, :2]
        rest = x[:, new.qkv.k.order[j, 2:]] @ new.qkv.k.rest[j]
        found = k2[:, 6 * j + 4 : 6 * j + 6] - new.qkv.k.b[6 * j + 4 : 6 * j + 6]
        np.testing.assert_allclose(found - rest, x[:, order], atol=1e-12)


def test_a_change_of_basis_does_not_commute_with_a_rotation():
    """The trap: the same done to columns that are rotated is another function."""
    lm = made(replace(GROUPED, rope_width=6))
    assert free_columns(attention_of(lm)) == 0
    T = np.random.default_rng(4).standard_normal((6, 6))

    def turn(attn):
        q = np.concatenate([w @ np.linalg.inv(T).T for w in np.split(attn.qkv.q.w, 4, 1)], 1)
        k = np.concatenate([w @ T for w in np.split(attn.qkv.k.w, 2, 1)], 1)
        qkv = replace(attn.qkv, q=Linear(q), k=Linear(k))
        return replace(attn, qkv=qkv)

    bare = swap(
        lm,
        Attention,
        lambda a: replace(a, qkv=replace(a.qkv, q=Linear(a.qkv.q.w), k=Linear(a.qkv.k.w))),
    )
    assert error(swap(bare, Attention, turn).logits(IDS % 19), bare.logits(IDS % 19)) > 1e-2


# What is saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "grouped"])
def test_saved_is_counted_and_predicted(kind):
    lm = made(GROUPED) if kind == "grouped" else tiny_lm(kind, dtype=np.float64)
    new, c = apply(lm, {"shrink": {}}), lm.model.config
    vo, qk = c.kv_heads * c.head_width**2, c.kv_heads * (c.head_width - c.rope_width) ** 2
    size = sum(w.size for w in weights(lm.model).values())
    assert size - sum(w.size for w in weights(new.model).values()) == c.layers * (vo + qk)
    work = []
    for model in (lm, new):
        with counting(model) as counts:
            model.logits(IDS % c.vocab_size)
        work.append(counts.total())
    assert work[0].multiply_adds - work[1].multiply_adds == len(IDS) * c.layers * (vo + qk)
    assert work[0].weight_bytes - work[1].weight_bytes == 8 * c.layers * (vo + qk)


def test_the_tree_shows_the_condition_numbers():
    conds = {}
    for choice in ("pivoted", "first"):
        new = apply(made(GROUPED), {"shrink": {"choice": choice}})
        conds[choice] = [node.cond for k in (ShrunkKeys, ShrunkOutput) for node in parts(new, k)]
        for cond in conds[choice]:
            assert f"cond={cond:g}" in repr(new.model)
    assert max(conds["pivoted"]) < max(conds["first"])


# Refusals ----------------------------------------------------------------------------------------


def with_out(lm, change):
    return swap(lm, Attention, lambda a: replace(a, out=Linear(change(a.out.w.copy()))))


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({"vo": False, "qk": False}, None, "nothing to do with vo=False and qk=False"),
        ({"vo": False}, None, "rotates all of them; use vo=True"),
        (
            {},
            lambda w: w * 0,
            "shrink cannot invert a block of W_o of block 0: its condition number",
        ),
        (
            {"choice": "first"},
            lambda w: np.roll(np.tril(np.ones_like(w)), 6),
            "or use choice=pivot",
        ),
    ],
)
def test_refusals(options, change, message):
    lm = made(replace(GROUPED, rope_width=6))
    lm = lm if change is None else with_out(lm, change)
    with pytest.raises(MinitxError, match="shrink") as caught:
        apply(lm, {"shrink": options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_heads_wider_than_the_stream_are_refused():
    lm = made(replace(GROUPED, width=8, head_width=12, rope_width=2))
    with pytest.raises(MinitxError, match="no wider than the stream; they are 12 and 8 wide"):
        apply(lm, {"shrink": {"qk": False}})
    with pytest.raises(MinitxError, match="10 columns read 8"):
        apply(lm, {"shrink": {"vo": False}})


@pytest.mark.parametrize("other", ["fuse_projections", "remove_weights"])
def test_two_that_want_the_same_matrices(other):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm("skipless"), {"shrink": {}, other: {}})
    assert "shrink" in str(caught.value) and other in str(caught.value)
