"""teal: which inputs a matrix uses, how thresholds are allocated, and what it costs on stories."""

from functools import cache

import literal_teal as literal
import numpy as np
import pytest
from own_rows import check_own_rows
from same import assert_same
from tiny import KINDS, WIDE, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import encode, held_out
from minitx.ledger import counting
from minitx.model import Linear
from minitx.shared.activation_threshold import AboveThreshold
from minitx.shared.linears import linears
from minitx.skip.teal import ThresholdedLinear, with_threshold
from minitx.skip.teal.allocation import JudgedBlock, greedy, thresholds
from minitx.state import Layer
from minitx.technique import apply, swap
from minitx.training.loss import token_losses
from minitx.tree import Part, part, walk

RNG = np.random.default_rng(7)
IDS = RNG.integers(0, 258, 40)
TEXTS = [IDS.tolist(), IDS[5:30].tolist()]


def thresholded(w, b, t):
    return ThresholdedLinear.of(Linear(np.array(w, float), b), AboveThreshold(t))


# The product -------------------------------------------------------------------------------------


def test_worked_example_by_hand():
    """x = (3, -1, 0.5): above 0.8 in magnitude are 3 and -1, so y = 3 (1, 2) - (3, 4) = (0, 2);
    above 2 only 3 is: (3, 6); above -1 everything: (0, 2) + 0.5 (5, 6) = (2.5, 5)."""
    x, w = [3.0, -1.0, 0.5], [[1.0, 2], [3, 4], [5, 6]]
    for t, expected in ((0.8, [0, 2]), (2.0, [3, 6]), (-1.0, [2.5, 5])):
        assert thresholded(w, None, t)(np.array([x])).tolist() == [expected], f"t={t}"
        assert literal.linear(x, w, [0.0, 0.0], t) == expected


@pytest.mark.parametrize("t", [-1.0, 0.5, 1.2, 100.0])
def test_equals_the_literal_version(t):
    w, b, x = (RNG.standard_normal(shape) for shape in ((9, 5), (5,), (6, 9)))
    linear = thresholded(w, b, t)
    expected = [literal.linear(row, w.tolist(), b.tolist(), t) for row in x.tolist()]
    one_by_one = np.concatenate([linear(row[None]) for row in x])
    assert_same(one_by_one, expected, "one token at a time", atol=1e-12)
    assert_same(linear(x), expected, "tokens together", atol=1e-12)
    assert_same(linear.outputs(x, slice(1, 4)), np.array(expected)[:, 1:4], tolerance=1e-7)


@pytest.mark.parametrize("family", KINDS)
def test_counted_work_equals_the_formula_on_the_card(family):
    """One token: of each matrix the rows of its active inputs, and a comparison for each input."""
    lm = apply(tiny_lm(family), {"teal": {"sparsity": 0.6, "step": 0.5, "stories": 1}})
    state = lm.model.new_state()
    lm.model(IDS[:20], state)
    with counting(lm) as counts:
        lm.model(IDS[20:21], state)
    found = {path: node for path, node in walk(lm) if type(node) is ThresholdedLinear}
    assert len(found) == 2 * (7 if family == "llama" else 6)
    active = inputs = 0
    for path, node in found.items():
        work, compared = counts.entries[path], counts.entries[f"{path}.select"].multiply_adds
        n = work.multiply_adds // node.w.shape[1]
        assert work.multiply_adds == n * node.w.shape[1], "not whole rows"
        assert work.weight_bytes == 4 * work.multiply_adds, "bytes of rows that are not used"
        assert compared == len(node.w), "not one comparison for each input"
        active, inputs = active + n, inputs + len(node.w)
    assert counts.events == {"inputs read": active, "inputs": inputs} and active < 0.7 * inputs


def test_rows_are_contiguous_in_large_matrices():
    lm = apply(tiny_lm(model=tiny_model("llama", **WIDE)), {"teal": {"stories": 1, "step": 1.0}})
    found = [node for _, node in walk(lm.model) if type(node) is ThresholdedLinear]
    assert found and all(node.w.flags.c_contiguous for node in found)


def test_prompt_with_each_tokens_own_rows_costs_what_single_tokens_cost():
    check_own_rows("teal", {"sparsity": 0.6, "stories": 1})


def test_neutral_setting_is_the_dense_model():
    lm = tiny_lm()
    assert repr(apply(lm, {"teal": {"sparsity": 0.0}}).model) == repr(lm.model)


def test_it_thresholds_what_other_techniques_leave_or_says_that_nothing_is_left():
    lm = tiny_lm("llama")
    options = {"stories": 1, "step": 0.5}
    both = apply(lm, {"teal": options, "cats": {"stories": 1}})
    ffn = both.model.stack.blocks[0].ffn
    assert type(ffn).__name__ == "ThresholdedFFN" and type(ffn.gate) is Linear
    fused = apply(lm, {"teal": options, "fuse_projections": True})
    assert type(fused.model.stack.blocks[0].attn.qkv.all) is ThresholdedLinear
    with pytest.raises(MinitxError, match="teal needs.*quantize"):
        apply(lm, {"teal": options, "quantize": True})


# The allocation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [0.1, 0.35, 0.8, 0.97])
def test_greedy_allocation_equals_the_literal_version(target):
    sizes = {"q": 64, "k": 16, "o": 64, "up": 160, "down": 160}
    slopes = dict(zip(sizes, (3.0, 1.0, 2.0, 0.5, 4.0), strict=True))

    def error(shares):
        return sum(slopes[name] * share**2 for name, share in shares.items())

    found = greedy(sizes, target, 8.0, error)
    expected = literal.allocate(sizes, target, 8.0, max(0.95, target), error)
    assert found == pytest.approx(expected)
    skipped = sum(found[name] * size for name, size in sizes.items())
    assert skipped == pytest.approx(target * sum(sizes.values())), "the target is not met"
    assert max(found.values()) <= max(0.95, target) + 1e-9


def test_greedy_step_goes_to_the_matrix_with_the_least_error_per_number_skipped():
    """Matrix a is half as large as b, so a step of 10 numbers raises its share by 0.5 and that of b
    by 0.25. Error 3 p_a + 4 p_b: the first steps are 1.5 against 1.0, so b gets them, until it may
    skip no more (0.95 of 40 = 38 numbers: 10 + 10 + 10 + 8); then a gets the last 2."""
    found = greedy({"a": 20, "b": 40}, 40 / 60, 10.0, lambda p: 3 * p["a"] + 4 * p["b"])
    assert found == pytest.approx({"a": 0.1, "b": 0.95})


def test_step_is_a_share_of_a_square_matrix(monkeypatch):
    """step=0.5 of a 16 x 16 matrix: 128 numbers, for every matrix."""
    steps = []

    def spy(sizes, sparsity, step, error):
        steps.append(step)
        return dict.fromkeys(sizes, sparsity)

    monkeypatch.setattr("minitx.skip.teal.allocation.greedy", spy)
    thresholds(tiny_lm(), TEXTS, 0.4, 0.5, with_threshold)
    assert steps == [128, 128], "not one allocation with this step for each block"


@part
class Masked(Part):
    """A dense product with zeros, as a check: no rows are skipped."""

    w: np.ndarray
    b: np.ndarray | None
    t: float

    def __call__(self, x):
        y = np.where(abs(x) > self.t, x, 0.0) @ self.w
        return y if self.b is None else y + self.b


@pytest.mark.parametrize("family", KINDS)
def test_error_is_that_of_the_last_quarter_of_each_text(family):
    """A whole pass over each text, where the technique only runs the last tokens."""
    model = tiny_lm(family, dtype=np.float64).model
    block, wanted = model.stack.blocks[0], linears(model, "all")
    inputs = [model.embed(np.array(ids), slice(0, len(ids))) for ids in TEXTS]
    judged = JudgedBlock(block, 0, inputs, wanted, with_threshold)
    shares = {key: 0.2 + 0.05 * number for number, key in enumerate(judged.matrices)}
    t = judged.thresholds(shares)
    masked = swap(block, Linear, lambda linear: Masked(linear.w, linear.b, t[id(linear)]))
    wrong = []
    for x in inputs:
        layer = Layer.once(len(x))
        error = masked(x, layer) - block(x, Layer.once(len(x)))
        wrong.append(error[int(0.75 * len(x)) :])
    expected = np.linalg.norm(np.concatenate(wrong), axis=0).mean()
    assert expected > 0 and judged.error(shares) == pytest.approx(expected, rel=1e-5)
    assert judged.error(dict.fromkeys(shares, 0.0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("step", [None, 0.5])
def test_each_block_skips_the_target_on_the_calibration_text(step):
    """Weighted by the matrices' sizes, with the inputs that the dense model has."""
    lm = tiny_lm("llama", dtype=np.float64)
    t = thresholds(lm, TEXTS, 0.4, step, with_threshold)
    for index, block in enumerate(lm.model.stack.blocks):
        inputs = [lm.model.embed(np.array(ids), slice(0, len(ids))) for ids in TEXTS]
        for before in lm.model.stack.blocks[:index]:
            inputs = [before(x, Layer.once(len(x))) for x in inputs]
        skipped, total = {}, {}

        def spy(linear: Linear, skipped=skipped, total=total) -> Part:
            return Counted(linear, t[id(linear)], skipped, total)

        counted = swap(block, Linear, spy)
        for x in inputs:
            counted(x, Layer.once(len(x)))
        shares = {key: skipped[key] / total[key] for key in total}
        sizes = {id(node): node.w.size for _, node in walk(block) if type(node) is Linear}
        mean = sum(shares[key] * size for key, size in sizes.items()) / sum(sizes.values())
        assert mean == pytest.approx(0.4, abs=0.002), f"block {index}"
        spread = max(shares.values()) - min(shares.values())
        assert spread > 0.2 if step else spread < 0.01, "the allocation is another one"


@part
class Counted(Part):
    """Counts the inputs of a matrix that are not above its threshold."""

    inner: Linear
    t: float
    skipped: dict
    total: dict

    def __call__(self, x):
        key = id(self.inner)
        self.skipped[key] = self.skipped.get(key, 0) + int((abs(x) <= self.t).sum())
        self.total[key] = self.total.get(key, 0) + x.size
        return self.inner(x)


def test_thresholds_are_the_literal_quantiles():
    lm = tiny_lm("gpt2", dtype=np.float64)
    first = lm.model.stack.blocks[0]
    x = first.attn.norm(lm.model.embed(IDS, slice(0, 40)))
    t = thresholds(lm, [IDS.tolist()], 0.3, None, with_threshold)
    expected = literal.threshold(x.ravel().tolist(), 0.3)
    for linear in (first.attn.qkv.q, first.attn.qkv.k, first.attn.qkv.v):
        assert t[id(linear)] == pytest.approx(expected, rel=1e-4)


# On stories --------------------------------------------------------------------------------------


@cache
def stories():
    dense = minitx.load("stories")
    return dense, [story.ids for story in encode(dense.tokenizer, held_out(dense, 3))]


@cache
def measured(**options):
    """Loss, and multiply-adds to decode 20 tokens."""
    dense, texts = stories()
    lm = apply(dense, {"teal": {"stories": 1, "step": 0.5, **options}}) if options else dense
    losses = [token_losses(lm.logits(ids[:-1]), np.array(ids[1:])) for ids in texts]
    state = lm.model.new_state()
    lm.model(texts[0][:60], state)
    with counting(lm) as counts:
        for token in texts[0][60:80]:
            lm.model([token], state)
    return float(np.concatenate(losses).mean()), counts.total("model.stack").multiply_adds


def test_on_stories_greedy_beats_uniform_beats_random_at_equal_cost():
    dense, work = measured()
    plain = {"sparsity": 0.5, "allocation": "uniform"}
    greedy, uniform = measured(sparsity=0.5), measured(**plain)
    random = measured(**plain, choose="random")
    for _, left in (greedy, uniform, random):
        assert 0.48 < left / work < 0.62
    assert greedy[1] == pytest.approx(uniform[1], rel=0.06), "multiply-adds differ"
    assert random[1] == pytest.approx(uniform[1], rel=0.1), "multiply-adds differ"
    prices = [loss - dense for loss, _ in (greedy, uniform, random)]
    assert prices[0] < 0.06 < prices[1] + 0.04 and prices[0] < prices[1], prices
    assert prices[2] > 1, prices
