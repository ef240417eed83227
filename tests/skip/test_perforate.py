"""perforate: which inputs are kept, what replaces the others, the search, what it costs."""

from functools import cache

import literal_perforate as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, in_chunks, tiny_lm

import minitx
from minitx import calibration
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import Linear
from minitx.ops import softmax
from minitx.shared.linears import linears
from minitx.shared.quality_monitor import Monitored
from minitx.skip.perforate import (
    Inputs,
    Perforated,
    filled,
    importance,
    kept_inputs,
    perforated,
    search,
)
from minitx.skip.perforate.search import RATES, combine, cross_entropy
from minitx.skip.sparse_memory.inner_product import key_norm_bound
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import nbytes, walk

RNG = np.random.default_rng(5)
IDS = RNG.integers(0, 258, 40)
FILLS = ("mean", "fit", "scale", "rate", "none")


def seen(rows) -> Inputs:
    inputs = Inputs(wants_gram=True)
    for row in np.array_split(rows, 3):
        inputs.add(row)
    return inputs


def with_perforation(lm, **options):
    return apply(lm, {"perforate": {"stories": 2} | options})


def parts_of(lm) -> list[Perforated]:
    return [node for _, node in walk(lm.model) if type(node) is Perforated]


# One product -------------------------------------------------------------------------------------


def test_worked_example_by_hand():
    """Two calibration inputs (1, 2, 3, 4) and (3, 2, 1, 0), one output, W = (1, 1, 1, 1). At
    rate=0.5 stride keeps inputs 0 and 2: the means of the skipped ones, 1 and 3, are 2 and 2, so
    c = 2 + 2. For x = (1, 2, 3, 4), where the dense product is 10:

        none    1 + 3                            = 4
        mean    1 + 3 + 4                        = 8
        rate    4 / 2 * (1 + 3)                  = 8
        scale   y = 10, 6 and p = 4, 4: alpha = (10 * 4 + 6 * 4) / (4 * 4 + 4 * 4) = 2, so 8
    """
    rows = np.array([[1.0, 2, 3, 4], [3, 2, 1, 0]])
    linear = Linear(np.ones((4, 1)))
    for fill, expected in (("none", 4), ("mean", 8), ("rate", 8), ("scale", 8)):
        found = perforated(linear, 0.5, "stride", fill, seen(rows), 0)
        assert found.kept.tolist() == [0, 2]
        assert found(rows[:1]).item() == pytest.approx(expected), f"fill={fill}"
        alpha, c = literal.fills(rows.tolist(), [[1.0]] * 4, [0, 2], fill)
        by_hand = literal.perforated_product(rows[0].tolist(), [[1.0]] * 4, None, [0, 2], alpha, c)
        assert by_hand == [pytest.approx(expected)], f"fill={fill}"


@pytest.mark.parametrize("fill", [fill for fill in FILLS if fill != "fit"])
@pytest.mark.parametrize("pattern", ["norm", "stride", "truncate"])
def test_product_equals_the_literal_version(pattern, fill):
    rows, w, b = RNG.standard_normal((9, 7)) + 1, RNG.standard_normal((7, 4)), RNG.random(4)
    for skipped in (1, 3, 6):
        found = perforated(Linear(w, b), skipped / 7, pattern, fill, seen(rows), 0)
        ranked = literal.scores(rows.tolist(), w.tolist(), fill)
        kept = literal.kept_inputs(pattern, 7, skipped, ranked)
        assert found.kept.tolist() == kept, f"{pattern} keeps other inputs"
        alpha, c = literal.fills(rows.tolist(), w.tolist(), kept, fill)
        for x in rows[:2]:
            expected = literal.perforated_product(
                x.tolist(), w.tolist(), b.tolist(), kept, alpha, c
            )
            assert_same(found(x), expected, f"fill={fill}", atol=1e-12)
            assert_same(found.outputs(x, slice(1, 3)), expected[1:3], atol=1e-12)


def test_kept_inputs_of_each_pattern_by_hand():
    scores = np.array([3.0, 1, 2, 3, 0, 5])
    for pattern, expected in (
        ("truncate", [0, 1, 2, 3]),
        ("stride", [0, 1, 3, 4]),  # 0, 1.5, 3, 4.5 rounded down
        ("norm", [0, 2, 3, 5]),
    ):
        assert kept_inputs(pattern, 6, 4, scores, 0).tolist() == expected, pattern
    assert kept_inputs("norm", 6, 2, scores, 0).tolist() == [0, 5], "ties go to the lower index"
    drawn = {tuple(kept_inputs("sample", 6, 4, scores, seed)) for seed in range(50)}
    assert len(drawn) > 8 and all(len(set(kept)) == 4 for kept in drawn)


def test_mean_and_fit_are_exact_in_the_mean():
    rows, w = RNG.standard_normal((50, 12)) * 2 + 3, RNG.standard_normal((12, 5))
    for fill in ("mean", "fit"):
        found = perforated(Linear(w), 0.5, "sample", fill, seen(rows), 1)
        assert_same(found(rows).mean(0), (rows @ w).mean(0), fill, tolerance=1e-7)
    varies, is_large = (importance(w, seen(rows), fill) for fill in ("mean", "none"))
    assert (varies < is_large).all(), "with fill=mean only what varies is lost"


def test_fit_has_the_least_squared_error_of_all_fills():
    rng = np.random.default_rng(1)
    mixed = rng.standard_normal((300, 12)) @ rng.standard_normal((12, 12)) + rng.standard_normal(12)
    w = rng.standard_normal((12, 5))
    kept = np.arange(0, 12, 2)
    errors = {}
    for fill in FILLS:
        left, c = filled(w, kept, fill, seen(mixed))
        errors[fill] = np.linalg.norm(mixed[:, kept] @ left + c - mixed @ w)
    assert min(errors, key=errors.get) == "fit", errors
    with_ones = np.c_[mixed[:, kept], np.ones(300)]
    best = np.linalg.lstsq(with_ones, mixed @ w, rcond=None)[0]
    least = np.linalg.norm(with_ones @ best - mixed @ w)
    assert least < errors["fit"] < 1.02 * least, "damping costs next to nothing"


@pytest.mark.parametrize("mean, common", [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)])
def test_error_of_each_fill_on_synthetic_inputs_as_the_card_says(mean, common):
    """Half of 256 inputs skipped; means of their own (0 or random), or one mean of one sign."""
    errors = relative_errors(mean, common)
    table = {
        (0.0, 0.0): {"none": 0.70, "rate": 0.99, "scale": 0.70, "mean": 0.70},
        (1.0, 0.0): {"none": 0.71, "rate": 1.02, "scale": 0.63, "mean": 0.50},
        (1.0, 1.0): {"none": 0.50, "rate": 0.11, "scale": 0.08, "mean": 0.06},
    }[mean, common]
    for fill, expected in table.items():
        assert errors[fill] == pytest.approx(expected, abs=0.006), f"{fill}: {errors}"
    if mean:
        assert min(errors, key=errors.get) == "mean", errors


def relative_errors(mean: float, common: float) -> dict[str, float]:
    rng = np.random.default_rng(0)
    each = mean * (np.full(256, 1.0) if common else rng.standard_normal(256))
    rows, new = (rng.standard_normal((n, 256)) + each for n in (2000, 200))
    w = rng.standard_normal((256, 64)) + common
    found = {}
    for fill in ("none", "rate", "scale", "mean"):
        part = perforated(Linear(w), 0.5, "stride", fill, seen(rows), 0)
        found[fill] = np.linalg.norm(part(new) - new @ w) / np.linalg.norm(new @ w)
    return found


def test_fit_keeps_the_weights_where_the_inputs_say_nothing():
    """Constant inputs, or a single one, have no covariance: then W_S stays, as with fill=mean."""
    w = RNG.standard_normal((6, 3))
    for rows in (np.ones((9, 6)), RNG.standard_normal((1, 6))):
        left, c = filled(w, np.array([0, 2, 5]), "fit", seen(rows))
        assert_same(left, w[[0, 2, 5]], atol=1e-9)
        assert_same(c, filled(w, np.array([0, 2, 5]), "mean", seen(rows))[1], tolerance=1e-7)


def test_matrices_of_the_same_input_draw_different_inputs():
    lm = with_perforation(tiny_lm(), rate=0.5, pattern="sample", rates="uniform")
    qkv = lm.model.stack.blocks[0].attn.qkv
    assert len({tuple(part.kept) for part in (qkv.q, qkv.k, qkv.v)}) > 1


def test_random_inputs_with_fill_rate_are_unbiased():
    """Over many seeds, the mean is the dense product within 3 standard errors."""
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal(10), rng.standard_normal((10, 3))
    inputs = seen(x[None])
    drawn = np.array(
        [perforated(Linear(w), 0.6, "sample", "rate", inputs, seed)(x) for seed in range(1500)]
    )
    off = abs(drawn.mean(0) - x @ w) / (drawn.std(0) / 1500**0.5)
    assert (off < 3).all(), f"biased by {off} standard errors"


# The search --------------------------------------------------------------------------------------


def test_search_by_hand():
    """Sizes 100, 100, 200; a budget of a quarter, 100. Errors per multiply-add of the first steps:
    1/25, 4/25, 1/50; later 3/25 (0.25 to 0.5), ..., 9/50. Steps: matrix 2 to 0.25 (50 saved), then
    0 to 0.25 (75), then 0 to 0.5 (100)."""
    alone = [(1.0, 4.0, 20.0), (4.0, 9.0, 30.0), (1.0, 10.0, 40.0)]
    assert combine(alone, [100, 100, 200], 0.25) == [0.5, 0.0, 0.25]
    assert combine(alone, [100, 100, 200], 0.1) == [0.25, 0.0, 0.0], "a cheaper step is too large"
    assert combine(alone, [100, 100, 200], 0.75) == [0.75] * 3


def test_search_equals_the_literal_version():
    for _ in range(20):
        alone = np.sort(RNG.random((6, 3)), 1).tolist()
        sizes, rate = RNG.integers(1, 9, 6).tolist(), float(RNG.random() * 0.8)
        found = combine(alone, sizes, rate)
        assert found == literal.combine(alone, sizes, rate, list(RATES))
        assert sum(r * s for r, s in zip(found, sizes)) <= rate * sum(sizes) + 1e-9


def test_error_alone_is_that_of_the_whole_model():
    """Though only the blocks from the changed matrix on run again."""
    lm = tiny_lm("gpt_neox", dtype=np.float64)
    wanted, texts = linears(lm.model, "all"), [IDS[:20].tolist(), IDS[20:].tolist()]

    def make(linear, rate):
        return Linear(linear.w * (1 - rate), linear.b)

    found = search.errors_alone(lm.model, wanted, texts, make)
    for m, (key, linear) in enumerate(wanted.items()):
        changed = search.replaced(lm.model, key, make(linear, 0.5))
        whole = [divergence(lm.logits(ids), changed(ids)) for ids in texts]
        assert found[m][1] == pytest.approx(np.concatenate(whole).mean()), f"matrix {m}"
    assert all(0 < a < b < c for a, b, c in found), "the error grows with the rate"


def divergence(dense, changed):
    p = softmax(dense)
    return cross_entropy(p, changed) - cross_entropy(p, dense)


def test_divergence_equals_the_literal_version():
    a, b = RNG.standard_normal((2, 3, 5))
    expected = np.mean([literal.divergence(x, y) for x, y in zip(a.tolist(), b.tolist())])
    assert divergence(a, b).mean() == pytest.approx(expected)
    assert_same(divergence(a, a + 3), 0, atol=1e-12)


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rates", ["greedy", "uniform", "random"])
def test_saved_work_and_weights_are_those_of_the_formula(family, rates):
    dense = tiny_lm(family)
    lm = with_perforation(dense, rate=0.3, rates=rates)
    whole = sum(linear.w.size for linear in linears(dense.model, "all").values())
    left = sum(part.inner.w.size for part in parts_of(lm))
    left += sum(node.w.size for node in linears(lm.model, "all").values()) - left
    if rates != "uniform":
        assert 0.25 * whole < whole - left <= 0.3 * whole, f"skipped {1 - left / whole:.2f}"
    work = []
    for model in (dense, lm):
        with counting(model) as counts:
            model.logits(IDS)
        work.append(counts.total())
    assert work[0].multiply_adds - work[1].multiply_adds == len(IDS) * (whole - left)
    added = sum(p.kept.nbytes + 4 * p.inner.w.shape[1] for p in parts_of(lm))
    assert nbytes(dense) - nbytes(lm) >= 4 * (whole - left) - added


@pytest.mark.parametrize("fill", FILLS)
def test_model_equals_dense_with_the_skipped_weights_filled_in(fill):
    """Chunks, a batch and single tokens give the same: the kept inputs are the same for all."""
    lm = with_perforation(tiny_lm(dtype=np.float64), rate=0.4, fill=fill, rates="uniform")
    whole = lm.logits(IDS)
    check_close(in_chunks(lm, IDS, (20, 1, 1, 18)), whole, 1e-12, "in chunks")
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")


def test_a_rate_of_less_than_one_input_changes_nothing():
    assert not parts_of(with_perforation(tiny_lm(), rate=0.04, rates="uniform"))
    one = with_perforation(tiny_lm(), rate=0.99, rates="uniform")
    assert {part.inner.w.shape[0] for part in parts_of(one)} == {1}, "one input stays"


def test_only_the_chosen_matrices_are_perforated():
    for which, place in (("ffn", ".ffn."), ("attention", ".attn.")):
        lm = with_perforation(tiny_lm(), rate=0.4, matrices=which, rates="uniform")
        paths = [path for path, node in walk(lm.model) if type(node) is Perforated]
        assert paths and all(place in path for path in paths)


def test_quantize_and_low_rank_go_together_with_it():
    others = {"quantize": True, "low_rank": {"rank": 4, "stories": 2}, "fuse_projections": True}
    others["sparse_memory"] = {"slots": 16}  # whose bound on keys needs the width of the model
    for name, options in others.items():
        found = apply(tiny_lm(), {"perforate": {"rate": 0.3, "stories": 2}, name: options})
        assert parts_of(found) and np.isfinite(in_chunks(found, IDS, (12, *[1] * 28))).all(), name


def test_sparse_memory_bounds_the_keys_of_a_perforated_matrix():
    lm = with_perforation(tiny_lm(dtype=np.float64), rate=0.4, rates="uniform")
    state = lm.model.new_state()
    lm.model(IDS, state)
    for block, layer in zip(lm.model.stack.blocks, state.layers, strict=True):
        bound = key_norm_bound(block.attn, lm.model.config.width)
        lengths = np.linalg.norm(layer.keys[:, : layer.count], axis=-1)
        assert (lengths <= bound[:, None]).all(), "a key is longer than its bound"
        assert (lengths.max(-1) > bound / 20).all(), "the bound says nothing"


def test_quality_monitor_runs_the_exact_ffn():
    """Never above the limit: always the perforated FFN, except at checks. Always above it: after
    the first check (token 3) all is exact, until a check finds the error small, which is never."""
    dense = tiny_lm(dtype=np.float64)
    options = dict(rate=0.4, matrices="ffn", rates="uniform")
    plain = with_perforation(dense, **options)
    for limit, expected in ((100.0, plain), (1e-9, dense)):
        lm = with_perforation(dense, **options, monitor=4, limit=limit)
        assert [type(node) for _, node in walk(lm.model)].count(Monitored) == 2
        state, other = lm.model.new_state(), expected.model.new_state()
        lm.model(IDS[:3], state), plain.model(IDS[:3], other)
        with counting(lm) as counts:
            lm.model(IDS[3:5], state)
        assert counts.events["quality checks"] == 2, "one in each layer"
        assert counts.events["checks above the limit"] == 2 * (limit < 1)
    with pytest.raises(MinitxError, match="perforate: the quality monitor compares FFNs"):
        with_perforation(dense, matrices="attention", monitor=4)


# On stories --------------------------------------------------------------------------------------


@cache
def stories():
    lm = minitx.load("stories")
    return lm, [text.ids for text in encode(lm.tokenizer, held_out(lm, 2))]


def loss(lm) -> float:
    losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in stories()[1]]
    return float(np.concatenate(losses).mean())


def added_loss(**options) -> float:
    dense, _ = stories()
    return loss(apply(dense, {"perforate": options})) - loss(dense)


def test_on_stories_norm_is_better_than_random_inputs():
    same = dict(rates="uniform", rate=0.125, stories=8)
    norm, random = added_loss(**same), added_loss(**same, pattern="sample")
    assert 0.02 < norm < 0.35 and random > 2.5 * norm, f"{norm:+.3f}, at random {random:+.3f}"


def test_on_stories_the_search_is_better_than_random_rates(monkeypatch):
    """One rate is tried for each matrix of attention: 32 short runs."""
    monkeypatch.setattr(search, "RATES", (0.5,))
    monkeypatch.setattr(calibration, "KEPT", {})
    same = dict(rate=0.25, matrices="attention", stories=1)
    found, random = added_loss(**same), added_loss(**same, rates="random")
    assert -0.02 < found < 0.05 and random > found + 0.1, f"{found:+.3f}, at random {random:+.3f}"
