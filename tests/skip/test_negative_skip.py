"""negative_skip: when a dot product may stop, what that computes, and what it saves on
stories-relu."""

from functools import cache

import literal_negative_skip as literal
import numpy as np
import pytest
from same import assert_same
from tiny import WIDE, check_close, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.memory_layout import to_column_major
from minitx.model import Linear
from minitx.skip.negative_skip import ORDERS, StoppedEarly
from minitx.technique import apply, blocks_of
from minitx.tree import walk

RNG = np.random.default_rng(4)
IDS = RNG.integers(0, 258, 40)
FIRST = {"shift": "positives_first", "bound": "largest_first"}
each_method = pytest.mark.parametrize("method", FIRST)


def made(w, b, method, every=16, order=None, mean=None):
    return StoppedEarly.of(Linear(w, b), method, ORDERS[order or FIRST[method]], every, mean)


def run(part, x):
    """The neurons, multiply-adds and terms computed."""
    with counting(part) as counts:
        h = part(x)
    assert counts.events["terms"] == x.size * h.shape[-1]
    return h, counts.total().multiply_adds, counts.events["terms computed"]


def relu(x, w, b=0.0):
    return np.maximum(x @ w + b, 0)


def test_shift_worked_example_by_hand():
    """x = 1 -1 2, so m = -1 and x - m = 2 0 3. w = 1 2 -3, of sum 0: the positive terms are 2*0 and
    1*2, then acc = 2, and -3*3 follows: -7. With bias -3: acc = -3, -3, -1 after both positive
    terms, and only the negative weight is left: stop after two of three terms."""
    x, w = np.array([[1.0, -1, 2]]), np.array([[1.0], [2], [-3]])
    for bias, terms in ((0.0, 3), (-3.0, 2)):
        h, work, computed = run(made(w, np.array([bias]), "shift", every=1), x)
        assert h.item() == 0 and computed == terms, f"bias {bias}"
        assert literal.shift([1.0, -1, 2], [1.0, 2, -3], bias, 1) == (0, terms)
    # Inputs >= 0 are not shifted, which is SnaPEA's own rule: 1 + 1 = 2, then 2 - 3*2 = -4.
    assert run(made(w[[0, 2]], np.ones(1), "shift", every=1), abs(x[:, [0, 2]]))[2] == 2
    # 3 comparisons for m, 1 multiply-add for m sum(w), 2 terms, 1 comparison after them (the first
    # check comes while a positive weight is left).
    assert work == 3 + 1 + 2 + 1


def test_bound_worked_example_by_hand():
    """x = 3 4, |x| = 5; w = -2 1, so the larger one comes first: acc = -6, and what is left adds at
    most 1 * 5 (it would add 4): -1 <= 0, stop after one term of two. With bias 1.5 it goes on."""
    x, w = np.array([[3.0, 4]]), np.array([[-2.0], [1]])
    h, work, computed = run(made(w, None, "bound", every=1), x)
    assert h.item() == 0 and computed == 1
    assert literal.bound([3.0, 4], [-2.0, 1], 0.0, 1) == (0, 1)
    assert work == 2 * 2 + 2 * 1 + 1 + 1, "2 D + 2 F, a term and a comparison"
    h, _, computed = run(made(w, np.array([1.5]), "bound", every=1), x)
    assert h.item() == 0 and computed == 2
    assert literal.bound([3.0, 4], [-2.0, 1], 1.5, 1) == (0, 2)


@each_method
@pytest.mark.parametrize("every", [1, 3, 8, 50])
@pytest.mark.parametrize("bias", [0.0, -2.0, 2.0])
def test_equals_the_literal_version(method, every, bias):
    x, w = RNG.standard_normal((2, 3, 12)), RNG.standard_normal((12, 9))
    w[2, :4] = 0
    b = bias + RNG.standard_normal(9) / 4
    h, _, computed = run(made(w, b, method, every), x)
    by_hand = [
        getattr(literal, method)(row.tolist(), w[:, j].tolist(), b[j], every)
        for row in x.reshape(-1, 12)
        for j in range(9)
    ]
    expected = np.reshape([value for value, _ in by_hand], (2, 3, 9))
    assert_same(h, expected, "neurons", atol=1e-12)
    assert computed == sum(terms for _, terms in by_hand), "it stops elsewhere"


@each_method
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("inputs", ["signed", "positive", "zero", "one large"])
def test_neurons_are_exactly_those_of_relu_in_every_order(method, order, inputs):
    x = RNG.standard_normal((20, 16))
    x = {"signed": x, "positive": abs(x), "zero": x * 0, "one large": x * 0.1}[inputs]
    x[:, 3] += 100.0 * (inputs == "one large")
    w, b = RNG.standard_normal((16, 30)), RNG.standard_normal(30) - 1
    h, _, computed = run(made(w, b, method, 4, order), x)
    expected = relu(x, w, b)
    check_close(h, expected, 1e-12, "neurons")
    assert_same(h == 0, expected == 0, "other zeros than ReLU's")
    assert computed <= x.size * 30


def test_unshifted_rule_would_be_wrong_for_signed_inputs():
    """The trap: stopping below 0 once only negative weights are left, with a negative input. w = 1
    -1, x = -1 -3: the sum is -1 after the positive weight, and 2 at the end."""
    x, w = np.array([[-1.0, -3]]), np.array([[1.0], [-1]])
    for method in FIRST:
        assert run(made(w, None, method, 1), x)[0].item() == pytest.approx(2), method


def test_orders_by_sign_and_magnitude_stop_sooner_than_the_stored_one():
    x, w = RNG.standard_normal((200, 64)), RNG.standard_normal((64, 40))
    b = np.full(40, -10.0)
    share = {
        (method, order): run(made(w, b, method, 8, order), x)[2] / (x.size * 40)
        for method in FIRST
        for order in ORDERS
    }
    for method, best in FIRST.items():
        assert min(ORDERS, key=lambda order: share[method, order]) == best
        assert share[method, best] < 0.92 < 0.97 < share[method, "original"]


def test_many_tokens_equal_few_at_a_time(monkeypatch):
    x, w = RNG.standard_normal((25, 16)), RNG.standard_normal((16, 10))
    part = made(w, None, "bound", 4)
    whole = part(x)
    monkeypatch.setattr("minitx.shared.ordering.GATHERED", 100)
    assert_same(part(x), whole, atol=1e-14)


@each_method
def test_counted_work_equals_the_formula_on_the_card(method):
    """Terms computed, a comparison per check that can stop, and what is done once per token."""
    x, w, n, D, F = RNG.standard_normal((7, 16)), RNG.standard_normal((16, 10)), 7, 16, 10
    part = made(w, np.full(10, -1.0), method, 4)
    _, work, computed = run(part, x)
    going = np.ones((n, F), bool)
    scaled = x / np.linalg.norm(x, axis=1)[:, None] if method == "bound" else x - x.min(1)[:, None]
    at = -1 / np.linalg.norm(x, axis=1)[:, None] if method == "bound" else -1
    at = at + (0 if method == "bound" else x.min(1)[:, None] * w.sum(0))
    order, checks, terms = ORDERS[FIRST[method]](w), 0, 0
    for k in range(0, D, 4):
        for o in order[k : k + 4]:
            at = at + scaled[:, o] * np.take_along_axis(w, o[None].astype(int), 0)
        terms += 4 * going.sum()
        left = np.take_along_axis(w, order[k + 4 :].astype(int), 0)
        may_stop = np.ones(F, bool) if method == "bound" else (left <= 0).all(0)
        checks += (going & may_stop).sum() if k + 4 < D else 0
        bound = np.linalg.norm(left, axis=0) if method == "bound" else 0
        going &= ~(may_stop & (at + bound <= 0))
    once = 2 * (D + F) if method == "bound" else D + F
    assert computed == terms and work == terms + checks + n * once


@each_method
@pytest.mark.parametrize("center", [False, True])
def test_model_equals_dense(method, center):
    """Large matrices too, which are column-major before."""
    dense = to_column_major(tiny_lm(model=tiny_model("gpt2", dtype=np.float64, **WIDE)))
    options = {"method": method, "center": center, "stories": 1}
    lm = apply(dense, {"negative_skip": options, "zero_skip": {}})
    check_close(lm.logits(IDS), dense.logits(IDS), 1e-12, "logits")
    for block in blocks_of(lm):
        assert block.ffn.expand.w.flags.c_contiguous, "a neuron's weights are not contiguous"


def test_nan_is_not_taken_for_a_zero():
    x, w = np.full((1, 16), np.nan), RNG.standard_normal((16, 3))
    for method in FIRST:
        assert np.isnan(made(w, None, method, 4)(x)).all(), method


@pytest.mark.parametrize("scale", [1e25, 1e-23, 1e-30])
def test_inputs_whose_squares_leave_float32_are_multiplied_exactly(scale):
    rng = np.random.default_rng(1)
    x, w = (scale * rng.standard_normal((5, 16))).astype("f4"), rng.standard_normal((16, 40))
    b = (scale * rng.standard_normal(40)).astype("f4")
    for method in FIRST:
        found = made(w.astype("f4"), b, method, 4)(x)
        assert found.dtype == np.float32
        expected = relu(x.astype(float), w, b)
        assert abs(found - expected).max() < 1e-5 * expected.max(), method


@pytest.mark.parametrize("family, activation", [("llama", "SwiGLU"), ("gpt_neox", "gelu")])
def test_models_without_relu_are_refused(family, activation):
    words = f"negative_skip needs FFNs with ReLU.*{activation}.*use.*teal"
    with pytest.raises(MinitxError, match=words):
        apply(tiny_lm(family), {"negative_skip": {}})


def test_other_formats_are_refused_by_name():
    for other in ("quantize", "function_tables", "order_products"):
        with pytest.raises(MinitxError, match=f"negative_skip.*{other}"):
            apply(tiny_lm("gpt2"), {"negative_skip": {}, other: {}})


@cache
def loaded():
    return minitx.load("stories-relu")


def test_share_of_terms_on_stories_relu():
    """The Cauchy-Schwarz bound stops sooner than the shift, and sooner still with centered
    inputs."""
    dense = loaded()
    ids = encode(dense.tokenizer, held_out(dense, 1))[0].ids[:50]

    def share(**options):
        lm = apply(dense, {"negative_skip": options | {"stories": 1}})
        with counting(lm) as counts:
            logits = lm.logits(ids)
        check_close(logits, dense.logits(ids), 1e-5, "logits")
        work = sum(
            entry.multiply_adds for path, entry in counts.entries.items() if "expand" in path
        )
        assert any(type(node) is StoppedEarly for _, node in walk(lm))
        of_dense = 4 * 50 * 128 * 512
        return counts.events["terms computed"] / counts.events["terms"], work / of_dense

    (shift, a), (bound, b), (centered, c) = map(
        lambda options: share(**options),
        ({"method": "shift"}, {}, {"center": True}),
    )
    assert 0.92 < shift < 0.96 and 0.96 < a < 1, f"{shift:.3f} of the terms, {a:.3f} with checks"
    assert 0.87 < bound < 0.91 and 0.94 < b < 0.98, f"{bound:.3f} of the terms, {b:.3f} with checks"
    assert 0.83 < centered < bound - 0.01 and c < b - 0.01, f"{centered:.3f}, {c:.3f} with checks"
