"""padding_skip: which rows are run, that each sequence gets what it gets alone, what it costs."""

from dataclasses import replace
from functools import cache
from itertools import islice

import literal_padding_skip as literal
import numpy as np
import pytest
from same import assert_same
from tiny import END, KINDS, check_close, decode, tiny_lm, tiny_model

from minitx.decode import Autoregressive, Sampler, new_state
from minitx.errors import MinitxError
from minitx.ledger import counting
from minitx.model import Attend, Cache, Linear
from minitx.ops import argmax_token
from minitx.skip.padding_skip import (
    EachSequence,
    Packed,
    PackedAttend,
    PackedBatch,
    PackedCache,
    PackedSoftmax,
    PackedState,
    multiply_adds,
    pack,
    passes,
)
from minitx.state import Layer, State, Tokens
from minitx.technique import apply, find, swap, wrap
from minitx.tree import Part, part, walk

RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(0, 258, n).tolist() for n in (9, 1, 4, 12)]
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def lms(kind="llama", dtype=np.float64):
    dense = tiny_lm(kind, dtype=dtype)
    return dense, apply(dense, {"padding_skip": True})


class Scripted(Sampler):
    """Chooses the argmax and keeps the logits; ends the text with the n-th token."""

    def __init__(self, ends=99):
        super().__init__(temperature=1.0)
        self.ends, self.seen = ends, []

    def __call__(self, logits):
        self.seen.append(logits)
        return END if len(self.seen) == self.ends else argmax_token(logits[:END])


def run_batch(lm, prompts, ends, limit):
    """The tokens and logits of each sequence, and the ledger."""
    choosers = [Scripted(n) for n in ends]
    with counting(lm) as counts:
        steps = list(lm.decode.batch(lm.model, prompts, choosers, limit))
    return list(zip(*steps)), [choose.seen for choose in choosers], counts


# The packed batch --------------------------------------------------------------------------------


def test_worked_example_of_three_prompts():
    """Prompts of 3, 1 and 2 tokens. Padded: 3 x 3 = 9 tokens. Packed: 6, a b c | d | e f, cut at
    0, 3, 4, 6; their positions are 0 1 2 | 0 | 0 1. The logits are those of rows 2, 3 and 5.

    Then the first sequence ends with its first token, the second with its third, the third with its
    second. Tokens run: 6, then 2 (second and third), then 1 (second): 9. Padded: 9 + 3 + 3 = 15."""
    lm = lms()[1]
    states = [lm.model.new_state() for _ in range(3)]
    step = PackedState(states, [3, 1, 2])
    assert step.cuts == [0, 3, 4, 6]
    assert step.tokens.array.tolist() == [0, 1, 2, 0, 0, 1]
    assert [x.tolist() for x in step.split(np.arange(6)[:, None])] == [
        [[0], [1], [2]],
        [[3]],
        [[4], [5]],
    ]
    tokens, _, counts = run_batch(lm, [[1, 2, 3], [4], [5, 6]], (1, 3, 2), 3)
    assert counts.events == {"tokens run": 9, "tokens with padding": 15}
    assert tokens[0] == (END, END, END), "a sequence that has ended repeats its last token"
    assert literal.rows_run([3, 1, 2], [1, 3, 2]) == [6, 2, 1]


def test_packed_attention_equals_the_literal_version():
    """From a batch padded on the right, as ByteTransformer's, to packed rows and back."""
    lengths, width = [5, 1, 3], 4
    mask = [[int(t < n) for t in range(5)] for n in lengths]
    places, offsets = literal.packed_places(mask)
    assert offsets == [0, 5, 6, 9]
    padded = [RNG.standard_normal((3, 5, width)) for _ in range(3)]
    q, k, v = ([row.tolist() for row in literal.pack(x, places)] for x in padded)
    expected = literal.attend(q, k, v, 0.5, offsets)
    states = [State(1, 5) for _ in lengths]
    step = PackedState(states, lengths)
    assert step.cuts == offsets and step.tokens.array.tolist() == literal.positions(offsets)
    heads = [np.array(x)[None] for x in (q, k, v)]  # (1, N, d)
    cache, layers = PackedCache(Cache()), step.layers[0]
    cache.store(*heads[1:], layers)
    found = PackedAttend(Attend(0.5))(heads[0], *cache.read(layers), layers)
    assert_same(found[0], expected, "packed attention", atol=1e-12)
    back = literal.unpack(expected, places, mask)
    alone = [
        literal.attend(q[a:b], k[a:b], v[a:b], 0.5, [0, b - a])
        for a, b in zip(offsets, offsets[1:])
    ]
    for row, own, n in zip(back, alone, lengths):
        assert_same(row[:n], own, tolerance=1e-7)
        assert not np.any(row[n:]), "padding is zero"


@pytest.mark.parametrize("at", [7, 3], ids=["newest", "with later rows that it must not see"])
@pytest.mark.parametrize("key_heads, value_heads, width", [(2, 2, 4), (4, 4, 4), (4, 1, 6)])
def test_one_softmax_for_all_equals_a_softmax_for_each(key_heads, value_heads, width, at):
    """Caches of 5, 1 and 8 rows, and one query each; large scores, so that the maximum matters."""
    q, S = RNG.standard_normal((4, 3, 4)), (5, 1, 8)
    k = [300 * RNG.standard_normal((key_heads, n, 4)) for n in S]
    v = [RNG.standard_normal((value_heads, n, width)) for n in S]
    layers = Packed([Layer(9).take(n) for n in S], [0, 1, 2, 3])
    for keys, values, layer in zip(k, v, layers.own):
        layer.store(keys, values)
        layer.tokens = layer.tokens.only([-1])
    layers.own[2].tokens = Tokens(np.array([at]))
    found = []
    for kind in (PackedAttend, PackedSoftmax):
        attend = kind(Attend(0.5))
        with counting(attend) as counts:
            found.append((attend(q, k, v, layers), counts.total()))
    (plain, work), (one, same) = found
    check_close(one, plain, 1e-12, "attention with one softmax")
    assert same == work, "the counts differ"


@pytest.mark.parametrize("dtype, within", [(np.float64, 1e-12), (np.float32, 1e-5)])
@kinds
def test_each_row_has_the_logits_that_it_has_alone(kind, dtype, within):
    """At every step, while others end: prompts of 9, 1, 4 and 12 tokens."""
    dense, packed = lms(kind, dtype)
    ends, limit = (2, 9, 5, 7), 9
    tokens, logits, _ = run_batch(packed, PROMPTS, ends, limit)
    for prompt, n, own, seen in zip(PROMPTS, ends, tokens, logits):
        alone = Scripted(n)
        expected = list(islice(decode(Autoregressive(), dense.model, prompt, alone, n), n))
        assert list(own[:n]) == expected, "the text differs"
        assert len(seen) == n, "a sequence that has ended is run"
        check_close(np.array(seen), np.array(alone.seen), within, f"logits of {len(prompt)} tokens")


@kinds
def test_sequences_do_not_see_each_other(kind):
    packed = lms(kind)[1]
    _, before, _ = run_batch(packed, PROMPTS, (99,) * 4, 5)
    other = [PROMPTS[0][::-1], PROMPTS[1], [7] * 11, PROMPTS[3]]
    _, after, _ = run_batch(packed, other, (99,) * 4, 5)
    for i in (1, 3):
        check_close(np.array(after[i]), np.array(before[i]), 1e-12, f"row {i}, which is unchanged")


@kinds
def test_sampled_rows_have_the_seeds_of_single_prompts(kind):
    dense, packed = lms(kind)
    options = dict(temperature=1.0, top_k=20)
    found = packed.generate(PROMPTS, 12, seed=5, **options)
    assert found == [dense.generate(p, 12, seed=5 + i, **options) for i, p in enumerate(PROMPTS)]


def test_single_prompt_runs_the_loop_inside():
    dense, packed = lms()
    assert packed.generate(PROMPTS[0], 9) == dense.generate(PROMPTS[0], 9)
    assert packed.generate([PROMPTS[0]], 9) == [dense.generate(PROMPTS[0], 9)]
    with counting(packed) as counts:
        packed.generate(PROMPTS[0], 9)
    assert not counts.events


def test_batch_stops_at_the_limit_and_at_the_end_of_the_context():
    dense, packed = lms()
    model = tiny_model("llama", dtype=np.float64, eos=())  # 48 tokens, and no end of text
    steps = list(
        PackedBatch(Autoregressive(), 256).batch(model, [[1] * 45, [2]], [Sampler()] * 2, 3)
    )
    assert len(steps) == 3
    assert list(packed.decode.batch(packed.model, PROMPTS, [Sampler()] * 4, 0)) == []
    assert packed.generate([[1] * 48, [2]]) == [[], []], "the longest prompt fills the context"
    with pytest.raises(MinitxError, match="exceeds the context"):
        packed.generate([[1] * 40, [2]], 9)


def test_each_sequence_knows_the_length_of_its_prompt():
    """Which techniques read that treat prompts and generated tokens differently."""
    seen = []

    @part
    class Watched(Part):
        inner: Part

        def __call__(self, x, state):
            seen.append((state.prompt, len(x), state.position))
            return self.inner(x, state)

        @property
        def blocks(self):
            return self.inner.blocks

    packed = lms()[1]
    watched = replace(packed.model, stack=Watched(packed.model.stack))
    list(packed.decode.batch(watched, [[1, 2, 3], [4]], [Scripted(), Scripted()], 2))
    assert seen == [(3, 3, 0), (1, 1, 0), (3, 1, 3), (1, 1, 1)]


def test_no_token_runs_before_it_is_requested():
    packed = lms()[1]
    with counting(packed) as counts:
        steps = packed.decode.batch(packed.model, [[1, 2], [3]], [Scripted(), Scripted()], 5)
        assert not counts.events
        for tokens_run in (3, 5, 7):
            next(steps)
            assert counts.events["tokens run"] == tokens_run


# What it costs -----------------------------------------------------------------------------------


@kinds
def test_counted_work_equals_the_formula_on_the_card(kind):
    """And that of the padded batch: the same formula with all sequences as long as the longest,
    none of which ends."""
    dense, packed = lms(kind)
    lengths, ends = [len(p) for p in PROMPTS], (2, 6, 1, 4)
    steps = [[(n, n) for n in lengths]]
    for t in range(1, max(ends)):
        steps.append([(1, n + t) for n, end in zip(lengths, ends) if t < end])
    rows = [sum(T for T, _ in step) for step in steps]
    assert rows == literal.rows_run(lengths, ends) == [26, 3, 2, 2, 1, 1]
    counts = run_batch(packed, PROMPTS, ends, max(ends))[2]
    assert counts.total().multiply_adds == sum(multiply_adds(packed.model, step) for step in steps)
    assert counts.events["tokens run"] == sum(rows)
    padded = [[(12, 12)] * 4, *([(1, 12 + t)] * 4 for t in range(1, 6))]
    counts = run_batch(dense, PROMPTS, ends, max(ends))[2]
    assert counts.total().multiply_adds == sum(multiply_adds(dense.model, step) for step in padded)


@kinds
def test_work_is_counted_where_the_dense_model_counts_it(kind):
    """Equal prompts that do not end: the same work, part by part. Only that a row of the table of
    positions is read for each sequence."""
    prompts = [PROMPTS[0]] * 3
    dense, packed = (run_batch(lm, prompts, (99,) * 3, 4)[2].entries for lm in lms(kind))
    assert packed | {"model.embed": dense["model.embed"]} == dense


def test_weights_are_read_once_a_step():
    """4 steps: each reads every matrix once, whatever the number of sequences."""
    dense, packed = lms()

    def read(lm, prompts):
        counts = run_batch(lm, prompts, (99,) * len(prompts), 4)[2]
        matrices = [e for path, e in counts.entries.items() if "blocks" in path or "head" in path]
        return sum(entry.weight_bytes for entry in matrices)

    assert read(packed, PROMPTS) == read(packed, PROMPTS[:1]) == read(dense, PROMPTS) > 0


@pytest.mark.parametrize(
    "tokens, expected", [(9, [[0], [1, 2], [3]]), (10, [[0, 1], [2], [3]]), (26, [[0, 1, 2, 3]])]
)
def test_passes_have_at_most_so_many_tokens(tokens, expected):
    """Prompts of 9, 1, 4 and 12 tokens, in order. A prompt with more tokens is a pass by itself."""
    lengths = dict(enumerate(map(len, PROMPTS)))
    assert passes(lengths, tokens) == expected
    assert passes(lengths, 1) == [[0], [1], [2], [3]] and passes({}, 9) == []
    lm = apply(tiny_lm(dtype=np.float64), {"padding_skip": {"tokens": tokens}})
    assert lm.generate(PROMPTS, 6) == lms()[0].generate(PROMPTS, 6)


def test_batch_that_has_ended_does_no_work():
    packed = lms()[1]
    once = run_batch(packed, PROMPTS, (1, 1, 1, 1), 1)[2].total()
    assert run_batch(packed, PROMPTS, (1, 1, 1, 1), 8)[2].total() == once


# With other techniques ---------------------------------------------------------------------------


def each_sequence(lm) -> set[str]:
    return {type(n.inner).__name__ for _, n in walk(pack(lm.model)) if type(n) is EachSequence}


def rows_equal_single_prompts(lm):
    assert lm.generate(PROMPTS, 10) == [lm.generate(prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("name", ["fold_norms", "heavy_hitters", "quantize", "quantize_cache"])
def test_techniques_of_matrices_and_caches_run_packed(name):
    lm = apply(tiny_lm(dtype=np.float64), {name: find(name).demo, "padding_skip": True})
    assert each_sequence(lm) == set()
    rows_equal_single_prompts(lm)


INSIDE = {
    "early_exit": "ExitingStack",
    "ffn_skip": "SkippableFFN",
    "first_layer": "FirstBlock",
    "kv_share": "FollowerAttention",
    "token_prune": "PruningStack",
}


@pytest.mark.parametrize("name", INSIDE)
def test_part_that_may_keep_something_of_a_sequence_runs_on_each(name):
    lm = apply(tiny_lm(dtype=np.float64), {name: find(name).demo, "padding_skip": True})
    assert each_sequence(lm) == {INSIDE[name]}
    rows_equal_single_prompts(lm)


@part
class Centered(Part):
    """A projection that depends on all rows of its input."""

    decides = "step"
    inner: Part

    def __call__(self, x):
        return self.inner(x - x.mean(-2, keepdims=True))


def test_projection_that_depends_on_other_rows_runs_on_each_sequence():
    dense, packed = lms("gpt2")
    for slot, found in (("attn", "Attention"), ("ffn", "FFN")):
        centered = wrap(packed, slot, lambda part, _: swap(part, Linear, Centered))
        assert each_sequence(centered) == {found}
        logits = run_batch(centered, PROMPTS, (99,) * 4, 1)[1]
        for prompt, row in zip(PROMPTS, logits):
            alone = centered.model.next_logits(prompt, new_state(centered.model, prompt))
            check_close(row[0], alone, 1e-12, f"a prompt of {len(prompt)} tokens")


@pytest.mark.parametrize(
    "other", ["prefix_cache", "prompt_lookup", "self_speculative", "speculative"]
)
def test_other_decoding_loops_are_refused_by_name(other):
    options = {"draft": "self"} if other == "speculative" else {}
    for wanted in ({"padding_skip": True, other: options}, {other: options, "padding_skip": True}):
        with pytest.raises(MinitxError, match="use one of the two") as caught:
            apply(tiny_lm(), wanted)
        assert "padding_skip" in str(caught.value) and other in str(caught.value)


def test_dense_batches_keep_their_padding():
    """The comparison: rows that have ended run on until all have."""
    dense = lms()[0]
    tokens, logits, counts = run_batch(dense, PROMPTS, (1, 5, 5, 5), 5)
    assert len(logits[0]) == 5 and not counts.events
