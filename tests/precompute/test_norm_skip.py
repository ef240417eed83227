"""norm_skip: the constant and the folding by hand, a literal version, the choice, figures."""

from functools import cache

import literal_norm_skip as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, in_chunks, tiny_lm, tiny_model

import minitx
from minitx.errors import MinitxError
from minitx.lab.evaluate import Tally
from minitx.lab.reading import add_up, stories_to_read
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN, Activated, LayerNorm, Linear, NoNorm, RMSNorm
from minitx.ops import relu
from minitx.precompute.norm_skip import (
    FixedScale,
    Unit,
    lowest,
    measure,
    skip_norm,
    units_of,
    without_norm,
)
from minitx.technique import apply, blocks_of
from minitx.tree import nbytes

RNG = np.random.default_rng(4)
TEXTS = [RNG.integers(0, 258, n).tolist() for n in (9, 14)]
IDS = RNG.integers(0, 258, 20)
family = pytest.mark.parametrize("family", FAMILIES)


def close(found, expected, what, tolerance=1e-10):
    assert_same(found, expected, what, atol=tolerance * abs(expected).max())


def skipped(lm) -> list[str]:
    """The names of the norms that are skipped."""
    nodes = [(f"{s}{i}", getattr(b, s)) for i, b in enumerate(blocks_of(lm)) for s in UNITS]
    return [n for n, node in [*nodes, ("final", lm.model)] if type(node.norm) in GONE]


UNITS, GONE = ("attn", "ffn"), (NoNorm, FixedScale)


# Worked example ----------------------------------------------------------------------------------


def test_rms_norm_by_hand_becomes_a_factor_of_the_next_matrix():
    # x = (3, 4), c = 1/2, gain (2, 10): x * c * gain = (3, 20). W = (1, 1): 23.
    # Folded: W* = (1/2 * 2 * 1, 1/2 * 10 * 1) = (1, 5), and (3, 4) . (1, 5) = 23.
    up, down = Linear(np.ones((2, 1))), Linear(np.eye(1))
    ffn = FFN(RMSNorm(np.array([2.0, 10.0]), 0.0), Activated(up, relu), down)
    found = without_norm(ffn, 0.5)
    assert found.expand.up.w.tolist() == [[1.0], [5.0]] and type(found.norm) is NoNorm
    assert found(np.array([[3.0, 4.0]]), None).tolist() == [[23.0]]


def test_layer_norm_by_hand_folds_its_mean_and_bias_too():
    # x = (1, 5): minus its mean (-2, 2). c = 1/2, gain (2, 10), bias (1, 1): (-2 + 1, 10 + 1).
    # W = (1, 3): -1 + 33 = 32.
    # Folded: diag(c gain) W = (1, 15), minus their mean 8: W* = (-7, 7); c* = bias . W = 4.
    # (1, 5) . (-7, 7) + 4 = 28 + 4 = 32.
    up, down = Linear(np.array([[1.0], [3.0]])), Linear(np.eye(1))
    norm = LayerNorm(np.array([2.0, 10.0]), np.array([1.0, 1.0]), 0.0)
    found = without_norm(FFN(norm, Activated(up, relu), down), 0.5)
    assert found.expand.up.w.tolist() == [[-7.0], [7.0]] and found.expand.up.b.tolist() == [4.0]
    assert found(np.array([[1.0, 5.0]]), None).tolist() == [[32.0]]


def test_constant_by_hand_is_one_over_the_mean_rms():
    # A model whose first norm reads rows (3, 4) and (6, 8): rms = 5/sqrt(2) and 10/sqrt(2), so
    # c = 1 / (7.5 / sqrt(2)). Over tokens, not over texts: the second row stands three times.
    lm = tiny_lm(dtype=np.float64)
    table = np.zeros((259, 16))
    table[0, :2], table[1, :2] = (3, 4), (6, 8)
    lm = apply(lm, {})
    lm = LM(type(lm.model)(**vars(lm.model) | {"embed": type(lm.model.embed)(table)}), TOKENIZER)
    found = measure(lm, [Unit("attn", 0)], [[0, 1], [1, 1]])[Unit("attn", 0)]
    assert found == pytest.approx(1 / ((5 + 3 * 10) / 4 / 16**0.5), rel=1e-5)


def test_overflow_ranks_last():
    assert lowest([np.nan, 3.0, np.inf, 2.0, 2.0]) == 3


# The literal version -----------------------------------------------------------------------------


@family
def test_greedy_choice_and_logits_equal_literal(family):
    lm = LM(tiny_model(family, dtype=np.float64), TOKENIZER)
    changed = apply(lm, {"norm_skip": {"count": 2}}, calibrate=TEXTS)
    expected = literal.greedy(lm.model, 2, TEXTS)
    names = [slot if slot == "final" else f"{slot}{i}" for slot, i in expected]
    assert sorted(skipped(changed)) == sorted(names), "other norms were selected"
    close(changed.logits(IDS), literal.run(lm.model, IDS, expected), "all tokens at once", 1e-9)
    close(in_chunks(changed, IDS, (7, *[1] * 13)), changed.logits(IDS), "token by token")


@family
def test_each_norm_alone_equals_literal(family):
    lm = LM(tiny_model(family, dtype=np.float64), TOKENIZER)
    constants = measure(lm, units_of(lm, "all"), TEXTS)
    for place in literal.places(lm.model):
        c = literal.constant(lm.model, place, {}, TEXTS)
        assert constants[Unit(*place)] == pytest.approx(c, rel=1e-10), place
        expected = literal.run(
            lm.model, IDS, {place: literal.Fixed(literal.norm_of(lm.model, place), c)}
        )
        close(skip_norm(lm, Unit(*place), c).logits(IDS), expected, str(place), 1e-9)


def test_constant_equals_the_norm_if_all_tokens_have_its_rms():
    """The exact case: a text of one token, repeated, has one rms at each place without positions
    (first block), so nothing changes there."""
    lm = LM(tiny_model("llama", dtype=np.float64), TOKENIZER)
    ids = [5] * 8
    changed = apply(lm, {"norm_skip": {"count": 5}}, calibrate=[ids])
    assert len(skipped(changed)) == 5
    close(changed.logits(ids), lm.logits(ids), "one rms for all tokens", 1e-9)


# Options -----------------------------------------------------------------------------------------


def test_where_limits_the_choice():
    lm = tiny_lm(dtype=np.float64)
    for where, names in dict(
        attn=["attn0", "attn1"], ffn=["ffn0", "ffn1"], final=["final"]
    ).items():
        changed = apply(lm, {"norm_skip": dict(where=where, count=len(names))}, calibrate=TEXTS)
        assert skipped(changed) == names


def test_random_choice_is_that_of_the_seed():
    def names(seed):
        options = dict(count=2, choose="random", seed=seed)
        return skipped(apply(tiny_lm(), {"norm_skip": options}, calibrate=TEXTS))

    assert names(1) == names(1) and len({tuple(names(seed)) for seed in range(6)}) > 2


def test_tied_head_keeps_the_embedding_as_it_is():
    lm = tiny_lm("gpt2", dtype=np.float64)
    changed = apply(lm, {"norm_skip": dict(where="final", count=1)}, calibrate=TEXTS)
    assert_same(changed.model.embed.tokens.w, lm.model.embed.tokens.w)
    assert changed.model.head.w is changed.model.embed.tokens.w
    assert type(changed.model.norm) is FixedScale


def test_refusals_name_the_technique_and_the_remedy():
    with pytest.raises(MinitxError, match="norm_skip: count is 9; expected at most 5, the norms"):
        apply(tiny_lm(), {"norm_skip": {"count": 9}})
    with pytest.raises(MinitxError, match="norm_skip.*RMSNorm or LayerNorm.*NoNorm"):
        apply(tiny_lm("skipless"), {"norm_skip": True})
    with pytest.raises(MinitxError, match="fold_norms needs.*where norm_skip has put a NoNorm"):
        apply(tiny_lm(), {"norm_skip": {"count": 5}, "fold_norms": True})
    with pytest.raises(MinitxError, match="norm_skip learns from calibration text"):
        apply(LM(tiny_lm().model), {"norm_skip": True})


# Work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, arrays", [("llama", 1), ("gpt_neox", 2)])
def test_weights_saved_are_those_of_the_card(family, arrays):
    """D per RMSNorm, 2 D per LayerNorm; but an untied head that had no bias gets one (V)."""
    lm = tiny_lm(family)
    changed = apply(lm, {"norm_skip": dict(where="ffn", count=2)}, calibrate=TEXTS)
    assert nbytes(lm.model) - nbytes(changed.model) == 2 * arrays * 16 * 4
    with counting(lm) as before:
        lm.logits(IDS)
    with counting(changed) as after:
        changed.logits(IDS)
    assert before.total().multiply_adds == after.total().multiply_adds, "no matrix gets smaller"


# Figures -----------------------------------------------------------------------------------------


@cache
def loss(**options) -> float:
    dense = minitx.load("stories-relu")
    lm = apply(dense, {"norm_skip": {"stories": 1} | options}) if options else dense
    read, tally = stories_to_read(lm, 2), Tally.empty()
    for one in read.texts:
        add_up(tally, lm, one)
    return read.report(tally).loss


def test_price_on_stories_relu_is_below_that_of_random_norms():
    price = loss(count=2) - loss()
    random = [loss(count=2, choose="random", seed=seed) - loss() for seed in (1, 2)]
    assert -0.003 < price < 0.01 and max(random) > 2 * abs(price), (price, random)
    assert loss(count=9, choose="random") - loss() > 0.5, "all norms are not needed?"
