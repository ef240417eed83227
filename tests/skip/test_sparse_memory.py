"""sparse_memory: the worked example, a literal twin, eviction and undoing; the rest is in
test_sparse_memory_model."""

import copy

import literal_sparse_memory as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from tiny import stored

from minitx import fast, ops
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention, Visible
from minitx.skip.sparse_memory import NearestKeys
from minitx.skip.sparse_memory.kd_trees import KDTrees
from minitx.skip.sparse_memory.nearest import Linear, random_lsh
from minitx.skip.sparse_memory.slots import Slots
from minitx.state import Layer

R = np.array([6.0, 6.0])  # longer than any key of random_qkv


def part(K=4, N=12, index="linear", delta=0.1, scale=0.5, context=30, d=8, R=R, b=2, L=3, checks=6):
    found = Linear()
    if index == "lsh":
        found = random_lsh(d, b, L, R, 3, np.float64)
    elif index == "kd-tree":
        found = KDTrees(R, K, checks, 2, 0)
    return SparseAttention(NearestKeys(found, K, min(N, context), delta, scale, context), scale)


def slots_of(layer) -> Slots:
    (found,) = (kept for kept in layer.memory.kept.values() if isinstance(kept, Slots))
    return found


# The worked example ------------------------------------------------------------------------------

KEYS = np.array([[2, 0], [0, 1], [-1, 0], [1, 1], [0, -2], [1, 0]], float)
VALUES = np.array([[1, 0], [0, 1], [2, 2], [3, 0], [0, 4], [5, 5]], float)
QUERIES = np.array([[1, 0], [2, 1], [2, 0], [0, 2], [0, -2], [2, 1]], float)
STEPS = [  # tokens in slots, evicted, {token: weight}, output
    ([0], None, {0: 1}, [1, 0]),
    ([0, 1], None, {0: 0.8930, 1: 0.1070}, [0.8930, 0.1070]),
    ([0, 1, 2], None, {0: 0.9442, 1: 0.0558}, [0.9442, 0.0558]),
    ([3, 1, 2], 0, {1: 0.5, 3: 0.5}, [1.5, 0.5]),
    ([3, 1, 4], 2, {3: 0.0142, 4: 0.9858}, [0.0425, 3.9433]),
    ([3, 5, 4], 1, {3: 0.6698, 5: 0.3302}, [3.6605, 1.6512]),
]
EXAMPLE = dict(K=2, N=3, delta=0.005, scale=0.5**0.5, context=6, d=2, R=None)


@pytest.mark.parametrize("sizes", [(1,) * 6, (6,), (2, 3, 1), (4, 2)])
def test_the_example(sizes):
    attend, layer = part(**EXAMPLE), Layer(6)
    done = 0
    for size in sizes:
        new = slice(done, done + size)
        so_far = stored(layer, KEYS[None, new], VALUES[None, new])
        out = attend(QUERIES[None, new], *so_far, layer)
        done += size
        np.testing.assert_allclose(out[0], [step[3] for step in STEPS[new]], atol=5e-5)
        slots = slots_of(layer)
        used = min(done, 3)
        assert slots.token[0, :used].tolist() == STEPS[done - 1][0]
        np.testing.assert_array_equal(slots.rows[0][0, :used], KEYS[STEPS[done - 1][0]])


def test_the_twin_has_the_example_too():
    memory = literal.Memory(3, 2, 0.005, 0.5**0.5)
    for k, v, q, (tokens, evicted, weights, output) in zip(KEYS, VALUES, QUERIES, STEPS):
        before = len(memory.evicted)
        memory.write(k, v)
        assert memory.token == tokens
        assert memory.evicted[before:] == ([] if evicted is None else [evicted])
        ((out, found),) = memory.read([q])
        np.testing.assert_allclose(out, output, atol=5e-5)
        assert found == pytest.approx(weights, abs=5e-5)
        if memory.t == 2:
            assert memory.last == [2, 2, 2]  # token 2 by its writing; so the oldest goes next


def test_the_dense_outputs_of_the_example():
    dense = ops.attention(QUERIES[None], KEYS[None], VALUES[None], 0.5**0.5)[0]
    expected = [[0.9583, 0.0818], [1.5, 0.5978], [0.1922, 3.6031], [1.9756, 0.7543]]
    np.testing.assert_allclose(dense[2:], expected, atol=5e-5)


def test_the_longest_unread_goes_and_not_the_most_recent():
    """Equation 6 read literally has it the other way round."""
    k = np.array([[[0.0, 0], [9, 0], [0, 0], [0, 0]]])
    q = np.array([[[1.0, 0], [9, 0], [9, 0], [9, 0]]])  # token 1 is all that is ever read
    layer = Layer(4)
    run(part(**EXAMPLE | {"context": 4}), q, k, k, (1,) * 4, layer)
    assert slots_of(layer).token[0].tolist() == [3, 1, 2]  # token 0 went; token 1 was read at 2


# Against the twin --------------------------------------------------------------------------------


def buckets(attend):
    """The twin's hashing with the same planes, augmented by hand."""
    lsh = attend.selector.index

    def of(x, key, h):
        rest = max(lsh.R[h] ** 2 - literal.dot(x, x), 0) ** 0.5 if key else 0
        return literal.signs([*x, rest], lsh.planes.tolist(), lsh.b)

    return of


SIZES = [(30,), (1,) * 30, (7, 1, 1, 16, 5), (12, 18), (13, 17)]


@pytest.mark.parametrize("index", ["linear", "lsh"])
@pytest.mark.parametrize("N", [1, 5, 12, 29, 30])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_it_is_the_literal_twin(index, N, heads):
    q, k, v = random_qkv(N + heads, K=heads)
    settings = dict(K=4, N=N, delta=0.1)
    attend = part(index=index, R=np.full(heads, 6.0), **settings)
    by_hand = buckets(attend) if index == "lsh" else None
    expected, read, memories = literal.attention(
        q.tolist(), k.tolist(), v.tolist(), 0.5, buckets=by_hand, **settings
    )
    for sizes in SIZES:
        layer = Layer(30)
        with counting(attend) as counts:
            found = run(attend, q, k, v, sizes, layer)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        if N < 30 or index == "lsh" or sizes == (30,):  # else the first four are all kept, unasked
            assert counts.events["keys kept"] == sum(len(r) for head in read for r in head)
        if N < 30:
            slots = slots_of(layer)
            for memory, token, last in zip(memories, slots.token, slots.last):
                assert token.tolist() == memory.token and last.tolist() == memory.last
            assert counts.events["keys evicted"] == heads * (30 - N)
            for memory in memories:
                assert len(memory.evicted) == len(set(memory.evicted)) == 30 - N


@pytest.mark.parametrize("N", [12, 30])
def test_without_a_bound_hashing_goes_by_directions(N):
    q, k, v = random_qkv(5)
    attend = part(N=N, index="lsh", R=None, b=3)

    def by_hand(x, key, h):
        return literal.signs(x, attend.selector.index.planes.tolist(), 3)

    settings = dict(N=N, K=4, delta=0.1, buckets=by_hand)
    expected, _, _ = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, **settings)
    for sizes in SIZES:
        np.testing.assert_allclose(run(attend, q, k, v, sizes), expected, atol=1e-12)


def test_hashing_leaves_keys_out_and_sometimes_too_many():
    """So that the test above tests something."""
    q, k, v = random_qkv(1)
    attend = part(N=30, index="lsh", b=3)
    lsh = attend.selector.index
    (codes,) = lsh.remember(k)
    asked = lsh(q.reshape(2, 2, 30, 8), k, (codes,)).sum(-1)
    assert asked.min() < 4 < asked.max() < 30


@pytest.mark.parametrize("index", ["linear", "lsh", "kd-tree"])
@pytest.mark.parametrize("N", [5, 12, 30])
def test_a_prompt_goes_as_single_tokens_go(index, N):
    q, k, v = random_qkv(2)
    attend = part(index=index, N=N)
    one, found = Layer(30), []
    expected = run(attend, q, k, v, (1,) * 30, one)
    for sizes in SIZES:
        layer = Layer(30)
        found = run(attend, q, k, v, sizes, layer)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        if N < 30:
            same_slots(slots_of(layer), slots_of(one))


@pytest.mark.parametrize("index", ["linear", "lsh", "kd-tree"])
@pytest.mark.parametrize("N", [5, 30])
def test_an_even_batch_is_each_row_alone(index, N):
    q, k, v = random_qkv(3, lead=(2,))
    attend = part(index=index, N=N)
    found = run(attend, q, k, v, (9, 1, 20))
    for i in (0, 1):
        alone = run(attend, q[i], k[i], v[i], (30,))
        if index == "kd-tree":  # each memory draws its trees for itself
            assert np.isfinite(found[i]).all()
        else:
            np.testing.assert_allclose(found[i], alone, atol=1e-12)


@pytest.mark.parametrize("index", ["linear", "lsh"])
def test_a_ragged_batch_where_nothing_is_evicted(index):
    start = np.array([0, 4, 17])
    q, k, v = random_qkv(1, lead=(3,))
    attend = part(index=index, N=30)
    for sizes in ((30,), (1,) * 30, (2, 20, 1, 7)):
        found = run(attend, q, k, v, sizes, Layer(30, start))
        assert np.isfinite(found).all()
        for i, first in enumerate(start):
            alone = run(attend, q[i, :, first:], k[i, :, first:], v[i, :, first:], (30 - first,))
            np.testing.assert_allclose(found[i, :, first:], alone, atol=1e-12)


def test_more_rows_than_one_block():
    S = 2 * fast.ROWS + 9
    q, k, v = random_qkv(3, S=S)
    for N in (fast.ROWS // 2, fast.ROWS + 5, S):
        attend = part(N=N, context=S)
        found = run(attend, q, k, v, (S,))
        np.testing.assert_allclose(found, run(attend, q, k, v, (1,) * S), atol=1e-12)
        expected, _, _ = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, N, 4, 0.1)
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_all_keys_are_dense_attention():
    q, k, v = random_qkv(6)
    expected = ops.attention(q, k, v, 0.5)
    np.testing.assert_array_equal(run(part(K=30, N=30), q, k, v, (30,)), expected)
    found = run(part(K=30, N=30, index="kd-tree", checks=None), q, k, v, (30,))
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_exact_trees_choose_what_a_look_at_all_keys_chooses():
    q, k, v = random_qkv(7)
    for N in (7, 30):
        expected = run(part(N=N), q, k, v, (30,))
        for bound in (R, None):
            found = run(part(N=N, index="kd-tree", checks=None, R=bound), q, k, v, (30,))
            np.testing.assert_allclose(found, expected, atol=1e-12)


# Eviction and undoing ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_ring_of_slots_evicts_alike(seed):
    """The paper's list in O(1), moved in the order of tokens, has (last, token) least in front."""
    rng = np.random.default_rng(seed)
    N = 5
    ring, token, last = literal.LeastRecentlyAccessed(N), list(range(N)), list(range(N))
    for slot in range(N):
        ring.access(slot)
    for t in range(N, 80):
        victim = min(range(N), key=lambda i: (last[i], token[i]))
        assert ring.front == victim
        token[victim] = last[victim] = t
        read = {victim, *rng.choice(N, rng.integers(0, N), replace=False).tolist()}
        for slot in sorted(read, key=lambda i: token[i]):
            last[slot] = t
            ring.access(slot)


def same_slots(one: Slots, other: Slots):
    for a, b in zip(
        (*one.rows, one.token, one.last), (*other.rows, other.token, other.last), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    assert one.held == other.held and one.count == other.count
    assert len(one.journal) == len(other.journal) == one.count
    for step, twin in zip(one.journal, other.journal):
        np.testing.assert_array_equal(step[:3], twin[:3])
        assert step.held == twin.held
        for a, b in zip(step.read, twin.read, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("index", ["linear", "lsh", "kd-tree"])
@pytest.mark.parametrize("N", [5, 12])
@pytest.mark.parametrize("sizes", [(1,) * 30, (30,), (11, 19)])
def test_undoing_every_step_goes_back_through_every_state(index, N, sizes):
    """Bit for bit, down to the empty memory."""
    q, k, v = random_qkv(8)
    attend, layer = part(index=index, N=N), Layer(30)
    run(attend, q, k, v, sizes, layer)
    slots = slots_of(layer)
    for back_to in (30, 21, 13, 12, 11, 5, 4, 1):
        layer.rewind(back_to)
        assert slots.count == back_to == len(slots.journal)
        run(attend, *(x[:, :back_to] for x in (q, k, v)), (back_to,), once := Layer(30))
        same_slots(slots, slots_of(once))
    layer.rewind(0)
    empty = Slots(slots.source, slots.index, 4, N, 0.1)
    same_slots(slots, empty)


def test_a_step_in_the_journal_is_small():
    q, k, v = random_qkv(9, S=200)
    layer = Layer(200)
    run(part(K=3, N=100, context=200), q, k, v, (200,), layer)
    for step in slots_of(layer).journal:
        (memories, _), last = step.read
        assert np.bincount(memories, minlength=2).max() <= 2 * 3  # G heads, K keys
        assert len(last) == len(memories) and len(step.slot) == len(step.token) == 2


@pytest.mark.parametrize("index", ["linear", "lsh", "kd-tree"])
def test_rewinding_and_keys_that_passed_by(index):
    """A block may be skipped that still stores its keys: these are written and not read."""
    q, k, v = random_qkv(2)
    attend, layer = part(index=index, N=7), Layer(30)

    def skip(many):
        new = slice(layer.tokens.end, layer.tokens.end + many)
        stored(layer, k[:, new], v[:, new])

    def journey():
        found = [run(attend, q, k, v, (6,), layer)]
        skip(5)
        found.append(run(attend, q, k, v, (1, 8), layer))
        skip(2)
        return np.concatenate([*found, run(attend, q, k, v, (1,) * 8, layer)], 1)

    once = journey()
    slots = slots_of(layer)
    assert all(not slots.journal[t].read for t in (6, 10, 20, 21))
    assert slots.journal[11].read and slots.count == 30
    before = copy.deepcopy((slots.token, slots.last, slots.rows))
    layer.rewind(17)
    run(attend, -q, -k, -v, (6,), layer)  # something else, to be forgotten
    layer.rewind(0)
    np.testing.assert_array_equal(journey(), once)
    np.testing.assert_array_equal(before[:2], (slots.token, slots.last))
    for a, b in zip(before[2], slots.rows, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_read_that_was_evicted_and_N_is_never_exceeded():
    q, k, v = random_qkv(4, S=60)
    attend, layer = part(N=9, context=60), Layer(60)
    choose, gone = attend.selector, [set(), set()]
    before = [set(), set()]
    for t in range(60):
        new = slice(t, t + 1)
        keys, _ = stored(layer, k[:, new], v[:, new])
        known = choose.remember(keys, layer)
        kept = choose(q[:, new], keys, known, Visible(1, t + 1))  # (K, G, 1, S)
        assert (kept.sum(-1) == min(4, t + 1)).all()
        for h in (0, 1):
            now = set(known.token[h, : min(t + 1, 9)].tolist())
            assert len(now) == min(t + 1, 9) and t in now
            gone[h] |= before[h] - now
            assert len(gone[h]) == max(0, t + 1 - 9) and not gone[h] & now
            assert set(np.nonzero(kept[h])[2].tolist()) <= now
            before[h] = now
