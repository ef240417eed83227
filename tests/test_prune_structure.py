"""Neurons and heads cut out: the same as if their rows were zero, and counted as less work."""

from dataclasses import replace

import numpy as np
import pytest
from slow import prune as slow
from tiny import FAMILIES, TOKENIZER, error

from minitx.build import random_model
from minitx.errors import MinitxError
from minitx.files.huggingface import write_model
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN, Attention, Linear, Transformer
from minitx.precompute.prune_structure import contributions, largest
from minitx.technique import apply, wrap
from minitx.training.calibration import Moments, calibration_texts, watch_inputs
from minitx.tree import map_weights, nbytes, walk

IDS = np.random.default_rng(3).integers(0, 258, 30)
HEADS = {"llama": (6, 3), "gpt2": (4, 4), "gpt_neox": (6, 2)}  # query heads, key/value heads


def make(family, dtype=np.float64, **changes):
    """A model with more heads than the tiny ones have, in groups of 2, 1 and 3."""
    heads, kv_heads = HEADS[family]
    config = replace(FAMILIES[family], heads=heads, kv_heads=kv_heads, **changes)
    rng = np.random.default_rng(5)
    model = random_model(config, 2, dtype)
    model = map_weights(
        model, lambda w: (w * 3 if w.ndim > 1 else w + rng.normal(0, 0.2, w.shape)).astype(dtype)
    )
    return LM(model, TOKENIZER)


def cut(lm, **options):
    return apply(lm, {"prune_structure": dict(neurons=0.0, stories=3) | options})


def parts(lm, kind):
    return [node for _, node in walk(lm.model) if type(node) is kind]


# Which go ----------------------------------------------------------------------------------------


def test_contributions_as_in_the_loop_written_twin():
    rng = np.random.default_rng(0)
    hidden, w = rng.normal(0, 1, (7, 12)), rng.normal(0, 1, (12, 5))
    for width in (1, 3, 4):
        found = contributions(hidden.T @ hidden, w, width)
        expected = slow.contributions(hidden.tolist(), w.tolist(), width)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert largest(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist() == [0, 2]
    assert largest(np.ones(4), 3).tolist() == [1, 2, 3]


def kept_neurons(before: FFN, after: FFN):
    """Which rows of W_down are left; columns of the other matrices have to be the same ones."""
    rows = [np.flatnonzero((before.down.w == row).all(1))[0] for row in after.down.w]
    for name, linear in vars(after.expand).items():
        if type(linear) is Linear:
            whole = getattr(before.expand, name)
            np.testing.assert_array_equal(linear.w, whole.w[:, rows])
            if whole.b is not None:
                np.testing.assert_array_equal(linear.b, whole.b[rows])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_by_their_scores(family):
    """24 neurons, 18 stay: in the first block those with the largest scores over what it reads."""
    lm = make(family)
    seen = watch_inputs(lm, Linear, calibration_texts(lm, 3), Moments)
    down = parts(lm, FFN)[0].down
    for score in ("activations", "weights"):
        changed = cut(lm, neurons=0.25, score=score)
        assert changed.model.config.hidden == 18
        kept = [kept_neurons(*both) for both in zip(parts(lm, FFN), parts(changed, FFN))]
        if score == "activations":
            expected = np.diag(seen[id(down)].gram) * (down.w**2).sum(1)
        else:
            expand = parts(lm, FFN)[0].expand
            expected = np.linalg.norm(down.w, axis=1) * np.linalg.norm(expand.up.w, axis=0)
            if family == "llama":
                expected *= np.linalg.norm(expand.gate.w, axis=0)
        assert kept[0] == sorted(np.argsort(expected)[6:])


# What is left ------------------------------------------------------------------------------------


def with_zeros(lm, changed):
    """The model as it was, with zeros in the rows of W_down and W_o that are missing now."""
    ffns = list(zip(parts(lm, FFN), parts(changed, FFN)))
    attentions = list(zip(parts(lm, Attention), parts(changed, Attention)))

    def zeroed(linear, rows):
        w = np.zeros_like(linear.w)
        w[rows] = linear.w[rows]
        return replace(linear, w=w)

    def ffn(part, number):
        return replace(part, down=zeroed(part.down, kept_neurons(*ffns[number])))

    def attn(part, number):
        before, after = attentions[number]
        rows = [np.flatnonzero((before.out.w == row).all(1))[0] for row in after.out.w]
        return replace(part, out=zeroed(part.out, rows))

    return wrap(wrap(lm, "ffn", ffn), "attn", attn)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["activations", "weights"])
@pytest.mark.parametrize("by", ["groups", "queries"])
def test_cutting_is_writing_zeros_but_smaller(family, score, by):
    lm = make(family)
    changed = cut(lm, neurons=0.5, heads=0.5, heads_by=by, score=score)
    expected = with_zeros(lm, changed)
    assert error(changed.logits(IDS), expected.logits(IDS)) < 1e-12
    assert error(changed.logits(IDS), lm.logits(IDS)) > 1e-3
    heads, kv_heads = HEADS[family]
    group = heads // kv_heads
    left = kv_heads - kv_heads // 2 if by == "groups" else kv_heads
    group = group if by == "groups" else group - group // 2
    for attn in parts(changed, Attention):
        assert (attn.kv_heads, attn.heads) == (left, left * group)
        assert all(w.flags.c_contiguous for w in (attn.qkv.q.w, attn.qkv.k.w, attn.out.w))
    config = changed.model.config
    assert (config.hidden, config.heads, config.kv_heads) == (12, left * group, left)


def test_the_heads_of_a_group_that_stay_are_those_that_give_most():
    lm = make("gpt_neox")
    attn = parts(lm, Attention)[0]
    seen = watch_inputs(lm, Linear, calibration_texts(lm, 3), Moments)[id(attn.out)]
    scores = contributions(seen.gram, attn.out.w, 8).reshape(2, 3)
    rows = attn.out.w.reshape(2, 3, 8, -1)
    changed = parts(cut(lm, heads=0.67, heads_by="queries"), Attention)[0]
    np.testing.assert_array_equal(
        changed.out.w.reshape(2, 8, -1), rows[np.arange(2), scores.argmax(1)]
    )
    groups = parts(cut(lm, heads=0.5), Attention)[0]
    best = scores.sum(1).argmax()
    np.testing.assert_array_equal(groups.out.w.reshape(3, 8, -1), rows[best])
    np.testing.assert_array_equal(groups.qkv.v.w, attn.qkv.v.w[:, best * 8 : best * 8 + 8])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["groups", "queries"])
def test_predicted_is_counted(family, by):
    """The card's formula, for multiply-adds, weights and the cache; S keys for token S."""
    lm = make(family, np.float32)
    changed = cut(lm, neurons=0.25, heads=0.5, heads_by=by)
    config, less = lm.model.config, changed.model.config
    neurons, heads = config.hidden - less.hidden, config.heads - less.heads
    kv_heads = config.kv_heads - less.kv_heads
    D, d, L = config.width, config.head_width, config.layers
    weights = (3 if family == "llama" else 2) * D * neurons + 2 * D * d * (heads + kv_heads)
    counted = {}
    for name, model in (("dense", lm), ("cut", changed)):
        state = model.model.new_state()
        model.model(IDS[:-1], state)
        with counting(model) as counts:
            model.model(IDS[-1:], state)
        counted[name] = counts.total(), state.bytes_per_token, nbytes(model)
    (before, cache, size), (after, less_cache, less_size) = counted.values()
    S = len(IDS)
    assert before.multiply_adds - after.multiply_adds == L * (weights + heads * 2 * d * S)
    assert cache - less_cache == L * kv_heads * 2 * d * 4
    biases = 0 if family == "llama" else neurons + d * (heads + 2 * kv_heads)
    assert size - less_size == 4 * L * (weights + biases)


def test_what_is_left_is_a_plain_model_that_can_be_written(tmp_path):
    from minitx import load

    lm = cut(make("llama", np.float32), neurons=0.25, heads=0.34)
    assert lm.model.config.kv_heads == 2 and lm.model.config.heads == 4
    write_model(lm.model, tmp_path, "F32")
    np.testing.assert_array_equal(load(tmp_path).logits(IDS), lm.logits(IDS))


def test_at_least_one_of_each_stays_and_shares_are_rounded_down():
    lm = make("llama")
    config = cut(lm, neurons=0.99, heads=0.99).model.config
    assert (config.hidden, config.heads, config.kv_heads) == (1, 2, 1)
    config = cut(lm, neurons=0.04, heads=0.3).model.config  # 0.96 of a neuron, 0.9 of a head
    assert (config.hidden, config.heads) == (24, 6)
    single = cut(make("gpt2"), heads=0.9, heads_by="queries")
    assert single.model.config.heads == 4  # every head stands alone


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neurons": 1.0}, "prune_structure needs a share of neurons of at least 0 and below 1"),
        ({"heads": -0.5}, "share of heads of at least 0 and below 1, not -0.5"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(MinitxError, match=message):
        cut(make("llama"), **options)


def test_a_model_without_a_tokenizer_is_cut_by_its_weights():
    lm = replace(make("llama"), tokenizer=None)
    with pytest.raises(MinitxError, match="prune_structure learns from calibration stories"):
        cut(lm, neurons=0.5)
    assert cut(lm, neurons=0.5, score="weights").model.config.hidden == 12
    assert type(cut(lm).model) is Transformer and cut(lm).model.config is lm.model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_other_folds_and_techniques_take_what_is_left(family):
    lm = make(family)
    options = {"prune_structure": {"neurons": 0.5, "heads": 0.5, "stories": 3}}
    expected = apply(lm, options).logits(IDS)
    for others in (
        {"fold_norms": True, "fuse_projections": True},
        {"first_layer": True},
        {"prune": {"sparsity": 0.0}},
        {"pack_zeros": True},
        {"exact_head": True},
    ):
        assert error(apply(lm, options | others).logits(IDS), expected) < 1e-12
