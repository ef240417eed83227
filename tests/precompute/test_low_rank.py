"""Two thin matrices: nearest of their rank, by weights or by outputs; when they pay; counts."""

import literal_prune as literal
import numpy as np
import pytest
from tiny import FAMILIES, tiny_lm

from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Linear
from minitx.precompute.low_rank import LowRank, break_even, chosen_rank, factored, pays, root_of
from minitx.shared.linears import linears
from minitx.technique import apply
from minitx.training.calibration import Rows, calibration_texts, watch_inputs
from minitx.tree import nbytes, walk

IDS = np.random.default_rng(3).integers(0, 258, 30)


def thin(lm, **options):
    return apply(lm, {"low_rank": dict(stories=3) | options})


def product(found: LowRank):
    return found.a.w @ found.b.w


def at_rank(w, r, c=None):
    """The factors of w, as the technique makes them."""
    c = np.eye(len(w)) if c is None else c
    u, s, v = np.linalg.svd(c.T @ w, full_matrices=False)
    return factored(Linear(w), c, u[:, :r], s[:r], v[:r])


def relative(w, changed, x=None):
    """How far off it is, or its outputs for the inputs x."""
    off = w - changed
    off, w = (off, w) if x is None else (x @ off, x @ w)
    return np.linalg.norm(off) / np.linalg.norm(w)


# The factors -------------------------------------------------------------------------------------


def test_full_rank_is_exact_but_for_rounding():
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (50, 12)) * rng.lognormal(0, 2, 12)
    for shape in ((12, 7), (12, 30)):
        w = rng.normal(0, 1, shape)
        for c in (None, root_of(x.T @ x, 0.01)):
            assert relative(w, product(at_rank(w, min(shape), c))) < 1e-12


def test_the_error_is_that_of_the_spectrum():
    """Gaussian 768x288 at r=72: 73 % of it is left out; at a spectrum exp(-i/40), 16 %."""
    w = np.random.default_rng(0).normal(0, 1, (768, 288))
    u, s, v = np.linalg.svd(w, full_matrices=False)
    slow_fall = np.exp(-np.arange(288) / 40)
    for spectrum, left in ((s, 0.73), (slow_fall, 0.16)):
        w = (u * spectrum) @ v
        found = factored(Linear(w), np.eye(768), u[:, :72], spectrum[:72], v[:72])
        assert relative(w, product(found)) == pytest.approx(left, abs=0.006)
    assert round(np.exp(-72 / 40), 3) == 0.165
    assert round(72 / break_even(768, 288), 2) == 0.34  # of its weights


@pytest.mark.parametrize("r", [1, 3, 5])
def test_weighted_factors_are_those_of_the_loop_written_twin(r):
    rng = np.random.default_rng(r)
    x, w = rng.normal(0, 1, (20, 6)) * rng.lognormal(0, 1, 6), rng.normal(0, 1, (6, 7))
    found = product(at_rank(w, r, root_of(x.T @ x, 1e-12)))
    expected = literal.low_rank(w.tolist(), r, x.tolist())
    np.testing.assert_allclose(found, expected, atol=1e-6)
    plain = product(at_rank(w, r))
    np.testing.assert_allclose(
        plain, literal.low_rank(w.tolist(), r, np.eye(6).tolist()), atol=1e-6
    )
    assert relative(w, found, x) < relative(w, plain, x)
    assert relative(w, plain) < relative(w, found)


def test_inputs_that_are_always_zero_do_no_harm():
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 1, (3, 8)), rng.normal(0, 1, (8, 8))
    x[:, 5] = 0
    for seen in (x, x * 0):  # fewer rows than inputs, and none at all
        found = product(at_rank(w, 3, root_of(seen.T @ seen, 0.01)))
        assert np.isfinite(found).all()
    np.testing.assert_allclose(found, product(at_rank(w, 3)), atol=1e-12)


# The rank ----------------------------------------------------------------------------------------


def test_which_rank():
    s = np.sqrt([6.0, 3.0, 1.0])  # energy .6, .9, 1
    for energy, r in ((0.5, 1), (0.6, 1), (0.61, 2), (0.9, 2), (0.95, 3), (1.0, 3)):
        assert chosen_rank(s, (3, 9), 1.0, None, energy) == r, energy
    assert chosen_rank(s, (3, 9), 1.0, 2, None) == 2 and chosen_rank(s, (3, 9), 1.0, 9, None) == 3
    assert break_even(128, 352) == 128 * 352 / 480
    for share, r in ((0.5, 46), (0.01, 1), (0.9, 84)):  # of 93.87
        assert chosen_rank(np.ones(128), (128, 352), share, None, None) == r
        assert share == 0.01 or r * 480 <= share * 128 * 352 < (r + 1) * 480
    assert pays(63, 128, 128) and not pays(64, 128, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_does_not_pay_is_left_as_it_is(family):
    lm = tiny_lm(family)
    whole = {id(m) for m in linears(lm.model, "all").values()}
    changed = thin(lm, rank=8)  # 16x16 breaks even at 8, 16x24 at 9.6, 16x8 at 5.3
    for path, node in walk(changed.model):
        if type(node) is LowRank:
            assert ".ffn." in path and node.a.w.shape[1] == 8
        elif type(node) is Linear and ".attn." in path:
            assert id(node) in whole
    assert not [n for _, n in walk(thin(lm, rank=10)) if type(n) is LowRank]
    for options in ({"energy": 1.0}, {"share": 1.0}):
        assert not [n for _, n in walk(thin(lm, **options)) if type(n) is LowRank]


# In a model --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"rank": 4}, {"share": 0.5}, {"energy": 0.8}])
def test_predicted_is_counted(family, options):
    lm = tiny_lm(family)
    changed = thin(lm, **options)
    found = [node for _, node in walk(changed.model) if type(node) is LowRank]
    saved = 0
    for part in found:
        (inputs, r), outputs = part.a.w.shape, part.b.w.shape[1]
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
def test_each_matrix_is_the_nearest_by_what_it_reads(family):
    """Weighted errs less in the outputs of every matrix, plain less in the weights."""
    lm = tiny_lm(family)
    seen = watch_inputs(lm, Linear, calibration_texts(lm, 3), Rows)
    whole = linears(lm.model, "ffn")
    found = {}
    for weighted in (True, False):
        changed = thin(lm, rank=4, weighted=weighted, matrices="ffn", damping=1e-6)
        found[weighted] = [n for _, n in walk(changed.model) if type(n) is LowRank]
    for (key, linear), better, plain in zip(whole.items(), found[True], found[False], strict=True):
        x = seen[key].all
        assert relative(linear.w, product(better), x) < relative(linear.w, product(plain), x)
        assert relative(linear.w, product(plain)) <= relative(linear.w, product(better)) * 1.0001
        expected = plain(x) if linear.b is None else x @ product(plain) + linear.b
        np.testing.assert_allclose(plain(x), expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            plain.outputs(x, slice(5, None)), plain(x)[..., 5:], rtol=1e-4, atol=1e-4
        )


def test_only_the_matrices_that_are_meant():
    for which, place in (("ffn", ".ffn."), ("attention", ".attn.")):
        for path, node in walk(thin(tiny_lm(), rank=3, matrices=which).model):
            if type(node) is LowRank:
                assert place in path


def test_behind_folds_and_fused_projections():
    """The one matrix of queries, keys and values gets one pair of factors; exit and keys alone
    still come from it."""
    lm = tiny_lm(dtype=np.float64)
    both = apply(lm, {"fold_norms": True, "fuse_projections": True, "low_rank": {"rank": 6}})
    fused = both.model.stack.blocks[0].attn.qkv
    assert type(fused.all) is LowRank
    x = np.random.default_rng(0).normal(0, 1, (3, 16))
    for found, expected in zip(fused.kv(x), fused(x)[1:]):
        np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rank": 0}, "low_rank needs a rank of at least 1, not 0"),
        ({"rank": 2, "energy": 0.5}, "a rank or an energy, not both"),
        ({"share": 0.0}, "low_rank needs a share above 0 and at most 1, not 0"),
        ({"energy": 1.5}, "low_rank needs an energy above 0 and at most 1, not 1.5"),
        ({"damping": 0.0}, "low_rank needs a damping above 0, not 0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(MinitxError, match=message):
        thin(tiny_lm(), **options)


def test_without_a_tokenizer_it_goes_by_the_weights():
    lm = tiny_lm(tokenizer=None)
    with pytest.raises(MinitxError, match="low_rank learns from calibration stories"):
        thin(lm)
    assert nbytes(thin(lm, weighted=False)) < nbytes(lm)
