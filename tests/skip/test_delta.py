"""delta: what is sent, that errors do not add up, what it costs, and what it is worth on text."""

from functools import cache

import literal_delta as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, WIDE, check_close, error, in_chunks, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import Linear
from minitx.skip.delta import DeltaLinear, LargeInputs
from minitx.state import Layer
from minitx.technique import apply
from minitx.training.loss import token_losses
from minitx.tree import walk

RNG = np.random.default_rng(3)
IDS = RNG.integers(0, 258, 40)


def product(xs, w, b=None, threshold=0.3, refresh=1 << 30, steps=None):
    """x W + b of all inputs xs (T, in), in one step or several."""
    layer, linear, out, at = Layer(len(xs)), DeltaLinear(w, b, threshold, refresh), [], 0
    for size in steps or (len(xs),):
        out.append(linear(xs[at : at + size], layer.take(size)))
        at += size
    return np.concatenate(out)


def slowly_changing(T, D, seed=0, keep=0.9):
    """Inputs (T, D) of which each is 0.9 of the one before plus noise: x_t = 0.9 x_(t-1) + ..."""
    rng = np.random.default_rng(seed)
    xs = rng.standard_normal((T, D))
    for t in range(1, T):
        xs[t] = keep * xs[t - 1] + (1 - keep**2) ** 0.5 * xs[t]
    return xs


def test_worked_example_by_hand():
    """W has the rows (1, 0), (0, 1), (2, 2), threshold 0.5.

    x = (2, 2, 2)        first token: all sent       y = (2 + 4, 2 + 4)         = (6, 6)
    x = (2.9, 2, 4)      rms 3.08, tolerance 1.54:   y = (6, 6) + 2 (2, 2)      = (10, 10)
                         only |4 - 2| exceeds it     (dense: 10.9, 10)
    x = (3.7, 2, 4)      rms 3.35, tolerance 1.68:   3.7 - 2 = 1.7 against what was last sent, 2,
                         though 3.7 - 2.9 = 0.8:     y = (10 + 1.7, 10)         = (11.7, 10)
    """
    xs = np.array([[2.0, 2, 2], [2.9, 2, 4], [3.7, 2, 4]])
    w = np.array([[1.0, 0], [0, 1], [2, 2]])
    expected = [[6, 6], [10, 10], [11.7, 10]]
    assert_same(product(xs, w, threshold=0.5), expected, "the product", tolerance=1e-7)
    by_hand, sent = literal.products(xs.tolist(), w.tolist(), [0, 0], 0.5)
    assert_same(by_hand, expected, tolerance=1e-7)
    assert sent == [3, 1, 1]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 2.0])
@pytest.mark.parametrize("steps", [(30,), (11, 1, 1, 17), (1,) * 30])
def test_equals_the_literal_version(threshold, steps):
    xs, w, b = slowly_changing(30, 6), RNG.standard_normal((6, 5)), RNG.standard_normal(5)
    expected, _ = literal.products(xs.tolist(), w.tolist(), b.tolist(), threshold, 8)
    found = product(xs, w, b, threshold, 8, steps)
    assert_same(found, expected, "x W + b", atol=1e-12)


def test_threshold_zero_is_exact_up_to_rounding():
    xs, w = slowly_changing(60, 16), RNG.standard_normal((16, 8))
    xs[20:40, :8] = xs[19, :8]  # these do not change, and are not sent
    check_close(product(xs, w, threshold=0), xs @ w, 1e-14, "threshold=0")


def test_errors_are_bounded_and_those_of_the_naive_variant_add_up():
    """The drift curve: relative error of 50 tokens each, over 1,000 tokens."""
    xs, w = slowly_changing(1000, 8), np.random.default_rng(1).standard_normal((8, 6))
    arguments, exact = (xs.tolist(), w.tolist(), [0.0] * 6, 0.3), xs @ w

    def curve(found):
        pieces = zip(np.split(np.asarray(found), 20), np.split(exact, 20), strict=True)
        return np.array([np.linalg.norm(y - z) / np.linalg.norm(z) for y, z in pieces])

    ours = curve(product(xs, w, threshold=0.3))
    naive = curve(literal.products(*arguments, compare_with="previous")[0])
    refreshed = curve(literal.products(*arguments, 20, compare_with="previous")[0])
    assert ours.max() < 0.2, f"errors against what was sent add up: {ours.round(2)}"
    assert ours[10:].mean() < 1.3 * ours[:10].mean()
    assert naive[-1] > 2 and naive[-1] > 2 * naive[0], f"the naive variant: {naive.round(2)}"
    assert refreshed.max() < 1 < naive.max(), f"refresh bounds it: {refreshed.round(2)}"


def test_refresh_clears_the_rounding_errors_of_float32():
    xs = slowly_changing(1000, 32).astype(np.float32)
    w = RNG.standard_normal((32, 16)).astype(np.float32)
    exact = xs.astype(float) @ w.astype(float)
    kept, cleared = (product(xs, w, threshold=0.0, refresh=r) for r in (1 << 30, 20))
    kept, cleared = error(kept[800:], exact[800:]), error(cleared[800:], exact[800:])
    assert cleared < 1e-6 < kept < 1e-5, f"without refresh {kept:.1e}, with {cleared:.1e}"


def test_input_error_never_exceeds_the_tolerance():
    xs = slowly_changing(200, 10)
    layer, linear = Layer(200), DeltaLinear(np.eye(10), None, 0.4, 1 << 30)
    off = abs(linear(xs, layer.take(200)) - xs)  # with W = I, y is what was sent
    assert (off <= 0.4 * np.sqrt((xs**2).mean(-1, keepdims=True)) + 1e-12).all()
    assert off.max() > 0.2


@pytest.mark.parametrize("keep, better", [(0.9, "delta"), (0.0, "zero")])
def test_comparing_with_the_token_before_pays_where_inputs_change_slowly(keep, better):
    xs, w = slowly_changing(300, 32, keep=keep), np.random.default_rng(1).standard_normal((32, 8))
    sent = {}
    parts = {"delta": DeltaLinear(w, None, 0.3, 1 << 30), "zero": LargeInputs(w, None, 0.3)}
    for name, linear in parts.items():
        with counting(linear) as counts:
            assert_same(linear(xs, Layer(300).take(300)), xs @ w, tolerance=0.2)
        sent[name] = counts.events["coordinates sent"] / counts.events["coordinates"]
    assert min(sent, key=sent.get) == better, f"shares sent: {sent}"


def test_nan_is_sent():
    xs = np.ones((3, 4))
    xs[1:, 2] = np.nan
    assert np.isnan(product(xs, np.eye(4))[1:]).any(-1).all(), "an overflow was hidden"


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_decision_does_not_depend_on_the_scale_of_float32_inputs(scale):
    """Their squares are beyond float32: the rms would be Inf, or 0."""
    xs, w = slowly_changing(50, 8), RNG.standard_normal((8, 3))
    for kind in (lambda w: DeltaLinear(w, None, 0.4, 1 << 30), lambda w: LargeInputs(w, None, 0.4)):
        found = kind(w.astype("f4"))((scale * xs).astype("f4"), Layer(50).take(50))
        expected = kind(w)(xs, Layer(50).take(50))
        assert_same(found / np.float64(scale), expected, atol=1e-4)


def test_token_that_comes_after_later_ones_is_dense_and_not_remembered():
    xs, w = slowly_changing(6, 5), RNG.standard_normal((5, 3))
    layer, linear = Layer(6), DeltaLinear(w, None, 0.5, 1 << 30)
    before = linear(xs[:5], layer.take(5))
    tokens, layer.tokens = layer.tokens, layer.tokens.only([1])  # token 1 again
    assert_same(linear(xs[5:], layer), xs[5:] @ w, "not dense", tolerance=1e-7)
    layer.tokens = tokens
    assert len(layer.memory.recall(linear, None).after) == 5
    assert_same(before, product(xs[:5], w, threshold=0.5))


def demo(family="llama", **options):
    return apply(tiny_lm(family, dtype=np.float64), {"delta": {"threshold": 0.5} | options})


def test_rewind_continues_from_any_position():
    lm = demo()
    once, state = in_chunks(lm, IDS, (20, *[1] * 20)), lm.model.new_state()
    in_chunks(lm, IDS, (20, *[1] * 20), state)
    for back_to in (37, 20, 5):
        state.rewind(back_to)
        found = in_chunks(lm, IDS[back_to:], (1,) * (40 - back_to), state)
        check_close(found, once[back_to:], 1e-13, f"rewound to {back_to}")


@pytest.mark.parametrize("family", FAMILIES)
def test_model_at_threshold_zero_equals_dense_up_to_rounding(family):
    lm = demo(family, threshold=0.0)
    check_close(lm.logits(IDS), tiny_lm(family, dtype=np.float64).logits(IDS), 1e-12, "threshold=0")


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_without_cache_equals_its_rows(family):
    lm, rows = demo(family), np.stack([IDS[:20], IDS[20:]])
    check_close(lm.logits(rows), np.stack([lm.logits(row) for row in rows]), 1e-12, "a batch")


@pytest.mark.parametrize("choose", ["delta", "zero", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counted_work_equals_the_formula_on_the_card(family, choose):
    """2 D comparisons, and n F for n coordinates sent, in each product of one decoded token."""
    lm = demo(family, choose=choose)
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    products = {p: n for p, n in walk(lm) if type(n) in (DeltaLinear, LargeInputs)}
    assert len(products) == 2 * 5, "q, kv, out, up, down of two blocks"
    with counting(lm) as counts:
        lm.model(IDS[20:21], state)
    inputs = widths = 0
    for path, node in products.items():
        D, F = node.w.shape
        sent, rest = divmod(counts.entries[path].multiply_adds - 2 * D, F)
        assert rest == 0 and 0 <= sent <= D
        assert counts.entries[path].weight_bytes == sent * F * 8, "rows that are not sent are read"
        stored = D + F if type(node) is DeltaLinear else 0
        assert counts.entries[path].cache_bytes == stored * 8, "what is remembered is read"
        inputs, widths = inputs + sent, widths + D
    assert counts.events == {"coordinates sent": inputs, "coordinates": widths}
    assert inputs < 0.95 * widths


def test_where_says_which_products():
    def kinds(where):
        lm = demo(where=where, refresh=4)
        found = {p.split(".", 3)[3] for p, n in walk(lm.model) if type(n) is DeltaLinear}
        return sorted(found)

    attention = ["attn.out", "attn.qkv.both", "attn.qkv.q"]
    assert kinds("all") == [*attention, "ffn.down", "ffn.expand.both"]
    assert kinds("attention") == attention
    assert kinds("ffn") == ["ffn.down", "ffn.expand.both"]
    assert kinds("down") == ["ffn.down"]


def test_monitor_runs_the_dense_ffn_where_the_error_exceeds_its_limit():
    dense = tiny_lm(dtype=np.float64)
    options = {"threshold": 1.0, "where": "ffn", "monitor": 4}
    strict, free = (apply(dense, {"delta": options | {"limit": n}}) for n in (0.0, 1e9))
    for lm, low, high in ((strict, 0.3, 0.8), (free, 0.0, 0.0)):
        with counting(lm) as counts:
            in_chunks(lm, IDS, (12, *[1] * 28))
        assert counts.events["quality checks"] == 2 * 10
        share = counts.events["checks above the limit"] / 20
        assert low <= share <= 1 if low else share == high
    for where in ("attention", "out"):
        with pytest.raises(MinitxError, match=f"delta: monitor=2 .* where={where}"):
            demo(where=where, monitor=2)


def test_rows_that_are_gathered_are_contiguous_beside_the_dense_matrix_of_the_monitor():
    lm = apply(tiny_lm(model=tiny_model("llama", **WIDE)), {"delta": {"monitor": 4}})
    layouts = {type(n): n.w.flags for _, n in walk(lm) if type(n) in (DeltaLinear, Linear)}
    assert layouts[DeltaLinear].c_contiguous and layouts[Linear].f_contiguous


def test_neutral_setting_is_the_dense_model_and_others_are_printed():
    lm = tiny_lm()
    assert repr(apply(lm, {"delta": {"refresh": 1}}).model) == repr(lm.model)
    assert "down: DeltaLinear(w 24x16, threshold=0.5, refresh=64)" in repr(demo().model)


def test_techniques_that_have_replaced_a_matrix_are_refused():
    with pytest.raises(MinitxError, match="delta .* quantize"):
        apply(tiny_lm(), {"delta": True, "quantize": True})
    with pytest.raises(MinitxError, match="delta .* head_router"):
        apply(tiny_lm(), {"delta": True, "head_router": {"first": 0}})
    both = apply(tiny_lm(), {"delta": {"where": "ffn"}, "head_router": {"first": 0}})
    assert np.isfinite(both.logits(IDS)).all()


@cache
def stories():
    lm = minitx.load("stories")
    return lm, encode(lm.tokenizer, held_out(lm, 1))[0].ids


@cache
def loss_and_work(**options):
    dense, ids = stories()
    lm = apply(dense, {"delta": options}) if options else dense
    with counting(lm) as counts:
        losses = token_losses(lm.logits(ids[:-1]), np.array(ids[1:]))
    return float(losses.mean()), counts.total().multiply_adds


def test_on_stories_it_is_better_than_random_coordinates_but_not_than_dropping_small_ones():
    dense, all_work = loss_and_work()
    for choose, threshold, loss, left in (
        ("delta", 0.3, (-0.02, 0.03), (0.72, 0.77)),
        ("zero", 0.3, (-0.02, 0.03), (0.68, 0.74)),
        ("random", 0.2, (1.0, 9.0), (0.7, 0.77)),
    ):
        after, work = loss_and_work(choose=choose, threshold=threshold)
        assert loss[0] < after - dense < loss[1], f"{choose}: {after - dense:+.3f} nats"
        assert left[0] < work / all_work < left[1], f"{choose}: {work / all_work:.3f} of the work"


def test_batch_with_a_cache_is_refused_by_name():
    lm = demo()
    with pytest.raises(MinitxError, match="^delta remembers .* batch of shape .*; give one"):
        lm.model(np.stack([IDS, IDS]), lm.model.new_state())
