"""Jacobi decoding gives the plain text, whatever is guessed, and forgets every wrong guess."""

import random

import literal_jacobi as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from same import assert_same
from tiny import FAMILIES, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Sampler, new_state
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.skip.jacobi import (
    Bigram,
    Jacobi,
    RandomGuesses,
    RandomToken,
    Repeat,
    jacobi,
    multiply_adds,
    verified,
)
from minitx.technique import apply
from minitx.tree import Part, part

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]

# The worked example ------------------------------------------------------------------------------
#
# A "model" whose next token is the sum of the last two, modulo 10. After 1 2 come 3 5 8 3 1 4 5 9.
# Eight guesses 0, corrected all at once; a bar stands after the tokens that are right for good:
#
#     text 1 2    guesses   0   0 0 0 0 0 0 0
#     pass 1                3 | 2 0 0 0 0 0 0      1+2, 2+0, 0+0, ...
#     pass 2                3 5 | 5 2 0 0 0 0 0    2+3, 3+2, 2+0, ...
#     pass 3                3 5 8 | 0 7 2 0 0 0    3+5, 5+5, 5+2, 2+0, ...
#     ...                   one more token each
#     pass 8                3 5 8 3 1 4 5 9 |
#     pass 9                3 5 8 3 1 4 5 9        nothing changes: solved


def chain(text):
    return (text[-1] + text[-2]) % 10


def test_jacobi_block_by_hand():
    y = [0] * 8
    after = []
    for _ in range(3):
        y = [chain([1, 2, *y[:i]]) for i in range(8)]
        after.append(y)
    assert after == [[3, 2, *[0] * 6], [3, 5, 5, 2, *[0] * 4], [3, 5, 8, 0, 7, 2, 0, 0]]
    found, passes = literal.block(chain, [1, 2], [0] * 8)
    assert found == [3, 5, 8, 3, 1, 4, 5, 9] and passes == 9, "8 passes, and one to detect"
    assert literal.block(chain, [1, 2], found) == (found, 1), "right guesses need one pass"


@part
class Certain(Part):
    """A model that is certain of the next token, a function of the text; notes what it is fed."""

    next: object
    vocab_size: int
    fed: list

    def hidden(self, ids, state):
        state.ids += list(ids)

    def __call__(self, ids, state):
        first = len(state.ids)
        self.hidden(ids, state)
        self.fed.append(list(ids))
        ends = range(first + 1, len(state.ids) + 1)
        return np.eye(self.vocab_size)[[self.next(state.ids[:end]) for end in ends]]


class Fed:
    """The state of such a model: the ids."""

    def __init__(self):
        self.ids = []

    @property
    def position(self):
        return len(self.ids)

    def rewind(self, position):
        del self.ids[position:]


def test_sliding_window_emits_each_token_as_soon_as_it_is_right():
    """The same 8 tokens in 8 passes: none is needed to detect the end, since the token that a pass
    emits last was never a guess."""
    loop, model = Jacobi(Repeat(), 8, 0), Certain(chain, 10, [])
    assert list(loop(model, Fed(), [1, 2], Sampler(), 8)) == [3, 5, 8, 3, 1, 4, 5, 9]
    assert model.fed[:3] == [[2, *[2] * 7], [3, 4, *[4] * 5], [5, 7, *[8] * 4]]
    assert len(model.fed) == 8


# Equal to the literal version --------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 4, 7])
@pytest.mark.parametrize("fill", [Repeat(), Bigram()])
def test_passes_equal_the_literal_version(m, fill):
    """Which guesses each pass checks, and so how many are accepted."""
    rng = np.random.default_rng(m)
    for _ in range(5):
        table = rng.integers(0, 4, (4, 4))
        text = rng.integers(0, 4, 3).tolist()

        def next_token(text, table=table):
            return int(table[text[-2], text[-1]])

        expected, passes = literal.sliding(next_token, text, m, 20, lambda t: fill(t, None))
        loop, model = Jacobi(fill, m, 0), Certain(next_token, 4, [])
        with ledger.counting(loop) as counts:
            assert list(loop(model, Fed(), text, Sampler(), 20)) == expected
        assert [fed[1:] for fed in model.fed] == passes
        assert counts.events["guesses accepted"] + counts.events["passes"] == 20


def test_new_guesses_by_hand():
    assert Repeat()([4, 7], None) == 7
    assert Bigram()([7, 1, 7, 2, 9, 7], None) == 2, "the latest occurrence"
    assert Bigram()([7, 1, 2], None) == 2, "never before: repeat it"
    assert Bigram()([7, 7], None) == 7
    rng = random.Random(0)
    assert {RandomToken(3)([], rng) for _ in range(50)} == {0, 1, 2}
    assert Jacobi(Bigram(), 4, 0).filled([1, 2, 1], [5], 4, None) == [5, 5, 5, 5]
    assert Jacobi(Bigram(), 4, 0).filled([1, 2, 1], [], 3, None) == [2, 1, 2]
    assert Jacobi(Bigram(), 4, 0).filled([1, 2, 1], [8, 9], 1, None) == [8]


@pytest.mark.parametrize("options", [{}, {"fill": "repeat"}, {"choose": "random"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_does_not_depend_on_the_guesses(family, options):
    dense = tiny_lm(family, dtype=np.float64)
    expected = dense.generate(PROMPT, 30)
    for guesses in (1, 3, 6):
        lm = apply(dense, {"jacobi": {"guesses": guesses, **options}})
        with ledger.counting(lm) as counts:
            assert lm.generate(PROMPT, 30) == expected
        assert counts.events["passes"] + counts.events["guesses accepted"] == 30


def test_right_guesses_take_one_pass():
    """A new guess that is always right: m + 1 tokens a pass."""
    lm = tiny_lm(dtype=np.float64)
    truth = PROMPT + lm.generate(PROMPT, 30)
    loop = Jacobi(lambda text, rng: truth[len(text)], 4, 0)
    with ledger.counting(lm) as counts:
        assert list(decode(loop, lm.model, PROMPT, Sampler(), 30)) == truth[len(PROMPT) :]
    assert counts.events["passes"] == 6 and counts.events["guesses accepted"] == 24


# Sampling ----------------------------------------------------------------------------------------


def test_verified_is_the_acceptance_rule_for_certain_drafts():
    """Guess 1 of p = [.5, .3, .2]: accepted with probability .3, else 0 or 2 as 5 to 2."""
    p = np.array([0.5, 0.3, 0.2])
    logits = np.log(np.stack([p, p]))
    found = exact_distribution(lambda s: tuple(verified(logits, [1], s)))
    expected = {(0,): 0.5, (2,): 0.2, (1, 0): 0.15, (1, 1): 0.09, (1, 2): 0.06}
    assert found == pytest.approx(expected)
    assert 0.7 * 5 / 7 == pytest.approx(found[(0,)]), "rejected, then from p without the guess"


@pytest.mark.parametrize("options", [{"fill": "repeat"}, {"choose": "random"}], ids=str)
def test_sequence_distribution_is_the_models(options):
    model = tiny_model("llama", vocab_size=3, bos=None, eos=(), dtype=np.float64)
    lm = apply(LM(model), {"jacobi": {"guesses": 2, **options}})
    prompt, accepted = [1, 2, 0], 0

    def run(sampler):
        nonlocal accepted
        with ledger.counting(lm) as counts:
            new = tuple(decode(lm.decode, model, prompt, sampler, 3))
        accepted += counts.events["guesses accepted"]
        return new

    expected = model_distribution(model, prompt, 3, temperature=1.0)
    assert total_variation(exact_distribution(run), expected) < 1e-9
    assert accepted


def test_same_seed_gives_the_same_sample_as_plain_decoding():
    """Each token is one draw, in order: guesses do not use up random numbers."""
    dense = tiny_lm(dtype=np.float64)
    lm = apply(dense, {"jacobi": {"guesses": 5}})
    for seed in range(3):
        options = dict(temperature=0.8, top_p=0.9, seed=seed)
        assert lm.generate(PROMPT, 30, **options) == dense.generate(PROMPT, 30, **options)


# Where decoding ends, and the KV cache -----------------------------------------------------------


def test_cache_between_passes_is_that_of_a_fresh_prefill():
    lm = tiny_lm(dtype=np.float64)
    loop, state, text = Jacobi(Bigram(), 4, 0), new_state(lm.model, PROMPT), list(PROMPT)
    for token in loop(lm.model, state, PROMPT, Sampler(), 30):
        text.append(token)
        if state.position > len(text) - 1:
            continue  # tokens of this pass that have not been yielded yet
        fresh = lm.model.new_state()
        lm.model(text[:-1], fresh)
        for kept, new in zip(state.layers, fresh.layers):
            assert kept.count == new.count, "rows of wrong guesses are left"
            for a, b in ((kept.keys, new.keys), (kept.values, new.values)):
                assert_same(a[..., : kept.count, :], b[..., : new.count, :], atol=1e-9)


def test_guesses_never_pass_the_end_of_the_context():
    lm = apply(tiny_lm(dtype=np.float64), {"jacobi": {"guesses": 100}})
    assert lm.generate([3], 47) == tiny_lm(dtype=np.float64).generate([3], 47)
    with ledger.counting(lm) as counts:
        lm.generate([1] * 47, 1)
    assert counts.events["guesses checked"] == 0, "there is room for one token only"


def test_text_may_end_within_accepted_guesses():
    lm = tiny_lm(dtype=np.float64)
    truth = lm.generate(PROMPT, 20)
    end = next(i for i in range(1, 20) if i % 5 not in (0, 4) and truth[i] not in truth[:i])
    model = tiny_model(dtype=np.float64, eos=(truth[end],))
    loop = Jacobi(lambda text, rng: (PROMPT + truth)[len(text)], 4, 0)
    changed = LM(model, decode=RightLoop(loop))
    assert changed.generate(PROMPT, 20) == truth[:end] == LM(model).generate(PROMPT, 20)


@part
class RightLoop(Part):
    loop: object

    def __call__(self, *arguments):
        return self.loop(*arguments)


# Settings ----------------------------------------------------------------------------------------


def test_no_guesses_change_nothing():
    lm = tiny_lm()
    assert jacobi(lm, guesses=0) is lm


def test_random_baseline_checks_as_many_guesses():
    lm = apply(tiny_lm(), {"jacobi": {"guesses": 4, "choose": "random"}})
    assert type(lm.decode) is RandomGuesses
    with ledger.counting(lm) as counts:
        lm.generate(PROMPT, 20)
    assert counts.events["guesses accepted"] == 0, "259 tokens: none is right by chance"
    assert counts.events["guesses checked"] == 16 * 4 + 3 + 2 + 1


@pytest.mark.parametrize("options", [{"guesses": -1}, {"fill": "zeros"}, {"guesses": 2.5}], ids=str)
def test_bad_options_are_refused(options):
    with pytest.raises(MinitxError, match="^jacobi: "):
        apply(tiny_lm(), {"jacobi": options})


def test_other_loops_are_refused_by_name():
    lm = apply(tiny_lm(), {"prompt_lookup": True})
    with pytest.raises(MinitxError, match="jacobi replaces the decoding loop.*prompt_lookup"):
        apply(lm, {"jacobi": True})


# What it costs -----------------------------------------------------------------------------------


def test_counted_multiply_adds_are_those_of_the_formula():
    """Matrices of the blocks, after a prompt of one token: 19 tokens, of which the last three
    passes check fewer guesses."""
    dense, m = tiny_lm(), 3
    lm = apply(dense, {"jacobi": {"guesses": m, "choose": "random"}})

    def ffn(lm):
        with ledger.counting(lm) as counts:
            lm.generate([7], 20)
        work = counts.total("model.stack.blocks.0.ffn").multiply_adds
        return work, counts.events["passes"], counts.events["guesses checked"]

    (plain, *_), (work, passes, checked) = ffn(dense), ffn(lm)
    assert passes == 20 and checked == 20 * m - 1 - 2 - 3
    assert work / plain == pytest.approx((checked + passes) / 20)
    assert multiply_adds(m, 20 / passes) == pytest.approx((work / plain * 20 + 6) / 20)


def test_stories_accepts_hardly_any_guess():
    """The published finding: plain Jacobi decoding gains next to nothing."""
    dense = minitx.load("stories", dtype=np.float64)
    lm = apply(dense, {"jacobi": {}})
    with ledger.counting(lm) as counts:
        assert lm.generate("One day", 60) == dense.generate("One day", 60)
    tokens_per_pass = 60 / counts.events["passes"]
    assert 1.0 <= tokens_per_pass < 1.2, f"{tokens_per_pass:.2f} tokens per pass"
