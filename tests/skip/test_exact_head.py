"""The exact head must return the dense head's token, for every hidden state, and skip rows.

First the two searches on matrices, then the head in a model.
"""

from dataclasses import replace
from functools import cache

import literal_exact_head as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm, tiny_model

from minitx import fast, ops
from minitx.build import random_model
from minitx.errors import MinitxError, MinitxWarning
from minitx.ledger import counting, group_of
from minitx.lm import LM
from minitx.model import Head, Linear, TiedHead
from minitx.skip.exact_head import ExactHead, preview_search, share_of_dense
from minitx.skip.exact_head.norm_search import norm_search
from minitx.technique import apply, swap
from minitx.tree import weights

dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def searches(W, rank=None, block=1):
    """Both searches in the rows of W (V, D)."""
    return norm_search(W, block), preview_search(W, rank or max(1, W.shape[1] // 4))


def decaying(rng, V, D, pace=12.0, dtype=np.float32):
    """Rows whose singular values fall like exp(-i / pace)."""
    W = rng.standard_normal((V, D)) * np.exp(-np.arange(D) / pace)
    Q, _ = np.linalg.qr(rng.standard_normal((D, D)))
    return (W @ Q).astype(dtype)


def spread(rng, V, D, dtype=np.float32):
    """Rows of very different lengths."""
    return (rng.standard_normal((V, D)) * rng.lognormal(0, 1, (V, 1))).astype(dtype)


def aligned(rng, W):
    """A hidden state x (D,) near the direction of some row, with noise of half its length."""
    row, noise = W[rng.integers(len(W))], rng.standard_normal(W.shape[1])
    noise *= 0.5 * np.linalg.norm(row) / np.linalg.norm(noise)
    return (row + noise).astype(W.dtype)


def run(search, x):
    """(token, rows read, multiply-adds, bytes)"""
    with counting(search) as counts:
        token, read = search(x)
    total = counts.total()
    return token, read, total.multiply_adds, total.weight_bytes


# The worked example ------------------------------------------------------------------------------
#
#     W         |W[v]|   z[v] = W[v] . [0.6, 0.8]
#     3     0    3        1.8      row 0 is the longest: its logit is 1.8
#     0     2    2        1.6      bound 2 * 1 >= 1.8: has to be computed
#     1     1    1.414    1.4      bound 1.414 < 1.8: neither this row nor a shorter one can win
#     0.5 -0.5   0.707   -0.1

W4, H2 = np.array([[3, 0], [0, 2], [1, 1], [0.5, -0.5]]), np.array([0.6, 0.8])


@dtypes
def test_norm_search_skips_the_two_short_rows_of_the_example(dtype):
    search = norm_search(W4.astype(dtype), 1)
    assert_same(search.norms, [3, 2, 2**0.5, 0.5**0.5], tolerance=1e-6)
    token, read, multiply_adds, _ = run(search, H2.astype(dtype))
    assert (token, read, multiply_adds) == (0, 2, 4)


def test_norm_search_with_a_single_block_reads_every_row():
    assert norm_search(W4, 4)(H2) == norm_search(W4, 2048)(H2) == (0, 4)


def test_bias_is_one_more_column_of_the_rows():
    """The bias 0.5 of row 1 makes its logit 2.1: it wins, though row 0 is longer."""
    W, x = np.c_[W4, [0, 0.5, 0, 0]], np.append(H2, 1)
    for search in searches(W, rank=2):
        assert search(x)[0] in (1, None)
    assert norm_search(W, 1)(x)[0] == 1


def test_ties_are_left_to_the_dense_head():
    rows, x = np.array([[0, 1], [2, 0], [1, 0], [2, 0.0]]), np.array([1, 0.0])
    for search in searches(rows):
        assert search(x)[0] is None, "rows 1 and 3 are equal"
    for head in (TiedHead(rows), Head(rows.T.copy())):
        for search in searches(rows):
            assert ExactHead(head, search, False).argmax(x) == 1, "the lower index"


# Against the literal version and the dense head --------------------------------------------------


def test_searches_read_the_same_rows_as_the_literal_version():
    rng = np.random.default_rng(4)
    fewer = 0
    for i in range(60):
        V, D = 40 + i, int(rng.integers(2, 12))
        W = (spread, decaying)[i % 2](rng, V, D, dtype=np.float64)
        x, rank, block = aligned(rng, W), int(rng.integers(1, D + 1)), int(rng.integers(1, 9))
        token = literal.dense(W, x)
        by_norms, by_preview = searches(W, rank, block)
        assert literal.by_norms(W, x, block) == run(by_norms, x)[:2] and by_norms(x)[0] == token
        expected, candidates = literal.preview(W, x, rank, by_preview.directions)
        assert expected == token
        if len(candidates) > V // 8 + 1:
            assert by_preview(x) == (None, 0), "too many candidates"
        else:
            assert run(by_preview, x)[:2] == (token, len(candidates))
            fewer += 1
    assert 10 < fewer < 60


@dtypes
def test_exact_head_equals_the_dense_head_on_a_thousand_random_heads(dtype):
    """Also with equal rows, rows of zeros and x = 0. What a search decides is the argmax of the
    logits in float64 too."""
    rng = np.random.default_rng(1)
    decided = 0
    for i in range(1000):
        V, D = int(rng.integers(1, 90)), int(rng.integers(1, 24))
        make = (spread, decaying)[i % 2]
        W = make(rng, V, D, dtype=dtype)
        W[rng.random(V) < 0.2] = W[rng.integers(V)]
        W[rng.random(V) < 0.1] = 0
        x = aligned(rng, W) if i % 3 else rng.standard_normal(D).astype(dtype)
        x = 0 * x if i % 50 == 7 else x
        z = W.astype(np.float64) @ x
        rank, block = int(rng.integers(1, D + 1)), int(rng.integers(1, V + 2))
        for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
            dense = head.argmax(x)
            for search in searches(W, rank, block):
                assert ExactHead(head, search, False).argmax(x) == dense
                found, _ = search(x)
                decided += found is not None
                assert found is None or found == z.argmax() == dense
    assert decided > 1000, "of 4000: the searches must not always fall back"


@dtypes
def test_exact_head_equals_the_dense_head_where_sums_run_in_another_order(dtype):
    """Large matrices, whose products ``fast`` sums differently from those of a few rows."""
    rng = np.random.default_rng(2)
    for make in (spread, decaying):
        W = make(rng, 2000, 40, dtype=dtype)
        assert W.size > fast.LARGE
        W[1500:] = W[:500]  # the winner often occurs twice
        for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
            for search in searches(W, block=300):
                for _ in range(30):
                    x = aligned(rng, W)
                    assert ExactHead(head, search, False).argmax(x) == head.argmax(x)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1, 1e12, 1e30])
def test_exact_head_equals_the_dense_head_for_near_ties(scale):
    """Pairs of rows that differ in their last bits, which two kernels may order differently."""
    rng = np.random.default_rng(3)
    W = np.repeat(spread(rng, 60, 48), 2, axis=0)
    W[1::2] *= (1 + rng.integers(-40, 40, (60, 1)) * 2.0**-24).astype(np.float32)
    for head in (TiedHead(W), Head(np.ascontiguousarray(W.T))):
        for search in searches(W, rank=12):
            for _ in range(50):
                x = aligned(rng, W) * np.float32(scale)
                assert ExactHead(head, search, False).argmax(x) == head.argmax(x)


@dtypes
def test_no_logit_exceeds_its_bound(dtype):
    rng = np.random.default_rng(5)
    for _ in range(200):
        V, D = int(rng.integers(1, 300)), int(rng.integers(1, 64))
        W = spread(rng, V, D, dtype)
        x = rng.standard_normal(D).astype(dtype)
        search = preview_search(W, int(rng.integers(1, D + 1)))
        P, u = search.bounds(x)
        z = W.astype(np.float64) @ x.astype(np.float64)
        slack = search.slack * search.longest * np.linalg.norm(x)
        assert P.dtype == u.dtype == dtype
        assert (u + slack >= z).all(), "a logit above its bound"
        top = int(P.argmax())
        assert ops.logits(x, W[top : top + 1])[0] <= z.max() + slack, "low above the largest logit"
        small = 2e-2 if dtype == np.float32 else 1e-10
        assert slack < small * search.longest * np.linalg.norm(x), "slack that hides the bound"


def test_preview_of_full_rank_has_one_candidate():
    rng = np.random.default_rng(6)
    W = rng.standard_normal((500, 32))
    search = preview_search(W, 32)
    assert not search.tail.any()
    for _ in range(50):
        x = rng.standard_normal(32)
        assert run(search, x)[:2] == ((W @ x).argmax(), 1)


# Counted work ------------------------------------------------------------------------------------


def test_counted_work_is_the_formula_of_the_card():
    rng = np.random.default_rng(7)
    V, D, rank, block = 3000, 48, 12, 100
    W = decaying(rng, V, D)
    fallbacks = 0
    for _ in range(40):
        x = aligned(rng, W)
        _, c, multiply_adds, size = run(preview_search(W, rank), x)
        if c:
            assert multiply_adds == D * D + V * (rank + 1) + D * (1 + c)
            assert size == 4 * multiply_adds
            assert multiply_adds < 0.5 * V * D
        fallbacks += not c
    assert fallbacks < 40
    W = spread(rng, V, D)
    search = norm_search(W, block)
    for _ in range(10):
        _, read, multiply_adds, size = run(search, aligned(rng, W))
        assert read % block == 0 and 0 < read < 0.5 * V
        assert multiply_adds == read * D and size == 4 * multiply_adds


def test_dense_fallback_is_counted_on_top():
    V, D, rank = 400, 16, 4
    W = np.random.default_rng(8).standard_normal((V, D))
    search = preview_search(W, rank)
    head = ExactHead(TiedHead(W), search, False)
    x = np.random.default_rng(9).standard_normal(D)
    assert search(x) == (None, 0)
    with counting(head) as counts:
        assert head.argmax(x) == (W @ x).argmax()
    assert counts.total().multiply_adds == D * D + V * (rank + 1) + D + V * D
    assert counts.events == {"head rows": V, "head rows read": V, "dense fallbacks": 1}


# In a model --------------------------------------------------------------------------------------

IDS = np.random.default_rng(0).integers(0, 258, 40)
SETTINGS = {
    "svd": dict(method="svd"),
    "svd of rank 1": dict(method="svd", rank=1),
    "svd of full rank": dict(method="svd", rank=16),
    "norms": dict(method="norms"),
    "norms in small blocks": dict(method="norms", block=20),
}
# A preview of full rank costs as much as the head, which is said (test_search_that_...).
pytestmark = pytest.mark.filterwarnings("ignore:exact_head.*can never pay")
settings = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)


@cache
def dense_and_its_texts(family, dtype):
    """The dense model, and its greedy texts after eight prompts."""
    dense = tiny_lm(family, dtype=dtype)
    return dense, [dense.generate(ids, 12) for ids in IDS.reshape(8, 5)]


@settings
@dtypes
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_dense_models(family, dtype, options):
    dense, texts = dense_and_its_texts(family, dtype)
    lm = apply(dense, {"exact_head": options})
    with counting(lm) as counts:
        for ids, text in zip(IDS.reshape(8, 5), texts):
            assert lm.generate(ids, 12) == text
    assert 0 < counts.events["head rows"] and set(counts.by_group()) >= {"head", "blocks.ffn"}
    if options.get("rank") == 16:
        assert counts.events["head rows read"] < 0.1 * counts.events["head rows"]


@settings
@dtypes
def test_greedy_text_is_the_dense_models_with_a_bias_in_the_head(dtype, options):
    """Folding a LayerNorm gives the head a bias."""
    dense = apply(tiny_lm("gpt_neox", dtype=dtype), {"fold_norms": True})
    assert dense.model.head.b is not None
    lm = apply(dense, {"exact_head": options})
    with counting(lm) as counts:
        for ids in IDS.reshape(8, 5):
            assert lm.generate(ids, 12) == dense.generate(ids, 12)
    if options.get("rank") != 1:  # too weak a preview
        assert counts.events["dense fallbacks"] < counts.events["head rows"] / 259


@settings
def test_all_logits_are_the_dense_heads_where_they_are_needed(options):
    dense = tiny_lm()
    lm = apply(dense, {"exact_head": options})
    assert_same(lm.logits(IDS), dense.logits(IDS))
    rows = IDS[:12].reshape(3, 4)
    assert_same(lm.model(rows), dense.model(rows))
    prompts = [[1], [2, 3, 4]]
    assert lm.generate(prompts, 10) == dense.generate(prompts, 10)
    sampling = dict(temperature=1.0, top_k=20, seed=3)
    assert lm.generate(IDS[:4], 20, **sampling) == dense.generate(IDS[:4], 20, **sampling)
    with counting(lm) as counts:
        lm.generate(IDS[:4], 5, **sampling)
    assert "head rows" not in counts.events, "sampling must not ask the search"


def test_memory_is_that_of_the_card():
    for family, method, copies in (
        ("gpt2", "svd", 0), ("gpt2", "norms", 1), ("llama", "svd", 1), ("llama", "norms", 1),
    ):  # fmt: skip
        dense = tiny_lm(family)
        lm = apply(dense, {"exact_head": dict(method=method, rank=3, block=100)})
        sizes = [sum(w.size for w in weights(m).values()) for m in (dense, lm)]
        V, D = 259, 16
        own = V * (3 + 1) + D * D if method == "svd" else V + 3  # ids, and the norms of 3 blocks
        assert sizes[1] - sizes[0] == own + copies * V * D, f"{method} in {family}"


def test_tree_shows_the_search_and_the_ledger_counts_one_head():
    lm = apply(tiny_lm(), {"exact_head": True})
    drawn = str(lm.model)
    assert "head: ExactHead(biased=False)\n" in drawn
    assert "search: PreviewSearch(rows 259x16," in drawn
    assert group_of("model.head.search") == group_of("model.head.head") == "head"


def with_head(W):
    """A small model with W (V, D) as its embedding and its head."""
    config = replace(
        FAMILIES["llama"], vocab_size=len(W), width=W.shape[1], tied=True, bos=None, eos=()
    )
    model = random_model(config, 1)
    return LM(replace(model, embed=replace(model.embed, w=W), head=TiedHead(W)))


def test_share_of_dense_is_a_loss_for_random_rows_and_a_gain_for_decaying_ones():
    rng = np.random.default_rng(10)
    config = replace(FAMILIES["llama"], vocab_size=8000, width=288, bos=None, eos=())
    texts = [rng.integers(0, 6000, 10), rng.integers(0, 6000, 8)]
    flat = LM(random_model(config, 1))
    assert share_of_dense(flat, texts, method="norms", block=500) >= 1
    assert share_of_dense(flat, texts, method="svd", rank=72) > 1.25
    falling = rng.standard_normal((6000, 32)) * np.exp(-np.arange(32) / 4)
    falling = with_head(falling.astype(np.float32))
    assert share_of_dense(falling, texts, method="svd", rank=16) < 0.75
    with pytest.raises(MinitxError, match="at least one"):
        share_of_dense(flat, [])


# Refusals ----------------------------------------------------------------------------------------


def test_head_of_another_type_is_refused():
    lm = swap(tiny_lm(), Head, lambda head: Linear(head.w))
    with pytest.raises(MinitxError, match="^exact_head needs a part of type Head or TiedHead, and"):
        apply(lm, {"exact_head": True})


@settings
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_or_inf_in_the_hidden_state_is_reported_as_by_the_dense_head(value, options):
    dense = tiny_lm()
    x = np.zeros(16, np.float32)
    x[3] = value
    head = apply(dense, {"exact_head": options}).model.head
    messages = []
    for argmax in (dense.model.head.argmax, head.argmax):
        with np.errstate(invalid="ignore"), pytest.raises(MinitxError, match="no next") as error:
            argmax(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@settings
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nan_or_inf_in_the_weights_is_reported(value, options, family):
    lm = tiny_lm(family)
    w = lm.model.head.w.copy()
    w[(2, 7) if family == "llama" else (7, 2)] = value
    lm = replace(lm, model=replace(lm.model, head=type(lm.model.head)(w)))
    message = "^exact_head: expected finite weights .* those of token 7 .* damaged or too large.$"
    with pytest.raises(MinitxError, match=message):
        apply(lm, {"exact_head": options})


@settings
def test_overflow_in_the_logits_is_reported(options):
    lm = apply(tiny_lm(), {"exact_head": options})
    with (
        np.errstate(over="ignore", invalid="ignore"),
        pytest.raises(MinitxError, match="too large|overflow"),
    ):
        lm.model.head.argmax(np.full(16, 3e38, np.float32))


@pytest.mark.filterwarnings("error")
def test_search_that_can_never_pay_is_said():
    """V = 259, D = 16. The dense head takes 4,144 multiply-adds. The search takes at least
    D^2 + V (rank + 1) + 2 D, if only one row is read: 4,173 at rank 14, 3,914 at rank 13."""
    lm = tiny_lm()
    with pytest.warns(MinitxWarning, match="at least 4,173 .* head 4,144, .* smaller rank"):
        apply(lm, {"exact_head": {"rank": 14}})
    with pytest.warns(MinitxWarning, match="at least 4,144 .*; use a block below 259"):
        apply(lm, {"exact_head": {"method": "norms", "block": 2048}})
    for options in ({}, {"rank": 13}, {"method": "norms"}, {"method": "norms", "block": 258}):
        apply(lm, {"exact_head": options})
    few = LM(tiny_model(vocab_size=17, eos=(), bos=None))
    with pytest.warns(MinitxWarning, match="leave it out: the vocabulary is too small"):
        apply(few, {"exact_head": {"rank": 1}})


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(rank=0), "exact_head: rank must be an integer, at least 1, or None; got 0"),
        (dict(rank=17), "exact_head: rank must be at most 16, the model's width; got 17"),
        (dict(block=0), "exact_head: block must be an integer, at least 1, or None; got 0"),
        (dict(method="int8"), "exact_head: method must be one of svd, norms; got 'int8'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        apply(tiny_lm(), {"exact_head": options})
