"""dot_product_reuse: which tokens share a product, that it is causal, and what it saves."""

from functools import cache

import literal_dot_product_reuse as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, check_close, error, in_chunks, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.skip.dot_product_reuse import ExactHash, ReusedLinear, SignHash
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import walk

RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 12, 40)  # few different tokens
LSH = {"form": "lsh", "bits": 3, "first": 0}


def product(xs, w, planes=None, slices=1, size=512, steps=None):
    """x W of all inputs xs (T, in), in one step or several, and the layer with its tables."""
    hashed = ExactHash() if planes is None else SignHash(planes)
    layer, linear = Layer(len(xs)), ReusedLinear(w, None, hashed, slices, size)
    out, at = [], 0
    for count in steps or (len(xs),):
        out.append(linear(xs[at : at + count], layer.take(count)))
        at += count
    return np.concatenate(out), layer.memory.recall(linear, None)


def test_worked_example_by_hand():
    """Two slices of two inputs, one plane each: is the first number of the slice above 0?
    W has the rows (1, 0), (0, 1), (10, 0), (0, 10).

    x = ( 1, 2 |  3, 4)    both new:      (1, 2) + (30, 40)  = ( 31,  42)
    x = ( 5, 6 | -7, 8)    left: above 0, so the product of (1, 2); right: new
                                          (1, 2) + (-70, 80) = (-69,  82)
    x = (-1, 0 | -9, 9)    left: new; right: at most 0, so the product of (-7, 8)
                                         (-1, 0) + (-70, 80) = (-71,  80)
    """
    xs = np.array([[1.0, 2, 3, 4], [5, 6, -7, 8], [-1, 0, -9, 9]])
    w = np.array([[1.0, 0], [0, 1], [10, 0], [0, 10]])
    planes = np.array([[[1.0], [0]], [[1], [0]]])
    expected = [[31, 42], [-69, 82], [-71, 80]]
    found, _ = product(xs, w, planes, slices=2)
    assert_same(found, expected, "the product")
    by_hand, hits = literal.products(xs.tolist(), w.tolist(), 2, planes.tolist())
    assert by_hand == expected and hits == [[False, False], [True, False], [False, True]]


@pytest.mark.parametrize("form", ["exact", "lsh"])
@pytest.mark.parametrize("slices, size", [(1, 512), (3, 512), (2, 4), (1, 1)])
@pytest.mark.parametrize("steps", [(30,), (11, 1, 1, 17), (1,) * 30])
def test_equals_the_literal_version(form, slices, size, steps):
    xs = RNG.integers(-1, 2, (30, 6)).astype(float)
    xs, w = xs[RNG.integers(0, 8, 30)], RNG.standard_normal((6, 5))  # 8 different ones, repeated
    planes = None if form == "exact" else RNG.standard_normal((slices, 6 // slices, 2))
    arguments = xs.tolist(), w.tolist(), slices, None if planes is None else planes.tolist(), size
    expected, hits = literal.products(*arguments)
    found, memory = product(xs, w, planes, slices, size, steps)
    assert_same(found, expected, "x W", atol=1e-12)
    assert all(len(table.products) <= size for table in memory.tables), "above the size limit"
    if size == 512:
        assert sum(len(table.products) for table in memory.tables) == (~np.array(hits)).sum()
    if form == "exact":
        assert_same(found, xs @ w, "the exact form is not", atol=1e-12)


def test_later_tokens_do_not_change_earlier_products_but_with_centroids_they_do():
    xs, w = RNG.standard_normal((20, 6)), RNG.standard_normal((6, 4))
    planes, other = RNG.standard_normal((1, 6, 2)), xs.copy()
    other[12:] += 0.3
    found = [product(x, w, planes)[0][:12] for x in (xs, other)]
    assert_same(*found, "the first token of a bucket gives its product")
    found = [
        np.array(literal.centroid_products(x.tolist(), w.tolist(), planes[0].tolist()))[:12]
        for x in (xs, other)
    ]
    assert error(*found) > 0.01, "the paper's form is not causal"


def test_more_bits_give_fewer_hits_and_smaller_errors():
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((6, 16))
    xs = centers[rng.integers(0, 6, 80)] + 0.2 * rng.standard_normal((80, 16))
    w, stored, wrong = rng.standard_normal((16, 8)), [], []
    for bits in (2, 6, 12, 40):
        found, memory = product(xs, w, rng.standard_normal((1, 16, bits)))
        stored.append(len(memory.tables[0].products))
        wrong.append(error(found, xs @ w))
    assert stored == sorted(stored) and stored[0] <= 4 and stored[-1] > 60, stored
    assert wrong[0] > 2 * wrong[2] and wrong[1] > wrong[3], wrong


def test_rewinding_forgets_the_products_of_later_tokens():
    xs, w = RNG.standard_normal((10, 4)), np.eye(4)
    layer, linear = Layer(20), ReusedLinear(w, None, ExactHash(), 1, 5)
    linear(xs, layer.take(10))
    memory = layer.memory.recall(linear, None)
    assert memory.tables[0].positions == [0, 1, 2, 3, 4], "the table holds 5"
    layer.rewind(3)
    assert memory.tables[0].positions == memory.seen == [0, 1, 2]
    assert set(memory.tables[0].rows) == {x.tobytes() for x in xs[:3]}
    linear(xs[5:6], layer.take(1))
    assert memory.tables[0].positions == [0, 1, 2, 3]


def test_token_that_comes_after_later_ones_is_computed_and_not_stored():
    xs, w = RNG.standard_normal((6, 4)), RNG.standard_normal((4, 3))
    layer, linear = Layer(6), ReusedLinear(w, None, SignHash(np.ones((1, 4, 1))), 1, 9)
    linear(xs[:5], layer.take(5))
    memory = layer.memory.recall(linear, None)
    before = list(memory.tables[0].positions)
    layer.tokens = layer.tokens.only([1])
    assert_same(linear(xs[5:], layer), xs[5:] @ w, tolerance=1e-7)
    assert memory.tables[0].positions == before and memory.seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [LSH, {}], ids=["lsh", "exact"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_rewind_continues_from_any_position(family, options):
    lm = apply(tiny_lm(family, dtype=np.float64), {"dot_product_reuse": options})
    once, state = in_chunks(lm, IDS, (20, *[1] * 20)), lm.model.new_state()
    in_chunks(lm, IDS, (20, *[1] * 20), state)
    for back_to in (37, 20, 5):
        state.rewind(back_to)
        found = in_chunks(lm, IDS[back_to:], (1,) * (40 - back_to), state)
        check_close(found, once[back_to:], 1e-12, f"rewound to {back_to}")


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_without_cache_equals_its_rows(family):
    lm = apply(tiny_lm(family, dtype=np.float64), {"dot_product_reuse": LSH})
    rows = np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")


def test_exact_form_shares_all_products_of_a_repeated_token_in_layer_0():
    """Serial blocks: q, k, v. Parallel ones: the FFN reads the same input, too."""
    for family, names in (("llama", ("q", "both")), ("gpt_neox", ("q", "both", "up", "down"))):
        lm = apply(tiny_lm(family, dtype=np.float64), {"dot_product_reuse": True})
        found = {p.rpartition(".")[2] for p, n in walk(lm.model) if type(n) is ReusedLinear}
        assert found - {"out"} == set(names)
        with counting(lm) as counts:
            in_chunks(lm, np.array([5, 7, 5, 5, 7, 9]), (1,) * 6)
        assert counts.events["products reused"] == 3 * len(names), family
        check_close(lm.logits(IDS), tiny_lm(family, dtype=np.float64).logits(IDS), 1e-12, "exact")


def test_exact_form_finds_nothing_with_learned_positions():
    lm = apply(tiny_lm("gpt2"), {"dot_product_reuse": True})
    with counting(lm) as counts:
        lm.logits(np.array([5, 5, 5, 5]))
    assert counts.events["products"] and not counts.events["products reused"]


@pytest.mark.parametrize("slices", [1, 4])
@pytest.mark.parametrize("form", ["exact", "lsh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family, form, slices):
    """A hash of s or s bits multiply-adds for each slice; s F for each product that is computed,
    and F to add one that is reused if there are several slices."""
    options = {"form": form, "slices": slices, "bits": 3, "first": 0, "layers": 2, "where": "all"}
    lm = apply(tiny_lm(family, dtype=np.float64), {"dot_product_reuse": options})
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    products = {p: n for p, n in walk(lm) if type(n) is ReusedLinear}
    with counting(lm) as counts:
        lm.model(IDS[20:21], state)
    hits = 0
    for path, node in products.items():
        n, F = node.w.shape
        s, total = n // slices, counts.total(path)
        rest = total.multiply_adds - n * (1 if form == "exact" else 3)
        reused = total.cache_bytes // (8 * F)
        assert rest == (slices - reused) * s * F + reused * F * (slices > 1), path
        hits += reused
    assert counts.events["products"] == len(products) * slices
    assert counts.events["products reused"] == hits
    assert form == "exact" or hits


def test_defaults_of_the_two_forms():
    def region(family, **options):
        lm = apply(tiny_lm(model=tiny_model(family, layers=4)), {"dot_product_reuse": options})
        found = {p.split(".")[2] for p, n in walk(lm.model) if type(n) is ReusedLinear}
        return sorted(map(int, found))

    assert region("llama") == [0] and region("llama", form="lsh") == [2, 3]
    assert region("llama", layers=3) == [0, 1, 2]
    assert region("llama", form="lsh", first=1, layers=2) == [1, 2]
    assert repr(apply(tiny_lm(), {"dot_product_reuse": {"size": 0}})) == repr(tiny_lm())
    assert repr(apply(tiny_lm(), {"dot_product_reuse": {"first": 2}})) == repr(tiny_lm())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(MinitxError, match="slices is 3; expected a divisor of 16"):
        apply(tiny_lm(), {"dot_product_reuse": {"slices": 3}})
    with pytest.raises(MinitxError, match="first must be at most 2, the number of layers; got 3"):
        apply(tiny_lm(), {"dot_product_reuse": {"first": 3}})
    with pytest.raises(MinitxError, match="dot_product_reuse .* delta"):
        apply(tiny_lm(), {"dot_product_reuse": True, "delta": True})


def test_exact_form_fits_a_prefix_cache_and_lsh_does_not():
    """Without the products of the prefix it computes more, and the same."""
    dense, prompt = tiny_lm(dtype=np.float64), IDS[:20].tolist()
    lm = apply(dense, {"dot_product_reuse": True, "prefix_cache": {"block": 4}})
    assert [lm.generate(prompt, 9) for _ in range(2)] == [dense.generate(prompt, 9)] * 2
    with pytest.raises(MinitxError, match="prefix_cache .* dot_product_reuse"):
        apply(dense, {"dot_product_reuse": LSH, "prefix_cache": True})


@cache
def loss_and_work(model, **options):
    dense = minitx.load(model)
    ids = encode(dense.tokenizer, held_out(dense, 1))[0].ids
    lm = apply(dense, {"dot_product_reuse": options}) if options else dense
    with counting(lm) as counts:
        losses = token_losses(lm.logits(ids[:-1]), np.array(ids[1:]))
    events = counts.events
    share = events["products reused"] / max(events["products"], 1)
    return float(losses.mean()), counts.total().multiply_adds, share


def test_exact_form_on_shipped_models_saves_without_added_loss():
    for model, left in (("stories-parallel", (0.9, 0.93)), ("stories", (0.98, 0.995))):
        dense, all_work, _ = loss_and_work(model)
        loss, work, _ = loss_and_work(model, form="exact")
        assert abs(loss - dense) < 1e-5, f"{model}: {loss - dense:+.1e} nats per token"
        assert left[0] < work / all_work < left[1], f"{model}: {work / all_work:.3f} of the work"


def test_lsh_form_on_stories_is_better_than_random_and_better_late_than_early():
    dense, all_work, _ = loss_and_work("stories")
    loss, work, share = loss_and_work("stories", form="lsh")
    random, same, again = loss_and_work("stories", form="lsh", choose="random")
    early, _, _ = loss_and_work("stories", form="lsh", first=0, layers=1)
    assert 0.85 < work / all_work < 0.93 and 0.2 < share < 0.5
    assert abs(again - share) < 0.1, "random reuses another number"
    assert -0.01 < loss - dense < 0.04, f"{loss - dense:+.4f} nats per token"
    assert random - dense > 2 * (loss - dense), f"random: {random - dense:+.4f}"
    assert early - dense > 0.5, f"layer 0: {early - dense:+.4f}"
