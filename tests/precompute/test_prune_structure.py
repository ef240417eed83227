"""prune_structure: scores of neurons and heads, which stay, what the smaller model computes."""

from dataclasses import replace

import literal_prune_structure as literal
import numpy as np
import pytest
from same import assert_same
from tiny import FAMILIES, TOKENIZER, error

from minitx.build import random_model
from minitx.calibration import calibration_ids
from minitx.checkpoints.huggingface import write_model
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.lm import LM
from minitx.model import FFN, Attention, Linear, Transformer
from minitx.precompute.prune_structure import contributions, head_scores, highest_scoring
from minitx.shared.observed_inputs import Moments, Rows, watch_inputs
from minitx.technique import apply, swap, wrap
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


def prune(lm, **options):
    return apply(lm, {"prune_structure": dict(neurons=0.0, stories=3) | options})


def parts(lm, kind):
    return [node for _, node in walk(lm.model) if type(node) is kind]


# Scores ------------------------------------------------------------------------------------------


def test_contributions_by_hand():
    """Two tokens, two neurons. h are the activations, W_down (2, 2) has a row for each neuron:

        h = 1  2     W_down = 1  1     neuron 0: (1 + 9) (1 + 1) = 20
            3  0              0  3     neuron 1: (4 + 0) (0 + 9) = 36

    Neuron 1 stays, although neuron 0 is the more active one."""
    h, down = np.array([[1.0, 2], [3, 0]]), np.array([[1.0, 1], [0, 3]])
    scores = contributions(h.T @ h, down, 1)
    assert scores.tolist() == [20, 36] == literal.contributions(h.tolist(), down.tolist(), 1)
    assert highest_scoring(scores, 1).tolist() == [1]


def test_contributions_equal_the_literal_version():
    rng = np.random.default_rng(0)
    hidden, w = rng.normal(0, 1, (7, 12)), rng.normal(0, 1, (12, 5))
    for rows in (1, 3, 4):
        found = contributions(hidden.T @ hidden, w, rows)
        expected = literal.contributions(hidden.tolist(), w.tolist(), rows)
        assert_same(found, expected, tolerance=1e-12)


def test_highest_scoring_ties_go_to_the_lower_index():
    assert highest_scoring(np.array([3.0, 1.0, 3.0, 2.0]), 2).tolist() == [0, 2]
    assert highest_scoring(np.ones(4), 3).tolist() == [0, 1, 2]
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores = rng.integers(0, 4, 9)
        assert highest_scoring(scores, 4).tolist() == literal.highest(scores.tolist(), 4), scores


# Neurons and heads that stay ---------------------------------------------------------------------


def kept_neurons(before: FFN, after: FFN):
    """The rows of W_down that are left; the other matrices must have the same columns left."""
    rows = [np.flatnonzero((before.down.w == row).all(1))[0] for row in after.down.w]
    for name, linear in vars(after.expand).items():
        if type(linear) is Linear:
            whole = getattr(before.expand, name)
            assert_same(linear.w, whole.w[:, rows])
            if whole.b is not None:
                assert_same(linear.b, whole.b[rows])
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_with_the_highest_scores_stay(family):
    """18 of 24 neurons; in the first block those with the highest scores on its inputs."""
    lm = make(family)
    seen = watch_inputs(lm, Linear, calibration_ids("test", lm, 3), Moments)
    down = parts(lm, FFN)[0].down
    for score in ("activations", "weights"):
        changed = prune(lm, neurons=0.25, score=score)
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
    and the biases must be those of the same heads."""
    d = len(before.out.w) // before.heads
    found = []
    for whole, after_ in ((before.qkv.q, after.qkv.q), (before.qkv.k, after.qkv.k)):
        columns = [np.flatnonzero((whole.w.T == column).all(1))[0] for column in after_.w.T]
        heads = [int(column) // d for column in columns[::d]]
        assert columns == [h * d + i for h in heads for i in range(d)], "part of a head was removed"
        found.append(heads)
    q, kv = (np.concatenate([np.arange(h * d, h * d + d) for h in heads]) for heads in found)
    for name, columns in (("q", q), ("k", kv), ("v", kv)):
        whole, after_ = getattr(before.qkv, name), getattr(after.qkv, name)
        assert_same(after_.w, whole.w[:, columns], f"W_{name} keeps other heads")
        if whole.b is not None:
            assert_same(after_.b, whole.b[columns], f"b_{name} keeps other heads")
    assert_same(after.out.w, before.out.w[q], "W_o keeps other heads")
    assert after.out.b is before.out.b, "the output projection keeps its whole bias"
    return found


def with_norms(lm, values, outputs):
    """The model with |W_v|^2 of each key/value head and |W_o|^2 of each query head as given."""

    def change(attn):
        v, out = attn.qkv.v, attn.out

        def scaled(w, squares):  # w (units, ...)
            norm = np.sqrt((w**2).sum((1, 2), keepdims=True))
            return w / norm * np.sqrt(np.array(squares, float))[:, None, None]

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
# With norms that are not squared the groups would have 9.8, 8.2 and 7.2; with W_o alone 12, 4 and
# 39; with W_v alone 4, 9 and 1; with their highest head 28, 27 and 38.
NORMS = (4, 9, 1), (5, 7, 1, 3, 1, 38)
SCORES = [20, 28, 9, 27, 1, 38]


@pytest.mark.parametrize("share, groups", [(0.34, [0, 2]), (0.67, [0])], ids=["one", "two"])
def test_heads_by_groups_and_weights_by_hand(share, groups):
    lm = with_norms(make("llama"), *NORMS)
    for attn in parts(lm, Attention):
        assert_same(head_scores(attn, {}), SCORES, "|W_v|^2 |W_o|^2", tolerance=1e-7)
    changed = prune(lm, heads=share, heads_by="groups", score="weights")
    for number, both in enumerate(zip(parts(lm, Attention), parts(changed, Attention))):
        queries, kv = kept_heads(*both)
        assert kv == groups, f"block {number}: groups {groups} score highest, but {kv} stay"
        with_them = [head for group in groups for head in (2 * group, 2 * group + 1)]
        assert queries == with_them, f"block {number}: expected all heads of {kv}, got {queries}"


def test_heads_by_queries_and_weights_by_hand():
    """One query head of each group of two goes, whatever the heads of other groups score."""
    outputs = (7, 5, 1, 3, 38, 1)
    lm = with_norms(make("llama"), NORMS[0], outputs)
    changed = prune(lm, heads=0.5, heads_by="queries", score="weights")
    for number, both in enumerate(zip(parts(lm, Attention), parts(changed, Attention))):
        queries, kv = kept_heads(*both)
        assert kv == [0, 1, 2], f"block {number}: every key/value head stays, but {kv} are left"
        assert queries == [0, 3, 4], f"block {number}: expected heads 0, 3 and 4, got {queries}"


@pytest.mark.parametrize("score", ["activations", "weights"])
@pytest.mark.parametrize("by", ["groups", "queries"])
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_kept_in_every_block_equal_the_literal_version(family, by, score):
    """By activations: those of the block's inputs when earlier blocks are pruned already."""
    lm = make(family)
    heads, kv_heads = HEADS[family]
    changed = prune(lm, heads=0.5, heads_by=by, score=score)
    stack, others = lm.model.stack, changed.model.stack.blocks
    size = kv_heads if by == "groups" else heads // kv_heads
    for number, block in enumerate(stack.blocks):
        out = block.attn.out
        if score == "activations":
            blocks = (*others[:number], *stack.blocks[number:])
            half = replace(lm, model=replace(lm.model, stack=replace(stack, blocks=blocks)))
            seen = watch_inputs(half, Linear, calibration_ids("test", lm, 3), Rows)[id(out)].all
            scores = literal.contributions(seen.tolist(), out.w.tolist(), 8)
        else:
            weights = block.attn.qkv.v.w.tolist(), out.w.tolist()
            scores = literal.head_scores_by_weights(*weights, heads, kv_heads)
        expected = literal.heads_to_keep(scores, kv_heads, size // 2, by)
        found = kept_heads(block.attn, others[number].attn)
        assert found == list(expected), (
            f"block {number}: expected query and key/value heads {expected}, got {found}"
        )


@pytest.mark.parametrize(
    "by, kept", [("groups", ([0, 1], [0])), ("queries", ([0, 2, 4], [0, 1, 2]))]
)
def test_heads_with_equal_scores_the_lower_index_stays(by, kept):
    def even(attn):
        v, out = (
            replace(node, w=np.where(node.w > 0, 1.0, -1.0)) for node in (attn.qkv.v, attn.out)
        )
        return replace(attn, qkv=replace(attn.qkv, v=v), out=out)

    lm = swap(make("llama"), Attention, even)
    changed = prune(lm, heads=0.67, heads_by=by, score="weights")
    for both in zip(parts(lm, Attention), parts(changed, Attention)):
        found = kept_heads(*both)
        assert found == list(kept), f"equal scores: expected heads {kept} to stay, got {found}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("score", ["activations", "weights"])
def test_neurons_kept_in_every_block_equal_the_literal_version(family, score):
    """By activations: those of the block's inputs when earlier blocks are pruned already."""
    lm = make(family)
    changed = prune(lm, neurons=0.25, score=score)
    stack, others = lm.model.stack, changed.model.stack.blocks
    for number, block in enumerate(stack.blocks):
        down, expand = block.ffn.down, block.ffn.expand
        if score == "activations":
            blocks = (*others[:number], *stack.blocks[number:])
            half = replace(lm, model=replace(lm.model, stack=replace(stack, blocks=blocks)))
            seen = watch_inputs(half, Linear, calibration_ids("test", lm, 3), Rows)[id(down)].all
            scores = literal.contributions(seen.tolist(), down.w.tolist(), 1)
        else:
            maps = [node.w.tolist() for node in vars(expand).values() if type(node) is Linear]
            scores = literal.neuron_scores_by_weights(maps, down.w.tolist())
        expected = literal.highest(scores, 18)
        found = kept_neurons(block.ffn, others[number].ffn)
        assert found == expected, f"block {number}: expected neurons {expected}, got {found}"


def test_neurons_with_equal_scores_the_lower_index_stays():
    """All rows of W_down have one norm, and all columns of W_gate and W_up, but for neuron 20."""

    def even(ffn):
        signs = np.where(np.arange(24)[:, None] >> np.arange(16) % 5 & 1, 1.0, -1.0)
        signs[20] *= 2  # the only neuron with another score
        maps = {n: node for n, node in vars(ffn.expand).items() if type(node) is Linear}
        alike = {n: replace(m, w=np.ones_like(m.w)) for n, m in maps.items()}
        expand = replace(ffn.expand, **alike)
        return replace(ffn, expand=expand, down=replace(ffn.down, w=signs))

    lm = swap(make("llama"), FFN, even)
    changed = prune(lm, neurons=0.5, score="weights")
    for both in zip(parts(lm, FFN), parts(changed, FFN)):
        found = [np.flatnonzero((both[0].down.w == row).all(1))[0] for row in both[1].down.w]
        assert found == [*range(11), 20], f"equal scores: expected 0 to 10 and 20, got {found}"


# The smaller model -------------------------------------------------------------------------------


def with_zeros(lm, changed):
    """The original model with zeros in the rows of W_down and W_o that were removed."""
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
def test_removing_units_equals_zeroing_their_rows(family, score, by):
    lm = make(family)
    changed = prune(lm, neurons=0.5, heads=0.5, heads_by=by, score=score)
    expected = with_zeros(lm, changed)
    assert_same(changed.logits(IDS), expected.logits(IDS), tolerance=1e-12)
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


def test_heads_that_contribute_most_stay():
    lm = make("gpt_neox")
    attn = parts(lm, Attention)[0]
    seen = watch_inputs(lm, Linear, calibration_ids("test", lm, 3), Moments)[id(attn.out)]
    scores = contributions(seen.gram, attn.out.w, 8).reshape(2, 3)
    rows = attn.out.w.reshape(2, 3, 8, -1)
    changed = parts(prune(lm, heads=0.67, heads_by="queries"), Attention)[0]
    assert_same(changed.out.w.reshape(2, 8, -1), rows[np.arange(2), scores.argmax(1)])
    groups = parts(prune(lm, heads=0.5), Attention)[0]
    best = scores.sum(1).argmax()
    assert_same(groups.out.w.reshape(3, 8, -1), rows[best])
    assert_same(groups.qkv.v.w, attn.qkv.v.w[:, best * 8 : best * 8 + 8])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["groups", "queries"])
def test_saved_work_and_bytes_are_those_of_the_card(family, by):
    """Multiply-adds, weights and the cache; token S attends to S keys."""
    lm = make(family, np.float32)
    changed = prune(lm, neurons=0.25, heads=0.5, heads_by=by)
    config, less = lm.model.config, changed.model.config
    neurons, heads = config.hidden - less.hidden, config.heads - less.heads
    kv_heads = config.kv_heads - less.kv_heads
    D, d, L = config.width, config.head_width, config.layers
    weights = (3 if family == "llama" else 2) * D * neurons + 2 * D * d * (heads + kv_heads)
    counted = {}
    for name, model in (("dense", lm), ("pruned", changed)):
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


def test_pruned_model_is_a_plain_model_that_can_be_written(tmp_path):
    from minitx import load

    lm = prune(make("llama", np.float32), neurons=0.25, heads=0.34)
    assert lm.model.config.kv_heads == 2 and lm.model.config.heads == 4
    write_model(lm.model, tmp_path, "F32")
    assert_same(load(tmp_path).logits(IDS), lm.logits(IDS))


def test_at_least_one_unit_stays_and_shares_are_rounded_down():
    lm = make("llama")
    config = prune(lm, neurons=0.99, heads=0.99).model.config
    assert (config.hidden, config.heads, config.kv_heads) == (1, 2, 1)
    config = prune(lm, neurons=0.04, heads=0.3).model.config  # 0.96 of a neuron, 0.9 of a head
    assert (config.hidden, config.heads) == (24, 6)
    single = prune(make("gpt2"), heads=0.9, heads_by="queries")
    assert single.model.config.heads == 4  # G = 1: no query head can go without its group


@pytest.mark.parametrize(
    "options, message",
    [
        ({"neurons": 1.0}, "neurons must be a number, at least 0 and below 1; got 1.0"),
        ({"heads": -0.5}, "heads must be a number, at least 0 and below 1; got -0.5"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(MinitxError, match=message):
        prune(make("llama"), **options)


def test_model_without_a_tokenizer_is_pruned_by_its_weights():
    lm = replace(make("llama"), tokenizer=None)
    with pytest.raises(MinitxError, match="prune_structure learns from calibration text"):
        prune(lm, neurons=0.5)
    assert prune(lm, neurons=0.5, score="weights").model.config.hidden == 12
    assert type(prune(lm).model) is Transformer and prune(lm).model.config is lm.model.config


@pytest.mark.parametrize("family", FAMILIES)
def test_other_techniques_accept_the_pruned_model(family):
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
        assert_same(apply(lm, options | others).logits(IDS), expected, tolerance=1e-12)
