"""Speculative decoding: what it emits has the model's own distribution, to the last digit.

Everything random is one of ``choose``'s draws, so ``Every`` can take each possible way through the
real loop and weigh it. What is found is compared with the model itself and with a literal twin.
"""

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction

import literal_speculative as literal
import numpy as np
import pytest
from enumeration import distance, law, law_of_model
from tiny import decode, tiny_lm, tiny_model

from minitx import ledger
from minitx.decode import Sampler
from minitx.skip import speculative as module
from minitx.skip.speculative import (
    DraftModel,
    PromptLookup,
    Speculative,
    agreed,
    operations,
    speedup,
    tokens_per_round,
)
from minitx.state import State
from minitx.tree import Part

P, Q = [0.5, 0.3, 0.2], [0.2, 0.5, 0.3]
PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]


# Models in which the next token depends on the last two, by a table ------------------------------


class Visible(State):
    """A state that notes the ids, so that a table can be looked up."""

    def __init__(self):
        super().__init__(0, 10**6)
        self.ids = []

    def rewind(self, position):
        super().rewind(position)
        del self.ids[position:]


@dataclass
class Shape:
    vocab_size: int = 3
    context: int = 10**6


@dataclass(eq=False)
class Markov(Part):
    """``w[a, b]`` (V,) are the probabilities after the tokens a, b."""

    w: np.ndarray
    config: Shape = field(default_factory=Shape)

    def new_state(self):
        return Visible()

    def hidden(self, ids, state):
        state.ids += list(ids)
        state.position += len(ids)

    def __call__(self, ids, state):
        assert state.position == len(state.ids)
        self.hidden(ids, state)
        n = len(state.ids)
        pairs = [state.ids[max(i - 2, 0) : i] for i in range(n - len(ids) + 1, n + 1)]
        return np.log(np.stack([self.after(pair) for pair in pairs]))

    def next_logits(self, ids, state):
        return self(ids, state)[-1]

    def after(self, text):
        a, b = (0, *text)[-2:]
        return self.w[a, b]

    def law(self, text, n):
        found = {(): 1.0}
        for _ in range(n):
            longer = {}
            for new, share in found.items():
                for token, p in enumerate(self.after((*text, *new))):
                    longer[(*new, token)] = share * p
            found = longer
        return found


def markov(seed, sharpness=1.0):
    return Markov(np.random.default_rng(seed).dirichlet([sharpness] * 3, (3, 3)))


def constant(p):
    """The same probabilities after everything."""
    return Markov(np.broadcast_to(np.array(p), (3, 3, 3)))


def emitted(target, draft, gamma, n, text=(1, 2), **options):
    loop = Speculative(DraftModel(draft), gamma)
    return law(lambda choose: tuple(decode(loop, target, text, choose, n)), **options)


# The rule ----------------------------------------------------------------------------------------


def one_token(q, choose):
    """(x, emitted) for x ~ Q, checked as if it had been drawn from q."""
    x = choose.draw(np.array(Q))
    return x, agreed(np.log(P), x, q, choose)


def emitted_once(run):
    found = defaultdict(float)
    for (_, token), share in law(run).items():
        found[token] += share
    return [found[i] for i in range(3)]


def test_the_worked_example():
    both = law(lambda choose: one_token(np.array(Q), choose))
    accepted = sum(share for (x, token), share in both.items() if x == token)
    assert accepted == pytest.approx(0.7)  # beta
    assert {token for x, token in both if x != token} == {0}  # the residual is [1, 0, 0]
    assert emitted_once(lambda c: one_token(np.array(Q), c)) == pytest.approx(P)
    for x in range(3):  # a draft that is certain of x, whatever x is
        found = law(lambda c, x=x: agreed(np.log(P), x, None, c))
        assert [found[i] for i in range(3)] == pytest.approx(P)


def test_the_worked_example_of_two_broken_rules(monkeypatch):
    """So that the test above is known to be able to fail."""
    greedy = law(lambda c: agreed(np.log(P), 1, np.array(Q), c))  # argmax Q, scored as if drawn
    assert [greedy[i] for i in range(3)] == pytest.approx([0.4, 0.6, 0])
    monkeypatch.setattr(module, "beyond", lambda p, x, q: p)  # replaced from p, not from the rest
    assert emitted_once(lambda c: one_token(np.array(Q), c)) == pytest.approx([0.35, 0.39, 0.26])


def test_a_token_that_the_model_excludes_is_never_accepted():
    logits = np.array([0.0, -np.inf, 0.0])
    for number in (0.0, 1 - 2**-53):  # the least and the largest that uniform() may give
        choose = Sampler(temperature=1.0)
        choose.uniform = lambda number=number: number
        for q in (None, np.array([0.1, 0.8, 0.1])):
            assert agreed(logits, 1, q, choose) != 1


def test_equal_distributions_leave_no_rest_and_that_is_no_error():
    p = np.array(P)
    np.testing.assert_array_equal(module.beyond(p, 0, p), p)
    np.testing.assert_array_equal(module.beyond(np.array([1.0, 0, 0]), 0, None), [1, 0, 0])
    np.testing.assert_allclose(module.beyond(p, 0, np.array(Q)), [0.3, 0, 0])


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_every_sequence_has_the_probability_that_the_model_gives_it(gamma, monkeypatch):
    p, q = markov(0), markov(1)
    expected = p.law((1, 2), 3)
    assert distance(emitted(p, q, gamma, 3), expected) < 1e-14
    assert distance(emitted(p, p, gamma, 3), expected) < 1e-14
    monkeypatch.setattr(module, "beyond", lambda p, x, q: p)
    assert distance(emitted(p, q, gamma, 3), expected) > 0.05


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_a_round_is_that_of_the_literal_twin(gamma):
    """Not only the tokens: also how many one round gives, and so how many were accepted."""
    p, q = markov(2), markov(3, 0.5)

    def one_round(choose):
        tokens = decode(Speculative(DraftModel(q), gamma), p, [2, 0], choose, 99)
        with ledger.counting(q) as counts:
            first = next(tokens)
            return first, *(next(tokens) for _ in range(counts.events["tokens accepted"]))

    def exactly(model):
        def after(text):
            row = [Fraction(share) for share in model.after(text)]
            return [share / sum(row) for share in row]

        return after

    twin = literal.law_of_round(exactly(p), exactly(q), gamma, (2, 0))
    assert sum(twin.values()) == 1
    assert {len(tokens) for tokens in twin} == set(range(1, gamma + 2))
    assert distance(law(one_round), twin) < 1e-14


WARPED = [
    dict(temperature=1.0),
    dict(temperature=0.6, top_k=2),
    dict(temperature=1.3, top_p=0.8),
]


@pytest.mark.parametrize(
    "family, draft, options",
    [
        ("llama", "another", WARPED[0]),
        ("gpt2", "another", WARPED[1]),
        ("gpt_neox", "another", WARPED[2]),
        ("llama", "self", WARPED[1]),
        ("gpt2", "lookup", WARPED[0]),
    ],
    ids=str,
)
def test_every_sequence_of_a_transformer(family, draft, options):
    """Three tokens of a vocabulary of three, against the model's own probabilities."""
    model = tiny_model(family, vocab_size=3, bos=None, eos=(), dtype=np.float64)
    part = {
        "another": DraftModel(tiny_model("llama", seed=5, vocab_size=3, bos=None, eos=())),
        "self": DraftModel(module.first_half(model)),
        "lookup": PromptLookup(),
    }[draft]
    prompt = [1, 2, 0, 1]
    expected = law_of_model(model, prompt, 3, **options)
    drafted = 0

    def run(choose):
        nonlocal drafted
        with ledger.counting(part) as counts:
            new = tuple(decode(Speculative(part, 2), model, prompt, choose, 3))
        drafted += counts.events["tokens drafted"]
        return new

    assert distance(law(run, **options), expected) < 1e-9
    assert drafted


def chi_square_p(counts, expected, n):
    """p-value of the counts, by Wilson and Hilferty; cells with few expected are pooled."""
    cells, rest = [], [0.0, 0.0]
    for key, share in expected.items():
        cell = (counts[key], n * share)
        if cell[1] < 5:
            rest = [a + b for a, b in zip(rest, cell)]
        else:
            cells.append(cell)
    cells += [tuple(rest)] if rest[1] else []
    chi2, df = sum((o - e) ** 2 / e for o, e in cells), len(cells) - 1
    z = ((chi2 / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df))
    return math.erfc(z / math.sqrt(2)) / 2


def test_the_frequencies_with_the_real_sampler(monkeypatch):
    """What enumeration leaves out: the random numbers themselves, and their order."""
    p, q, n = markov(4), markov(5), 1200
    expected, loop = p.law((1, 2), 3), Speculative(DraftModel(q), 2)

    def counted():
        choose = Sampler(temperature=1.0, seed=0)
        return Counter(tuple(decode(loop, p, (1, 2), choose, 3)) for _ in range(n))

    assert chi_square_p(counted(), expected, n) > 1e-4
    monkeypatch.setattr(module, "beyond", lambda p, x, q: p)
    assert chi_square_p(counted(), expected, n) < 1e-4


# Figures -----------------------------------------------------------------------------------------


def test_the_cost_model_by_hand():
    assert tokens_per_round(0.8, 4) == pytest.approx(3.3616)
    assert tokens_per_round(1, 4) == 5 and tokens_per_round(0, 4) == tokens_per_round(0.5, 0) == 1
    assert speedup(0.8, 4, 0.05) == pytest.approx(2.801, abs=5e-4)
    assert speedup(0.8, 4, 0.25) == pytest.approx(1.681, abs=5e-4)
    assert speedup(0.8, 4, 0.25, v=2) == pytest.approx(3.3616 / 3)
    assert operations(0.8, 4, 0.05) == pytest.approx(5.2 / 3.3616)
    assert operations(0.3, 0, 0.05) == 1
    for alpha in (0.3, 0.9):  # the closed form
        assert tokens_per_round(alpha, 6) == pytest.approx((1 - alpha**7) / (1 - alpha))


@pytest.mark.parametrize(
    "c, best",
    [
        (0.05, [(0.5, 3, 1.630), (0.7, 6, 2.353), (0.8, 8, 3.092), (0.9, 13, 4.674)]),
        (0.5, [(0.5, 1, 1.000), (0.7, 1, 1.133), (0.8, 2, 1.220), (0.9, 3, 1.376)]),
    ],
)
def test_the_best_gamma(c, best):
    for alpha, gamma, gain in best:
        gains = [speedup(alpha, g, c) for g in range(1, 30)]
        assert max(gains) == pytest.approx(gain, abs=5e-4)
        assert gains[gamma - 1] == pytest.approx(max(gains))


@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
def test_predicted_tokens_a_round_are_the_counted_ones(gamma):
    """p and q that do not depend on the text are the case for which the formula is exact."""
    loop = Speculative(DraftModel(constant(Q)), gamma)

    def accepted(choose):
        with ledger.counting(loop) as counts:
            next(decode(loop, constant(P), [1, 2], choose, 99))
        return counts.events["tokens accepted"] + 1

    found = sum(n * share for n, share in law(accepted).items())
    alpha = sum(map(min, P, Q))
    assert found == pytest.approx(tokens_per_round(alpha, gamma))


def test_the_acceptance_rate_is_the_overlap_of_the_distributions():
    """alpha, over the contexts that were really checked, within four standard errors."""
    p, q, overlaps, taken = markov(6), markov(7), [], []

    def spy(logits, x, dist, choose, real=agreed):
        token = real(logits, x, dist, choose)
        overlaps.append(np.minimum(choose.probabilities(logits), dist).sum())
        taken.append(token == x)
        return token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "agreed", spy)
        sampler = Sampler(temperature=1.0, seed=1)
        list(decode(Speculative(DraftModel(q), 3), p, [1, 2], sampler, 2000))
    error = math.sqrt(sum(b * (1 - b) for b in overlaps)) / len(overlaps)
    assert abs(np.mean(taken) - np.mean(overlaps)) < 4 * error
    assert 0.2 < np.mean(taken) < 0.95


def test_counted_work_is_the_predicted_work():
    """A product with weights is done once for each token that is run; the head's weights are read
    once for each pass. What the drafts cost follows from how many there were."""
    lm, small = tiny_lm(), tiny_model("llama", seed=9, layers=1, width=8, hidden=8)
    changed = replace(lm, decode=Speculative(DraftModel(small), 3))
    with ledger.counting(changed) as counts:
        changed.generate(PROMPT, 25)
    n = counts.events
    head, ffn = counts.total("model.head"), counts.total("model.stack.blocks.0.ffn")
    checked = n["tokens drafted"] + n["target calls"]
    assert head.multiply_adds == 259 * 16 * checked
    assert head.weight_bytes == 4 * 259 * 16 * n["target calls"]
    assert ffn.multiply_adds == 3 * 16 * 24 * (len(PROMPT) - 1 + checked)
    drafts = counts.total("decode.draft.model.head")
    assert drafts.multiply_adds == 259 * 8 * n["tokens drafted"]
    assert n["tokens drafted"] > n["target calls"] > 0
