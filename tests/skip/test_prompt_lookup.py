"""Prompt lookup: what followed the last tokens earlier in the text is proposed, then verified."""

from itertools import islice

import literal_prompt_lookup as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from tiny import FAMILIES, decode, tiny_lm, tiny_model

from minitx import ledger
from minitx.decode import Sampler
from minitx.shared.draft_and_verify import Speculative
from minitx.shared.draft_length import FixedLength
from minitx.skip.prompt_lookup import NgramIndex, PromptLookup, prompt_lookup
from minitx.technique import apply

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]

# The worked example ------------------------------------------------------------------------------
#
#     text   5 1 2 3 9 8 1 2 3
#              -----     -----       the last three tokens occur before, at 1
#                    9 8 1 2         the four tokens that followed them


def continuation(text, longest):
    return NgramIndex(longest).continuation(text)


def test_prompt_lookup_by_hand():
    assert continuation(PROMPT, 3)[:4] == [9, 8, 1, 2]
    assert continuation([1, 2, 3, 4], 3) == [], "nothing occurs twice"
    assert continuation([7, 7, 7], 3) == [7], "the last tokens do not match themselves"
    assert continuation([1, 2, 8, 2, 9, 1, 2], 3)[:2] == [8, 2], "two tokens, not a later single"
    assert continuation([4, 5, 4, 6, 4], 3) == [6, 4], "the latest occurrence"
    assert continuation([4], 3) == [] and continuation([4, 4], 3) == [4]


def test_index_of_a_growing_text_equals_the_literal_search():
    rng = np.random.default_rng(0)
    for _ in range(100):
        text = rng.integers(0, rng.integers(2, 6), 20).tolist()
        longest, end = int(rng.integers(1, 5)), 1
        index = NgramIndex(longest)
        while end <= 20:  # the text grows by some tokens at a time
            expected = literal.prompt_lookup(text[:end], longest, 99)
            assert index.continuation(text[:end]) == expected, f"{end} tokens of {text}"
            end += int(rng.integers(1, 5))


def test_proposals_are_certain_so_q_is_one_hot():
    drafting = PromptLookup(3).begin(None, None)
    found = list(islice(drafting.propose(PROMPT, Sampler(temperature=1.0)), 4))
    assert [proposal.x for proposal in found] == [9, 8, 1, 2]
    assert all(proposal.q is None for proposal in found)


# The loop ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [dict(temperature=1.0), dict(temperature=0.6, top_k=2)], ids=str
)
def test_sequence_distribution_is_the_models(options):
    """Three tokens from a vocabulary of three, against the model's own probabilities."""
    model = tiny_model("gpt2", vocab_size=3, bos=None, eos=(), dtype=np.float64)
    prompt, loop = [1, 2, 0, 1], Speculative(PromptLookup(3), FixedLength(2))
    expected = model_distribution(model, prompt, 3, **options)
    proposed = 0

    def run(sampler):
        nonlocal proposed
        with ledger.counting(model) as counts:
            new = tuple(decode(loop, model, prompt, sampler, 3))
        proposed += counts.events["draft tokens proposed"]
        return new

    found = exact_distribution(run, **options)
    assert total_variation(found, expected) < 1e-9, "another distribution than the model has"
    assert proposed


@pytest.mark.parametrize("gamma", [1, 3, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_rounds_equal_the_literal_version(family, gamma):
    lm = tiny_lm(family, dtype=np.float64)
    changed = apply(lm, {"prompt_lookup": {"gamma": gamma}})

    def argmax(text):
        return int(lm.model(text)[-1].argmax())

    expected, rounds = literal.greedy(argmax, gamma, 3, PROMPT, 30)
    with ledger.counting(changed) as counts:
        assert changed.generate(PROMPT, 30) == lm.generate(PROMPT, 30) == expected
    assert counts.events["target passes"] == rounds


def test_seed_repeats_a_sample_and_batch_rows_equal_single_runs():
    lm = apply(tiny_lm(), {"prompt_lookup": {"gamma": 3}})
    options = dict(temperature=1.0, top_k=20, seed=5)
    once = lm.generate(PROMPT, 15, **options)
    assert once == lm.generate(PROMPT, 15, **options)
    assert once != lm.generate(PROMPT, 15, **options | {"seed": 6})
    prompts = [PROMPT, PROMPT[:2], PROMPT + [4, 4]]
    rows = lm.generate(prompts, 15, **options)
    for i, (row, prompt) in enumerate(zip(rows, prompts)):
        assert row == lm.generate(prompt, 15, **options | {"seed": 5 + i})
    assert lm.generate(prompts, 15) == tiny_lm().generate(prompts, 15)


def test_options_are_in_the_tree_and_gamma_0_changes_nothing():
    lm = tiny_lm()
    assert prompt_lookup(lm, gamma=0) is lm
    assert repr(prompt_lookup(lm, gamma=5, longest=2).decode) == (
        "Speculative\n  draft: PromptLookup(longest=2)\n  length: FixedLength(gamma=5)"
    )
