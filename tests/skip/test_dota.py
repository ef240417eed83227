"""dota: the worked example, a literal twin, bounds that must hold, and all ways tokens may come."""

from dataclasses import replace

import literal_dota as literal
import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx import fast, ops
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoRope, Rope
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.dota import DetectingAttention, Guess, Strongest, guessed, loads
from minitx.skip.dota.detector import (
    Detect,
    Detector,
    coded,
    narrow_rope,
    projection,
    random_detectors,
)
from minitx.state import Layer, Tokens
from minitx.technique import apply
from minitx.tree import Part, part, walk

IDS = np.random.default_rng(5).integers(0, 258, 40)


@part
class Bare(Part):
    """A norm that leaves x as it is."""

    def __call__(self, x):
        return x


def detecting(detector, attn, kappa, bits, width):
    detect = Detect.of(detector, attn, width, bits)
    attn = replace(attn, attend=SparseAttention(Strongest(kappa, 4), attn.attend.scale))
    return DetectingAttention(attn.norm, detect, attn, kappa, "by hand")


def note_kept(monkeypatch):
    """What ``Strongest`` keeps, call by call."""
    found, call = [], Strongest.__call__

    def told(self, q, k, known, visible):
        found.append(call(self, q, k, known, visible))
        return found[-1]

    monkeypatch.setattr(Strongest, "__call__", told)
    return found


# The worked example ------------------------------------------------------------------------------

X = np.array([[1, 0, 2, 0], [0, 1, 1, -1], [2, 1, 0, 1], [1, -1, 1, 1], [0, 2, 1, 1]], float)
W_Q = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], float)
W_K = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], float)
W_V = np.array([[1, 0], [0, 1], [0, 0], [1, 1]], float)
P = 1.5**0.5 * np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
DETECTOR = Detector(P, np.eye(2) * 2 / 3, np.eye(2))
ATTN = Attention(
    Bare(),
    QKV(Linear(W_Q), Linear(W_K), Linear(W_V)),
    NoRope(),
    Cache(),
    Attend(2**-0.5),
    Linear(np.eye(2)),
    1,
    1,
)
GUESSED = {
    None: [[5], [3, 5], [5, -1, 10], [2, -2, 6, 4], [7, 5, 6, 2, 10]],
    4: {2: [5.1429, -1.7143, 9.7347]},
    2: [[4], [4, 4], [0, 0, 9], [0, 0, 6, 4], [6, 6, 0, 0, 9]],
}
SELECTED = [{0}, {0, 1}, {0, 2}, {2, 3}, {0, 4}]
OUTPUT = [[1, 0], [0.6089, 0], [2.6089, 1.6089], [2.8044, 1.6089], [1, 2.6789]]
DENSE = [[1, 0], [0.6089, 0], [2.5676, 1.5905], [2.7126, 1.5317], [1.0523, 2.5736]]


def scores_of_the_example(bits):
    detect = Detect.of(DETECTOR, ATTN, 2, bits)
    tokens = Tokens(slice(0, 5))
    queries, keys = detect(X, tokens)
    y, y_scale = coded(X @ P, bits)
    _, q_scale = detect.rows((y, y_scale), detect.w_q, detect.s_q, tokens)
    return guessed(queries, *keys)[0, 0] * q_scale[0][:, None]


@pytest.mark.parametrize("bits", GUESSED)
def test_guesses_of_the_example(bits):
    np.testing.assert_allclose(
        X @ P / 1.5**0.5, [[1, 2], [-1, 2], [3, 1], [2, 0], [1, 3]], atol=1e-12
    )
    found = scores_of_the_example(bits)
    twin = literal.guesses(*(a.tolist() for a in (X, P, DETECTOR.w_q, DETECTOR.w_k)), bits)
    expected = GUESSED[bits]
    for i, row in expected.items() if isinstance(expected, dict) else enumerate(expected):
        np.testing.assert_allclose(found[i, : i + 1], row, atol=5e-5)
    for i, row in enumerate(twin):
        np.testing.assert_allclose(found[i, : i + 1], row, atol=1e-12)


def test_codes_of_the_example():
    _, (codes, scales) = Detect.of(DETECTOR, ATTN, 2, 4)(X, Tokens(slice(0, 5)))
    assert codes[0].tolist() == [[4, 7], [-4, 7], [7, 2], [7, 0], [2, 7]]
    np.testing.assert_allclose(scales[0], [0.34993, 0.34993, 0.52489, 0.34993, 0.52489], atol=5e-6)


def test_the_squared_error_of_the_example():
    from minitx.training.detector import squares

    q, k, a, b = X @ W_Q, X @ W_K, X @ P @ DETECTOR.w_q, X @ P
    lower = [[3], [1, -1], [6, 2, 8], [2, -2, 6, 4], [7, 5, 6, 2, 10]]
    for i, row in enumerate(lower):
        np.testing.assert_allclose((q @ k.T)[i, : i + 1], row)
    left, right = np.concatenate([a, -q], 1), np.concatenate([b, k], 1)
    found = squares(left[None, None], right[None, None], np.ones((1, 5), bool))
    assert found / 15 == pytest.approx(3.8667, abs=5e-5)


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("sizes", [(5,), (1,) * 5, (2, 3)])
def test_selections_and_outputs_of_the_example(monkeypatch, bits, sizes):
    kept = note_kept(monkeypatch)
    part, layer, found = detecting(DETECTOR, ATTN, 2, bits, 2), Layer(5), []
    for size in sizes:
        x = X[layer.tokens.end : layer.tokens.end + size]
        found.append(part(x, layer.take(size)))
    np.testing.assert_allclose(np.concatenate(found), OUTPUT, atol=5e-5)
    rows = [set(np.flatnonzero(row)) for call in kept for row in call[0, 0]]
    assert rows == SELECTED[-len(rows) :]  # the first two see no more than kappa keys
    lists = (a.tolist() for a in (X, P, DETECTOR.w_q, DETECTOR.w_k, X @ W_Q, X @ W_K, X @ W_V))
    outputs, chosen = literal.one_head(*lists, 2**-0.5, 2, bits)
    np.testing.assert_allclose(np.concatenate(found), outputs, atol=1e-12)
    assert [set(row) for row in chosen] == SELECTED


def test_errors_of_the_example_and_their_bound():
    found = detecting(DETECTOR, ATTN, 2, None, 2)(X, Layer(5).take(5))
    dense = ATTN(X, Layer(5).take(5))
    np.testing.assert_allclose(dense, DENSE, atol=5e-5)
    error = np.linalg.norm(found - dense, axis=1)
    s = (X @ W_Q @ (X @ W_K).T) * 2**-0.5
    weight = np.exp(s - s.max(1, keepdims=True)) * np.tri(5)
    weight /= weight.sum(1, keepdims=True)
    dropped = [1 - sum(weight[i, j] for j in SELECTED[i]) for i in range(5)]
    bound = [2 * d * max(np.linalg.norm((X @ W_V)[: i + 1], axis=1)) for i, d in enumerate(dropped)]
    np.testing.assert_allclose(dropped[2:], [0.0114, 0.0479, 0.0757], atol=5e-5)
    np.testing.assert_allclose(error[2:], [0.0452, 0.1199, 0.1176], atol=5e-5)
    np.testing.assert_allclose(bound[2:], [0.0824, 0.3457, 0.5460], atol=5e-4)
    assert (error <= np.array(bound) + 1e-12).all()


# The detector ------------------------------------------------------------------------------------


def test_the_projection_is_sparse_and_keeps_lengths():
    p = projection(1000, 200, np.random.default_rng(0))
    values, counts = np.unique(p, return_counts=True)
    np.testing.assert_allclose(values, [-((3 / 200) ** 0.5), 0, (3 / 200) ** 0.5], rtol=1e-6)
    np.testing.assert_allclose(counts / p.size, [1 / 6, 2 / 3, 1 / 6], atol=0.004)
    assert p.var() == pytest.approx(1 / 200, rel=0.01) and abs(p.mean()) < 5e-4
    assert p.dtype == np.float32
    x = np.random.default_rng(1).standard_normal((50, 1000))
    np.testing.assert_allclose(((x @ p) ** 2).sum(1) / (x**2).sum(1), 1, atol=0.35)


@pytest.mark.parametrize("kappa", [1, 3, 7])
def test_a_perfect_detector_chooses_as_the_scores_themselves(monkeypatch, kappa):
    """k = d, P = I, and the model's own matrices, in floats: S~ = S."""
    rng = np.random.default_rng(3)
    x, w_q, w_k, w_v = rng.standard_normal((20, 6)), *rng.standard_normal((3, 6, 6))
    attn = replace(ATTN, qkv=QKV(Linear(w_q), Linear(w_k), Linear(w_v)), out=Bare())
    kept = note_kept(monkeypatch)
    detecting(Detector(np.eye(6), w_q, w_k), attn, kappa, None, 6)(x, Layer(20).take(len(x)))
    (kept,) = kept
    scores = (x @ w_q) @ (x @ w_k).T
    for i in range(20):
        best = np.argsort(-scores[i, : i + 1])[:kappa]
        assert set(np.flatnonzero(kept[0, 0, i])) == set(best)


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_it_is_the_literal_twin(monkeypatch, bits, heads, kv_heads):
    """Heads that share keys have one K~ and a W~q each; at 2 bits most guesses are equal."""
    monkeypatch.setattr(fast, "ROWS", 8)  # so that rows come in several blocks
    rng = np.random.default_rng(4)
    D, k, d, T, kappa = 12, 2, 4, 21, 5
    x = rng.standard_normal((T, D))
    w_q, w_k, w_v = (rng.standard_normal((D, n * d)) for n in (heads, kv_heads, kv_heads))
    qkv = QKV(Linear(w_q), Linear(w_k), Linear(w_v))
    attn = Attention(Bare(), qkv, NoRope(), Cache(), Attend(0.5), Bare(), heads, kv_heads)
    p = projection(D, k, rng).astype(float)
    low_q, low_k = (rng.standard_normal((k, n * k)) for n in (heads, kv_heads))
    with counting(part := detecting(Detector(p, low_q, low_k), attn, kappa, bits, d)) as counts:
        found = part(x, Layer(T).take(T))
    all_chosen = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        matrices = low_q[:, h * k : (h + 1) * k], low_k[:, g * k : (g + 1) * k]
        rows = x @ w_q[:, h * d : (h + 1) * d], *(x @ w[:, g * d : (g + 1) * d] for w in (w_k, w_v))
        lists = (a.tolist() for a in (x, p, *matrices, *rows))
        expected, chosen = literal.one_head(*lists, 0.5, kappa, bits)
        np.testing.assert_allclose(found[:, h * d : (h + 1) * d], expected, atol=1e-12)
        all_chosen.append(chosen)
    assert [len(row) for row in all_chosen[0]] == [min(kappa, i + 1) for i in range(T)]
    assert counts.events["keys kept"] == literal.row_by_row(sum(all_chosen, []))
    together = sum(
        literal.out_of_order(rows[a : min(a + 4, b)])
        for rows in all_chosen
        for first in range(0, T, 8)
        for b in [min(first + 8, T)]
        for a in range(first, b, 4)
    )
    assert counts.events["key loads, 4 rows together"] == together
    assert together < counts.events["key loads, row by row"] == counts.events["keys kept"]


# Rotation ----------------------------------------------------------------------------------------

# (rotated columns, head width, k): the pairs of the model's that turn. Of k columns, k * rotated /
# width are to turn, which is half as many pairs: rounded (halves to even), at least one, and the
# slowest ones.
PAIRS = {
    (8, 8, 8): [0, 1, 2, 3],  # all of them
    (8, 8, 4): [2, 3],
    (8, 8, 2): [3],
    (4, 8, 8): [0, 1],  # partial: half of the model's columns turn, so half of the k
    (4, 8, 4): [1],
    (4, 8, 2): [1],  # 2 * 4 / 8 / 2 = 0.5 rounds to 0: one pair all the same
    (2, 16, 4): [0],  # 4 * 2 / 16 / 2 = 0.25
    (6, 8, 4): [1, 2],  # 4 * 6 / 8 / 2 = 1.5 rounds to 2
    (12, 16, 6): [4, 5],  # 6 * 12 / 16 / 2 = 2.25
}


@pytest.mark.parametrize("sizes", PAIRS)
def test_narrow_rope_rotates_the_slowest_pairs_of_the_model(sizes):
    """Pair i of the model turns by position * 100^(-2 i / rotated columns)."""
    rotated, width, k = sizes
    rope = narrow_rope(Rope(*ops.rope_tables(rotated, 7, 100.0, np.float64)), k, width)
    pairs = PAIRS[sizes]
    assert rope.cos.shape == rope.sin.shape == (7, 2 * len(pairs)), (
        f"expected {2 * len(pairs)} of {k} columns to turn, got tables of shape {rope.cos.shape}"
    )
    angle = np.array([[at * 100.0 ** (-2 * i / rotated) for i in pairs] for at in range(7)])
    message = f"expected the angles of the model's pairs {pairs}"
    np.testing.assert_allclose(rope.cos, np.cos([*angle.T, *angle.T]).T, err_msg=message)
    np.testing.assert_allclose(rope.sin, np.sin([*-angle.T, *angle.T]).T, err_msg=message)


def test_narrow_rope_of_a_partial_rotation_turns_the_first_columns_by_hand():
    """4 of 8 columns turn in the model, base 100: pairs turn by 1 and by 1/10 a position. Of k = 4
    columns two turn, as the slower pair: columns 0 and 1 by 3/10 at position 3; 2 and 3 do not."""
    rope = narrow_rope(Rope(*ops.rope_tables(4, 7, 100.0, np.float64)), 4, 8)
    where = Tokens(slice(3, 4))
    x = np.array([[[2.0, 5.0, 7.0, 11.0]]])  # one head, one token
    c, s = np.cos(0.3), np.sin(0.3)
    expected = [2 * c - 5 * s, 5 * c + 2 * s, 7, 11]
    np.testing.assert_allclose(
        rope(x, where)[0, 0], expected, err_msg="the key turned at position 3 is another"
    )


def test_narrow_rope_without_rotation_stays_as_it_is():
    rope = NoRope()
    assert narrow_rope(rope, 4, 8) is rope, "a model without rotary positions gets none"
    with pytest.raises(MinitxError):
        narrow_rope(Bare(), 4, 8)


@pytest.mark.parametrize("family, pairs", [("llama", [2, 3]), ("gpt_neox", [1])])
def test_detect_rotates_by_the_head_width_of_the_model(family, pairs):
    """k = 4 of 8: llama turns all columns of a head, gpt_neox 4 of 8, so 4 and 2 of the k turn."""
    attn = tiny_lm(family).model.stack.blocks[0].attn
    (detector, *_) = random_detectors(FAMILIES[family], 4, 0)
    found = Detect.of(detector, attn, FAMILIES[family].head_width, 4).rope
    half = attn.rope.cos.shape[1] // 2
    columns = [*pairs, *(half + i for i in pairs)]
    message = f"expected the model's columns {columns}"
    np.testing.assert_array_equal(found.cos, attn.rope.cos[:, columns], err_msg=message)
    np.testing.assert_array_equal(found.sin, attn.rope.sin[:, columns], err_msg=message)


# Models ------------------------------------------------------------------------------------------


def with_detectors(family, kappa, bits=4):
    """In float64, fitted afterwards."""
    return apply(tiny_lm(family, dtype=np.float64), {"dota": {"kappa": kappa, "bits": bits}})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_prompts_chunks_and_single_tokens_keep_the_same_keys(monkeypatch, family, bits):
    lm = with_detectors(family, 6, bits)
    kept = note_kept(monkeypatch)

    def rows(sizes):
        kept.clear()
        state, at = lm.model.new_state(), 0
        for size in sizes:
            lm.model(IDS[at : at + size], state)
            at += size
        found = {}
        for number, call in enumerate(kept):
            for row in np.moveaxis(call, -2, 0):  # (K, G, S)
                found.setdefault(number % 2, []).append(row)
        return found

    whole, single = rows((40,)), rows((1,) * 40)
    for block in (0, 1):
        assert len(whole[block]) == 40 and len(single[block]) == 34  # not asked up to 6 keys
        for a, b in zip(whole[block][6:], single[block], strict=True):
            n = b.shape[-1]
            np.testing.assert_array_equal(a[..., :n], b)
            assert not a[..., n:].any() and (b.sum(-1) == 6).all()
    for a in rows((7, 20, 13))[1]:
        assert (a.sum(-1) <= 6).all()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_padded_batch_is_each_row_alone(family):
    lm = with_detectors(family, 5)
    alone = [lm.generate(IDS[:n].tolist(), 6) for n in (20, 11, 3)]
    assert lm.generate([IDS[:n].tolist() for n in (20, 11, 3)], 6) == alone


@pytest.mark.parametrize("bits", [None, 8, 2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_a_kappa_that_no_context_reaches_is_dense(family, bits):
    dense = tiny_lm(family)
    for kappa in (40, 48, 10**9):  # of 40 all are kept, so with 40 it is dense too
        lm = apply(dense, {"dota": {"kappa": kappa, "bits": bits}})
        np.testing.assert_array_equal(lm.logits(IDS), dense.logits(IDS))


def test_keys_of_tokens_that_passed_a_layer_by_are_remembered():
    """After ``backfill`` of all before it a token finds the K~ that running the layer leaves."""
    lm = with_detectors("llama", 3)
    block = lm.model.stack.blocks[0]
    x = np.random.default_rng(6).standard_normal((20, 16))
    called, filled = Layer(48), Layer(48)
    block(x[:19], called.take(19))
    for a, b in ((0, 7), (7, 8), (8, 19)):
        block.backfill(x[a:b], filled.take(b - a))
    last = [block(x[19:], layer.take(1)) for layer in (filled, called)]
    np.testing.assert_allclose(*last, atol=1e-12)
    ours, theirs = (layer.memory.kept[Guess] for layer in (called, filled))
    np.testing.assert_array_equal(ours.keys[..., :20, :], theirs.keys[..., :20, :])
    assert ours.keys.dtype == np.int8


def test_it_works_with_early_exits_and_folded_norms():
    exits = {"measure": "random", "threshold": 0.5}
    lm = apply(tiny_lm(), {"dota": {"kappa": 5}, "early_exit": exits, "fold_norms": True})
    assert len(lm.generate(IDS[:20].tolist(), 20)) == 20


def test_the_random_ones_to_train_begin_small():
    found = random_detectors(replace(FAMILIES["llama"], width=64), 4, 0)
    x = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    q, k = found[0](x, NoRope(), Tokens(slice(0, 400)))
    assert (q @ k.swapaxes(-1, -2)).var() == pytest.approx(1, rel=0.7)
    assert len(found) == 2 and (found[0].p != found[1].p).any()
    assert {a.dtype for d in found for a in (d.p, d.w_q, d.w_k)} == {np.dtype(np.float32)}


# Loads -------------------------------------------------------------------------------------------


def test_loads_of_the_example():
    wanted = [{0, 2, 5}, {2, 3, 5}, {0, 2, 3}, {5, 6, 7}]
    kept = np.array([[j in keys for j in range(8)] for keys in wanted])
    assert (literal.row_by_row(wanted), literal.in_order(wanted), literal.out_of_order(wanted)) == (
        12,
        9,
        8,
    )
    assert loads(kept, 4) == 8
    assert loads(kept, 1) == loads(kept[:, None], 4) == 12  # each row for itself


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_loads_are_the_twins(rows):
    kept = np.random.default_rng(rows).random((2, 3, 11, 9)) < 0.4
    expected = 0
    for head in kept.reshape(-1, 11, 9):
        wanted = [set(np.flatnonzero(row)) for row in head]
        expected += sum(literal.out_of_order(wanted[a : a + rows]) for a in range(0, 11, rows))
    assert loads(kept, rows) == expected


def test_the_tree_shows_the_detector_and_where_it_is_from():
    lm = with_detectors("llama", 6)
    assert "DetectingAttention(kappa=6, fit=post-hoc)" in repr(lm.model)
    assert "detect: Detect(p 16x2, w_q 2x4" in repr(lm.model)
    assert sum(isinstance(node, Strongest) for _, node in walk(lm)) == 2
