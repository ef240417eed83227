"""low_rank: the factors, the rank, when they are smaller, what they save."""

from dataclasses import replace

import literal_low_rank as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, tiny_lm

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.low_rank import LowRank, break_even, chosen_rank, factors, pays, root_of
from minitx.shared.linears import change_linears, linears
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.technique import apply
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(3).integers(0, 258, 30)


def factorized(lm, **options):
    return apply(lm, {"low_rank": dict(stories=3) | options})


def product(found: LowRank):
    return found.left.w @ found.right.w


def at_rank(w, r, c=None):
    """The factors of w at rank r, computed as the technique does."""
    c = np.eye(len(w)) if c is None else c
    u, s, v = np.linalg.svd(c.T @ w, full_matrices=False)
    return factors(Linear(w), c, u[:, :r], s[:r], v[:r])


def relative_error(w, changed, x=None):
    """Of the weights, or of the outputs for the inputs x."""
    difference = w - changed
    difference, w = (difference, w) if x is None else (x @ difference, x @ w)
    return np.linalg.norm(difference) / np.linalg.norm(w)


# The factors -------------------------------------------------------------------------------------


def test_factors_by_hand():
    """The rows of W are orthogonal, so the singular values are their norms, and U is I:

        W = 3  3     norm sqrt(18)
            1 -1     norm sqrt(2)

    Rank 1 keeps row 0: left right = (3 3; 0 0), which is off by sqrt(2) of ||W|| = sqrt(20)."""
    w = np.array([[3.0, 3], [1, -1]])
    found = at_rank(w, 1)
    assert found.left.w.shape == (2, 1) and found.right.w.shape == (1, 2)
    assert_same(product(found), [[3, 3], [0, 0]], atol=1e-12)
    assert relative_error(w, product(found)) == pytest.approx((2 / 20) ** 0.5)


def test_weighted_factors_by_hand():
    """The same W with inputs (0, 10) twice and (1, 0) once. X^T X = diag(1, 200), so c^T W has rows
    of norms sqrt(18) and sqrt(200) sqrt(2) = 20: now row 1 is kept, and outputs are hardly off."""
    w, x = np.array([[3.0, 3], [1, -1]]), np.array([[0.0, 10], [0, 10], [1, 0]])
    found = product(at_rank(w, 1, root_of(x.T @ x, 1e-12)))
    assert_same(found, [[0, 0], [1, -1]], atol=1e-6)
    plain = product(at_rank(w, 1))
    assert relative_error(w, found, x) < 0.25 < relative_error(w, plain, x)


def test_full_rank_is_exact_but_for_rounding():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (50, 12)) * rng.lognormal(0, 2, 12)
    for shape in ((12, 7), (12, 30)):
        w = rng.normal(0, 1, shape)
        for c in (None, root_of(x.T @ x, 0.01)):
            assert relative_error(w, product(at_rank(w, min(shape), c))) < 1e-12


def test_error_depends_on_the_spectrum():
    """768 x 288 at r = 72: 73 % relative error if Gaussian, 16 % at a spectrum exp(-i/40)."""
    w = np.random.default_rng(0).normal(0, 1, (768, 288))
    u, s, v = np.linalg.svd(w, full_matrices=False)
    decaying = np.exp(-np.arange(288) / 40)
    for spectrum, error in ((s, 0.73), (decaying, 0.16)):
        w = (u * spectrum) @ v
        found = factors(Linear(w), np.eye(768), u[:, :72], spectrum[:72], v[:72])
        assert relative_error(w, product(found)) == pytest.approx(error, abs=0.006)
    assert round(np.exp(-72 / 40), 3) == 0.165
    assert round(72 / break_even(768, 288), 2) == 0.34  # of its weights


@pytest.mark.parametrize("r", [1, 3, 5])
def test_factors_equal_the_literal_version(r):
    rng = np.random.default_rng(r)
    x, w = rng.normal(0, 1, (20, 6)) * rng.lognormal(0, 1, 6), rng.normal(0, 1, (6, 7))
    found = product(at_rank(w, r, root_of(x.T @ x, 1e-12)))
    expected = literal.low_rank(w.tolist(), r, x.tolist())
    assert_same(found, expected, atol=1e-6)
    plain = product(at_rank(w, r))
    assert_same(plain, literal.low_rank(w.tolist(), r, np.eye(6).tolist()), atol=1e-6)
    assert relative_error(w, found, x) < relative_error(w, plain, x)
    assert relative_error(w, plain) < relative_error(w, found)


def test_inputs_that_are_always_zero_give_finite_factors():
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 1, (3, 8)), rng.normal(0, 1, (8, 8))
    x[:, 5] = 0
    for seen in (x, x * 0):  # fewer rows than inputs, and none at all
        found = product(at_rank(w, 3, root_of(seen.T @ seen, 0.01)))
        assert np.isfinite(found).all()
    assert_same(found, product(at_rank(w, 3)), atol=1e-12)


# The rank ----------------------------------------------------------------------------------------


def test_chosen_rank_by_rank_energy_and_share():
    s = np.sqrt([6.0, 3.0, 1.0])  # cumulative energy .6, .9, 1
    for energy, r in ((0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert chosen_rank(s, (3, 9), 1.0, None, energy) == r, energy
    assert chosen_rank(s, (3, 9), 1.0, 2, None) == 2 and chosen_rank(s, (3, 9), 1.0, 9, None) == 3
    assert break_even(128, 352) == 128 * 352 / 480
    for share, r in ((0.5, 46), (0.01, 1), (0.9, 84)):  # of 93.87
        assert chosen_rank(np.ones(128), (128, 352), share, None, None) == r
        assert share == 0.01 or r * 480 <= share * 128 * 352 < (r + 1) * 480
    assert pays(63, 128, 128) and not pays(64, 128, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_matrices_whose_factors_are_no_smaller_stay_dense(family):
    lm = tiny_lm(family)
    whole = {id(m) for m in linears(lm.model, "all").values()}
    changed = factorized(lm, rank=8)  # 16x16 breaks even at 8, 16x24 at 9.6, 16x8 at 5.3
    for path, node in walk(changed.model):
        if type(node) is LowRank:
            assert ".ffn." in path and node.left.w.shape[1] == 8
        elif type(node) is Linear and ".attn." in path:
            assert id(node) in whole
    assert not [n for _, n in walk(factorized(lm, rank=10)) if type(n) is LowRank]
    for options in ({"energy": 1.0}, {"share": 1.0}):
        assert not [n for _, n in walk(factorized(lm, **options)) if type(n) is LowRank]


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"rank": 4}, {"share": 0.5}, {"energy": 0.8}])
def test_saved_work_and_bytes_are_those_of_the_formula(family, options):
    lm = tiny_lm(family)
    changed = factorized(lm, **options)
    found = [node for _, node in walk(changed.model) if type(node) is LowRank]
    saved = 0
    for part in found:
        (inputs, r), outputs = part.left.w.shape, part.right.w.shape[1]
        assert r * (inputs + outputs) < inputs * outputs
        saved += inputs * outputs - r * (inputs + outputs)
    assert saved
    with counting(lm) as before:
        lm.logits(IDS)
    with counting(changed) as after:
        changed.logits(IDS)
    assert before.total().multiply_adds - after.total().multiply_adds == len(IDS) * saved
    assert nbytes(lm) - nbytes(changed) == 4 * saved


@pytest.mark.parametrize("family", FAMILIES)
def test_weighted_has_the_least_output_error_and_plain_the_least_weight_error(family):
    """For every matrix of a model, on what the matrix reads."""
    lm = tiny_lm(family)
    seen = watch_inputs(lm, Linear, calibration_ids("test", lm, 3), Rows)
    whole = linears(lm.model, "ffn")
    found = {}
    for weighted in (True, False):
        changed = factorized(lm, rank=4, weighted=weighted, matrices="ffn", damping=1e-6)
        found[weighted] = [n for _, n in walk(changed.model) if type(n) is LowRank]
    for (key, linear), better, plain in zip(whole.items(), found[True], found[False], strict=True):
        x = seen[key].all
        assert relative_error(linear.w, product(better), x) < relative_error(
            linear.w, product(plain), x
        )
        assert (
            relative_error(linear.w, product(plain))
            <= relative_error(linear.w, product(better)) * 1.0001
        )
        expected = plain(x) if linear.b is None else x @ product(plain) + linear.b
        assert_same(plain(x), expected, tolerance=1e-4, atol=1e-4)
        assert_same(plain.outputs(x, slice(5, None)), plain(x)[..., 5:], tolerance=1e-4, atol=1e-4)


def test_only_the_chosen_matrices_are_factorized():
    for which, place in (("ffn", ".ffn."), ("attention", ".attn.")):
        for path, node in walk(factorized(tiny_lm(), rank=3, matrices=which).model):
            if type(node) is LowRank:
                assert place in path


def test_fused_projections_get_one_pair_of_factors():
    """From which keys and values alone are still computed, for early exits."""
    lm = tiny_lm(dtype=np.float64)
    both = apply(lm, {"fold_norms": True, "fuse_projections": True, "low_rank": {"rank": 6}})
    fused = both.model.stack.blocks[0].attn.qkv
    assert type(fused.all) is LowRank
    x = np.random.default_rng(0).normal(0, 1, (3, 16))
    for found, expected in zip(fused.kv(x), fused(x)[1:]):
        assert_same(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "rank must be an integer, at least 1, or None; got 0"),
        ({"rank": 2, "energy": 0.5}, "got rank and energy; give only one of them"),
        ({"rank": 2, "share": 0.5}, "got share and rank; give only one of them"),
        ({"share": 0.0}, "share must be a number, above 0 and at most 1, or None; got 0.0"),
        ({"energy": 1.5}, "energy must be a number, above 0 and at most 1, or None; got 1.5"),
        ({"damping": 0.0}, "damping must be a number, above 0 and at most 100; got 0.0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        factorized(tiny_lm(), **options)


def test_default_is_an_energy_of_0_996():
    """The squared singular values sum to .95, .9915, .9945, .9975, 1: the fourth reaches .996."""
    dense, roots = tiny_lm(), np.sqrt([0.95, 0.0415, 0.003, 0.003, 0.0025])

    def with_spectrum(linear):
        u, _, v = np.linalg.svd(linear.w, full_matrices=False)
        return replace(linear, w=((u[:, :5] * roots) @ v[:5]).astype(np.float32))

    ffn = linears(dense.model, "ffn")
    changed = factorized(change_linears(dense, ffn, with_spectrum), weighted=False)
    ranks = [node.left.w.shape[1] for _, node in walk(changed) if type(node) is LowRank]
    assert ranks == [4] * len(ffn), f"expected rank 4, got {ranks}"


def test_model_without_a_tokenizer_is_factorized_by_its_weights():
    lm = tiny_lm(tokenizer=None)
    with pytest.raises(MinitxError, match="low_rank learns from calibration text"):
        factorized(lm)
    assert nbytes(factorized(lm, share=0.75, weighted=False)) < nbytes(lm)
