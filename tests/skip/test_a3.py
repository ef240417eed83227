"""a3: the paper's worked example, the literal versions; then the search, the sorted columns, fixed
point, counts and options."""

import math

import literal_a3 as literal
import numpy as np
import pytest
from qkv import check_long_prompt, check_padded_batch, random_qkv, run
from same import assert_same
from tiny import check_close, in_chunks, stored, tiny_lm

from minitx import ops
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.shared.sparse_attention import SparseAttention
from minitx.skip.a3 import GreedySelector, greedy_search
from minitx.skip.a3.fixed_point import (
    FixedPointAttend,
    Rounding,
    exp_from_tables,
    exp_tables,
)
from minitx.skip.a3.sorted_columns import (
    SortedColumns,
    cached_columns,
    merge_columns,
    sort_columns,
)
from minitx.state import Layer
from minitx.technique import apply, find
from minitx.tree import Part, part

IDS = np.random.default_rng(5).permutation(258)[:40]
SETTINGS = {
    "conservative": dict(iterations=1 / 2, threshold=5.0),
    "aggressive": dict(iterations=1 / 8, threshold=10.0),
    "all n, no second filter": dict(iterations=1.0, threshold=0.0),
    "second filter alone": dict(iterations=None, threshold=20.0),
    "groups of 4": dict(iterations=1 / 4, threshold=5.0, rebuild=4),
    "groups of 1": dict(iterations=1 / 4, threshold=5.0, rebuild=1),
    "groups longer than the text": dict(iterations=1 / 4, threshold=0.0, rebuild=99),
    "tables": dict(iterations=1 / 2, threshold=5.0, exp="tables"),
    "fixed point": dict(
        iterations=1 / 2, threshold=5.0, integer_bits=4, fraction_bits=4, rebuild=8
    ),
    "fixed point with tables": dict(
        iterations=1 / 2, threshold=0.0, integer_bits=3, fraction_bits=3, exp="tables"
    ),
}
each_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


def a3_part(
    scale=0.5,
    iterations=0.5,
    threshold=5.0,
    rebuild=0,
    exp="exact",
    integer_bits=None,
    fraction_bits=4,
):
    """a3's attention with these options."""
    rounding = None if integer_bits is None else Rounding(integer_bits, fraction_bits)
    arithmetic = None
    if rounding or exp == "tables":
        arithmetic = FixedPointAttend(exp == "tables", fraction_bits, rounding)
    selector = GreedySelector(iterations, rebuild, scale, rounding)
    return SparseAttention(selector, scale, threshold / 100, arithmetic)


def greedy_sums(q, keys, M):
    """minitx's search for one query over keys (n, d)."""
    columns = sort_columns(np.array(keys, float))
    return np.array(greedy_search([float(x) for x in q], columns, M, len(keys)))


# Worked examples ---------------------------------------------------------------------------------

FIGURE_6 = [0.8, -0.3, 0.4], [[-0.6, 0.1, 0.8], [0.1, -0.2, -0.9], [0.8, 0.6, 0.7], [0.5, 0.7, 0.5]]
SLIDE = [0.8, -0.5, 0.6], [[-0.6, 0.1, 0.4], [0.1, 0.4, -0.9], [0.9, -0.6, 0.3]]
GATE = [1, 1], [[-0.9, 0.1], [0.2, -0.5], [0.3, -0.8]]
READING = [1, 1], [[0.5, 0], [0.4, -0.45], [-0.6, 0]]


@pytest.mark.parametrize(
    "search",
    [
        greedy_sums,
        lambda *a: literal.search_by_queues(*a)[0],
        lambda *a: literal.search_by_sorting(*a)[0],
    ],
    ids=["minitx", "queues", "sorting"],
)
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
def test_greedy_sums_of_the_worked_examples(search, example, M, expected):
    """Figure 6: q = (0.8, -0.3, 0.4). The products by key, row by row:

    key 0: -0.48, -0.03,  0.32        iteration 1 pops  0.64 (key 2) and -0.48 (key 0)
    key 1:  0.08,  0.06, -0.36        iteration 2 pops  0.40 (key 3) and -0.36 (key 1)
    key 2:  0.64, -0.18,  0.28        iteration 3 pops  0.32 (key 0) and -0.21 (key 3)
    key 3:  0.40, -0.21,  0.20
    greedy: -0.48 + 0.32 = -0.16, -0.36, 0.64, 0.40 - 0.21 = 0.19: candidates are keys 2 and 3.
    """
    found = search(*example, M)
    assert_same(found, expected, "greedy sums", atol=1e-12)


def test_figure_6_pops_six_products_at_any_reading_of_the_gate():
    for gate in ("after", "start", "never"):
        found, products = literal.search_by_queues(*FIGURE_6, 3, gate)
        assert_same(found, [-0.16, -0.36, 0.64, 0.19], atol=1e-12)
        assert products == 6


def test_gate_is_read_after_the_largest_product():
    never, _ = literal.search_by_queues(*GATE, 3, "never")
    assert_same(never, [-0.8, -0.3, -0.5], tolerance=1e-7)
    assert np.flatnonzero(greedy_sums(*GATE, 3) > 0).tolist() == [1, 2], "no gate"
    at_start, _ = literal.search_by_queues(*READING, 2, "start")
    assert [total > 0 for total in at_start] == [True, True, False]
    assert np.flatnonzero(greedy_sums(*READING, 2) > 0).tolist() == [0], "read at the start"


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(iterations=3 / 4, threshold=0.0), [2.826765, 1.173235]),
        (dict(iterations=None, threshold=0.0), [2.100332, 0.960018]),
    ],
)
def test_attention_output_of_figure_6(settings, expected):
    q, keys = FIGURE_6
    values = [[1, 0], [0, 1], [2, 2], [4, 0]]
    output, _, _ = literal.attend(q, keys, values, 1.0, **settings)
    assert_same(output, expected, tolerance=1e-6)
    v = np.pad(np.array(values, float), ((0, 0), (0, 1)))[None]
    q = np.broadcast_to(np.array(q), (1, 4, 3))  # four equal queries; the last sees all keys
    for sizes in ((4,), (3, 1)):
        found = run(a3_part(1.0, **settings), q, np.array([keys]), v, sizes)[0, -1, :2]
        assert_same(found, expected, tolerance=1e-6)


@pytest.mark.parametrize("threshold, kept", [(5, [1, 2, 4]), (0, [0, 1, 2, 3, 4]), (100, [1])])
@pytest.mark.parametrize("sizes", [(5,), (4, 1)])
@pytest.mark.parametrize("exp", ["exact", "tables"])
def test_second_filter_keeps_scores_near_the_largest(threshold, kept, sizes, exp):
    """The largest is 4; threshold=5 allows ln(100 / 5) = 3.0 less: 1.1 and 1.5, but not 0.9."""
    scores = [0, 4, 1.1, 0.9, 1.5]
    assert literal.filter_by_score(dict(enumerate(scores)), threshold) == kept
    k = np.array(scores)[None, :, None] * np.eye(5)[0]
    q, v = np.broadcast_to(np.eye(5)[0], (1, 5, 5)), np.eye(5)[None]
    part = a3_part(1.0, iterations=None, threshold=float(threshold), exp=exp)
    found = run(part, q, k, v, sizes)[0, -1]
    assert np.flatnonzero(found).tolist() == kept


# Equal to the literal version, however the tokens arrive ------------------------------------------


@each_setting
@pytest.mark.parametrize("K", [1, 2, 4])
def test_attention_equals_the_literal_version(settings, K):
    q, k, v = random_qkv(K=K)
    expected, selected = literal.attention(q.tolist(), k.tolist(), v.tolist(), 0.5, **settings)
    for sizes in ((30,), (1,) * 30, (7, 1, 1, 16, 5)):
        attend = a3_part(**settings)
        with counting(attend) as counts:
            found = run(attend, q, k, v, sizes)
        assert_same(found, expected, f"chunks of {sizes}", atol=1e-12)
        candidates, kept = (sum(len(s[i]) for row in selected for s in row) for i in (0, 1))
        assert counts.events["keys kept"] == kept, "after the second filter"
        assert not settings["threshold"] or counts.events["keys scored"] == candidates


@each_setting
def test_prompt_longer_than_a_block_equals_the_literal_version(settings):
    check_long_prompt(
        a3_part(**settings), lambda q, k, v: literal.attention(q, k, v, 0.5, **settings)[0]
    )


@each_setting
def test_padded_batch_equals_each_row_alone(settings):
    def literal_attention(q, k, v):
        return literal.attention(q, k, v, 0.5, **settings)[0]

    check_padded_batch(a3_part(**settings), literal_attention, (0, 5, 18))


@pytest.mark.parametrize("rebuild", [0, 4])
def test_columns_follow_a_cache_that_others_fill_or_rewind(rebuild):
    q, k, v = random_qkv(2)
    attend, layer = a3_part(iterations=0.25, rebuild=rebuild), Layer(30)
    expected = run(attend, q, k, v, (30,))
    run(attend, q, k, v, (6,), layer)
    stored(layer, k[:, 6:11], v[:, 6:11])
    assert_same(run(attend, q, k, v, (1, 8), layer), expected[:, 11:20], atol=1e-12)
    layer.rewind(9)
    run(attend, -q, -k, -v, (4,), layer)  # other keys, which the next rewind removes
    layer.rewind(9)
    found = run(attend, q, k, v, (3, 1, 17), layer)
    assert_same(found, expected[:, 9:], atol=1e-12)
    layer.rewind(0)
    assert_same(run(attend, q, k, v, (1, 29), layer), expected, atol=1e-12)


def test_generation_in_a_batch_equals_generation_alone():
    lm = apply(tiny_lm(dtype=np.float64), {"a3": {"rebuild": 3}})
    prompts = [IDS[:12].tolist(), IDS[20:23].tolist(), IDS[5:6].tolist()]
    together = lm.generate(prompts, 20)
    assert together == [lm.generate(prompt, 20) for prompt in prompts]


@pytest.mark.parametrize("iterations", [0.5, 0.1])
def test_prompt_selects_what_single_tokens_select_with_equal_keys_in_float32(iterations):
    """As where a token comes again and its columns are not rotated."""
    q, k, v = random_qkv(5, S=150, dtype=np.float32)
    words = np.random.default_rng(5).integers(0, 9, 150)
    k[..., 4:] = k[:, words, 4:]
    k = k.round(1)
    found = []
    for sizes in ((150,), (1,) * 150, (60, 1, 1, 88)):
        attend = a3_part(iterations=iterations)
        with counting(attend) as counts:
            out = run(attend, q, k, v, sizes)
        found.append(out)
        assert out.dtype == np.float32
        assert counts.events["keys scored"] > 1000 * iterations
        assert_same(out, found[0], atol=1e-5)
    exact = (x.astype(float).tolist() for x in (q, k, v))
    expected, _ = literal.attention(*exact, 0.5, iterations=iterations)
    assert (abs(out - expected).max(-1) > 1e-4).mean() < 0.01


@pytest.mark.parametrize("family", ["gpt_neox", "skipless"])
def test_few_tokens_again_and_again_are_searched_alike_in_all_steps(family):
    """Half of a head's columns are not rotated: in block 0 all keys of a token are equal there, but
    for what one product of many rows and many of one row round differently."""
    lm = apply(tiny_lm(family, dtype=np.float64), {"a3": {"threshold": 0.0}})
    for ids in (np.arange(40) % 3 + 5, np.random.default_rng(1).integers(5, 9, 40)):
        whole = lm.logits(ids)
        for sizes in ((12, *[1] * 28), (7, 20, 13), (1,) * 40):
            check_close(in_chunks(lm, ids, sizes), whole, 1e-10, f"in steps of {sizes[:2]}")


def test_later_key_changes_nothing_for_earlier_queries():
    q, k, v = random_qkv(4)
    large = k.copy()
    large[:, -1] *= 1000
    for settings in SETTINGS.values():
        before, after = (run(a3_part(**settings), q, x, v, (30,)) for x in (k, large))
        assert_same(before[:, :-1], after[:, :-1])


# Greedy search -----------------------------------------------------------------------------------


def random_search(seed, integers=False):
    """A query, keys and M up to more than all products; with integers, many equal numbers."""
    rng = np.random.default_rng(seed)
    n, d = rng.integers(1, 60), rng.integers(1, 9)
    q = rng.standard_normal(d)
    keys = rng.standard_normal((n, d)) + rng.choice([0, -0.7, 0.7])
    if integers:
        q, keys = np.round(2 * q), np.round(2 * keys)
    M = int(rng.integers(1, n * d + 5) if seed % 3 else rng.integers(1, n + 1))
    return q, keys, M


@pytest.mark.parametrize("integers", [False, True])
def test_search_equals_sorting_all_products_and_the_literal_queues(integers):
    """With integers many products are equal or 0, and sums are exactly 0."""
    for seed in range(300):
        q, keys, M = random_search(seed, integers)
        found = greedy_sums(q, keys, M)
        by_sorting, _ = literal.search_by_sorting(q.tolist(), keys.tolist(), M)
        assert_same(found, by_sorting, f"search {seed}", atol=1e-12)
        assert (found > 1e-12).sum() <= M, "more candidates than iterations"
        if not integers:
            by_queues, products = literal.search_by_queues(q.tolist(), keys.tolist(), M)
            assert_same(found, by_queues, atol=1e-12)
            assert products <= 2 * M
            assert_same(greedy_sums(3.7 * q, keys, M) > 0, found > 0)


def test_ties_go_to_the_lower_column_and_there_to_the_outer_number():
    """Fifty equal keys, q = (1, 1): the largest products are popped from the end of column 0, key
    49 first, and the smallest from the start of column 1, key 0 first."""
    keys = np.tile([[1.0, -0.25]], (50, 1))
    found = greedy_sums([1, 1], keys, 7)
    assert_same(found, [-0.25] * 7 + [0] * 36 + [1] * 7, tolerance=1e-7)


def test_largest_greedy_sum_is_kept_if_none_is_positive():
    keys = -np.ones((6, 2))
    selected = literal.candidates([1.0, 1.0], keys.tolist(), 0.5)
    assert selected == [1], "key 0 has lost a product, key 1 is the first that has not"
    q, k, v = np.ones((1, 6, 2)), keys[None], np.arange(12.0).reshape(1, 6, 2)
    for sizes in ((6,), (1,) * 6):
        found = run(a3_part(), q, k, v, sizes)[0]
        assert_same(found, v[0, [0, 1, 1, 1, 1, 1]])


def test_many_iterations_are_not_neutral():
    """Without a gate they would give the scores themselves, and keep the positive ones."""
    q, keys, _ = random_search(1)
    by_queues, _ = literal.search_by_queues(q.tolist(), keys.tolist(), keys.size, "never")
    assert_same(by_queues, keys @ q, atol=1e-12)
    q, k, v = random_qkv(6)
    found = run(a3_part(iterations=8.0, threshold=0.0), q, k, v, (30,))
    assert abs(found - ops.attention(q, k, v, 0.5)).max() > 0.01


# Sorted columns ----------------------------------------------------------------------------------


@part
class Owner(Part):
    """Whose columns they are."""


def random_keys(seed, lead=(2,), n=40, d=5, step=None):
    k = np.random.default_rng(seed).standard_normal((*lead, n, d)).astype(np.float32)
    return np.round(k / step) * np.float32(step) if step else k


def assert_sorted(found, k):
    """Each column, number by number; equal numbers in the order of their keys."""
    *lead, n, d = k.shape
    assert found.values.shape == found.rows.shape == (*lead, d, n)
    assert found.values.dtype == k.dtype and found.rows.dtype == np.int32
    for head in np.ndindex(*lead):
        for j in range(d):
            expected = sorted((float(x), row) for row, x in enumerate(k[head][:, j]))
            column = list(zip(found.values[head][j].tolist(), found.rows[head][j]))
            assert column == expected, f"column {j} of head {head} is not sorted"


@pytest.mark.parametrize("lead", [(2,), (3, 1)])
@pytest.mark.parametrize("step", [None, 0.5])  # few, or many equal numbers
def test_inserting_equals_sorting_on_every_prefix(lead, step):
    k = random_keys(1, lead, step=step)
    columns = SortedColumns(40)
    for n in range(1, 41):
        assert_sorted(columns.extend(k[..., :n, :]), k[..., :n, :])


@pytest.mark.parametrize("step", [None, 0.5])
@pytest.mark.parametrize("sizes", [(40,), (1, 39), (7, 1, 1, 20, 11)])
def test_merging_equals_sorting(sizes, step):
    k, columns, n = random_keys(2, step=step), SortedColumns(40), 0
    for size in sizes:
        n += size
        assert_sorted(columns.extend(k[..., :n, :]), k[..., :n, :])
    assert_sorted(columns.extend(k[..., :n, :]), k)  # nothing new
    assert_sorted(merge_columns(sort_columns(k[:, :15]), sort_columns(k[:, 15:], 15)), k)


def test_rewinding_columns_removes_keys():
    k, columns = random_keys(3, step=0.5), SortedColumns(40)
    columns.extend(k)
    for position in (40, 33, 32, 5):
        columns.rewind(position)
        assert_sorted(columns.current(), k[:, :position])
    assert_sorted(columns.extend(-k[:, :6]), np.concatenate([k[:, :5], -k[:, 5:6]], 1))
    columns.rewind(0)
    assert columns.current().rows.shape == (2, 5, 0)
    assert_sorted(columns.extend(k[:, :1]), k[:, :1])
    assert_sorted(columns.extend(k), k)


def test_columns_between_two_keys():
    k = random_keys(4, step=0.5)
    columns = sort_columns(k)
    for end in (1, 17, 39, 40, 50):
        assert_sorted(columns.between(0, end), k[:, :end])
    values, rows = columns.between(5, 17)
    assert_sorted(type(columns)(values, rows - np.int32(5)), k[:, 5:17])
    assert columns.between(9, 9).rows.shape == (2, 5, 0)


def test_cached_columns_of_a_layer():
    k, layer, owner = random_keys(5), Layer(40), Owner()
    assert cached_columns(owner, k[:, :0], layer) is None
    assert_sorted(cached_columns(owner, k[:, :9], layer), k[:, :9])
    layer.memory.rewind(4)
    assert_sorted(cached_columns(owner, k, layer), k)
    passing = Layer(40, remember=False)
    assert_sorted(cached_columns(owner, k, passing), k)
    assert not passing.memory.kept and cached_columns(owner, k[:, :0], passing) is None


def test_sorted_values_moved_are_counted():
    k = np.array([[[2.0, 1], [4, 3], [6, 5], [3, 0]]])
    columns = SortedColumns(4)
    with counting(Owner()) as counts:
        columns.extend(k[:, :3])
    assert counts.events == {"sorted values moved": 6}
    with counting(Owner()) as counts:
        columns.extend(k)  # 4 and 6 move; 1, 3 and 5; and the new numbers themselves
    assert counts.events == {"sorted values moved": 5 + 2}


def test_rebuild_sorts_when_a_group_is_full():
    q, k, v = random_qkv(2, S=20)
    attend = a3_part(iterations=0.25, threshold=0.0, rebuild=8)
    layer, moved = Layer(20), []
    for _ in range(20):
        with counting(attend) as counts:
            run(attend, q, k, v, (1,), layer)
        moved.append(counts.events["sorted values moved"])
        unfinished = layer.tokens.end % 8
        assert counts.events["keys kept"] >= 4 * unfinished
        assert counts.events["keys kept"] <= 4 * (unfinished + max(1, round(layer.tokens.end / 4)))
    assert {n for n, found in enumerate(moved, 1) if found} == {8, 16}
    assert moved[15] == 2 * 8 * 16


# Fixed point and exponential tables --------------------------------------------------------------


def test_rounding_to_fixed_point_saturates():
    x = np.array([0.03, 0.04, -0.04, 1.0, 15.93, 15.99, 16, -1e9, 3.1])
    expected = [0, 0.0625, -0.0625, 1, 15.9375, 15.9375, 15.9375, -15.9375, 3.125]
    assert_same(Rounding(4, 4)(x), expected)
    assert [literal.fixed_point(number, 4, 4) for number in x] == expected
    assert Rounding(4, 4)(x.astype(np.float32)).dtype == np.float32


def test_exp_tables_have_256_entries_for_16_bits():
    integer, fraction = exp_tables(256, np.dtype(np.float64))
    assert len(integer) == len(fraction) == 256
    assert_same(integer[3] * fraction[128], np.exp(-3.5), tolerance=1e-15)


@pytest.mark.parametrize("f, unit", [(1, 1 / 4), (3, 1 / 64), (4, 1 / 256), (8, 2.0**-16)])
@pytest.mark.parametrize("dtype, noise", [(np.float64, 1e-15), (np.float32, 2e-7)])
def test_exp_from_tables_is_exact_up_to_half_a_unit(f, unit, dtype, noise):
    x = -np.linspace(0, 2 * 4**f, 100_001).astype(dtype)
    found = exp_from_tables(x, f)
    assert found.dtype == dtype and found[0] == 1
    rounded = np.rint(x / unit) * unit
    inside = -rounded < 4**f
    assert_same(found[inside], np.exp(rounded[inside]), tolerance=2 * noise, atol=1e-37)
    assert abs(found - np.exp(x)).max() <= unit / 2 + noise
    if f == 4:
        assert unit / 2 == 1 / 512 and abs(found - np.exp(x)).max() > 1 / 600  # no better either
    assert not found[~inside].any() and (~inside).any()
    expected = [literal.exp_from_tables(float(y), f) for y in x[:50]]
    assert expected == pytest.approx(found[:50], rel=1e-6)


def test_exp_from_tables_is_0_beyond_the_last_entry():
    assert_same(exp_from_tables(np.array([-256, -300, -1e30]), 4), 0)
    found = exp_from_tables(np.array([-1e30, 0], np.float32), 8)
    assert_same(found, [0, 1])


@pytest.mark.parametrize("sizes", [(30,), (1,) * 30])
def test_fixed_point_error_falls_with_more_fraction_bits(sizes):
    q, k, v = random_qkv(6)
    exact = ops.attention(q, k, v, 0.5)
    all_keys = dict(iterations=None, threshold=0.0, exp="tables")
    errors = []
    for f in (2, 4, 6, 8):
        found = run(a3_part(**all_keys, integer_bits=4, fraction_bits=f), q, k, v, sizes)
        errors.append(abs(found - exact).max())
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1 > 0.02 > errors[-1]
    tables_alone = run(a3_part(**all_keys), q, k, v, sizes)
    assert 1e-6 < abs(tables_alone - exact).max() < 0.01


def test_fixed_point_outputs_are_multiples_of_their_unit():
    """Weights have 2 f fraction bits and values f: with f = 2 the unit is 2^-6."""
    q, k, v = random_qkv(7, dtype=np.float32)
    for exp in ("exact", "tables"):
        found = run(a3_part(integer_bits=4, fraction_bits=2, exp=exp), q, k, v, (29, 1))
        assert found.dtype == np.float32
        assert_same(found * 64, np.rint(found * 64))
        assert (found * 16 != np.rint(found * 16)).any()


def test_fixed_point_weights_below_half_a_unit_are_lost():
    """With 8 fraction bits, 1 / 512 rounds to 0: that happens with 512 equal keys."""
    ones = np.ones((1, 600, 2))
    part = a3_part(iterations=None, threshold=0.0, integer_bits=4, fraction_bits=4)
    found = run(part, ones, ones, ones, (600,))[0, :, 0]
    assert found[0] == 1 and found[510] == 511 / 256 and not found[511:].any()


def test_search_reads_rounded_numbers():
    """Keys that round to 0 have no positive product: then the first is kept."""
    q, v = np.ones((1, 3, 2)), np.eye(3, 2)[None]
    k = np.array([[[0.01, 0.01], [0.02, 0.02], [0.03, 0.03]]])
    for sizes in ((3,), (1, 1, 1)):
        rounded = a3_part(1.0, integer_bits=4, fraction_bits=4)
        assert_same(run(rounded, q, k, v, sizes)[0, -1], v[0, 0])
        assert run(a3_part(1.0), q, k, v, sizes)[0, -1, 0] != 1


# Counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("iterations, threshold", [(0.5, 0.0), (0.1, 0.0), (0.5, 5.0)])
def test_counted_cost_of_a_decoded_token_is_the_cards(family, iterations, threshold):
    lm = apply(tiny_lm(family), {"a3": {"iterations": iterations, "threshold": threshold}})
    c, state = lm.model.config, lm.model.new_state()
    H, K, d, n = c.heads, c.kv_heads, c.head_width, 30
    M = round(iterations * n)
    lm.model(IDS[: n - 1], state)
    with counting(lm) as counts:
        lm.model(IDS[n - 1 : n], state)
    blocks = [f"model.stack.blocks.{i}.attn.attend" for i in range(c.layers)]
    events = counts.events
    popped = sum(counts.entries[path + ".selector"].multiply_adds for path in blocks)
    popped -= c.layers * H * 2 * d
    assert popped == events["products popped"]
    assert c.layers * H * M < popped <= c.layers * H * 2 * M
    for path in blocks:
        entry = counts.entries[path + ".selector"]
        assert entry.multiply_adds <= H * 2 * (d + M)
        numbers = entry.multiply_adds + entry.multiply_adds - H * 2 * d  # values; rows if popped
        assert entry.cache_bytes == 4 * numbers
    assert events["keys seen"] == c.layers * H * n
    scored = events["keys scored" if threshold else "keys kept"]
    assert c.layers * H <= scored <= c.layers * H * max(1, M)
    exact = sum(counts.entries[path].multiply_adds for path in blocks)
    assert exact == d * (scored + events["keys kept"])
    moved = events["sorted values moved"]
    assert c.layers * K * d <= moved <= c.layers * K * d * n
    dense, state = tiny_lm(family), lm.model.new_state()
    dense.model(IDS[: n - 1], state)
    with counting(dense) as counts:
        dense.model(IDS[n - 1 : n], state)
    assert counts.entries[blocks[0]].multiply_adds == H * 2 * n * d


@pytest.mark.parametrize("n", [100, 1000])
def test_counted_products_are_those_of_the_literal_version(n):
    q, k, v = random_qkv(1, S=n, d=16)
    attend, layer = a3_part(iterations=0.125), Layer(n)
    stored(layer, k[:, :-1], v[:, :-1])
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    M = round(n / 8)
    popped = [
        literal.search_by_sorting(q[h, -1].tolist(), k[h // 2].tolist(), M)[1] for h in range(4)
    ]
    assert counts.events["products popped"] == sum(popped) <= 4 * 2 * M
    made = counts.entries["selector"].multiply_adds
    assert made == sum(popped) + 4 * 2 * 16 <= 4 * 2 * (16 + M)
    assert made < 4 * n * 16 / (2 if n == 100 else 4), "as many products as there are"
    last = (x.tolist() for x in (q[:, -1:], k, v))
    _, selected = literal.attention(*last, 0.5, iterations=0.125, threshold=5.0)
    assert counts.events["keys scored"] == sum(len(row[0][0]) for row in selected)
    assert counts.events["keys kept"] == sum(len(row[0][1]) for row in selected)


def test_equal_products_cost_no_more_than_others():
    """Keys of two ones, and q = (1, 1): M products of column 0 are popped, and none is negative."""
    q, k, v = np.ones((3, 1, 50, 2))
    attend = a3_part()
    with counting(attend) as counts:
        run(attend, q, k, v, (1,) * 50)
    M = [max(1, round(n / 2)) for n in range(1, 51)]
    assert counts.events["keys scored"] == sum(M)
    assert counts.entries["selector"].multiply_adds == sum(M) + 50 * 2 * 2


@pytest.mark.parametrize("options", [{"exp": "tables"}, {"integer_bits": 4}])
def test_fixed_point_counts_the_rows_that_it_gathers(options):
    q, k, v = random_qkv(3, S=20)
    attend, layer = a3_part(**options), Layer(20)
    run(attend, q, k, v, (19,), layer)
    _, selected = literal.attention(*(x.tolist() for x in (q[:, -1:], k, v)), 0.5, **options)
    most = max(len(row[0][0]) for row in selected)
    with counting(attend) as counts:
        run(attend, q, k, v, (1,), layer)
    assert counts.entries["arithmetic"].multiply_adds == 4 * 2 * 8 * most
    assert counts.events["keys kept"] == sum(len(row[0][1]) for row in selected)


# Options -----------------------------------------------------------------------------------------


def test_presets_are_the_papers_settings_and_neutral_is_dense():
    dense = tiny_lm()
    expected = {
        name: apply(dense, {"a3": SETTINGS[name]}).logits(IDS)
        for name in ("conservative", "aggressive")
    }
    for name, logits in expected.items():
        found = apply(dense, {"a3": {"preset": name}}).logits(IDS)
        assert_same(found, logits)
    assert abs(expected["conservative"] - expected["aggressive"]).max() > 0.1
    neutral = apply(dense, {"a3": {"iterations": None, "threshold": 0.0, "rebuild": 4}})
    state = neutral.model.new_state()
    found = [neutral.model(ids, state) for ids in (IDS[:9], IDS[9:10], IDS[10:])]
    assert_same(np.concatenate(found), dense.logits(IDS), atol=1e-4)
    assert not state.layers[0].memory.kept


@pytest.mark.parametrize(
    "options, message",
    [
        ({"iterations": 0.0}, "iterations must be a number, above 0 and at most 1024, or None"),
        ({"iterations": -0.5}, "got -0.5."),
        ({"iterations": math.inf}, "got inf."),
        ({"threshold": -1.0}, "threshold must be a number, 0 to 100; got -1.0."),
        ({"threshold": 100.5}, "got 100.5."),
        ({"rebuild": -1}, "rebuild must be an integer, at least 0; got -1."),
        ({"integer_bits": 0}, "integer_bits must be an integer, 1 to 8, or None; got 0."),
        ({"integer_bits": 9}, "got 9."),
        ({"fraction_bits": 0}, "fraction_bits must be an integer, 1 to 8; got 0."),
        ({"fraction_bits": 9, "exp": "tables"}, "got 9."),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError) as refused:
        apply(tiny_lm(), {"a3": options})
    text = str(refused.value)
    assert text.startswith("a3: ") and message in text and "\n" not in text


def test_tree_shows_the_settings_and_card_says_what_is_unconfirmed():
    options = {"preset": "aggressive", "rebuild": 16, "integer_bits": 4, "exp": "tables"}
    tree = repr(apply(tiny_lm(), {"a3": options}).model)
    assert "iterations=0.125, rebuild=16" in tree and "floor=0.1" in tree
    assert "FixedPointAttend(tables=True, fraction_bits=4)" in tree
    assert "Rounding(integer_bits=4, fraction_bits=4)" in tree
    plain = repr(apply(tiny_lm(), {"a3": True}).model)
    assert "iterations=0.5" in plain and "floor=0.05" in plain and "FixedPoint" not in plain
    sections = find("a3").card.sections
    assert "unconfirmed" in sections["Fidelity"] and "our extension" in sections["Fidelity"]
