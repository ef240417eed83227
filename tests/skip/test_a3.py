"""a3: the paper's worked example and slide, the literal twin, and what must hold of the search; the
sorted columns, fixed point and counts: see test_a3_columns.py, test_a3_fixed_point.py and
test_a3_counts.py."""

import literal_a3 as literal
import numpy as np
import pytest
from qkv import random_qkv, run
from tiny import stored, tiny_lm

from minitx import fast, ops
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.a3 import SearchedKeys, greedy_search
from minitx.skip.a3.fixed_point import FixedPoint, Rounded
from minitx.skip.a3.greedy_search import GreedySearch, pops
from minitx.skip.a3.sorted_columns import sort
from minitx.state import Layer
from minitx.technique import apply

IDS = np.random.default_rng(5).integers(0, 258, 40)
SETTINGS = {
    "conservative": dict(M=1 / 2, T=5.0),
    "aggressive": dict(M=1 / 8, T=10.0),
    "all n, no second choice": dict(M=1.0, T=0.0),
    "second choice alone": dict(M=None, T=20.0),
    "blocks of 4": dict(M=1 / 4, T=5.0, rebuild=4),
    "blocks of 1": dict(M=1 / 4, T=5.0, rebuild=1),
    "blocks longer than the text": dict(M=1 / 4, T=0.0, rebuild=99),
    "tables": dict(M=1 / 2, T=5.0, exp="tables"),
    "fixed point": dict(M=1 / 2, T=5.0, i=4, f=4, rebuild=8),
    "fixed point with tables": dict(M=1 / 2, T=0.0, i=3, f=3, exp="tables"),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def part(scale=0.5, M=0.5, T=5.0, rebuild=0, exp="exact", i=None, f=4):
    rounded = None if i is None else Rounded(i, f)
    other = FixedPoint(exp == "tables", f, rounded) if i or exp == "tables" else None
    return SparseAttention(
        SearchedKeys(GreedySearch(), M, rebuild, scale, rounded), scale, T / 100, other
    )


def greedy(q, keys, M):
    q, keys = np.array(q, float), np.array(keys, float)
    one = np.ones((1, 1, 1), int)
    n = len(keys)
    found = GreedySearch()(q[None, None, None], sort(keys[None]), 0 * one, n * one, M * one, n)
    return found[0, 0, 0]


# Worked examples ---------------------------------------------------------------------------------

FIGURE_6 = [0.8, -0.3, 0.4], [[-0.6, 0.1, 0.8], [0.1, -0.2, -0.9], [0.8, 0.6, 0.7], [0.5, 0.7, 0.5]]
SLIDE = [0.8, -0.5, 0.6], [[-0.6, 0.1, 0.4], [0.1, 0.4, -0.9], [0.9, -0.6, 0.3]]
GATE = [1, 1], [[-0.9, 0.1], [0.2, -0.5], [0.3, -0.8]]
READING = [1, 1], [[0.5, 0], [0.4, -0.45], [-0.6, 0]]
searches = pytest.mark.parametrize(
    "search",
    [greedy, lambda *a: literal.by_queues(*a)[0], lambda *a: literal.by_sorting(*a)[0]],
    ids=["minitx", "queues", "sorting"],
)


@searches
@pytest.mark.parametrize(
    "example, M, expected",
    [
        (FIGURE_6, 1, [-0.48, 0, 0.64, 0]),
        (FIGURE_6, 2, [-0.48, -0.36, 0.64, 0.40]),
        (FIGURE_6, 3, [-0.16, -0.36, 0.64, 0.19]),
        (SLIDE, 1, [0, -0.54, 0.72]),
        (SLIDE, 2, [-0.48, -0.54, 1.02]),
        (SLIDE, 3, [-0.24, -0.74, 1.02]),
        (GATE, 3, [-0.8, 0.2, 0.3]),
        (READING, 2, [0.5, -0.05, -0.6]),
    ],
)
def test_greedy_sums(search, example, M, expected):
    np.testing.assert_allclose(search(*example, M), expected, atol=1e-12)


def test_figure_6_takes_six_products_whichever_way_the_gate_is_read():
    for gate in ("after", "start", "never"):
        found, products = literal.by_queues(*FIGURE_6, 3, gate)
        np.testing.assert_allclose(found, [-0.16, -0.36, 0.64, 0.19], atol=1e-12)
        assert products == 6


def test_the_gate_and_when_it_is_read_matter():
    np.testing.assert_allclose(literal.by_queues(*GATE, 3, "never")[0], [-0.8, -0.3, -0.5])
    assert np.flatnonzero(greedy(*GATE, 3) > 0).tolist() == [1, 2]
    at_start, _ = literal.by_queues(*READING, 2, "start")
    assert [total > 0 for total in at_start] == [True, True, False]
    assert np.flatnonzero(greedy(*READING, 2) > 0).tolist() == [0]


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(M=3 / 4, T=0.0), [2.826765, 1.173235]),
        (dict(M=None, T=0.0), [2.100332, 0.960018]),
    ],
)
def test_outputs_of_figure_6(settings, expected):
    q, keys = FIGURE_6
    values = [[1, 0], [0, 1], [2, 2], [4, 0]]
    np.testing.assert_allclose(
        literal.one_query(q, keys, values, 1.0, **settings)[0], expected, 1e-6
    )
    v = np.pad(np.array(values, float), ((0, 0), (0, 1)))[None]
    q = np.broadcast_to(np.array(q), (1, 4, 3))  # four queries, of which the last sees all keys
    for sizes in ((4,), (3, 1)):
        found = run(part(1.0, **settings), q, np.array([keys]), v, sizes)[0, -1, :2]
        np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("T, kept", [(5, [1, 2, 4]), (0, [0, 1, 2, 3, 4]), (100, [1])])
@pytest.mark.parametrize("sizes", [(5,), (4, 1)])
@pytest.mark.parametrize("exp", ["exact", "tables"])
def test_second_choice(T, kept, sizes, exp):
    scores = [0, 4, 1.1, 0.9, 1.5]
    assert literal.survivors(dict(enumerate(scores)), T) == kept
    k = np.array(scores)[None, :, None] * np.eye(5)[0]
    q, v = np.broadcast_to(np.eye(5)[0], (1, 5, 5)), np.eye(5)[None]
    found = run(part(1.0, M=None, T=float(T), exp=exp), q, k, v, sizes)[0, -1]
    assert np.flatnonzero(found).tolist() == kept


# Against the twin, in every way that tokens may come ----------------------------------------------


@each_setting
@pytest.mark.parametrize("K", [1, 2, 4])
def test_it_is_the_literal_twin(settings, K):
    q, k, v = random_qkv(K=K)
    expected, chosen = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, **settings)
    for sizes in ((30,), (1,) * 30, (7, 1, 1, 16, 5)):
        attend = part(**settings)
        with counting(attend) as counts:
            found = run(attend, q, k, v, sizes)
        np.testing.assert_allclose(found, expected, atol=1e-12)
        candidates, kept = (sum(len(c[i]) for row in chosen for c in row) for i in (0, 1))
        assert counts.events["keys kept"] == kept
        assert not settings["T"] or counts.events["keys scored"] == candidates


@each_setting
def test_more_rows_than_one_block(settings, monkeypatch):
    """Three causal blocks; the last query of each against the twin; and few queries at a time."""
    S = 2 * fast.ROWS + 9
    q, k, v = random_qkv(3, S=S)
    found = run(part(**settings), q, k, v, (S,))
    monkeypatch.setattr(greedy_search, "NUMBERS", 10_000)
    again = run(part(**settings), q, k, v, (S,))
    np.testing.assert_allclose(found, again, atol=1e-12)
    np.testing.assert_allclose(found, run(part(**settings), q, k, v, (1,) * S), atol=1e-12)
    for end in (fast.ROWS, fast.ROWS + 1, S):
        last = q[:, end - 1 : end], k[:, :end], v[:, :end]
        expected, _ = literal.attention(*(x.tolist() for x in last), 0.5, **settings)
        np.testing.assert_allclose(found[:, end - 1 : end], expected, atol=1e-12)


@each_setting
@pytest.mark.parametrize("sizes", [(30,), (1,) * 30, (2, 20, 1, 7)])
def test_a_ragged_batch_is_each_row_alone(settings, sizes):
    start = np.array([0, 5, 18])
    q, k, v = random_qkv(1, lead=(3,))
    found = run(part(**settings), q, k, v, sizes, Layer(30, start))
    assert np.isfinite(found).all()
    for i, first in enumerate(start):
        row = (x[i, :, first:].tolist() for x in (q, k, v))
        expected, _ = literal.attention(*row, 0.5, **settings)
        np.testing.assert_allclose(found[i, :, first:], expected, atol=1e-12)


@pytest.mark.parametrize("rebuild", [0, 4])
def test_columns_follow_a_cache_that_was_filled_or_rewound_elsewhere(rebuild):
    q, k, v = random_qkv(2)
    attend, layer = part(M=0.25, rebuild=rebuild), Layer(30)
    expected = run(attend, q, k, v, (30,))
    run(attend, q, k, v, (6,), layer)
    stored(layer, k[:, 6:11], v[:, 6:11])
    np.testing.assert_allclose(run(attend, q, k, v, (1, 8), layer), expected[:, 11:20], atol=1e-12)
    layer.rewind(9)
    run(attend, -q, -k, -v, (4,), layer)  # something else, to be forgotten
    layer.rewind(9)
    found = run(attend, q, k, v, (3, 1, 17), layer)
    np.testing.assert_allclose(found, expected[:, 9:], atol=1e-12)
    layer.rewind(0)
    np.testing.assert_allclose(run(attend, q, k, v, (1, 29), layer), expected, atol=1e-12)


def test_a_whole_model_generates_alike_in_a_batch_and_alone():
    lm = apply(tiny_lm(dtype=np.float64), {"a3": {"rebuild": 3}})
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    together = lm.generate(prompts, 20)
    assert together == [lm.generate(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("M", [0.5, 0.1])
def test_a_prompt_chooses_what_single_tokens_choose_where_keys_are_equal(M):
    """As where a token comes again and its columns are not rotated; and in float32."""
    q, k, v = random_qkv(5, S=150, dtype=np.float32)
    words = np.random.default_rng(5).integers(0, 9, 150)
    k[..., 4:] = k[:, words, 4:]
    k = k.round(1)
    found = []
    for sizes in ((150,), (1,) * 150, (60, 1, 1, 88)):
        attend = part(M=M)
        with counting(attend) as counts:
            out = run(attend, q, k, v, sizes)
        found.append(out)
        assert out.dtype == np.float32
        assert counts.events["keys scored"] > 1000 * M
        np.testing.assert_allclose(out, found[0], atol=1e-5)
    expected, _ = literal.attention(*(x.astype(float).tolist() for x in (q, k, v)), 0.5, M=M)
    assert (abs(out - expected).max(-1) > 1e-4).mean() < 0.01  # sums of exactly 0 in float32


def test_a_later_key_changes_nothing_for_earlier_queries():
    q, k, v = random_qkv(4)
    large = k.copy()
    large[:, -1] *= 1000
    for settings in SETTINGS.values():
        before, after = (run(part(**settings), q, x, v, (30,)) for x in (k, large))
        np.testing.assert_array_equal(before[:, :-1], after[:, :-1])


# What must hold of the search --------------------------------------------------------------------


def drawn(seed, whole=False):
    """A query and keys of any size, M up to more than all products; or with many equal numbers."""
    rng = np.random.default_rng(seed)
    n, d = rng.integers(1, 60), rng.integers(1, 9)
    q = rng.standard_normal(d)
    keys = rng.standard_normal((n, d)) + rng.choice([0, -0.7, 0.7])
    if whole:
        q, keys = np.round(2 * q), np.round(2 * keys)
    M = int(rng.integers(1, n * d + 5) if seed % 3 else rng.integers(1, n + 1))
    return q, keys, M


@pytest.mark.parametrize("whole", [False, True])
def test_the_search_is_that_with_queues_and_that_which_sorts_all(whole):
    """With whole numbers many products are equal or 0, and sums hit 0 exactly."""
    for seed in range(300):
        q, keys, M = drawn(seed, whole)
        found = greedy(q, keys, M)
        np.testing.assert_allclose(
            found, literal.by_sorting(q.tolist(), keys.tolist(), M)[0], atol=1e-12
        )
        assert (found > 1e-12).sum() <= M
        if not whole:
            by_queues, products = literal.by_queues(q.tolist(), keys.tolist(), M)
            np.testing.assert_allclose(found, by_queues, atol=1e-12)
            assert products <= 2 * M
            np.testing.assert_array_equal(greedy(3.7 * q, keys, M) > 0, found > 0)


def test_equal_keys_are_taken_from_the_first_on():
    keys = np.tile([[1.0, -0.25]], (50, 1))
    found = greedy([1, 1], keys, 7)
    np.testing.assert_allclose(found, [0.75] * 7 + [0] * 43)


def test_where_no_sum_is_positive_the_best_is_kept():
    keys = -np.ones((6, 2))
    assert literal.candidates([1.0, 1.0], keys.tolist(), 0.5) == [1]  # 0 lost a product, 1 did not
    q, k, v = np.ones((1, 6, 2)), keys[None], np.arange(12.0).reshape(1, 6, 2)
    for sizes in ((6,), (1,) * 6):
        found = run(part(), q, k, v, sizes)[0]
        np.testing.assert_array_equal(found, v[0, [0, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("seed", range(20))
def test_pops_are_what_going_through_the_iterations_gives(seed):
    rng = np.random.default_rng(seed)
    M = rng.integers(1, 30, (2, 3))
    up, down = -np.sort(-rng.exponential(1, (2, 2, 3, 30)), -1)
    down *= 2
    up[..., rng.integers(1, 30) :] = 0
    for a, b, most, found in zip(
        up.reshape(6, -1), down.reshape(6, -1), M.reshape(-1), pops(up, down, M).reshape(-1)
    ):
        running = taken = 0
        for t in range(most):
            running += a[t]
            if running >= 0:
                running -= b[taken]
                taken += 1
        assert found == taken


def test_the_named_settings_and_neutral():
    dense = tiny_lm()
    expected = {
        name: apply(dense, {"a3": dict(M=M, T=T)}).logits(IDS)
        for name, M, T in (("conservative", 0.5, 5.0), ("aggressive", 0.125, 10.0))
    }
    for name, logits in expected.items():
        found = apply(dense, {"a3": {"setting": name}}).logits(IDS)
        np.testing.assert_array_equal(found, logits)
    assert abs(expected["conservative"] - expected["aggressive"]).max() > 0.1
    neutral = apply(dense, {"a3": {"M": None, "T": 0.0, "rebuild": 4}})
    state = neutral.model.new_state()
    found = [neutral.model(ids, state) for ids in (IDS[:9], IDS[9:10], IDS[10:])]
    np.testing.assert_allclose(np.concatenate(found), dense.logits(IDS), atol=1e-4)
    assert not state.layers[0].memory.kept


def test_a_huge_M_is_not_neutral():
    """Ungated it would find the scores themselves, and keep the positive ones."""
    q, keys, _ = drawn(1)
    by_queues, _ = literal.by_queues(q.tolist(), keys.tolist(), keys.size, "never")
    np.testing.assert_allclose(by_queues, keys @ q, atol=1e-12)
    q, k, v = random_qkv(6)
    assert abs(run(part(M=8.0, T=0.0), q, k, v, (30,)) - ops.attention(q, k, v, 0.5)).max() > 0.01
