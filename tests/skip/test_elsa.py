"""elsa: the paper's figures, a worked example, a literal twin, and what must hold."""

import literal_elsa as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from test_elsa_hashing import dense
from tiny import tiny_lm

from minitx import fast, ops
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.skip.elsa import AlikeKeys, largest_seen, samples
from minitx.skip.elsa.hashing import Factor, Kronecker, SignHash, cosines, pack, sign_hash
from minitx.state import Layer
from minitx.technique import apply
from minitx.tree import Part, part

IDS = np.random.default_rng(6).integers(0, 258, 40)
T = [0.3, -0.2, 0.5, 1.5]  # one threshold for each of four heads, of which one lets nothing pass


def attend(t=T, d=8, k=None, bias=0.3, scale=0.5, hash_of=None):
    """elsa's attention with thresholds t, one for each head."""
    k = d if k is None else k
    hash_of = sign_hash(d, k, 1) if hash_of is None else hash_of
    return SparseAttention(AlikeKeys(hash_of, bias, cosines(k, bias), np.array(t, float)), scale)


def twin(q, k, v, part, first=0):
    """(output, survivors) by the twin, with the settings of ``attend``."""
    alike = part.selector
    settings = dense(alike.hash).tolist(), alike.theta_bias, alike.t.tolist()
    return literal.attention(q.tolist(), k.tolist(), v.tolist(), part.scale, *settings, first)


def kept_of(part, q, k):
    """What all queries q (H, T, d) keep of k (K, T, d): (K, G, T, T)"""
    return part.selector(q, k, part.selector.of_keys(k), Visible(q.shape[-2], k.shape[-2]))


# The paper's figures -----------------------------------------------------------------------------


@part
class Bits(Part):
    """A hash that was fixed beforehand."""

    bits: tuple

    def __call__(self, x):
        return np.broadcast_to(pack(np.array(self.bits, bool)), (*x.shape[:-1], 1))


def test_figure_4():
    alike = attend([0.0], k=3, bias=0.127, hash_of=Bits((1, 1, 1))).selector
    hashes = pack(np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1], [0, 0, 0]], bool))
    norms = np.array([1.35, 1.97, 0.96, 1.66])
    found = alike.similarity(np.ones((1, 1, 3)), hashes[None], norms[None])
    np.testing.assert_allclose(found[0, 0, 0], [0.82, -0.76, 0.58, -1.65], atol=0.012)
    np.testing.assert_allclose(alike.cosines[[1, 2, 3]], [0.61, -0.39, -0.99], atol=0.006)


def test_figure_6():
    """Four keys of one number each, so that they are the scores."""
    scores = np.array([1.35, -0.72, 0.86, 0.24])
    q, k = np.full((1, 4, 1), 2.0), scores[None, :, None] / 2
    w = fast.attention_weights(q, k, 1.0, Visible(4, 4).mask)
    np.testing.assert_allclose(w[0, 3] / w[0, 3].sum(), [0.48, 0.06, 0.30, 0.16], atol=0.005)
    t = samples(q, k, 1.0, 1.0, Visible(4, 4))[0, 3]
    np.testing.assert_allclose(t, 0.86 / (2 * (1.35 / 2)))
    assert literal.sample([2.0], (scores[:, None] / 2).tolist(), 1.0, 1.0) == pytest.approx(t)


# The end-to-end example --------------------------------------------------------------------------

A1, A2 = np.array([[0.6, -0.8], [0.8, 0.6]]), np.array([[0.8, 0.6], [-0.6, 0.8]])
Q = np.array([1, 0.2, -0.5, 0.8])
KEYS = np.array(
    [[1, 1, 0, 1], [-1, 0.5, 1, 0], [0.5, -1, 0.5, 2], [2, 0, -1, 1], [0.1, 0, -0.1, 0.1]]
)
VALUES = np.array([[1, 0], [0, 1], [2, 0], [0, 3], [5, 5]], float)
EXAMPLE = SignHash(4, (Kronecker((Factor(A1), Factor(A2))),))
FIVE = np.broadcast_to(Q, (1, 5, 4))  # five queries, of which the last sees all keys


def test_hashes_and_similarities_of_the_example():
    assert literal.bits(dense(EXAMPLE).tolist(), Q.tolist()) == [1, 0, 1, 1]
    np.testing.assert_array_equal(EXAMPLE(Q), pack(np.array([1, 0, 1, 1], bool)))
    alike = attend([0.0], k=4, bias=0.25, hash_of=EXAMPLE).selector
    found = alike.similarity(Q[None, None], *alike.of_keys(KEYS[None]))[0, 0, 0]
    np.testing.assert_allclose(found, [1.7321, 0.3711, 0.5802, 2.1067, 0.1732], atol=5e-5)
    twins = literal.similarities(Q.tolist(), KEYS.tolist(), dense(EXAMPLE).tolist(), 0.25)
    np.testing.assert_allclose(found, twins, atol=1e-12)


@pytest.mark.parametrize(
    "t, kept, output",
    [
        (0.5, {0, 3}, [0.3430, 1.9710]),
        (0.2, {0, 2, 3}, [0.7134, 1.5304]),
        (-np.inf, {0, 1, 2, 3, 4}, [1.0901, 1.8373]),
        (-1.0, {0, 1, 2, 3, 4}, [1.0901, 1.8373]),  # asked, and found to keep all
        (1.01, {3}, [0, 3]),
    ],
)
@pytest.mark.parametrize("sizes", [(5,), (4, 1)])
def test_survivors_and_output_of_the_example(t, kept, output, sizes):
    part = attend([t], k=4, bias=0.25, hash_of=EXAMPLE)
    v = np.pad(VALUES, ((0, 0), (0, 2)))  # as wide as the keys
    found = run(part, FIVE, KEYS[None], v[None], sizes)
    np.testing.assert_allclose(found[0, -1, :2], output, atol=5e-5)
    if np.isfinite(t):
        assert set(np.flatnonzero(kept_of(part, FIVE, KEYS[None])[0, 0, -1])) == kept
    settings = dense(EXAMPLE).tolist(), 0.25, t
    row, which = literal.one_query(Q.tolist(), KEYS.tolist(), VALUES.tolist(), 0.5, *settings)
    np.testing.assert_allclose(row, output, atol=5e-5)
    assert set(which) == kept


@pytest.mark.parametrize("p, t", [(0.5, 0.4849), (1.0, 0.5877), (2.0, 0.9697), (3.0, 0.9697)])
def test_learned_samples_of_the_example(p, t):
    found = samples(FIVE, KEYS[None], p, 0.5, Visible(5, 5))[0, -1]
    assert found == pytest.approx(t, abs=5e-5)
    assert literal.sample(Q.tolist(), KEYS.tolist(), p, 0.5) == pytest.approx(t, abs=5e-5)


# Against the twin, in every way that tokens may come ---------------------------------------------


@pytest.mark.parametrize("K, bits", [(1, 8), (2, 8), (4, 8), (2, 5), (2, 20)])
def test_it_is_the_literal_twin(K, bits):
    q, k, v = random_qkv(K=K)
    part = attend(k=bits)
    expected, kept = twin(q, k, v, part)
    found = kept_of(part, q, k).reshape(4, 30, 30)
    assert [[np.flatnonzero(row).tolist() for row in head] for head in found] == kept
    assert {len(which) for which in kept[3]} == {1} != {len(which) for which in kept[0]}
    for sizes in ((30,), (1,) * 30, (7, 1, 1, 16, 5)):
        np.testing.assert_allclose(run(part, q, k, v, sizes), expected, atol=1e-12)


@pytest.mark.parametrize("d", [7, 12])
def test_other_widths(d):
    q, k, v = random_qkv(2, S=20, d=d)
    part = attend(d=d)
    expected, _ = twin(q, k, v, part)
    for sizes in ((20,), (1,) * 20):
        np.testing.assert_allclose(run(part, q, k, v, sizes), expected, atol=1e-12)


def test_more_rows_than_one_block():
    """Three causal blocks; the last query of each against the twin."""
    S = 2 * fast.ROWS + 9
    q, k, v = random_qkv(3, S=S)
    part = attend()
    found = run(part, q, k, v, (S,))
    np.testing.assert_allclose(found, run(part, q, k, v, (1,) * S), atol=1e-12)
    for end in (fast.ROWS, fast.ROWS + 1, S):
        expected, _ = twin(q[:, end - 1 : end], k[:, :end], v[:, :end], part)
        np.testing.assert_allclose(found[:, end - 1 : end], expected, atol=1e-12)


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (2, 20, 1, 7)])
def test_a_ragged_batch_is_each_row_alone(sizes):
    """Whatever the padding holds: its keys are long here, and no maximum is to count them."""
    start = np.array([0, 4, 17])
    q, k, v = random_qkv(1, lead=(3,))
    for i, first in enumerate(start):
        k[i, :, :first] *= 100
    part = attend()
    found = run(part, q, k, v, sizes, Layer(30, start))
    assert np.isfinite(found).all()
    for i, first in enumerate(start):
        expected, _ = twin(q[i, :, first:], k[i, :, first:], v[i, :, first:], part)
        np.testing.assert_allclose(found[i, :, first:], expected, atol=1e-12)


def test_a_whole_model_generates_alike_in_a_batch_and_alone():
    lm = apply(tiny_lm(dtype=np.float64), {"elsa": {"p": 2.0}})
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    assert lm.generate(prompts, 20) == [lm.generate(prompt, 20) for prompt in prompts]


# What must hold ----------------------------------------------------------------------------------


def test_a_later_key_changes_nothing_for_earlier_queries():
    """However long it is: the largest norm is that of the keys that a query sees."""
    q, k, v = random_qkv(4)
    large = k.copy()
    large[:, -1] *= 1000
    before, after = (run(attend(), q, x, v, (30,)) for x in (k, large))
    np.testing.assert_array_equal(before[:, :-1], after[:, :-1])
    kept = kept_of(attend([0.5] * 4), q, large)
    assert kept[..., -1, :].sum(-1).max() == 1  # and beside it no other is long enough


def test_the_largest_norm_that_a_query_sees():
    norms = np.array([[3.0, 1, 4, 1, 5, 9]])
    found = largest_seen(norms, Visible(4, 6))
    assert found[..., 0].tolist() == [[[4, 4, 5, 9]]]
    assert largest_seen(norms, Visible(1, 6)).item() == 9
    padded = largest_seen(np.stack([norms, norms]), Visible(4, 6, np.array([0, 3])))
    assert padded[..., 0].tolist() == [[[[4, 4, 5, 9]]], [[[4, 1, 5, 9]]]]


def test_lengths_of_queries_and_of_all_keys_do_not_matter():
    q, k, _ = random_qkv(5)
    part = attend([0.1, 0.2, 0.3, 0.4])
    kept = kept_of(part, q, k)
    assert 0.05 < kept.sum() / (4 * 30 * 31 / 2) < 0.95
    long = q * np.random.default_rng(0).uniform(0.1, 10, (4, 30, 1))
    np.testing.assert_array_equal(kept_of(part, long, k), kept)
    np.testing.assert_array_equal(kept_of(part, q, 8 * k), kept)


def test_the_length_of_one_key_does_matter():
    """A short one is not kept, though its direction is the query's own."""
    q, k, _ = random_qkv(5)
    part = attend([0.3] * 4)
    k[:, 3] = q[::2, 9]
    assert kept_of(part, q, k)[:, 0, 9, 3].all()
    k[:, 3] *= 0.01
    assert not kept_of(part, q, k)[:, 0, 9, 3].any()


def test_survivors_are_nested():
    q, k, _ = random_qkv(6)
    kept = [kept_of(attend([t] * 4), q, k) for t in (-0.5, 0.0, 0.2, 0.4, 0.6, 0.8, 2.0)]
    for more, fewer in zip(kept, kept[1:]):
        assert (fewer <= more).all() and fewer.sum() < more.sum()
    assert (kept[-1].sum(-1) == 1).all()


def test_of_equally_alike_keys_the_earliest_is_kept_where_none_is_enough():
    q, k, _ = random_qkv(7, S=10)
    k[:] = k[:, :1]
    kept = kept_of(attend([2.0] * 4), q, k)
    assert kept[..., 0].all() and kept.sum() == 4 * 10


def test_a_key_just_at_the_threshold_is_not_kept():
    """All keys are the query itself, so each has the largest similarity there is: t = 1 has to be
    exceeded, and the earliest alone is left."""
    q, k, _ = random_qkv(7, S=10)
    q[:], k[:] = q[0, 0], q[0, 0]
    assert kept_of(attend([1.0] * 4), q, k).sum() == 4 * 10
    assert kept_of(attend([0.999] * 4), q, k).sum() == 4 * 10 * 11 // 2


def test_keys_that_are_all_zero_are_attended_to():
    q, k, v = random_qkv(8, S=6)
    found = run(attend([-0.5] * 4), q, 0 * k, v, (6,))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_a_threshold_that_all_keys_reach_is_dense_attention(sizes):
    """-1 is compared with every key, and lets it pass since the angle is taken too small."""
    q, k, v = random_qkv(9)
    expected = ops.attention(q, k, v, 0.5)
    part = attend([-1.0] * 4)
    assert not part.selector.keeps_all(30) and kept_of(part, q, k).sum() == 4 * 30 * 31 / 2
    np.testing.assert_allclose(run(part, q, k, v, sizes), expected, atol=1e-12)


@pytest.mark.parametrize("options", [{"p": 0.0}, {"t": -np.inf}, {"t": -1.5}])
def test_neutral_is_dense_bit_for_bit_and_hashes_nothing(options):
    plain = tiny_lm()
    lm = apply(plain, {"elsa": options})
    states = lm.model.new_state(), plain.model.new_state()
    pieces = IDS[:9], IDS[9:10], IDS[10:12]
    with counting(lm) as counts:
        found = [lm.model(ids, states[0]) for ids in pieces]
    for a, ids in zip(found, pieces):
        np.testing.assert_array_equal(a, plain.model(ids, states[1]))
    assert not counts.events and not states[0].layers[0].memory.kept


def test_one_head_that_keeps_all_beside_others():
    q, k, v = random_qkv(10)
    part = attend([-np.inf, -np.inf, 0.3, 0.3])
    found = run(part, q, k, v, (29, 1))
    np.testing.assert_allclose(found[:2], ops.attention(q, k, v, 0.5)[:2], atol=1e-12)
    twins, _ = twin(q, k, v, attend([-2, -2, 0.3, 0.3]))
    np.testing.assert_allclose(found, twins, atol=1e-12)


def test_the_hash_is_one_for_all_layers_and_the_thresholds_are_each_ones_own():
    lm = apply(tiny_lm(), {"elsa": True})
    chosen = [block.attn.attend.selector for block in lm.model.stack.blocks]
    first, second = (c.hash.batches[0].factors for c in chosen)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a.a, b.a)
    t = np.array([c.t for c in chosen])
    assert t.shape == (2, 2) and len(np.unique(t)) == 4
