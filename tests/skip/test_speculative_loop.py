"""Speculative decoding as a loop: greedy text, caches, limits, seeds, drafts and refusals.

That it samples from the right distribution: test_speculative.py.
"""

from dataclasses import replace

import literal_speculative as literal
import numpy as np
import pytest
from tiny import FAMILIES, decode, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.checkpoints import find
from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.skip import speculative as module
from minitx.skip.speculative import (
    DraftModel,
    PromptLookup,
    Speculative,
    continuation,
    speculative,
)
from minitx.state import State
from minitx.technique import apply, decides, techniques
from minitx.tree import Part, part

# Greedy ------------------------------------------------------------------------------------------

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]


@part
class Drafts(Part):
    """Drafts greedily what a function of the text gives."""

    next: object

    def new_state(self):
        return State(0, 0)

    def __call__(self, text, gamma, choose, memory):
        x = []
        while len(x) < gamma and (token := self.next(text + x)) is not None:
            x.append(token)
        return [(token, None) for token in x]


@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_whatever_is_drafted(family, gamma):
    lm = tiny_lm(family, dtype=np.float64)
    truth = PROMPT + lm.generate(PROMPT, 30)
    rng = np.random.default_rng(0)
    # each draft, and how many passes of the model it should take if that is certain
    always_right, always_wrong = lambda t: truth[len(t)], lambda t: (truth[len(t)] + 1) % 259
    drafts = [
        (Drafts(always_right), -(-30 // (gamma + 1))),
        (Drafts(always_wrong), 30),
        (Drafts(lambda t: None), 30),
        (Drafts(lambda t: truth[len(t)] if rng.random() < 0.7 else 7), None),
        (Drafts(lambda t: truth[len(t)] if len(t) % 3 else None), None),
        (DraftModel(module.first_half(lm.model)), None),
        (DraftModel(lm.model), -(-30 // (gamma + 1))),
        (PromptLookup(), None),
    ]
    for draft, calls in drafts:
        changed = replace(lm, decode=Speculative(draft, gamma))
        with ledger.counting(changed) as counts:
            assert changed.generate(PROMPT, 30) == truth[len(PROMPT) :]
        events = counts.events
        assert events["tokens accepted"] + events["target calls"] == 30
        assert calls is None or events["target calls"] == calls


def test_greedy_rounds_are_those_of_the_literal_twin():
    lm, other = tiny_lm(dtype=np.float64), tiny_model(seed=1, dtype=np.float32, layers=1)

    def last(model):
        return lambda text: int(model(text)[-1].argmax())

    for gamma in (1, 3, 5):
        expected, rounds = literal.greedy(last(lm.model), last(other), gamma, PROMPT, 20)
        changed = replace(lm, decode=Speculative(DraftModel(other), gamma))
        with ledger.counting(changed) as counts:
            assert changed.generate(PROMPT, 20) == expected
        assert counts.events["target calls"] == rounds


@part
class Watched(Part):
    """A draft that looks at the model's state at the beginning of every round."""

    draft: Part
    states: list
    look: object

    def new_state(self):
        return self.draft.new_state()

    def __call__(self, text, gamma, choose, memory):
        self.look(text, self.states[-1], memory)
        return self.draft(text, gamma, choose, memory)


@pytest.mark.parametrize("family", FAMILIES)
def test_between_rounds_the_caches_hold_all_tokens_but_the_last(family, monkeypatch):
    lm, states, seen = tiny_lm(family, dtype=np.float64), [], []
    make = type(lm.model).new_state
    monkeypatch.setattr(
        type(lm.model), "new_state", lambda *a: states.append(make(*a)) or states[-1]
    )

    def look(text, state, memory):
        fresh = make(lm.model)
        lm.model(text[:-1], fresh)
        assert state.position == len(text) - 1 and memory.position < len(text)
        for kept, new in zip(state.layers, fresh.layers):
            n = new.count
            assert kept.count == n == len(text) - 1
            np.testing.assert_allclose(kept.keys[..., :n, :], new.keys[..., :n, :], atol=1e-10)
            np.testing.assert_allclose(kept.values[..., :n, :], new.values[..., :n, :], atol=1e-10)
        seen.append(len(text))

    draft = Drafts(lambda text: (text[-1] * 3 + len(text)) % 259 if len(text) % 4 else text[-1])
    tokens = decode(Speculative(Watched(draft, states, look), 3), lm.model, PROMPT, Sampler(), 20)
    assert len(list(tokens)) == 20 and len(seen) > 5


# Ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_the_limit_and_the_end_of_the_context(options):
    lm = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    whole = lm.generate(PROMPT, **options)
    assert len(whole) == lm.model.config.context - len(PROMPT)
    for limit in range(7):
        found = lm.generate(PROMPT, limit, **options)
        # in the last round fewer are drafted, so a sample may differ there, but not the greedy text
        assert len(found) == limit and (options or found == whole[:limit])
    full = [1] * lm.model.config.context
    assert lm.generate(full, **options) == [] and len(lm.generate(full[:-1], **options)) == 1
    assert len(lm.generate([3], 5, **options)) == 5


def test_a_draft_of_a_shorter_context_drafts_as_long_as_it_can():
    lm = tiny_lm(dtype=np.float64)
    changed = replace(lm, decode=Speculative(DraftModel(tiny_model(seed=1, context=20)), 4))
    with ledger.counting(changed) as counts:
        assert changed.generate(PROMPT, 30) == lm.generate(PROMPT, 30)
    assert counts.events["tokens drafted"]
    draft = changed.decode.draft
    for length, drafted in ((16, 4), (18, 3), (20, 1), (21, 0), (40, 0)):  # 20 have room for runs
        found = draft([1] * length, 4, Sampler(), draft.new_state())
        assert len(found) == drafted


def test_the_text_ends_inside_an_accepted_run():
    lm = tiny_lm(dtype=np.float64)
    truth = lm.generate(PROMPT, 20)
    end = next(i for i in range(1, 20) if i % 5 not in (0, 4) and truth[i] not in truth[:i])
    model = tiny_model(dtype=np.float64, eos=(truth[end],))
    draft = Drafts(lambda text: (PROMPT + truth)[len(text)])
    changed = LM(model, decode=Speculative(draft, 4))
    assert changed.generate(PROMPT, 20) == truth[:end] == LM(model).generate(PROMPT, 20)


# Seeds and batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["self", "lookup"])
def test_a_seed_gives_the_same_sample_and_a_batch_row_what_it_gives_alone(draft):
    lm = apply(tiny_lm(), {"speculative": {"draft": draft, "gamma": 3}})
    options = dict(temperature=1.0, top_k=20, seed=5)
    once = lm.generate(PROMPT, 15, **options)
    assert once == lm.generate(PROMPT, 15, **options)
    assert once != lm.generate(PROMPT, 15, **options | {"seed": 6})
    prompts = [PROMPT, PROMPT[:2], PROMPT + [4, 4]]
    rows = lm.generate(prompts, 15, **options)
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        assert row == lm.generate(prompt, 15, **options | {"seed": 5 + i})
    assert lm.generate(prompts, 15) == tiny_lm().generate(prompts, 15)
    assert lm.generate(prompts, 0) == [[], [], []]


# Prompt lookup -----------------------------------------------------------------------------------


def test_lookup_by_hand():
    assert continuation([5, 1, 2, 3, 9, 8, 1, 2, 3], 3, 4) == [9, 8, 1, 2]
    assert continuation([1, 2, 3, 4], 3, 4) == []
    assert continuation([7, 7, 7], 3, 4) == [7]
    assert continuation([1, 2, 8, 2, 9, 1, 2], 3, 2) == [
        8,
        2,
    ]  # two tokens before one that is later
    assert continuation([4, 5, 4, 6, 4], 3, 9) == [6, 4]  # of two places the last
    assert continuation([4], 3, 4) == continuation([4, 4], 3, 0) == []


def test_lookup_is_that_of_the_literal_twin():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = rng.integers(0, rng.integers(2, 6), rng.integers(1, 20)).tolist()
        longest, k = int(rng.integers(1, 5)), int(rng.integers(0, 6))
        assert continuation(text, longest, k) == literal.lookup(text, longest, k)


# Which draft -------------------------------------------------------------------------------------


def test_neutral_needs_no_draft():
    lm = tiny_lm()
    assert speculative(lm, draft="./nowhere", gamma=0) is lm


def test_the_draft_is_a_part_of_the_tree(monkeypatch):
    lm = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    drawn = repr(lm.decode)
    assert drawn.startswith("Speculative(gamma=4)\n  draft: DraftModel\n    model: Transformer")
    assert len(lm.decode.draft.model.stack.blocks) == 1 and len(lm.model.stack.blocks) == 2
    assert lm.decode.draft.model.stack.blocks[0] is lm.model.stack.blocks[0]
    assert repr(apply(tiny_lm(), {"speculative": {"draft": "lookup"}}).decode) == (
        "Speculative(gamma=4)\n  draft: PromptLookup(longest=3)"
    )


def test_auto_is_the_shipped_draft_where_it_fits(monkeypatch, tmp_path):
    lm = minitx.load("stories", speculative=True)
    assert type(lm.decode.draft) is DraftModel
    assert lm.decode.draft.model.config == minitx.load("stories-draft").model.config
    assert type(apply(tiny_lm(), {"speculative": True}).decode.draft) is PromptLookup
    assert type(apply(tiny_lm(tokenizer=None), {"speculative": True}).decode.draft) is PromptLookup
    stories = minitx.load("stories")
    monkeypatch.setattr(find, "SHIPPED", [tmp_path])
    assert type(apply(stories, {"speculative": True}).decode.draft) is PromptLookup


def test_a_draft_from_a_folder(tmp_path):
    tiny_folder(tmp_path / "toy")
    lm = apply(tiny_lm(), {"speculative": {"draft": str(tmp_path / "toy")}})
    assert lm.generate("Once", 20) == tiny_lm().generate("Once", 20)
    bare = apply(tiny_lm(tokenizer=None), {"speculative": {"draft": str(tmp_path / "toy")}})
    assert bare.generate(PROMPT, 20) == tiny_lm().generate(PROMPT, 20)


@pytest.mark.parametrize(
    "lm, options, words",
    [
        (tiny_lm, {"gamma": -1}, "gamma = -1 tokens; give 0"),
        (tiny_lm, {"draft": "./nowhere"}, "cannot load its draft: There is no model './nowhere'"),
        (
            tiny_lm,
            {"draft": "stories-draft"},
            "cannot use 'stories-draft' as its draft: it has 1022 tokens and this model 259; give "
            "a model that shares the tokenizer, or draft=self or draft=lookup.",
        ),
        (lambda: tiny_lm(model=tiny_model(layers=1)), {"draft": "self"}, "a model of one block"),
    ],
)
def test_refusals(lm, options, words):
    with pytest.raises(MinitxError) as caught:
        apply(lm(), {"speculative": options})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("speculative ")


@part
class OtherStack(Part):
    stack: Part

    @property
    def blocks(self):
        return self.stack.blocks

    def __call__(self, x, state):
        return self.stack(x, state)


def test_self_needs_a_stack_that_can_be_cut():
    lm = tiny_lm()
    lm = replace(lm, model=replace(lm.model, stack=OtherStack(lm.model.stack)))
    with pytest.raises(MinitxError, match="speculative needs a part of type Stack"):
        apply(lm, {"speculative": {"draft": "self"}})
    assert apply(lm, {"speculative": True}).generate(PROMPT, 9) == tiny_lm().generate(PROMPT, 9)


# Together with others ----------------------------------------------------------------------------


@pytest.mark.parametrize("technique", techniques(), ids=lambda t: t.name)
@pytest.mark.parametrize("draft", ["self", "lookup"])
def test_it_says_what_another_technique_says_alone(technique, draft):
    """Also with one that is approximate, if its decisions are per token and it can be rewound."""
    if technique.name == "speculative":
        return
    for family in FAMILIES:
        try:
            alone = apply(tiny_lm(family, dtype=np.float64), {technique.name: True})
            both = apply(alone, {"speculative": {"draft": draft, "gamma": 3}})
        except MinitxError:
            continue
        if decides(alone.model) != "token":  # on several tokens together it decides otherwise
            continue
        assert both.generate(PROMPT, 30) == alone.generate(PROMPT, 30)


def test_the_shipped_stories_are_told_alike():
    dense = minitx.load("stories", dtype=np.float64)
    changed = apply(dense, {"speculative": True})
    with ledger.counting(changed) as counts:
        assert changed.generate("One day", 40) == dense.generate("One day", 40)
    assert counts.events["tokens accepted"] > 0
