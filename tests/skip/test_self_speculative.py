"""The first layers draft, the others verify, in one KV cache: exact, cheaper than with two."""

from dataclasses import replace
from itertools import islice

import literal_self_speculative as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from same import assert_same
from tiny import FAMILIES, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger, ops
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.shared.draft_and_verify import Speculative, verify
from minitx.shared.draft_length import AdaptiveStop, FixedLength
from minitx.skip.self_speculative import FirstLayers, self_speculative
from minitx.technique import apply
from minitx.tree import Part, part

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]


def changed(lm, **options):
    return apply(lm, {"self_speculative": options})


def run(lm, prompt, n, **options):
    """The completion, and what was counted."""
    with ledger.counting(lm) as counts:
        return lm.generate(prompt, n, **options), counts


# The worked example ------------------------------------------------------------------------------
#
# Four layers, E = 2, gamma = 3; the prompt has 9 tokens. Rows of the KV cache in layers 0 1 | 2 3:
#
#     prefill of all tokens but the last                   8 8 | 8 8
#     draft x1: layers 0 1 read the last prompt token      9 9 | 8 8
#     draft x2: they read x1                              10 10 | 8 8
#     draft x3: they read x2                              11 11 | 8 8
#     verify: they read x3; then layers 2 3 read the
#     saved h[2] of the last prompt token, x1, x2, x3     12 12 | 12 12
#     x1 accepted, x2 rejected, t drawn instead: the text
#     has 11 tokens, the cache all but t                  10 10 | 10 10


def test_layers_hold_different_numbers_of_rows_while_drafting_and_the_same_after_it():
    model = tiny_model(layers=4, dtype=np.float64)
    state = new_state(model, PROMPT)
    model.hidden(PROMPT[:-1], state)
    drafting, rows = FirstLayers(2).begin(model, state), []

    def note():
        rows.append([layer.count for layer in state.layers])

    note()
    x = []
    for proposal in islice(drafting.propose(PROMPT, Sampler()), 3):
        x.append(proposal.x)
        note()
    logits = drafting.score([PROMPT[-1], *x])
    note()
    drafting.rewind(10)
    note()
    assert rows == [
        [8, 8, 8, 8], [9, 9, 8, 8], [10, 10, 8, 8], [11, 11, 8, 8], [12, 12, 12, 12], [10] * 4
    ]  # fmt: skip
    assert_same(logits, model(PROMPT + x)[8:], atol=1e-12)
    assert state.position == 10 and drafting.h == []


@pytest.mark.parametrize("gamma, stop", [(1, 0.0), (3, 0.0), (4, 0.0041)])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rounds_equal_the_literal_version(family, gamma, stop):
    lm, E = tiny_lm(model=tiny_model(family, layers=3, dtype=np.float64)), 1
    model = lm.model

    def early(text):
        state = new_state(model, text)
        x = model.embed(np.array(text), state.take(len(text)).lookup)
        return model.stack.run(x, state, 0, E)[-1]

    def exit(h):
        p = ops.softmax(model.head(model.norm(h)))
        return int(p.argmax()), p.max()

    def late(states):
        state = new_state(model, states)
        state.take(len(states))
        x = model.stack.run(np.stack(states), state, E, 3)
        return model.head(model.norm(x)).argmax(-1).tolist()

    expected, rounds, drafted = literal.greedy(early, exit, late, gamma, stop, PROMPT, 12)
    text, counts = run(changed(lm, layers=E, gamma=gamma, stop=stop), PROMPT, 12)
    assert text == expected == lm.generate(PROMPT, 12)
    assert counts.events["target passes"] == rounds
    assert counts.events["draft tokens proposed"] == drafted


# Exactness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(temperature=1.0), dict(temperature=0.6, top_k=2)], ids=str
)
@pytest.mark.parametrize("length", [FixedLength(2), AdaptiveStop(3, 0.4)])
def test_sequence_distribution_is_the_models(options, length):
    model = tiny_model("gpt2", layers=2, vocab_size=3, bos=None, eos=(), dtype=np.float64)
    prompt, loop = [1, 2, 0, 1], Speculative(FirstLayers(1), length)
    expected = model_distribution(model, prompt, 3, **options)
    found = exact_distribution(lambda s: tuple(decode(loop, model, prompt, s, 3)), **options)
    assert total_variation(found, expected) < 1e-9, "another distribution than the model has"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_cache_after_each_round_equals_a_fresh_prefill(family, layers):
    model = tiny_model(family, layers=4, dtype=np.float64)
    state, text = new_state(model, PROMPT), list(PROMPT)
    model.hidden(text[:-1], state)
    drafting, accepted = FirstLayers(layers).begin(model, state), set()
    for gamma in (3, 0, 1, 3, 4, 2):
        found = FixedLength(gamma).take(drafting.propose(text, Sampler()), 99)
        new = verify(drafting.score([text[-1], *(x for x, *_ in found)]), found, Sampler())
        text += new
        accepted.add(len(new) - 1)
        drafting.rewind(len(text) - 1)
        fresh = new_state(model, text)
        model.hidden(text[:-1], fresh)
        assert state.position == fresh.position == len(text) - 1
        for kept, expected in zip(state.layers, fresh.layers):
            n = expected.count
            assert kept.count == n, "layers hold different numbers of rows"
            for name in ("keys", "values"):
                rows, wanted = getattr(kept, name)[..., :n, :], getattr(expected, name)[..., :n, :]
                assert_same(rows, wanted, name, atol=1e-10)


def test_seed_repeats_a_sample_and_batch_rows_equal_single_runs():
    lm = changed(tiny_lm(), gamma=3)
    options = dict(temperature=1.0, top_k=20, seed=5)
    once = lm.generate(PROMPT, 15, **options)
    assert once == lm.generate(PROMPT, 15, **options)
    assert once != lm.generate(PROMPT, 15, **options | {"seed": 6})
    prompts = [PROMPT, PROMPT[:1], PROMPT + [4, 4]]
    rows = lm.generate(prompts, 15, **options)
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        assert row == lm.generate(prompt, 15, **options | {"seed": 5 + i})
    assert lm.generate(prompts, 15) == tiny_lm().generate(prompts, 15)


# Cost --------------------------------------------------------------------------------------------


def test_counted_work_is_one_run_of_every_layer_per_token_and_one_more_head_per_draft():
    """Blocks 0 | 1 with E = 1. A round of n proposals runs n + 1 tokens through each layer, once;
    the head scores n hidden states of the draft and n + 1 of the target. The weights of the first
    layers are read n + 1 times, those of the others once."""
    lm = changed(tiny_lm(), layers=1, gamma=3, stop=0.0)
    _, counts = run(lm, PROMPT, 25)
    n, rounds = (counts.events[e] for e in ("draft tokens proposed", "target passes"))
    assert n > rounds > 0
    head = counts.total("model.head")
    assert head.multiply_adds == 259 * 16 * (2 * n + rounds)
    for block, reads in ((0, n + rounds), (1, rounds)):
        ffn = counts.total(f"model.stack.blocks.{block}.ffn.down")
        assert ffn.multiply_adds == 16 * 24 * (len(PROMPT) - 1 + n + rounds)
        assert ffn.weight_bytes == 4 * 16 * 24 * (1 + reads)  # 1: the prefill


def test_shared_cache_saves_the_first_layers_of_a_draft_with_its_own_cache():
    """``speculative draft=self`` proposes and accepts the same tokens. Its draft reads the prompt
    and every token for itself: the first half of the layers runs about twice."""
    options = {"gamma": 4, "stop": 0.0}
    ours, counts = run(changed(tiny_lm(), layers=1, **options), PROMPT, 25)
    theirs, more = run(apply(tiny_lm(), {"speculative": {"draft": "self"} | options}), PROMPT, 25)
    assert ours == theirs and counts.events == more.events
    runs_twice = more.total("decode.draft.model.stack").multiply_adds
    ours, theirs = counts.total().multiply_adds, more.total().multiply_adds - runs_twice
    # Of one token after another the ledger counts the visible keys, of a chunk all pairs.
    path = "model.stack.blocks.0.attn.attend"
    pairs = more.total(path).multiply_adds - counts.total(path).multiply_adds
    assert pairs > 0 and ours == theirs - pairs
    once = counts.total("model.stack.blocks.0").multiply_adds
    assert 0.75 < runs_twice / once <= 1, "that is most of the first half once more"


def test_figures_on_stories():
    """The more layers draft, the more tokens are accepted: stories was trained for early exit."""
    lm = minitx.load("stories")
    prompt = "One day Mia went to the park. She saw"
    accepted = {}
    for layers in (2, 4):
        text, counts = run(changed(lm, layers=layers, gamma=4, stop=0.0), prompt, 40)
        assert text == lm.generate(prompt, 40)
        events = counts.events
        accepted[layers] = events["draft tokens accepted"] / events["draft tokens proposed"]
    assert 0.38 < accepted[2] < 0.5 and 0.7 < accepted[4] < 0.85, accepted


# Options and models ------------------------------------------------------------------------------


def test_options_are_in_the_tree_and_gamma_0_changes_nothing():
    lm = tiny_lm()
    assert self_speculative(lm, gamma=0) is lm
    assert repr(self_speculative(lm, gamma=5, stop=0.0).decode) == (
        "Speculative\n  draft: FirstLayers(layers=1)\n  length: FixedLength(gamma=5)"
    )
    assert type(self_speculative(lm, adapt=True).decode.length) is AdaptiveStop
    assert minitx.load("stories", self_speculative=True).decode.draft.layers == 2


@part
class OtherStack(Part):
    stack: Part

    @property
    def blocks(self):
        return self.stack.blocks

    def __call__(self, x, state):
        return self.stack(x, state)


@pytest.mark.parametrize(
    "layers, options, words",
    [
        (2, {"layers": 2}, "layers is 2, but the model has 2 and .* give 1 to 1."),
        (1, {}, "needs a model of two layers or more, and this one has one; use prompt_lookup"),
        (2, {"layers": 0}, "layers must be an integer, at least 1, or None; got 0"),
        (2, {"stop": 1.5}, "stop must be a number, 0 to 1; got 1.5"),
    ],
)
def test_bad_options_are_refused(layers, options, words):
    with pytest.raises(MinitxError, match=f"^self_speculative.*{words}") as caught:
        changed(tiny_lm(model=tiny_model(layers=layers)), **options)
    assert "\n" not in str(caught.value)


def test_models_whose_first_layers_cannot_run_alone_are_refused():
    lm = tiny_lm()
    other = replace(lm, model=replace(lm.model, stack=OtherStack(lm.model.stack)))
    with pytest.raises(MinitxError, match="self_speculative needs a part of type Stack"):
        changed(other)
    with pytest.raises(MinitxError, match="self_speculative .*sink_window frees cache rows"):
        apply(lm, {"sink_window": {"sinks": 2, "window": 5}, "self_speculative": {}})
    with pytest.raises(MinitxError, match="head_cascade decides by the step; use one of the two"):
        apply(lm, {"head_cascade": {}, "self_speculative": {}})
    with pytest.raises(MinitxError, match="already has that of prompt_lookup; use one of the two"):
        changed(apply(lm, {"prompt_lookup": {}}))
