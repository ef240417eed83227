"""prune: scores, which weights become zero, block by block, what zeros save (nothing)."""

import literal_prune as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, tiny_lm

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import QKV, Linear
from minitx.precompute.prune import InputNorms, lowest_mask, prune_globally, selector
from minitx.shared.linears import linears
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.shared.share import share_of
from minitx.technique import apply, swap
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(3).integers(0, 258, 30)


def pruned(lm, **options):
    return apply(lm, {"prune": options})


def matrices(lm):
    return [linear.w for linear in linears(lm.model, "all").values()]


def output_error(x, w, changed):
    return np.linalg.norm(x @ (w - changed)) / np.linalg.norm(x @ w)


# Which weights -----------------------------------------------------------------------------------


def test_wanda_and_magnitude_by_hand():
    """Half of 4 weights, whose inputs have norms 10, 1, 1 and 0.1:

    W                1     -2    0.5    4
    |W|              1      2    0.5    4      magnitude zeroes  1 and 0.5
    |W| ||X||       10      2    0.5    0.4    wanda zeroes    0.5 and 4
    """
    w, norms = np.array([[1.0], [-2.0], [0.5], [4.0]]), np.array([[10.0], [1.0], [1.0], [0.1]])
    scores = abs(w) * norms
    assert_same(scores[:, 0], [10, 2, 0.5, 0.4], tolerance=1e-7)
    half = selector("output", 0.5)
    assert half(scores)[:, 0].tolist() == [False, False, True, True], "wanda"
    assert half(abs(w))[:, 0].tolist() == [True, False, True, False], "magnitude"


@pytest.mark.parametrize("seed", range(3))
def test_masks_equal_the_literal_version(seed):
    rng = np.random.default_rng(seed)
    w = rng.integers(-4, 5, (16, 5)).astype(float)  # with many ties
    x = rng.normal(0, rng.lognormal(0, 1, 16), (9, 16))
    norms = InputNorms()
    norms.add(x[:4])
    norms.add(x[4:])
    for found, expected in (
        (abs(w), literal.scores(w.tolist())),
        (abs(w) * norms.norms[:, None], literal.scores(w.tolist(), x.tolist())),
    ):
        assert_same(found, expected, "scores", tolerance=1e-12)
        for scope, mask in (
            ("output", literal.by_output(expected, 4)),  # int(16 * 0.3)
            ("matrix", literal.by_matrix(expected, 24)),
            ("2:4", literal.n_of_m(expected, 2, 4)),
            ("4:8", literal.n_of_m(expected, 4, 8)),
        ):
            select = selector(scope, 0.3)
            assert_same(select(np.array(expected)), mask, scope)


def test_scope_output_compares_a_column_and_n_of_m_runs_along_the_inputs():
    """W is stored (in, out): each output loses as many weights, each input need not."""
    w = np.array([[1.0, 40.0], [2.0, 30.0], [3.0, 20.0], [4.0, 10.0]])
    expected = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], bool)
    for scope in ("output", "2:4"):
        assert_same(selector(scope, 0.5)(w), expected, scope)
    by_matrix = selector("matrix", 0.5)(w)
    assert_same(by_matrix, [[True, False]] * 4)


def test_ties_go_to_the_lower_index_and_sparsity_0_zeroes_none():
    equal = np.ones((8, 3))
    assert lowest_mask(equal, 3, 0)[:, 0].tolist() == [True] * 3 + [False] * 5
    for scope in ("output", "matrix"):
        assert not selector(scope, 0.0)(equal).any()
        count = 3 if scope == "output" else share_of(24, 0.13)
        assert selector(scope, 0.13)(equal).sum() == count


def test_share_of_rounds_down_but_not_by_floating_point_error():
    assert share_of(100, 0.29) == 29 and share_of(7, 0.5) == 3 and share_of(3, 0.999) == 2


def test_wanda_has_the_smaller_output_error_where_inputs_differ():
    """512 x 512, inputs with log-normal scales, half of the weights zero. Standard deviation 1.3
    gives errors of about .26 for magnitude and .08 for Wanda (2:4: .35 and .14)."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(0, 1, (512, 512)), rng.normal(0, 1, (600, 512)) * rng.lognormal(0, 1.3, 512)
    found = {}
    for scope in ("output", "2:4"):
        for name, norms in (("magnitude", 1), ("wanda", np.linalg.norm(x, axis=0)[:, None])):
            mask = selector(scope, 0.5)(abs(w) * norms)
            found[scope, name] = output_error(x, w, np.where(mask, 0, w))
    assert 0.2 < found["output", "magnitude"] < 0.32 and found["output", "wanda"] < 0.11
    assert 0.28 < found["2:4", "magnitude"] < 0.42 and found["2:4", "wanda"] < 0.2


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_every_output_loses_the_same_share(family, method):
    lm = tiny_lm(family)
    changed = pruned(lm, sparsity=0.3, method=method, stories=3)
    for w, before in zip(matrices(changed), matrices(lm)):
        assert_same((w == 0).sum(0), share_of(len(w), 0.3))
        assert_same(w[w != 0], before[w != 0], "the other weights stay as they were")
    for scope in ("2:4", "4:8"):
        m = int(scope[-1])
        for w in matrices(pruned(lm, scope=scope, method=method, stories=3)):
            assert ((w.reshape(len(w) // m, m, -1) == 0).sum(1) == m // 2).all(), scope


def test_default_share_is_0_2_or_half_where_the_pattern_says_so():
    lm = tiny_lm()
    for options, share in (({}, 0.2), ({"preset": "paper"}, 0.5), ({"scope": "2:4"}, 0.5)):
        for w in matrices(pruned(lm, method="magnitude", **options)):
            assert ((w == 0).sum(0) == share_of(len(w), share)).all(), options


def test_global_scope_compares_all_matrices_as_in_the_literal_version():
    rng = np.random.default_rng(1)
    three = QKV(*(Linear(rng.integers(-9, 10, shape)) for shape in ((4, 3), (3, 5), (4, 2))))
    before = [three.q.w, three.k.w, three.v.w]
    expected = literal.globally([literal.scores(w.tolist()) for w in before], 14)
    found = prune_globally(three, {id(m): m for m in (three.q, three.k, three.v)}, 0.4)  # of 35
    for w, mask, after in zip(before, expected, (found.q.w, found.k.w, found.v.w)):
        assert_same(after, np.where(mask, 0, w))

    lm = tiny_lm("gpt2")
    total = sum(w.size for w in matrices(lm))
    after = matrices(pruned(lm, method="magnitude", scope="global", sparsity=0.4))
    zeroed = np.concatenate([abs(old)[new == 0] for new, old in zip(after, matrices(lm))])
    left = np.concatenate([abs(new[new != 0]) for new in after])
    assert len(zeroed) == share_of(total, 0.4) and zeroed.max() <= left.min()
    assert len({(w == 0).mean() for w in after}) > 2, "matrices lose different shares"


def test_only_the_chosen_matrices_are_pruned():
    lm = tiny_lm()
    for which, parts in (("ffn", "ffn"), ("attention", "attn")):
        for path, node in walk(pruned(lm, matrices=which, method="magnitude").model):
            if type(node) is Linear:
                assert (node.w == 0).any() == (f".{parts}." in path), path


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_scores_the_second_block_by_outputs_of_the_pruned_first(family):
    """By hand: prune block 0 by what it reads, run the model with it, prune block 1 by what that
    reads. Inputs from the dense model would select other weights."""
    lm = tiny_lm(family)
    changed = pruned(lm, sparsity=0.5, stories=3)
    texts = calibration_ids("test", lm, 3)

    def expected_masks(model, block):
        seen = watch_inputs(model, Linear, texts, Rows)
        found = linears(model.model.stack.blocks[block], "all")
        scores = [literal.scores(m.w.tolist(), seen[i].all.tolist()) for i, m in found.items()]
        return [np.array(literal.by_output(s, len(s) // 2)) for s in scores]

    def masks(model, block):
        return [m.w == 0 for m in linears(model.model.stack.blocks[block], "all").values()]

    def differ(a, b):  # the literal version reads float32 inputs, so near-ties may differ
        return [(x != y).mean() > 0.01 for x, y in zip(a, b, strict=True)]

    first, dense = expected_masks(lm, 0), expected_masks(lm, 1)
    assert not any(differ(first, masks(changed, 0)))
    where = dict(zip(linears(lm.model.stack.blocks[0], "all"), first))
    half = swap(
        lm, Linear, lambda m: Linear(np.where(where.get(id(m), False), 0, m.w).astype("f"), m.b)
    )
    assert not any(differ(expected_masks(half, 1), masks(changed, 1)))
    assert any(differ(dense, masks(changed, 1))), "the example tells the two apart"


def test_zeros_in_dense_arrays_save_no_work_and_no_memory():
    lm = tiny_lm()
    with counting(lm) as before:
        lm.logits(IDS)
    for scope in ("output", "2:4"):
        changed = pruned(lm, scope=scope, stories=3)
        with counting(changed) as after:
            changed.logits(IDS)
        assert after.total() == before.total() and nbytes(changed) == nbytes(lm)
    assert "50% zeros" in repr(changed) and "zeros" not in repr(lm)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparsity": 1.0}, "sparsity must be a number, at least 0 and below 1, or None; got 1.0"),
        ({"sparsity": -0.1}, "at least 0 and below 1, or None; got -0.1"),
        ({"scope": "2:4", "sparsity": 0.3}, "zeroes half of the weights.* use sparsity=0.5 or"),
        ({"scope": "matrix"}, "within one output, not with scope=matrix; use scope=output or"),
        ({"scope": "global", "sparsity": 0.0}, "not with scope=global"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message) as caught:
        pruned(tiny_lm(), **options)
    assert "\n" not in str(caught.value)


def test_wanda_without_a_tokenizer_and_odd_sizes_for_n_of_m_are_refused():
    with pytest.raises(MinitxError, match="prune learns from calibration text"):
        pruned(tiny_lm(tokenizer=None))
    assert pruned(tiny_lm(tokenizer=None), method="magnitude").tokenizer is None
    assert TOKENIZER is not None
    odd = swap(tiny_lm(), Linear, lambda m: Linear(m.w[:14]) if len(m.w) == 24 else m)
    with pytest.raises(MinitxError, match="scope=2:4 needs a multiple of 4 inputs.* has 14"):
        pruned(odd, scope="2:4", method="magnitude")
