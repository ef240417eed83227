"""shrink (MatShrink): the same logits without the identity blocks, and the predicted savings."""

from dataclasses import replace

import literal_shrink as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, KINDS, check_close, error, tiny_lm

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import Attention, Linear
from minitx.precompute.shrink import (
    ShrunkKeys,
    ShrunkOutput,
    column_order,
    shrink_keys,
    shrink_output,
    unrotated_columns,
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


def test_shrink_worked_example_by_hand():
    """One head of width 1, hidden state of width 3. W_v = [1, 2, 3]^T, W_o = [3, 6, -2].

    The longest column of W_o is 6 (index 1): block = [6], p = [1], rest = [0, 2].
    W_v* = W_v block = [6, 12, 18]^T;    W_o* = block^-1 W_o = [0.5, 1, -1/3]
    x = [1, 0, 0]:  u = 6;   out[1] = u = 6;   out[0, 2] = u [0.5, -1/3] = [3, -2]
    x W_v W_o = 1 * [3, 6, -2]: the same.
    """
    attn = attention_of(tiny_lm("gpt2", dtype=np.float64))
    w_v, w_o = np.array([[1.0], [2.0], [3.0]]), np.array([[3.0, 6.0, -2.0]])
    qkv = replace(attn.qkv, v=Linear(w_v))
    new = shrink_output(replace(attn, qkv=qkv, out=Linear(w_o), heads=1, kv_heads=1), "pivoted", 0)
    assert_same(new.qkv.v.w, [[6], [12], [18]], "W_v*", tolerance=1e-7)
    assert_same(new.out.rest, [[[0.5, -1 / 3]]], "W_o*[rest]", tolerance=1e-7)
    u = new.qkv.v(np.array([[1.0, 0, 0]]))
    assert_same(new.out(u), [[3, 6, -2]], "output", tolerance=1e-7)


# Literal version ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shrunk_values_and_output_equal_the_literal_version(kind):
    """W_v,j W_o,j of each first head, from what is stored of them, row by row."""
    attn = attention_of(tiny_lm(kind, dtype=np.float64))
    new = shrink_output(attn, "pivoted", 0)
    K, G, d = attn.kv_heads, attn.heads // attn.kv_heads, 8
    D = attn.out.w.shape[1]
    for j in range(K):
        a = attn.qkv.v.w[:, j * d : (j + 1) * d]
        b = attn.out.w[j * G * d : (j * G + 1) * d]
        a_new, rest, p = literal.pair(a.tolist(), b.tolist())
        assert_same(new.qkv.v.w[:, j * d : (j + 1) * d], a_new, atol=1e-11)
        assert_same(new.out.rest[j], rest, atol=1e-11)
        assert np.argsort(new.out.gather[j]).tolist() == p
        for x in np.eye(D)[:3]:
            applied = literal.apply(a_new, rest, p, x.tolist())
            assert_same(applied, x @ a @ b, atol=1e-11)


def test_shrink_pivots_equal_the_literal_version():
    rng = np.random.default_rng(1)
    for r, n in ((1, 1), (3, 3), (4, 9), (6, 24)):
        matrix = rng.standard_normal((r, n))
        assert column_order(matrix, "pivoted").tolist() == literal.pivots(matrix.tolist())
        assert column_order(matrix, "first").tolist() == list(range(n))
    low = np.outer([1.0, 2, 3], [1.0, 1, 0, 1])  # rank 1: still an order of all columns
    assert sorted(column_order(low, "pivoted")) == [0, 1, 2, 3]


def test_shrink_pivoting_improves_the_condition_number_and_pivoting_the_transpose_does_not():
    """Over random draws. The paper's Algorithm 1 pivots the transpose, which permutes the rows of
    the first columns but chooses no other columns: the condition number stays the same."""
    rng = np.random.default_rng(2)
    first, pivoted = [], []
    for _ in range(100):
        matrix = rng.standard_normal((16, 64))
        first.append(np.linalg.cond(matrix[:, :16]))
        pivoted.append(np.linalg.cond(matrix[:, column_order(matrix, "pivoted")[:16]]))
        rows = column_order(matrix[:, :16].T, "pivoted")  # an order of the rows of the block
        assert np.isclose(np.linalg.cond(matrix[rows, :16]), first[-1])
    assert np.median(pivoted) < 10 < np.median(first) and max(pivoted) < 15 < max(first) / 10


# The model ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(
    "options", [{}, {"pairs": "qk"}, {"pairs": "vo"}, {"columns": "first"}], ids=str
)
def test_shrink_with_groups_biases_and_partial_rope_keeps_the_logits(dtype, tolerance, options):
    if dtype == "float32" and "columns" in options:
        tolerance = 1e-3  # that is what pivoting is for
    lm = made(GROUPED, np.dtype(dtype))
    new = apply(lm, {"shrink": options})
    check_close(new.logits(IDS % 19), lm.logits(IDS % 19), tolerance, "logits")
    assert bool(parts(new, ShrunkKeys)) == (options.get("pairs") != "vo")
    assert bool(parts(new, ShrunkOutput)) == (options.get("pairs") != "qk")


def test_shrink_padded_batch_and_single_tokens():
    lm = made(GROUPED)
    new = apply(lm, {"shrink": {}})
    ids = np.stack([IDS[:12], IDS[12:24]]) % 19
    start = np.array([0, 5])
    found, expected = (x.model(ids, x.model.new_state(start)) for x in (new, lm))
    assert_same(found[1, 5:], expected[1, 5:], atol=1e-11)
    assert_same(found[0], expected[0], atol=1e-11)
    state = new.model.new_state()
    one = [new.model(ids[0, t : t + 1], state)[0] for t in range(12)]
    assert_same(one, expected[0], atol=1e-11)


def test_shrunk_parts_give_output_columns():
    attn = attention_of(made(GROUPED))
    x = np.random.default_rng(3).standard_normal((2, 5, 24))
    keys, out = shrink_keys(attn, "pivoted", 0).qkv.k, shrink_output(attn, "pivoted", 0).out
    assert_same(keys.outputs(x, slice(3, None)), keys(x)[..., 3:])
    assert_same(out.outputs(x, slice(3, None)), out(x)[..., 3:])


def test_shrink_keeps_scores_though_queries_and_keys_change():
    attn = attention_of(made(GROUPED))
    new = shrink_keys(attn, "pivoted", 0)
    x = np.random.default_rng(3).standard_normal((5, 24))
    (q, k, _), (q2, k2, _) = attn.qkv(x), new.qkv(x)
    assert abs(q2 - q).max() > 0.1 and abs(k2 - k).max() > 0.1
    for h in range(4):  # columns 4 and 5 of each head of 6 are not rotated; the others stay
        j = h // 2
        for a, b, same in ((4, 6, False), (0, 4, True)):
            qs, ks = slice(6 * h + a, 6 * h + b), slice(6 * j + a, 6 * j + b)
            assert_same(q2[:, qs] @ k2[:, ks].T, q[:, qs] @ k[:, ks].T, atol=1e-10)
            assert np.array_equal(q2[:, qs], q[:, qs]) == same
    for j in range(2):  # the identity: these keys are numbers of x, plus the bias
        order = new.qkv.k.order[j, :2]
        rest = x[:, new.qkv.k.order[j, 2:]] @ new.qkv.k.rest[j]
        found = k2[:, 6 * j + 4 : 6 * j + 6] - new.qkv.k.b[6 * j + 4 : 6 * j + 6]
        assert_same(found - rest, x[:, order], atol=1e-12)


def test_shrink_of_rotated_columns_would_change_the_logits():
    """The negative control: a change of basis does not commute with a rotation."""
    lm = made(replace(GROUPED, rope_width=6))
    assert unrotated_columns(attention_of(lm)) == 0
    T = np.random.default_rng(4).standard_normal((6, 6))

    def change_basis(attn):
        q = np.concatenate([w @ np.linalg.inv(T).T for w in np.split(attn.qkv.q.w, 4, 1)], 1)
        k = np.concatenate([w @ T for w in np.split(attn.qkv.k.w, 2, 1)], 1)
        qkv = replace(attn.qkv, q=Linear(q), k=Linear(k))
        return replace(attn, qkv=qkv)

    bare = swap(
        lm,
        Attention,
        lambda a: replace(a, qkv=replace(a.qkv, q=Linear(a.qkv.q.w), k=Linear(a.qkv.k.w))),
    )
    assert error(swap(bare, Attention, change_basis).logits(IDS % 19), bare.logits(IDS % 19)) > 1e-2


# Savings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "grouped"])
def test_shrink_saves_the_predicted_weights_and_multiply_adds(kind):
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


def test_shrink_condition_numbers_are_in_the_tree():
    conditions = {}
    for columns in ("pivoted", "first"):
        new = apply(made(GROUPED), {"shrink": {"columns": columns}})
        conditions[columns] = [
            node.condition for k in (ShrunkKeys, ShrunkOutput) for node in parts(new, k)
        ]
        for condition in conditions[columns]:
            assert f"condition={condition:g}" in repr(new.model)
    assert max(conditions["pivoted"]) < max(conditions["first"])


# Refusals ----------------------------------------------------------------------------------------


def with_out(lm, change):
    return swap(lm, Attention, lambda a: replace(a, out=Linear(change(a.out.w.copy()))))


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({"pairs": "none"}, None, "pairs must be one of possible, vo, qk"),
        ({"pairs": "qk"}, None, "rotates all of them; use pairs=vo"),
        (
            {},
            lambda w: w * 0,
            "shrink cannot invert a block of W_o of block 0: its condition number",
        ),
        (
            {"columns": "first"},
            lambda w: np.roll(np.tril(np.ones_like(w)), 6),
            "or use columns=pivoted",
        ),
    ],
)
def test_shrink_bad_options_or_singular_blocks_are_refused(options, change, message):
    lm = made(replace(GROUPED, rope_width=6))
    lm = lm if change is None else with_out(lm, change)
    with pytest.raises(MinitxError, match="shrink") as caught:
        apply(lm, {"shrink": options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_shrink_heads_wider_than_the_hidden_state_are_refused():
    lm = made(replace(GROUPED, width=8, head_width=12, rope_width=2))
    with pytest.raises(
        MinitxError, match="no wider than the hidden state; they are 12 wide and it is 8"
    ):
        apply(lm, {"shrink": {"pairs": "vo"}})
    with pytest.raises(MinitxError, match="10 of their columns are not rotated and it is 8 wide"):
        apply(lm, {"shrink": {"pairs": "qk"}})


@pytest.mark.parametrize("other", ["fuse_projections", "remove_weights"])
def test_shrink_beside_techniques_of_the_same_matrices_is_refused(other):
    with pytest.raises(MinitxError) as caught:
        apply(tiny_lm("skipless"), {"shrink": {}, other: {}})
    assert "shrink" in str(caught.value) and other in str(caught.value)
