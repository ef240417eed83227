"""Neurons and heads cut out: the same as if their rows were zero, and counted as less work."""

from dataclasses import replace

import literal_prune as literal
import numpy as np
import pytest
from tiny import FAMILIES, TOKENIZER, error

from minitx.build import random_model
from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN, Attention, Linear, Transformer
from minitx.precompute.prune_structure import contributions, head_scores, largest
from minitx.technique import apply, swap, wrap
from minitx.training.calibration import Moments, Rows, calibration_texts, watch_inputs
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
        expected = literal.contributions(hidden.tolist(), w.tolist(), width)
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


def kept_heads(before: Attention, after: Attention):
    """The query heads that are left, by W_q, and the key/value heads, by W_k. All other matrices
    and the biases have to be those of the same heads."""
    d = len(before.out.w) // before.heads
    found = []
    for whole, cut_ in ((before.qkv.q, after.qkv.q), (before.qkv.k, after.qkv.k)):
        columns = [np.flatnonzero((whole.w.T == column).all(1))[0] for column in cut_.w.T]
        heads = [int(column) // d for column in columns[::d]]
        assert columns == [h * d + i for h in heads for i in range(d)], "a head is cut through"
        found.append(heads)
    q, kv = (np.concatenate([np.arange(h * d, h * d + d) for h in heads]) for heads in found)
    for name, columns in (("q", q), ("k", kv), ("v", kv)):
        whole, cut_ = getattr(before.qkv, name), getattr(after.qkv, name)
        assert np.array_equal(cut_.w, whole.w[:, columns]), f"W_{name} keeps other heads"
        if whole.b is not None:
            assert np.array_equal(cut_.b, whole.b[columns]), f"b_{name} keeps other heads"
    assert np.array_equal(after.out.w, before.out.w[q]), "W_o keeps other heads"
    assert after.out.b is before.out.b, "the output projection keeps its whole bias"
    return found


def with_lengths(lm, values, outputs):
    """The model with |W_v|^2 of each key/value head and |W_o|^2 of each query head as given."""

    def change(attn):
        v, out = attn.qkv.v, attn.out

        def scaled(w, squares):  # w (units, ...)
            length = np.sqrt((w**2).sum((1, 2), keepdims=True))
            return w / length * np.sqrt(np.array(squares, float))[:, None, None]

        by_head = v.w.reshape(len(v.w), len(values), -1).swapaxes(0, 1)
        w_v = scaled(by_head, values).swapaxes(0, 1).reshape(v.w.shape)
        w_o = scaled(out.w.reshape(len(outputs), -1, out.w.shape[1]), outputs).reshape(out.w.shape)
        return replace(attn, qkv=replace(attn.qkv, v=replace(v, w=w_v)), out=replace(out, w=w_o))

    return swap(lm, Attention, change)


# The scores are |W_v|^2 |W_o|^2. Key/value heads have |W_v|^2 of 4, 9 and 1; their query heads have
# |W_o|^2 of
#            5  7           1  3            1  38
# which makes
#     4 (5 + 7) = 48   9 (1 + 3) = 36   1 (1 + 38) = 39
# By lengths that are not squared the groups would have 9.8, 8.2 and 7.2; by W_o alone 12, 4 and 39;
# by W_v alone 4, 9 and 1; by their largest head 28, 27 and 38.
LENGTHS = (4, 9, 1), (5, 7, 1, 3, 1, 38)
SCORES = [20, 28, 9, 27, 1, 38]


@pytest.mark.parametrize("share, groups", [(0.34, [0, 2]), (0.67, [0])], ids=["cut one", "cut two"])
def test_heads_by_weights_in_groups_by_hand(share, groups):
    lm = with_lengths(make("llama"), *LENGTHS)
    for attn in parts(lm, Attention):
        np.testing.assert_allclose(head_scores(attn, {}), SCORES, err_msg="|W_v|^2 |W_o|^2")
    changed = cut(lm, heads=share, heads_by="groups", score="weights")
    for number, both in enumerate(zip(parts(lm, Attention), parts(changed, Attention))):
        queries, kv = kept_heads(*both)
        assert kv == groups, f"block {number}: groups {groups} score highest, but {kv} stay"
        with_them = [head for group in groups for head in (2 * group, 2 * group + 1)]
        assert queries == with_them, f"block {number}: expected all heads of {kv}, got {queries}"


def test_heads_by_weights_in_each_group_by_hand():
    """One of each two query heads goes, whatever the heads of other groups score."""
    outputs = (7, 5, 1, 3, 38, 1)
    lm = with_lengths(make("llama"), LENGTHS[0], outputs)
    changed = cut(lm, heads=0.5, heads_by="queries", score="weights")
    for number, both in enumerate(zip(parts(lm, Attention), parts(changed, Attention))):
        queries, kv = kept_heads(*both)
        assert kv == [0, 1, 2], f"block {number}: every key/value head stays, but {kv} are left"
        assert queries == [0, 3, 4], f"block {number}: expected heads 0, 3 and 4, got {queries}"


def highest(scores, count):
    """The places of the ``count`` highest, ascending; of equal ones the later place."""
    gone = literal.lowest(
        [(score, place) for place, score in enumerate(scores)], len(scores) - count
    )
    return [place for place in range(len(scores)) if place not in gone]


def heads_to_keep(scores, kv_heads, count, by):
    """(query heads, key/value heads) that stay when ``count`` go of all groups, or in each."""
    G = len(scores) // kv_heads
    groups = [range(k * G, k * G + G) for k in range(kv_heads)]
    if by == "groups":
        kept = highest([sum(scores[h] for h in group) for group in groups], kv_heads - count)
        return [h for k in kept for h in groups[k]], kept
    kept = [
        k * G + i for k in range(kv_heads) for i in highest(scores[k * G : k * G + G], G - count)
    ]
    return kept, list(range(kv_heads))


@pytest.mark.parametrize("score", ["activations", "weights"])
@pytest.mark.parametrize("by", ["groups", "queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_kept_in_every_block_are_those_of_the_literal_scores(family, by, score):
    """By activations: those that reach the block when the blocks before it are cut already."""
    lm = make(family)
    heads, kv_heads = HEADS[family]
    changed = cut(lm, heads=0.5, heads_by=by, score=score)
    stack, others = lm.model.stack, changed.model.stack.blocks
    of = kv_heads if by == "groups" else heads // kv_heads
    for number, block in enumerate(stack.blocks):
        out = block.attn.out
        if score == "activations":
            blocks = (*others[:number], *stack.blocks[number:])
            half = replace(lm, model=replace(lm.model, stack=replace(stack, blocks=blocks)))
            seen = watch_inputs(half, Linear, calibration_texts(lm, 3), Rows)[id(out)].all
            scores = literal.contributions(seen.tolist(), out.w.tolist(), 8)
        else:
            v = block.attn.qkv.v.w
            scores = [
                float((v[:, k * 8 : k * 8 + 8] ** 2).sum() * (out.w[h * 8 : h * 8 + 8] ** 2).sum())
                for h in range(heads)
                for k in [h // (heads // kv_heads)]
            ]
        expected = heads_to_keep(scores, kv_heads, of // 2, by)
        found = kept_heads(block.attn, others[number].attn)
        assert found == list(expected), (
            f"block {number}: expected query and key/value heads {expected}, got {found}"
        )


@pytest.mark.parametrize(
    "by, kept", [("groups", ([4, 5], [2])), ("queries", ([1, 3, 5], [0, 1, 2]))]
)
def test_heads_with_equal_scores_the_higher_index_stays(by, kept):
    def even(attn):
        v, out = (
            replace(node, w=np.where(node.w > 0, 1.0, -1.0)) for node in (attn.qkv.v, attn.out)
        )
        return replace(attn, qkv=replace(attn.qkv, v=v), out=out)

    lm = swap(make("llama"), Attention, even)
    changed = cut(lm, heads=0.67, heads_by=by, score="weights")
    for both in zip(parts(lm, Attention), parts(changed, Attention)):
        found = kept_heads(*both)
        assert found == list(kept), f"equal scores: expected heads {kept} to stay, got {found}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["activations", "weights"])
def test_neurons_kept_in_every_block_are_those_of_the_literal_scores(family, score):
    """By activations: those that reach the block when the blocks before it are cut already."""
    lm = make(family)
    changed = cut(lm, neurons=0.25, score=score)
    stack, others = lm.model.stack, changed.model.stack.blocks
    for number, block in enumerate(stack.blocks):
        down, expand = block.ffn.down, block.ffn.expand
        if score == "activations":
            blocks = (*others[:number], *stack.blocks[number:])
            half = replace(lm, model=replace(lm.model, stack=replace(stack, blocks=blocks)))
            seen = watch_inputs(half, Linear, calibration_texts(lm, 3), Rows)[id(down)].all
            scores = [(seen[:, u] ** 2).sum() * (down.w[u] ** 2).sum() for u in range(24)]
        else:
            maps = [node for node in vars(expand).values() if type(node) is Linear]
            scores = [
                np.prod([np.sqrt((w**2).sum()) for w in [down.w[u], *(m.w[:, u] for m in maps)]])
                for u in range(24)
            ]
        expected, found = highest(scores, 18), kept_neurons(block.ffn, others[number].ffn)
        assert found == expected, f"block {number}: expected neurons {expected}, got {found}"


def test_neurons_with_equal_scores_the_higher_index_stays():
    """All 24 rows of W_down are as long, and all columns of W_gate and W_up, but for neuron 3."""

    def even(ffn):
        signs = np.where(np.arange(24)[:, None] >> np.arange(16) % 5 & 1, 1.0, -1.0)
        signs[3] *= 2  # the only one with a score of its own
        maps = {n: node for n, node in vars(ffn.expand).items() if type(node) is Linear}
        alike = {n: replace(m, w=np.ones_like(m.w)) for n, m in maps.items()}
        expand = replace(ffn.expand, **alike)
        return replace(ffn, expand=expand, down=replace(ffn.down, w=signs))

    lm = swap(make("llama"), FFN, even)
    changed = cut(lm, neurons=0.5, score="weights")
    for both in zip(parts(lm, FFN), parts(changed, FFN)):
        found = [np.flatnonzero((both[0].down.w == row).all(1))[0] for row in both[1].down.w]
        assert found == [3, *range(13, 24)], f"equal scores: expected 3 and 13 to 23, got {found}"


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
