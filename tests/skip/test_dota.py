"""dota: the worked example, the literal version, all ways tokens may come, costs, and the file."""

import json
from dataclasses import replace
from types import SimpleNamespace

import literal_dota as literal
import numpy as np
import pytest
from same import assert_same
from test_model_gradients import MODELS, model_of
from tiny import FAMILIES, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import fast, ops
from minitx.checkpoints.huggingface import write_model
from minitx.checkpoints.safetensors import read_tensors
from minitx.checkpoints.safetensors_write import write_safetensors
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import QKV, Attend, Attention, Cache, Linear, NoRope, Rope
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.dota import DetectedKeys, DetectingAttention, DetectorCache, estimate
from minitx.skip.dota.detector import (
    Detector,
    QuantizedDetector,
    narrow_rope,
    projection,
    quantize,
)
from minitx.skip.dota.file import read_detectors, write_detectors
from minitx.skip.dota.fit import Text, fit_detectors, solve
from minitx.skip.dota.loads import key_loads
from minitx.state import Layer, Tokens
from minitx.technique import apply, find
from minitx.training.detector import Joint, joint_loss, random_detectors, squared_products
from minitx.training.loss import cross_entropy
from minitx.tree import Part, part, walk

IDS = np.random.default_rng(5).integers(0, 258, 40)
LLAMA = FAMILIES["llama"]
THREE = ["llama", "gpt2", "gpt_neox"]


@part
class NoNorm(Part):
    """Leaves x as it is."""

    def __call__(self, x):
        return x


def detecting(detector, attn, keep, bits, width):
    quantized = QuantizedDetector.of(detector, attn, width, bits)
    attn = replace(attn, attend=SparseAttention(DetectedKeys(keep, 4), attn.attend.scale))
    return DetectingAttention(attn.norm, quantized, attn, keep, "by hand")


@pytest.fixture
def kept(monkeypatch):
    """A list of what ``DetectedKeys`` keeps, call by call."""
    found, select = [], DetectedKeys.__call__

    def recorded(self, q, k, known, visible):
        found.append(select(self, q, k, known, visible))
        return found[-1]

    monkeypatch.setattr(DetectedKeys, "__call__", recorded)
    return found


# The worked example: 5 tokens, D = 4, one head of d = 2, rank 2, keep 2 ---------------------------

X = np.array([[1, 0, 2, 0], [0, 1, 1, -1], [2, 1, 0, 1], [1, -1, 1, 1], [0, 2, 1, 1]], float)
W_Q = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], float)
W_K = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], float)
W_V = np.array([[1, 0], [0, 1], [0, 0], [1, 1]], float)
P = 1.5**0.5 * np.array([[1, 0], [0, 1], [0, 1], [1, 0]])
DETECTOR = Detector(P, np.eye(2) * 2 / 3, np.eye(2))
ATTN = Attention(
    NoNorm(),
    QKV(Linear(W_Q), Linear(W_K), Linear(W_V)),
    NoRope(),
    Cache(),
    Attend(2**-0.5),
    Linear(np.eye(2)),
    1,
    1,
)
LISTS = [a.tolist() for a in (X, P, DETECTOR.w_q, DETECTOR.w_k, X @ W_Q, X @ W_K, X @ W_V)]
ESTIMATES = {  # by bits
    None: [[5], [3, 5], [5, -1, 10], [2, -2, 6, 4], [7, 5, 6, 2, 10]],
    4: {2: [5.1429, -1.7143, 9.7347]},
    2: [[4], [4, 4], [0, 0, 9], [0, 0, 6, 4], [6, 6, 0, 0, 9]],
}
KEPT = [{0}, {0, 1}, {0, 2}, {2, 3}, {0, 4}]
OUTPUT = [[1, 0], [0.6089, 0], [2.6089, 1.6089], [2.8044, 1.6089], [1, 2.6789]]
DENSE = [[1, 0], [0.6089, 0], [2.5676, 1.5905], [2.7126, 1.5317], [1.0523, 2.5736]]


@pytest.mark.parametrize("bits", ESTIMATES)
def test_worked_example_estimates(bits):
    """y = x p has the rows sqrt(1.5) times [1, 2] [-1, 2] [3, 1] [2, 0] [1, 3]. With w_q = 2/3 I
    and w_k = I the estimate of a pair is 2/3 * 1.5 = 1 times the dot product of these rows:
    query 2 gets [3, 1].[1, 2] = 5, [3, 1].[-1, 2] = -1 and [3, 1].[3, 1] = 10."""
    y = X @ P / 1.5**0.5
    assert_same(y, [[1, 2], [-1, 2], [3, 1], [2, 0], [1, 3]], atol=1e-12)
    quantized, tokens = QuantizedDetector.of(DETECTOR, ATTN, 2, bits), Tokens(slice(0, 5))
    queries, keys = quantized(X, tokens)
    _, q_scales = quantized.heads(quantize(X @ P, bits), quantized.w_q, quantized.s_q, tokens)
    found = estimate(queries, *keys)[0, 0] * q_scales[0][:, None]
    expected = ESTIMATES[bits]
    for i, row in expected.items() if isinstance(expected, dict) else enumerate(expected):
        assert_same(found[i, : i + 1], row, f"query {i}", atol=5e-5)
    for i, row in enumerate(literal.estimates(*LISTS[:4], bits)):
        assert_same(found[i, : i + 1], row, f"query {i}", tolerance=1e-6)


def test_rounding_errors_of_the_input_leave_estimates():
    """Tokens with equal integers have equal estimates only if their scales are equal: then the tie
    goes to the lower index, in whatever order the model's sums were added."""
    x = np.random.default_rng(0).standard_normal((5, 4))
    noisy = x * (1 + 1e-15 * np.random.default_rng(1).standard_normal((5, 1)))
    quantized, tokens = QuantizedDetector.of(DETECTOR, ATTN, 2, 4), Tokens(slice(0, 5))
    for found, expected in zip(quantized.kv(noisy, tokens), quantized.kv(x, tokens), strict=True):
        assert_same(found, expected)


def test_worked_example_key_integers_at_4_bits():
    """k~ of token 0 is sqrt(1.5) [1, 2]: at 4 bits [1, 2] * 7 / 2 = [3.5, 7], so [4, 7], with the
    scale sqrt(1.5) * 2 / 7 = 0.34993."""
    _, (integers, scales) = QuantizedDetector.of(DETECTOR, ATTN, 2, 4)(X, Tokens(slice(0, 5)))
    assert integers[0].tolist() == [[4, 7], [-4, 7], [7, 2], [7, 0], [2, 7]]
    assert_same(scales[0], [0.34993, 0.34993, 0.52489, 0.34993, 0.52489], atol=5e-6)


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("sizes", [(5,), (1,) * 5, (2, 3)])
def test_worked_example_kept_keys_and_outputs(kept, bits, sizes):
    """The two largest estimates of each query, by hand from the table above: of query 2's 5, -1
    and 10 stay 5 and 10, so keys 0 and 2. At every bit width the same keys, so the same
    outputs."""
    attention, layer, found = detecting(DETECTOR, ATTN, 2, bits, 2), Layer(5), []
    for size in sizes:
        x = X[layer.tokens.end : layer.tokens.end + size]
        found.append(attention(x, layer.take(size)))
    assert_same(np.concatenate(found), OUTPUT, atol=5e-5)
    rows = [set(np.flatnonzero(row)) for call in kept for row in call[0, 0]]
    assert rows == KEPT[-len(rows) :]  # the first two see at most 2 keys, so nothing is selected
    outputs, chosen = literal.one_head(*LISTS, 2**-0.5, 2, bits)
    assert_same(np.concatenate(found), outputs, atol=1e-12)
    assert [set(row) for row in chosen] == KEPT


def test_worked_example_errors_are_within_their_bound():
    """|sparse - dense| <= 2 * (dense weight that is dropped) * max |v|, for any selection."""
    found = detecting(DETECTOR, ATTN, 2, None, 2)(X, Layer(5).take(5))
    dense = ATTN(X, Layer(5).take(5))
    assert_same(dense, DENSE, atol=5e-5)
    error = np.linalg.norm(found - dense, axis=1)
    s = (X @ W_Q @ (X @ W_K).T) * 2**-0.5
    weight = np.exp(s - s.max(1, keepdims=True)) * np.tri(5)
    weight /= weight.sum(1, keepdims=True)
    dropped = [1 - sum(weight[i, j] for j in KEPT[i]) for i in range(5)]
    bound = [2 * d * max(np.linalg.norm((X @ W_V)[: i + 1], axis=1)) for i, d in enumerate(dropped)]
    assert_same(dropped[2:], [0.0114, 0.0479, 0.0757], atol=5e-5)
    assert_same(error[2:], [0.0452, 0.1199, 0.1176], atol=5e-5)
    assert_same(bound[2:], [0.0824, 0.3457, 0.5460], atol=5e-4)
    assert (error <= np.array(bound) + 1e-12).all()


def test_worked_example_squared_error_of_the_estimates():
    """Of the paper's S, which is not divided by sqrt(d): the mean over 15 pairs is 3.8667."""
    q, k, low_q, low_k = X @ W_Q, X @ W_K, X @ P @ DETECTOR.w_q, X @ P
    lower = [[3], [1, -1], [6, 2, 8], [2, -2, 6, 4], [7, 5, 6, 2, 10]]
    for i, row in enumerate(lower):
        assert_same((q @ k.T)[i, : i + 1], row, tolerance=1e-7)
    left, right = np.concatenate([low_q, -q], 1), np.concatenate([low_k, k], 1)
    found = squared_products(left[None, None], right[None, None], np.ones((1, 5), bool))
    assert found / 15 == pytest.approx(3.8667, abs=5e-5)


# Equals the literal version ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [None, 8, 4, 2])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1)])
def test_detecting_attention_equals_the_literal_version(monkeypatch, bits, heads, kv_heads):
    """Heads that share keys have one k~ and a w_q each; at 2 bits most estimates are tied."""
    monkeypatch.setattr(fast, "ROWS", 8)  # so that queries come in several blocks
    rng = np.random.default_rng(4)
    D, rank, d, T, keep = 12, 2, 4, 21, 5
    x = rng.standard_normal((T, D))
    w_q, w_k, w_v = (rng.standard_normal((D, n * d)) for n in (heads, kv_heads, kv_heads))
    qkv = QKV(Linear(w_q), Linear(w_k), Linear(w_v))
    attn = Attention(NoNorm(), qkv, NoRope(), Cache(), Attend(0.5), NoNorm(), heads, kv_heads)
    p = projection(D, rank, rng).astype(float)
    low_q, low_k = (rng.standard_normal((rank, n * rank)) for n in (heads, kv_heads))
    with counting(run := detecting(Detector(p, low_q, low_k), attn, keep, bits, d)) as counts:
        found = run(x, Layer(T).take(T))
    all_kept = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        matrices = low_q[:, h * rank : (h + 1) * rank], low_k[:, g * rank : (g + 1) * rank]
        rows = x @ w_q[:, h * d : (h + 1) * d], *(x @ w[:, g * d : (g + 1) * d] for w in (w_k, w_v))
        lists = (a.tolist() for a in (x, p, *matrices, *rows))
        expected, kept_keys = literal.one_head(*lists, 0.5, keep, bits)
        assert_same(found[:, h * d : (h + 1) * d], expected, f"head {h}", atol=1e-12)
        all_kept.append(kept_keys)
    assert [len(row) for row in all_kept[0]] == [min(keep, i + 1) for i in range(T)]
    assert counts.events["keys kept"] == literal.loads_one_at_a_time(sum(all_kept, []))
    in_parallel = sum(
        literal.loads_out_of_order(rows[a : min(a + 4, b)])
        for rows in all_kept
        for first in range(0, T, 8)
        for b in [min(first + 8, T)]
        for a in range(first, b, 4)
    )
    assert counts.events["key loads, 4 queries in parallel"] == in_parallel
    one_at_a_time = counts.events["key loads, one query at a time"]
    assert in_parallel < one_at_a_time == counts.events["keys kept"]


# The detector ------------------------------------------------------------------------------------


def test_projection_is_sparse_and_keeps_lengths():
    p = projection(1000, 200, np.random.default_rng(0))
    values, counts = np.unique(p, return_counts=True)
    assert_same(values, [-((3 / 200) ** 0.5), 0, (3 / 200) ** 0.5], tolerance=1e-6)
    assert_same(counts / p.size, [1 / 6, 2 / 3, 1 / 6], atol=0.004)
    assert p.var() == pytest.approx(1 / 200, rel=0.01) and abs(p.mean()) < 5e-4
    assert p.dtype == np.float32
    x = np.random.default_rng(1).standard_normal((50, 1000))
    assert_same(((x @ p) ** 2).sum(1) / (x**2).sum(1), 1, atol=0.35)


@pytest.mark.parametrize("keep", [1, 3, 7])
def test_perfect_detector_keeps_the_keys_with_the_largest_scores(kept, keep):
    """rank = d, p = I, and the model's own matrices, in floats: the estimates are the scores."""
    rng = np.random.default_rng(3)
    x, w_q, w_k, w_v = rng.standard_normal((20, 6)), *rng.standard_normal((3, 6, 6))
    attn = replace(ATTN, qkv=QKV(Linear(w_q), Linear(w_k), Linear(w_v)), out=NoNorm())
    detecting(Detector(np.eye(6), w_q, w_k), attn, keep, None, 6)(x, Layer(20).take(len(x)))
    (found,) = kept
    scores = (x @ w_q) @ (x @ w_k).T
    for i in range(20):
        best = np.argsort(-scores[i, : i + 1])[:keep]
        assert set(np.flatnonzero(found[0, 0, i])) == set(best), f"query {i}"


def test_random_detectors_estimate_with_variance_1():
    found = random_detectors(replace(LLAMA, width=64), 4, 0)
    x = np.random.default_rng(0).standard_normal((400, 64)).astype(np.float32)
    q, k = found[0](x, NoRope(), Tokens(slice(0, 400)))
    assert (q @ k.swapaxes(-1, -2)).var() == pytest.approx(1, rel=0.7)
    assert len(found) == 2 and (found[0].p != found[1].p).any()
    assert {a.dtype for d in found for a in (d.p, d.w_q, d.w_k)} == {np.dtype(np.float32)}


# Rotation ----------------------------------------------------------------------------------------

# (rotated columns, head width, rank): the pairs of the model's RoPE that rotate. Of the detector's
# columns rank * rotated / width are to rotate, which is half as many pairs: rounded (halves to
# even), at least one, and those of the lowest frequencies.
PAIRS = {
    (8, 8, 8): [0, 1, 2, 3],  # all of them
    (8, 8, 4): [2, 3],
    (8, 8, 2): [3],
    (4, 8, 8): [0, 1],  # partial: half of the model's columns rotate, so half of the rank's
    (4, 8, 4): [1],
    (4, 8, 2): [1],  # 2 * 4 / 8 / 2 = 0.5 rounds to 0: one pair all the same
    (2, 16, 4): [0],  # 4 * 2 / 16 / 2 = 0.25
    (6, 8, 4): [1, 2],  # 4 * 6 / 8 / 2 = 1.5 rounds to 2
    (12, 16, 6): [4, 5],  # 6 * 12 / 16 / 2 = 2.25
}


@pytest.mark.parametrize("sizes", PAIRS)
def test_narrow_rope_rotates_by_the_lowest_frequencies_of_the_model(sizes):
    """Pair i of the model rotates by position * 100^(-2 i / rotated columns)."""
    rotated, width, rank = sizes
    rope = narrow_rope(Rope(*ops.rope_tables(rotated, 7, 100.0, np.float64)), rank, width)
    pairs = PAIRS[sizes]
    assert rope.cos.shape == rope.sin.shape == (7, 2 * len(pairs)), (
        f"expected {2 * len(pairs)} of {rank} columns to rotate, got tables {rope.cos.shape}"
    )
    angle = np.array([[at * 100.0 ** (-2 * i / rotated) for i in pairs] for at in range(7)])
    message = f"expected the angles of the model's pairs {pairs}"
    assert_same(rope.cos, np.cos([*angle.T, *angle.T]).T, message, tolerance=1e-7)
    assert_same(rope.sin, np.sin([*-angle.T, *angle.T]).T, message, tolerance=1e-7)


def test_narrow_rope_of_a_partial_rotation_by_hand():
    """4 of 8 columns rotate in the model, base 100: its pairs by 1 and by 1/10 per position. Of 4
    columns two rotate, as the slower pair: columns 0 and 1 by 3/10 at position 3; not 2 and 3."""
    rope = narrow_rope(Rope(*ops.rope_tables(4, 7, 100.0, np.float64)), 4, 8)
    x = np.array([[[2.0, 5.0, 7.0, 11.0]]])  # one head, one token
    c, s = np.cos(0.3), np.sin(0.3)
    expected = [2 * c - 5 * s, 5 * c + 2 * s, 7, 11]
    found = rope(x, Tokens(slice(3, 4)))[0, 0]
    assert_same(found, expected, "rotated key differs at position 3", tolerance=1e-7)


def test_narrow_rope_of_a_model_without_rope_is_none():
    rope = NoRope()
    assert narrow_rope(rope, 4, 8) is rope, "a model without rotary positions gets none"
    with pytest.raises(MinitxError):
        narrow_rope(NoNorm(), 4, 8)


@pytest.mark.parametrize("family, pairs", [("llama", [2, 3]), ("gpt_neox", [1])])
def test_quantized_detector_rotates_in_proportion_to_the_model(family, pairs):
    """Rank 4, width 8: llama rotates all columns of a head, gpt_neox 4 of 8; so 4 and 2 of 4."""
    attn = tiny_lm(family).model.stack.blocks[0].attn
    (detector, *_) = random_detectors(FAMILIES[family], 4, 0)
    found = QuantizedDetector.of(detector, attn, FAMILIES[family].head_width, 4).rope
    half = attn.rope.cos.shape[1] // 2
    columns = [*pairs, *(half + i for i in pairs)]
    message = f"expected the model's columns {columns}"
    assert_same(found.cos, attn.rope.cos[:, columns], message)
    assert_same(found.sin, attn.rope.sin[:, columns], message)


# The post-hoc fit --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox parallel"])
def test_fit_has_the_least_error_nearby(name):
    """No other w_q or w_k close by has a smaller error, by the loss of joint training."""
    config = replace(MODELS[name], context=32)
    model = model_of(config)
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, config.vocab_size, 30) for _ in range(8)]
    found = fit_detectors(model, texts, 2)
    ids, ones = np.array(texts), np.ones((8, 30))

    def error(detectors):
        joint = Joint(model, detectors)
        return joint_loss(joint, lambda m: cross_entropy(m(ids), ids, ones), 1.0, ones)[1][1]

    best = error(found)
    nothing = tuple(replace(d, w_q=0 * d.w_q) for d in found)
    assert best < error(nothing), "worse than estimates of 0"
    slack = 1e-6 if name == "gpt2" else 0.02  # rotary: w_k is not solved for again at the end
    for seed in range(4):
        rng = np.random.default_rng(seed)
        near = tuple(
            replace(d, w_q=d.w_q + 0.03 * abs(d.w_q).max() * rng.standard_normal(d.w_q.shape))
            for d in found
        )
        assert error(near) > best, "a w_q nearby has a smaller error"
        near = tuple(
            replace(d, w_k=d.w_k + 0.03 * abs(d.w_k).max() * rng.standard_normal(d.w_k.shape))
            for d in found
        )
        assert error(near) > best * (1 - slack), "a w_k nearby has a smaller error"


def test_least_squares_of_scores_that_are_all_zero_gives_zeros():
    """As where a technique has skipped every input of W_q: the equations are 0 w = 0."""
    zeros = np.zeros((5, 3))
    text = SimpleNamespace(y=zeros, turn=np.zeros((5, 3, 3)))
    assert not solve([(text, np.zeros((5, 3, 3)), zeros)]).any()


@pytest.mark.parametrize("side", ["w_q", "w_k"])
def test_fit_normal_equations_equal_least_squares_pair_by_pair(side):
    """One equation per pair j <= i, in the four unknowns w_ac of a matrix: s_ij is the sum of
    y_ia w_ac (R_i k~_j)_c for a head's w_q, and of y_ja w_ac (R_j q~_i)_c, in both heads, for
    w_k."""
    rng, T = np.random.default_rng(7), 9
    attn = tiny_lm("llama").model.stack.blocks[0].attn  # two heads of width 8 share their keys
    x, q, k = (rng.standard_normal(shape) for shape in ((T, 16), (2, T, 8), (1, T, 8)))
    rope = narrow_rope(attn.rope, 2, 8)
    text = Text(projection(16, 2, rng), attn, rope, (x, q, k), 0)
    w_q, w_k = rng.standard_normal((2, 2, 2)), rng.standard_normal((2, 2))
    low_k = rope((text.y @ w_k)[None], Tokens(slice(0, T)))[0]
    assert_same(text.rotated(w_k), low_k, "rotated rows", atol=1e-12)
    pairs, scores = [], []
    for head in [0] if side == "w_q" else [0, 1]:
        low_q = text.rotated(w_q[head])
        for i in range(T):
            for j in range(i + 1):
                mine, other = (i, low_k[j]) if side == "w_q" else (j, low_q[i])
                pairs.append(np.outer(text.y[mine], text.turn[mine] @ other).reshape(-1))
                scores.append(q[head, i] @ k[0, j] * attn.attend.scale)
    expected = np.linalg.lstsq(np.array(pairs), np.array(scores))[0].reshape(2, 2)
    found = solve([text.query_sums(w_k, 0) if side == "w_q" else text.key_sums(w_q)])
    assert_same(found, expected, f"{side} of least error", atol=1e-6)


def test_fit_without_texts_is_refused():
    with pytest.raises(MinitxError, match="^dota: a detector is fitted to texts"):
        fit_detectors(tiny_model(), [], 2)


# Models ------------------------------------------------------------------------------------------


def with_dota(family, keep, bits=4):
    """In float64, with fitted detectors."""
    return apply(tiny_lm(family, dtype=np.float64), {"dota": {"keep": keep, "bits": bits}})


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("bits", [None, 4, 2])
def test_prompts_chunks_and_single_tokens_keep_the_same_keys(kept, family, bits):
    lm = with_dota(family, 6, bits)

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
        assert len(whole[block]) == 40 and len(single[block]) == 34  # up to 6 keys all are kept
        for a, b in zip(whole[block][6:], single[block], strict=True):
            n = b.shape[-1]
            assert_same(a[..., :n], b)
            assert not a[..., n:].any(), "a later key is kept"
            assert_same(b.sum(-1), 6)
    for a in rows((7, 20, 13))[1]:
        assert (a.sum(-1) <= 6).all()


@pytest.mark.parametrize("family", THREE)
def test_padded_batch_equals_each_prompt_alone(family):
    lm = with_dota(family, 5)
    alone = [lm.generate(IDS[:n].tolist(), 6) for n in (20, 11, 3)]
    assert lm.generate([IDS[:n].tolist() for n in (20, 11, 3)], 6) == alone


@pytest.mark.parametrize("bits", [None, 8, 2])
@pytest.mark.parametrize("family", THREE)
def test_keep_beyond_the_context_is_dense(family, bits):
    dense = tiny_lm(family)
    for keep in (40, 48, 10**9):  # of 40 tokens 40 keys are all, so 40 is dense too
        lm = apply(dense, {"dota": {"keep": keep, "bits": bits}})
        assert_same(lm.logits(IDS), dense.logits(IDS))


def test_backfill_stores_low_rank_keys_too():
    """After ``backfill`` of all earlier tokens, a token finds the k~ that running would leave."""
    lm = with_dota("llama", 3)
    block = lm.model.stack.blocks[0]
    x = np.random.default_rng(6).standard_normal((20, 16))
    called, filled = Layer(48), Layer(48)
    block(x[:19], called.take(19))
    for a, b in ((0, 7), (7, 8), (8, 19)):
        block.backfill(x[a:b], filled.take(b - a))
    last = [block(x[19:], layer.take(1)) for layer in (filled, called)]
    np.testing.assert_allclose(*last, atol=1e-12)
    ours, theirs = (layer.memory.kept[DetectorCache] for layer in (called, filled))
    assert_same(ours.keys[..., :20, :], theirs.keys[..., :20, :])
    assert ours.keys.dtype == np.int8


def test_dota_runs_with_early_exit_and_folded_norms():
    exits = {"measure": "random", "threshold": 0.5}
    lm = apply(tiny_lm(), {"dota": {"keep": 5}, "early_exit": exits, "fold_norms": True})
    assert len(lm.generate(IDS[:20].tolist(), 20)) == 20


def test_tree_shows_the_detector_and_its_source():
    lm = with_dota("llama", 6)
    assert "DetectingAttention(keep=6, fit=post-hoc)" in repr(lm.model)
    assert "detector: QuantizedDetector(p 16x2, w_q 2x4" in repr(lm.model)
    assert sum(isinstance(node, DetectedKeys) for _, node in walk(lm)) == 2


# Costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [4, None])
def test_decoded_token_costs_what_the_card_says(family, bits):
    S, keep, rank = 30, 7, 4
    lm = apply(tiny_lm(family), {"dota": {"keep": keep, "bits": bits, "rank": rank}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d, D = c.heads, c.kv_heads, c.head_width, c.width
    lm.model(IDS[: S - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[S - 1 : S], state)
    path = "model.stack.blocks.0.attn"
    detector = counts.entries[path + ".detector"]
    selector = counts.entries[path + ".attn.attend.selector"]
    exact = counts.entries[path + ".attn.attend"]
    assert detector.multiply_adds == D * rank + rank**2 * (H + K)
    assert detector.weight_bytes == 4 * detector.multiply_adds
    assert selector.multiply_adds == H * S * rank
    assert selector.cache_bytes == K * S * (4 + rank * (1 if bits else 4))
    assert exact.multiply_adds == 2 * H * keep * d
    assert exact.cache_bytes == 8 * H * keep * d
    assert counts.events == {
        "keys seen": c.layers * H * S,
        "keys kept": c.layers * H * keep,
        "key loads, one query at a time": c.layers * H * keep,
        "key loads, 4 queries in parallel": c.layers * H * keep,
    }


def test_prompt_saves_nothing_and_every_query_keeps_as_many():
    T, keep = 30, 7
    lm = apply(tiny_lm(), {"dota": {"keep": keep, "parallel_queries": 8}})
    c = lm.model.config
    with counting(lm) as counts:
        lm.model(IDS[:T], lm.model.new_state())
    path = "model.stack.blocks.0.attn.attn.attend"
    assert counts.entries[path].multiply_adds == 2 * c.heads * T * T * c.head_width
    assert counts.entries[path + ".selector"].multiply_adds == c.heads * T * T * 2
    kept = c.layers * c.heads * sum(min(keep, i + 1) for i in range(T))
    assert counts.events["keys kept"] == counts.events["key loads, one query at a time"] == kept
    assert 0 < counts.events["key loads, 8 queries in parallel"] < kept


# Key loads ---------------------------------------------------------------------------------------


def test_key_loads_by_hand():
    """Four queries that keep three keys each: 12 loads one at a time. In parallel 8:
    step 1: key 2 for queries 0, 1 and 2, key 5 for query 3;
    step 2: key 0 for queries 0 and 2, key 3 for query 1, key 6 for query 3;
    step 3: key 5 for queries 0 and 1, key 3 for query 2, key 7 for query 3."""
    wanted = [{0, 2, 5}, {2, 3, 5}, {0, 2, 3}, {5, 6, 7}]
    kept = np.array([[j in keys for j in range(8)] for keys in wanted])
    assert literal.loads_one_at_a_time(wanted) == 12
    assert literal.loads_in_order(wanted) == 9
    assert literal.loads_out_of_order(wanted) == 8
    assert key_loads(kept, 4) == 8
    assert key_loads(kept, 1) == key_loads(kept[:, None], 4) == 12, "each query by itself"


@pytest.mark.parametrize("parallel", [1, 2, 3, 4, 8])
def test_key_loads_equal_the_literal_version(parallel):
    kept = np.random.default_rng(parallel).random((2, 3, 11, 9)) < 0.4
    expected = 0
    for head in kept.reshape(-1, 11, 9):
        wanted = [set(np.flatnonzero(row)) for row in head]
        expected += sum(
            literal.loads_out_of_order(wanted[a : a + parallel]) for a in range(0, 11, parallel)
        )
    assert key_loads(kept, parallel) == expected


# The file ----------------------------------------------------------------------------------------


def folder_with_detectors(folder, rank=4, seed=0, family="llama", tokenizer=True):
    tiny_folder(folder, family, tokenizer)
    write_detectors(random_detectors(FAMILIES[family], rank, seed), folder)
    return folder


def test_file_gives_back_the_detectors_written(tmp_path):
    written = random_detectors(LLAMA, 4, 0)
    write_detectors(written, tmp_path)
    for dtype in (np.float32, np.float64):
        for ours, theirs in zip(read_detectors(tmp_path, LLAMA, dtype), written, strict=True):
            for name in ("p", "w_q", "w_k"):
                assert_same(getattr(ours, name), getattr(theirs, name))
                assert getattr(ours, name).dtype == dtype


@pytest.mark.parametrize("family", FAMILIES)
def test_file_beside_the_weights_is_used(tmp_path, family):
    folder = folder_with_detectors(tmp_path, family=family, tokenizer=False)
    lm = minitx.load(folder, dota={"keep": 6})
    assert lm.folder == folder and "fit=trained" in repr(lm) and "p 16x4" in repr(lm)
    state = lm.model.new_state()
    single = [lm.model(IDS[t : t + 1], state)[0] for t in range(40)]
    assert_same(single, lm.logits(IDS), atol=1e-4)
    assert (lm.logits(IDS) != minitx.load(folder).logits(IDS)).any()
    assert "fit=trained" in repr(minitx.load(folder, dota={"fit": "trained", "rank": 4}))
    double = minitx.load(folder, dtype=np.float64, dota=True)
    assert double.logits(IDS).dtype == np.float64


def test_file_shipped_with_stories_is_read():
    lm = minitx.load("stories")
    found = read_detectors(lm.folder, lm.model.config)
    assert [d.rank for d in found] == [found[0].rank] * lm.model.config.layers


def test_file_is_ignored_with_fit_post_hoc(tmp_path):
    lm = minitx.load(folder_with_detectors(tmp_path), dota={"fit": "post-hoc"})
    assert "fit=post-hoc" in repr(lm) and "p 16x2" in repr(lm)
    without = tmp_path / "without"
    without.mkdir()
    assert "fit=post-hoc" in repr(minitx.load(tiny_folder(without), dota=True))


def test_file_does_not_matter_without_dota(tmp_path):
    folder = folder_with_detectors(tmp_path)
    with_file = minitx.load(folder).logits(IDS)
    (folder / "dota.safetensors").write_bytes(b"damaged")
    assert_same(minitx.load(folder).logits(IDS), with_file)


def changed(folder, change):
    """The file with its tensors (a dict) changed."""
    tensors = read_tensors(folder / "dota.safetensors")
    change(tensors)
    write_safetensors(folder / "dota.safetensors", tensors)


FAULTS = {
    "has no tensor 'blocks.1.w_k'": lambda t: t.pop("blocks.1.w_k"),
    "unexpected tensor 'blocks.2.p'": lambda t: t.update({"blocks.2.p": t["blocks.0.p"]}),
    "w_q has the shape (4, 4); expected (4, 8)": lambda t: t.update(
        {"blocks.0.w_q": t["blocks.0.w_k"]}
    ),
    "blocks.1.p has the shape (16, 2)": lambda t: t.update({"blocks.1.p": t["blocks.1.p"][:, :2]}),
    "rank must be an even integer, 2 to the head width 8; got 3": lambda t: t.update(
        {"blocks.0.p": t["blocks.0.p"][:, :3]}
    ),
    "got 0": lambda t: t.update({"blocks.0.p": np.float32(1)}),
    "NaN or Inf": lambda t: t["blocks.1.w_q"].__setitem__((0, 0), np.nan),
}


@pytest.mark.parametrize("words", FAULTS)
def test_file_that_does_not_fit_is_refused(tmp_path, words):
    changed(folder_with_detectors(tmp_path), FAULTS[words])
    with pytest.raises(MinitxError) as refused:
        minitx.load(tmp_path, dota=True)
    text = str(refused.value)
    assert words in text and "dota.safetensors" in text and "\n" not in text


def test_model_without_some_heads_is_refused_with_the_reason(tmp_path):
    """The file is this model's own, but heads were removed since."""
    folder = folder_with_detectors(tmp_path)
    pruned = {"heads": 0.5, "heads_by": "queries", "score": "weights"}
    with pytest.raises(MinitxError, match="for 2 query heads and 1 key .*prune_structure") as no:
        minitx.load(folder, dota=True, prune_structure=pruned)
    assert "use fit=post-hoc" in str(no.value)
    lm = minitx.load(folder, dota={"fit": "post-hoc"}, prune_structure=pruned)
    assert np.isfinite(lm.logits(IDS)).all()


def test_file_trained_with_other_weights_is_refused(tmp_path):
    folder = folder_with_detectors(tmp_path)
    minitx.load(folder, dota=True)
    write_model(tiny_model(seed=2), folder, "F32")
    with pytest.raises(MinitxError, match="dota.safetensors: was not trained with the weights"):
        minitx.load(folder, dota=True)
    minitx.load(folder, dota={"fit": "post-hoc"})


@pytest.mark.parametrize("size", [0, 7, 100, 1000])
def test_file_that_is_cut_off_is_refused(tmp_path, size):
    path = folder_with_detectors(tmp_path) / "dota.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MinitxError, match="dota.safetensors: "):
        minitx.load(tmp_path, dota=True)


# Refusals and the card ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep": 0}, "keep must be an integer, at least 1; got 0."),
        ({"bits": 1}, "bits must be an integer, 2 to 8, or None; got 1."),
        ({"bits": 9}, "bits must be an integer, 2 to 8, or None; got 9."),
        ({"parallel_queries": 0}, "parallel_queries must be an integer, 1 to 8; got 0."),
        ({"parallel_queries": 9}, "parallel_queries must be an integer, 1 to 8; got 9."),
        ({"rank": 3}, "rank must be an even integer, 2 to the head width 8; got 3."),
        ({"rank": 10}, "rank must be an even integer, 2 to the head width 8; got 10."),
        ({"rank": 0}, "rank must be an integer, at least 1, or None; got 0."),
        ({"fit": "trained"}, "fit=trained reads dota.safetensors beside the weights"),
    ],
)
def test_bad_option_is_refused(options, words):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"dota": options})
    text = str(refused.value)
    assert text.startswith("dota: ") and words in text and "\n" not in text


def test_missing_tokenizer_or_file_is_named(tmp_path):
    with pytest.raises(MinitxError, match="^dota.* tokenizer .* train it with a detector.$"):
        apply(replace(tiny_lm(), tokenizer=None), {"dota": True})
    folder = tiny_folder(tmp_path)
    with pytest.raises(MinitxError, match="^dota: fit=trained .* has none in " + str(folder)):
        minitx.load(folder, dota={"fit": "trained"})


def test_trained_detectors_refuse_another_rank_and_folded_norms(tmp_path):
    folder = folder_with_detectors(tmp_path)
    message = "^dota: rank is 2, but the trained detectors have the rank 4"
    with pytest.raises(MinitxError, match=message):
        minitx.load(folder, dota={"rank": 2})
    with pytest.raises(MinitxError, match="dota needs a part of type .* where fold_norms has put"):
        minitx.load(folder, dota=True, fold_norms=True)
    minitx.load(folder, dota=True, fuse_projections=True).logits(IDS)


@pytest.mark.parametrize("other", ["first_layer", "predictive_attention"])
def test_technique_that_replaces_the_same_part_is_refused(other):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"dota": True, other: True})
    assert "dota" in str(refused.value) and other in str(refused.value)


def test_card_says_what_is_not_the_papers():
    sections = find("dota").card.sections
    assert "unconfirmed" in sections["Fidelity"] and "reconstruction" in sections["Fidelity"]
    assert "152" not in json.dumps(sections), "no figure of the paper's: they are for hardware"
