"""Majority votes: which answer wins, when voting may stop, and what voters can and cannot do."""

import itertools

import literal_majority_vote as literal
import numpy as np
import pytest
from markov import after_last
from tiny import END, TOKENIZER, Spy, decode, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.decode import Autoregressive, Sampler, TokenLoop, new_state
from minitx.errors import MinitxError
from minitx.lab.answers import answer, held_out_questions
from minitx.lm import LM
from minitx.shared.token_text import TokenText
from minitx.skip.majority_vote import (
    LastWord,
    MajorityVote,
    WholeText,
    is_decided,
    majority_accuracy,
    winner,
)
from minitx.technique import apply
from minitx.tree import Part, part

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]


@part
class LastToken(Part):
    """Answers are the same if they end in the same token: the "final answer" of a toy."""

    def __call__(self, answer, eos):
        return answer[-1]


@part
class Scripted(TokenLoop):
    """An inner loop whose i-th call yields the i-th of these answers."""

    answers: list
    calls: list

    def __call__(self, model, state, ids, choose, limit):
        self.calls.append((state.position, tuple(ids), limit))
        yield from self.answers[len(self.calls) - 1][:limit]


def vote(answers, votes=None):
    """What a vote over scripted answers returns, and how many were cast."""
    inner = Scripted(answers, [])
    loop = MajorityVote(inner, WholeText(None), votes or len(answers), 0.7, 0)
    found = list(decode(loop, tiny_model(), [1], Sampler(), len(answers[0])))
    return found, len(inner.calls)


# The worked example ------------------------------------------------------------------------------
#
# Three ways to reason (tokens 0, 1, 2 with .4, .3, .3), two answers (3 and 4). The first way leads
# to answer 3, the other two to answer 4. Greedy decoding takes the most likely way: 3. Summed over
# the ways, 4 has .6, and of many samples most say 4.

WAYS = np.array([[0, 0, 0, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0],
                 [0.4, 0.3, 0.3, 0, 0]])  # fmt: skip


def test_worked_example_vote_sums_over_the_ways_to_an_answer():
    model = after_last(WAYS)
    assert list(decode(Autoregressive(), model, [4], Sampler(), 2)) == [0, 3]
    loop = MajorityVote(Autoregressive(), LastToken(), 101, 1.0, 0)
    assert list(decode(loop, model, [4], Sampler(), 2))[-1] == 4


def test_most_frequent_answer_wins_and_ties_go_to_the_first_seen():
    a, b, c = [1, 1], [2, 2], [3, 3]
    assert vote([b, a, a])[0] == a
    assert vote([b, a])[0] == b, "a tie goes to the answer that was seen first"
    assert vote([c, a, b, b, a])[0] == a, "of two leaders the one that was seen first"


def test_voting_stops_when_the_result_is_certain():
    a, b = [1], [2]
    assert vote([a, a, a, b, b]) == (a, 3), "3 of 5"
    assert vote([a, a, b, a, b]) == (a, 4)
    assert vote([a, a, b, b]) == (a, 2), "b could only draw level, and a was there first"
    assert vote([b, a, a, b]) == (b, 4), "after three, b may still draw level, and was there first"


def test_margin_that_exceeds_the_votes_left_always_stops():
    for counts in itertools.product(range(5), repeat=3):
        if 0 in counts:
            continue
        lead, second = sorted(counts, reverse=True)[:2]
        for left in range(5):
            if lead - second > left:
                assert is_decided(counts, left)


def test_early_stop_equals_the_literal_version():
    """All ways to cast up to five votes for three answers: the same winner as after all of them,
    and not one vote more than is needed for certainty."""
    for n in range(1, 6):
        for cast in itertools.product("abc", repeat=n):
            counts = {}
            for number, one in enumerate(cast, 1):
                counts[one] = counts.get(one, 0) + 1
                if is_decided([*counts.values()], n - number):
                    break
            found = [*counts][winner([*counts.values()])]
            assert found == literal.winner([*cast]), f"stopped too early at {cast}"
            if n < 5:
                assert number == literal.votes_needed([*cast], "abcd"), cast


def test_early_stop_gives_what_all_votes_give(monkeypatch):
    lm = apply(tiny_lm(), {"majority_vote": {"votes": 7, "temperature": 0.4}})
    prompts = [[i, 2 * i, 7] for i in range(12)]
    with ledger.counting(lm) as counts:
        early = [lm.generate(prompt, 1) for prompt in prompts]
    assert counts.events["votes cast"] < counts.events["votes allowed"] == 12 * 7
    monkeypatch.setattr("minitx.skip.majority_vote.is_decided", lambda counts, left: left == 0)
    assert early == [lm.generate(prompt, 1) for prompt in prompts]


# The same answer ---------------------------------------------------------------------------------


def test_answers_are_compared_without_end_of_text_and_outer_spaces():
    ids = TOKENIZER.encode("Once", special=False)
    spaced = TOKENIZER.encode(" Once ", special=False)
    text = WholeText(TokenText.of(TOKENIZER))
    assert text([*ids, END], (END,)) == text(spaced, (END,)) == text(ids, (END,)) == "Once"
    assert WholeText(None)([1, 2, END], (END,)) == (1, 2)


def test_last_word_of_the_first_sentence():
    def word(text):
        return LastWord(TokenText.of(TOKENIZER))(TOKENIZER.encode(text, special=False), (END,))

    assert word(" Leo is in the cellar. He ran.") == word("It is the cellar.") == "cellar"
    assert word(".") == word(" ") == ""


# What a vote costs -------------------------------------------------------------------------------


def test_prompt_runs_once_and_each_vote_runs_its_last_token():
    lm, runs = tiny_lm(), []
    spied = Spy(lm.model, runs)
    loop = MajorityVote(Autoregressive(), WholeText(None), 4, 2.0, 0)
    list(loop(spied, new_state(lm.model, PROMPT), PROMPT, Sampler(), 3))
    assert runs == [(8,), *[(1,)] * 4 * 3], "the prompt but its last token, then 4 times 3 tokens"


def test_votes_start_from_the_state_behind_the_prompt():
    inner = Scripted([[7], [1, 2], [1, 3], [1, 2]], [])
    lm = tiny_lm()
    state = new_state(lm.model, PROMPT)
    lm.model(PROMPT[:-1], state)
    loop = MajorityVote(inner, WholeText(None), 3, 0.7, 0)
    inner.answers[:1] = []  # no prefill is needed
    assert list(loop(lm.model, state, PROMPT, Sampler(), 2)) == [1, 2]
    assert inner.calls == [(8, tuple(PROMPT), 2)] * 3 and state.position == 8


def test_known_prefix_is_reused_by_the_loop_inside():
    lm = apply(tiny_lm(), {"majority_vote": {"votes": 3}, "prefix_cache": {"block": 2}})
    with ledger.counting(lm) as counts:
        first = lm.generate(PROMPT, 5)
        before = counts.events["prompt tokens reused"]
        assert lm.generate(PROMPT, 5) == first
    assert counts.events["prompt tokens reused"] - before >= 7


def test_answer_that_ends_early_is_followed_by_end_of_text():
    """So the rows of a batch, one of which has ended, go on together."""
    inner = Scripted([[4, END, 9], [5, 6, 7], [4, END, 3]], [])
    loop = MajorityVote(inner, WholeText(None), 3, 0.7, 0)
    assert list(decode(loop, tiny_model(), [1], Sampler(), 3)) == [4, END, END]


# Seeds -------------------------------------------------------------------------------------------


def test_same_request_gets_the_same_answer_and_another_seed_another():
    lm = apply(tiny_lm(), {"majority_vote": {"votes": 3}})
    options = dict(temperature=1.5, seed=5)
    assert lm.generate(PROMPT, 12, **options) == lm.generate(PROMPT, 12, **options)
    assert lm.generate(PROMPT, 12, **options) != lm.generate(PROMPT, 12, **options | {"seed": 6})
    assert lm.generate(PROMPT, 12) == lm.generate(PROMPT, 12)
    rows = lm.generate([PROMPT, PROMPT[2:]], 12, **options)
    assert rows[1] == lm.generate(PROMPT[2:], 12, **options | {"seed": 6})


def test_greedy_request_samples_at_the_option_temperature():
    loop = MajorityVote(Autoregressive(), WholeText(None), 4, 0.9, 3)
    greedy = [*loop.voters(Sampler(), PROMPT)]
    assert {s.temperature for s in greedy} == {0.9} and len({s.seed for s in greedy}) == 4
    own = [*loop.voters(Sampler(temperature=0.2, top_k=5, seed=1), PROMPT)]
    assert {(s.temperature, s.top_k) for s in own} == {(0.2, 5)}
    assert {s.seed for s in own}.isdisjoint(s.seed for s in greedy)
    other = [*loop.voters(Sampler(), PROMPT[1:])]
    assert {s.seed for s in other}.isdisjoint(s.seed for s in greedy), "votes of another prompt"


def test_bad_options_are_refused():
    for options, words in (
        ({"votes": 0}, "votes must be an integer, at least 1; got 0"),
        ({"temperature": 0.0}, "temperature must be a number, above 0; got 0.0"),
    ):
        with pytest.raises(MinitxError, match=f"majority_vote: {words}"):
            apply(tiny_lm(), {"majority_vote": options})
    with pytest.raises(MinitxError, match="same=sentence needs a tokenizer"):
        apply(LM(tiny_model()), {"majority_vote": {"same": "sentence"}})


# What voters can do ------------------------------------------------------------------------------


def test_majority_of_independent_voters_by_hand():
    """n = 3: .7^3 + 3 (.7^2)(.3) = .343 + .441 = .784."""
    assert majority_accuracy(0.7, 3) == pytest.approx(0.784)
    assert majority_accuracy(0.7, 5) == pytest.approx(0.83692)
    assert majority_accuracy(0.7, 9) == pytest.approx(0.90119, abs=5e-6)
    assert majority_accuracy(0.4, 3) == pytest.approx(0.352), "below one half, voting hurts"
    assert majority_accuracy(0.4, 5) == pytest.approx(0.31744)
    for copying, expected in ((0.0, 0.837), (0.5, 0.768), (1.0, 0.7)):
        assert majority_accuracy(0.7, 5, copying) == pytest.approx(expected, abs=5e-4)


def test_vote_is_better_than_a_random_vote_and_no_better_than_greedy_on_stories():
    """One-word answers of stories-draft, in ten stories: their most likely answer is the greedy one
    already."""
    lm = minitx.load("stories-draft")
    questions = held_out_questions(lm, 10)

    def accuracy(**options):
        changed = apply(lm, {"majority_vote": {"votes": 9, "temperature": 1.0} | options})
        return answer(changed, questions).accuracy

    greedy, voted, drawn = answer(lm, questions).accuracy, accuracy(), accuracy(choose="random")
    assert drawn < voted, "the majority is right more often than one of its voters"
    assert abs(voted - greedy) < 0.12, "the vote comes back to the greedy answer"
