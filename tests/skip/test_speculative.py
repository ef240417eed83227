"""Speculative decoding must sample from the target model's distribution, to the last digit.

Every random choice of the loop is a draw of its sampler, so ``exact_distribution`` can follow each
possible outcome of the real loop and weigh it. The result is compared with the target model itself
and with the literal version.
"""

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction

import literal_speculative as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
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
    Proposal,
    Speculative,
    accept_or_resample,
    continuation,
    multiply_adds,
    residual_distribution,
    speculative,
    speedup,
    tokens_per_round,
    verify,
)
from minitx.state import State
from minitx.technique import apply, decides, techniques
from minitx.tree import Part, part

PROMPT = [5, 1, 2, 3, 9, 8, 1, 2, 3]

# The worked example ------------------------------------------------------------------------------
#
#                       token 0   token 1   token 2
#     target p            0.5       0.3       0.2
#     draft q             0.2       0.5       0.3
#     min(p, q)           0.2       0.3       0.2     sum 0.7: the acceptance rate
#     max(0, p - q)       0.3       0         0       normalized: the residual [1, 0, 0]
#
# Token 0 is proposed with probability 0.2 and always accepted (0.5 / 0.2 > 1); token 1 is accepted
# with probability 0.3 / 0.5, token 2 with 0.2 / 0.3. The other 0.3 are rejections: token 0.
# Emitted: 0.2 + 0.3 = 0.5,  0.5 * 0.6 = 0.3,  0.3 * 2/3 = 0.2, which is p.

P, Q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.5, 0.3])


def propose_and_verify(sampler):
    """(draft token, emitted token)."""
    x = sampler.draw(Q)
    return x, accept_or_resample(P, Q, x, sampler)


def emitted(run):
    """The distribution (3,) of the second of the two."""
    found = np.zeros(3)
    for (_, token), share in exact_distribution(run).items():
        found[token] += share
    return found


def test_accept_or_resample_emits_the_target_distribution():
    np.testing.assert_allclose(emitted(propose_and_verify), P)
    for x in range(3):  # a draft that always proposes x
        one_hot = np.eye(3)[x]
        found = exact_distribution(lambda s, x=x, q=one_hot: accept_or_resample(P, q, x, s))
        assert [found[i] for i in range(3)] == pytest.approx(P)


def test_acceptance_rate_is_the_overlap_of_p_and_q():
    both = exact_distribution(propose_and_verify)
    accepted = sum(share for (x, token), share in both.items() if x == token)
    assert accepted == pytest.approx(0.7), "sum of min(p, q)"
    assert {token for x, token in both if x != token} == {0}, "the residual is [1, 0, 0]"


def test_residual_distribution_is_the_normalized_excess():
    np.testing.assert_allclose(residual_distribution(P, Q), [1, 0, 0])
    np.testing.assert_allclose(residual_distribution(Q, P), [0, 2 / 3, 1 / 3])
    one_hot = np.array([0, 1, 0])
    np.testing.assert_allclose(residual_distribution(P, one_hot), [5 / 7, 0, 2 / 7])


def test_residual_distribution_of_equal_distributions_is_p():
    np.testing.assert_array_equal(residual_distribution(P, P), P)
    certain = np.array([1.0, 0, 0])
    np.testing.assert_array_equal(residual_distribution(certain, certain), certain)


def test_two_common_bugs_change_the_distribution(monkeypatch):
    """So the tests above can fail. Bug 1: the draft decodes greedily, but its token is verified
    with the softmax q. Bug 2: a rejected token is resampled from p instead of the residual."""
    greedy = exact_distribution(lambda s: accept_or_resample(P, Q, int(Q.argmax()), s))
    assert [greedy[i] for i in range(3)] == pytest.approx([0.4, 0.6, 0])
    monkeypatch.setattr(module, "residual_distribution", lambda p, q: p)
    np.testing.assert_allclose(emitted(propose_and_verify), [0.35, 0.39, 0.26])


def test_token_with_target_probability_zero_is_never_accepted():
    p, q = np.array([0.5, 0, 0.5]), np.array([0.1, 0.8, 0.1])
    for number in (0.0, 1 - 2**-53):  # the smallest and the largest that uniform() may return
        sampler = Sampler(temperature=1.0)
        sampler.uniform = lambda number=number: number
        assert accept_or_resample(p, q, 1, sampler) != 1
        assert accept_or_resample(p, np.array([0.0, 1, 0]), 1, sampler) != 1


def test_greedy_shortcut_is_the_rule_for_one_hot_distributions():
    """In ``verify``, temperature 0 does not go through accept_or_resample, but gives the same."""
    rng, sampler = np.random.default_rng(0), Sampler()
    for _ in range(50):
        logits = rng.standard_normal((2, 4))
        p, x = sampler.probabilities(logits[0]), int(rng.integers(4))
        q = np.eye(4)[x]
        found = verify(logits, [Proposal(x, q)], sampler)
        assert found[0] == accept_or_resample(p, q, x, sampler) == logits[0].argmax()
        assert len(found) == (2 if found[0] == x else 1)


# Sequences: Markov models, by enumeration --------------------------------------------------------


class NotedState(State):
    """A state that notes the ids, so that a Markov model can look them up."""

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
    """A model in which the next token depends on the last two: ``w[a, b]`` (V,) are the
    probabilities after tokens a, b."""

    w: np.ndarray
    config: Shape = field(default_factory=Shape)

    def new_state(self):
        return NotedState()

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

    def fractions(self, text):
        """The same as exact fractions, whose sum is exactly 1."""
        row = [Fraction(share) for share in self.after(text)]
        return [share / sum(row) for share in row]

    def distribution(self, text, n):
        """{n tokens after the text: probability}"""
        found = {(): 1.0}
        for _ in range(n):
            found = {
                (*new, token): share * p
                for new, share in found.items()
                for token, p in enumerate(self.after((*text, *new)))
            }
        return found


def markov(seed, sharpness=1.0):
    return Markov(np.random.default_rng(seed).dirichlet([sharpness] * 3, (3, 3)))


def constant(p):
    """A model that gives the same probabilities after every text."""
    return Markov(np.broadcast_to(np.array(p), (3, 3, 3)))


def decoded(target, draft, gamma, n, text=(1, 2)):
    """{n tokens: probability} of the real loop."""
    loop = Speculative(DraftModel(draft), gamma)
    return exact_distribution(lambda sampler: tuple(decode(loop, target, text, sampler, n)))


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_round_equals_the_literal_version(gamma):
    """Not only which tokens, but also how many a round gives, and so how many were accepted."""
    p, q = markov(2), markov(3, 0.5)

    def one_round(sampler):
        tokens = decode(Speculative(DraftModel(q), gamma), p, [2, 0], sampler, 99)
        with ledger.counting(q) as counts:
            first = next(tokens)
            more = counts.events["draft tokens accepted"]
            return first, *(next(tokens) for _ in range(more))

    expected = literal.round_distribution(p.fractions, q.fractions, gamma, (2, 0))
    assert sum(expected.values()) == 1
    assert {len(tokens) for tokens in expected} == set(range(1, gamma + 2))
    assert total_variation(exact_distribution(one_round), expected) < 1e-14, "the real loop"

    def literal_round(sampler):
        def draw(p):
            return sampler.draw(np.array(p, float))

        return literal.one_round(p.fractions, q.fractions, gamma, (2, 0), draw)

    found = exact_distribution(literal_round)
    assert total_variation(found, expected) < 1e-14, "the literal loop"


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_sequence_distribution_is_the_targets(gamma, monkeypatch):
    p, q = markov(0), markov(1)
    expected = p.distribution((1, 2), 3)
    assert total_variation(decoded(p, q, gamma, 3), expected) < 1e-14, "another draft"
    assert total_variation(decoded(p, p, gamma, 3), expected) < 1e-14, "draft = target"
    monkeypatch.setattr(module, "residual_distribution", lambda p, q: p)
    assert total_variation(decoded(p, q, gamma, 3), expected) > 0.05, "the test can fail"


@pytest.mark.parametrize(
    "family, draft, options",
    [
        ("llama", "another", dict(temperature=1.0)),
        ("gpt2", "another", dict(temperature=0.6, top_k=2)),
        ("gpt_neox", "another", dict(temperature=1.3, top_p=0.8)),
        ("llama", "self", dict(temperature=0.6, top_k=2)),
        ("gpt2", "lookup", dict(temperature=1.0)),
    ],
    ids=str,
)
def test_transformer_sequence_distribution_is_the_targets(family, draft, options):
    """Three tokens from a vocabulary of three, against the model's own probabilities."""
    model = tiny_model(family, vocab_size=3, bos=None, eos=(), dtype=np.float64)
    chosen = {
        "another": DraftModel(tiny_model("llama", seed=5, vocab_size=3, bos=None, eos=())),
        "self": DraftModel(module.first_half(model)),
        "lookup": PromptLookup(3),
    }[draft]
    prompt = [1, 2, 0, 1]
    expected = model_distribution(model, prompt, 3, **options)
    proposed = 0

    def run(sampler):
        nonlocal proposed
        with ledger.counting(chosen) as counts:
            new = tuple(decode(Speculative(chosen, 2), model, prompt, sampler, 3))
        proposed += counts.events["draft tokens proposed"]
        return new

    assert total_variation(exact_distribution(run, **options), expected) < 1e-9
    assert proposed


# Sequences: the real sampler, by statistics ------------------------------------------------------


def chi_square_p(counts, expected, n):
    """p-value of the counts (Wilson and Hilferty's approximation); rare cells are pooled."""
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


def test_sampled_frequencies_pass_a_chi_square_test(monkeypatch):
    """What enumeration leaves out: the random numbers themselves, and their order."""
    p, q, n = markov(4), markov(5), 1200
    expected, loop = p.distribution((1, 2), 3), Speculative(DraftModel(q), 2)

    def counted():
        sampler = Sampler(temperature=1.0, seed=0)
        return Counter(tuple(decode(loop, p, (1, 2), sampler, 3)) for _ in range(n))

    assert chi_square_p(counted(), expected, n) > 1e-4
    monkeypatch.setattr(module, "residual_distribution", lambda p, q: p)
    assert chi_square_p(counted(), expected, n) < 1e-4, "the test can fail"


def test_measured_acceptance_rate_is_the_mean_overlap():
    """alpha over the contexts that were verified, within four standard errors."""
    p, q, overlaps, accepted = markov(6), markov(7), [], []

    def spy(p, q, x, sampler, real=accept_or_resample):
        token = real(p, q, x, sampler)
        overlaps.append(np.minimum(p, q).sum())
        accepted.append(token == x)
        return token

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "accept_or_resample", spy)
        sampler = Sampler(temperature=1.0, seed=1)
        list(decode(Speculative(DraftModel(q), 3), p, [1, 2], sampler, 2000))
    error = math.sqrt(sum(b * (1 - b) for b in overlaps)) / len(overlaps)
    assert abs(np.mean(accepted) - np.mean(overlaps)) < 4 * error
    assert 0.2 < np.mean(accepted) < 0.95


# Greedy decoding ---------------------------------------------------------------------------------


@part
class Scripted(Part):
    """A greedy draft that proposes what a function of the text returns; None ends its proposals."""

    next: object
    vocab_size: int = 259

    def new_state(self):
        return State(0, 0)

    def propose(self, text, gamma, sampler, state):
        x = []
        while len(x) < gamma and (token := self.next(text + x)) is not None:
            x.append(token)
        return [Proposal(token, np.eye(1, self.vocab_size, token)[0]) for token in x]


@pytest.mark.parametrize("gamma", [1, 2, 4, 7])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_does_not_depend_on_the_draft(family, gamma):
    lm = tiny_lm(family, dtype=np.float64)
    truth = PROMPT + lm.generate(PROMPT, 30)
    rng = np.random.default_rng(0)
    all_accepted = -(-30 // (gamma + 1))
    drafts = [  # each with the number of target passes, where that is certain
        (Scripted(lambda t: truth[len(t)]), all_accepted),
        (Scripted(lambda t: (truth[len(t)] + 1) % 259), 30),  # always wrong
        (Scripted(lambda t: None), 30),
        (Scripted(lambda t: truth[len(t)] if rng.random() < 0.7 else 7), None),
        (Scripted(lambda t: truth[len(t)] if len(t) % 3 else None), None),
        (DraftModel(module.first_half(lm.model)), None),
        (DraftModel(lm.model), all_accepted),
        (PromptLookup(259), None),
    ]
    for draft, passes in drafts:
        changed = replace(lm, decode=Speculative(draft, gamma))
        with ledger.counting(changed) as counts:
            assert changed.generate(PROMPT, 30) == truth[len(PROMPT) :]
        events = counts.events
        assert events["draft tokens accepted"] + events["target passes"] == 30
        assert passes is None or events["target passes"] == passes


def test_greedy_rounds_equal_the_literal_version():
    lm, other = tiny_lm(dtype=np.float64), tiny_model(seed=1, dtype=np.float32, layers=1)

    def argmax(model):
        return lambda text: int(model(text)[-1].argmax())

    for gamma in (1, 3, 5):
        expected, rounds = literal.greedy(argmax(lm.model), argmax(other), gamma, PROMPT, 20)
        changed = replace(lm, decode=Speculative(DraftModel(other), gamma))
        with ledger.counting(changed) as counts:
            assert changed.generate(PROMPT, 20) == expected
        assert counts.events["target passes"] == rounds


def test_stories_tells_the_same_text_with_its_shipped_draft():
    dense = minitx.load("stories", dtype=np.float64)
    changed = apply(dense, {"speculative": True})
    with ledger.counting(changed) as counts:
        assert changed.generate("One day", 40) == dense.generate("One day", 40)
    assert counts.events["draft tokens accepted"] > 0


# KV caches ---------------------------------------------------------------------------------------


@part
class Watched(Part):
    """A draft that looks at the target's state at the beginning of every round."""

    draft: Part
    states: list
    look: object

    def new_state(self):
        return self.draft.new_state()

    def propose(self, text, gamma, sampler, state):
        self.look(text, self.states[-1], state)
        return self.draft.propose(text, gamma, sampler, state)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_every_token_except_the_last_between_rounds(family, monkeypatch):
    lm, states, seen = tiny_lm(family, dtype=np.float64), [], []
    new_state = type(lm.model).new_state
    monkeypatch.setattr(
        type(lm.model), "new_state", lambda *a: states.append(new_state(*a)) or states[-1]
    )

    def look(text, state, draft_state):
        fresh = new_state(lm.model)
        lm.model(text[:-1], fresh)
        assert state.position == len(text) - 1 and draft_state.position < len(text)
        for kept, new in zip(state.layers, fresh.layers):
            n = new.count
            assert kept.count == n == len(text) - 1
            np.testing.assert_allclose(kept.keys[..., :n, :], new.keys[..., :n, :], atol=1e-10)
            np.testing.assert_allclose(kept.values[..., :n, :], new.values[..., :n, :], atol=1e-10)
        seen.append(len(text))

    draft = Scripted(lambda text: (text[-1] * 3 + len(text)) % 259 if len(text) % 4 else text[-1])
    tokens = decode(Speculative(Watched(draft, states, look), 3), lm.model, PROMPT, Sampler(), 20)
    assert len(list(tokens)) == 20 and len(seen) > 5


# Where decoding ends -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3}], ids=str)
def test_decoding_stops_at_the_limit_and_at_the_end_of_the_context(options):
    lm = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    whole = lm.generate(PROMPT, **options)
    assert len(whole) == lm.model.config.context - len(PROMPT)
    for limit in range(7):
        found = lm.generate(PROMPT, limit, **options)
        # The last round proposes fewer tokens, so samples may differ there; greedy text may not.
        assert len(found) == limit and (options or found == whole[:limit])
    full = [1] * lm.model.config.context
    assert lm.generate(full, **options) == [] and len(lm.generate(full[:-1], **options)) == 1
    assert len(lm.generate([3], 5, **options)) == 5


def test_draft_with_a_shorter_context_proposes_while_it_can():
    lm = tiny_lm(dtype=np.float64)
    changed = replace(lm, decode=Speculative(DraftModel(tiny_model(seed=1, context=20)), 4))
    with ledger.counting(changed) as counts:
        assert changed.generate(PROMPT, 30) == lm.generate(PROMPT, 30)
    assert counts.events["draft tokens proposed"]
    draft = changed.decode.draft
    for length, expected in ((16, 4), (18, 3), (20, 1), (21, 0), (40, 0)):
        found = draft.propose([1] * length, 4, Sampler(), draft.new_state())
        assert len(found) == expected, f"{length} tokens before a context of 20 ends"


def test_text_may_end_within_accepted_tokens():
    lm = tiny_lm(dtype=np.float64)
    truth = lm.generate(PROMPT, 20)
    end = next(i for i in range(1, 20) if i % 5 not in (0, 4) and truth[i] not in truth[:i])
    model = tiny_model(dtype=np.float64, eos=(truth[end],))
    draft = Scripted(lambda text: (PROMPT + truth)[len(text)])
    changed = LM(model, decode=Speculative(draft, 4))
    assert changed.generate(PROMPT, 20) == truth[:end] == LM(model).generate(PROMPT, 20)


# Seeds and batches -------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", ["self", "lookup"])
def test_seed_repeats_a_sample_and_batch_rows_equal_single_runs(draft):
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


def test_prompt_lookup_by_hand():
    assert continuation([5, 1, 2, 3, 9, 8, 1, 2, 3], 3, 4) == [9, 8, 1, 2]
    assert continuation([1, 2, 3, 4], 3, 4) == [], "nothing occurs twice"
    assert continuation([7, 7, 7], 3, 4) == [7], "the last tokens do not match themselves"
    assert continuation([1, 2, 8, 2, 9, 1, 2], 3, 2) == [8, 2], "two tokens, before a later single"
    assert continuation([4, 5, 4, 6, 4], 3, 9) == [6, 4], "the latest occurrence"
    assert continuation([4], 3, 4) == continuation([4, 4], 3, 0) == []


def test_prompt_lookup_equals_the_literal_version():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = rng.integers(0, rng.integers(2, 6), rng.integers(1, 20)).tolist()
        longest, limit = int(rng.integers(1, 5)), int(rng.integers(0, 6))
        expected = literal.prompt_lookup(text, longest, limit)
        assert continuation(text, longest, limit) == expected


def test_prompt_lookup_proposals_have_one_hot_distributions():
    found = PromptLookup(10).propose(PROMPT, 4, Sampler(temperature=1.0), State(0, 0))
    assert [x for x, _ in found] == [9, 8, 1, 2]
    np.testing.assert_array_equal([q for _, q in found], np.eye(10)[[9, 8, 1, 2]])


# Which draft -------------------------------------------------------------------------------------


def test_gamma_0_changes_nothing_and_loads_no_draft():
    lm = tiny_lm()
    assert speculative(lm, draft="./nowhere", gamma=0) is lm


def test_draft_is_a_part_of_the_tree():
    lm = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    drawn = repr(lm.decode)
    assert drawn.startswith("Speculative(gamma=4)\n  draft: DraftModel\n    model: Transformer")
    assert len(lm.decode.draft.model.stack.blocks) == 1 and len(lm.model.stack.blocks) == 2
    assert lm.decode.draft.model.stack.blocks[0] is lm.model.stack.blocks[0], "weights are shared"
    assert repr(apply(tiny_lm(), {"speculative": {"draft": "lookup"}}).decode) == (
        "Speculative(gamma=4)\n  draft: PromptLookup(vocab_size=259, longest=3)"
    )


def test_draft_auto_is_the_shipped_draft_if_its_vocabulary_fits(monkeypatch, tmp_path):
    lm = minitx.load("stories", speculative=True)
    assert type(lm.decode.draft) is DraftModel
    assert lm.decode.draft.model.config == minitx.load("stories-draft").model.config
    assert type(apply(tiny_lm(), {"speculative": True}).decode.draft) is PromptLookup
    assert type(apply(tiny_lm(tokenizer=None), {"speculative": True}).decode.draft) is PromptLookup
    stories = minitx.load("stories")
    monkeypatch.setattr(find, "SHIPPED", [tmp_path])
    assert type(apply(stories, {"speculative": True}).decode.draft) is PromptLookup


@pytest.mark.filterwarnings("ignore:speculative.*use a smaller draft")  # as large as the target
def test_draft_may_be_a_folder(tmp_path):
    tiny_folder(tmp_path / "toy")
    lm = apply(tiny_lm(), {"speculative": {"draft": str(tmp_path / "toy")}})
    assert lm.generate("Once", 20) == tiny_lm().generate("Once", 20)
    bare = apply(tiny_lm(tokenizer=None), {"speculative": {"draft": str(tmp_path / "toy")}})
    assert bare.generate(PROMPT, 20) == tiny_lm().generate(PROMPT, 20)


@pytest.mark.parametrize(
    "lm, options, words",
    [
        (tiny_lm, {"gamma": -1}, ": gamma must be an integer, at least 0; got -1."),
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
def test_bad_options_are_refused(lm, options, words):
    with pytest.raises(MinitxError) as caught:
        apply(lm(), {"speculative": options})
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith("speculative")


@part
class OtherStack(Part):
    stack: Part

    @property
    def blocks(self):
        return self.stack.blocks

    def __call__(self, x, state):
        return self.stack(x, state)


def test_draft_self_needs_a_plain_stack():
    lm = tiny_lm()
    lm = replace(lm, model=replace(lm.model, stack=OtherStack(lm.model.stack)))
    with pytest.raises(MinitxError, match="speculative needs a part of type Stack"):
        apply(lm, {"speculative": {"draft": "self"}})
    assert apply(lm, {"speculative": True}).generate(PROMPT, 9) == tiny_lm().generate(PROMPT, 9)


# Cost --------------------------------------------------------------------------------------------


def test_cost_formula_by_hand():
    assert tokens_per_round(0.8, 4) == pytest.approx(3.3616)
    assert tokens_per_round(1, 4) == 5 and tokens_per_round(0, 4) == tokens_per_round(0.5, 0) == 1
    assert speedup(0.8, 4, 0.05) == pytest.approx(2.801, abs=5e-4)
    assert speedup(0.8, 4, 0.25) == pytest.approx(1.681, abs=5e-4)
    assert speedup(0.8, 4, 0.25, v=2) == pytest.approx(3.3616 / 3)
    assert multiply_adds(0.8, 4, 0.05) == pytest.approx(5.2 / 3.3616)
    assert multiply_adds(0.3, 0, 0.05) == 1
    for alpha in (0.3, 0.9):
        closed_form = (1 - alpha**7) / (1 - alpha)
        assert tokens_per_round(alpha, 6) == pytest.approx(closed_form)


@pytest.mark.parametrize(
    "c, best",
    [
        (0.05, [(0.5, 3, 1.630), (0.7, 6, 2.353), (0.8, 8, 3.092), (0.9, 13, 4.674)]),
        (0.5, [(0.5, 1, 1.000), (0.7, 1, 1.133), (0.8, 2, 1.220), (0.9, 3, 1.376)]),
    ],
)
def test_best_gamma_grows_with_the_acceptance_rate(c, best):
    for alpha, gamma, gain in best:
        gains = [speedup(alpha, g, c) for g in range(1, 30)]
        assert max(gains) == pytest.approx(gain, abs=5e-4)
        assert gains[gamma - 1] == pytest.approx(max(gains))


@pytest.mark.parametrize("gamma", [1, 2, 3, 4])
def test_counted_tokens_per_round_equal_the_formula(gamma):
    """The formula is exact where p and q do not depend on the text."""
    loop = Speculative(DraftModel(constant(Q)), gamma)

    def tokens(sampler):
        with ledger.counting(loop) as counts:
            next(decode(loop, constant(P), [1, 2], sampler, 99))
        return counts.events["draft tokens accepted"] + 1

    found = sum(n * share for n, share in exact_distribution(tokens).items())
    alpha = np.minimum(P, Q).sum()
    assert found == pytest.approx(tokens_per_round(alpha, gamma))


def test_counted_work_follows_from_proposals_and_target_passes():
    """Each token that is run takes its multiply-adds; each pass reads the head's weights once."""
    lm, small = tiny_lm(), tiny_model("llama", seed=9, layers=1, width=8, hidden=8)
    changed = replace(lm, decode=Speculative(DraftModel(small), 3))
    with ledger.counting(changed) as counts:
        changed.generate(PROMPT, 25)
    proposed = counts.events["draft tokens proposed"]
    passes = counts.events["target passes"]
    head, ffn = counts.total("model.head"), counts.total("model.stack.blocks.0.ffn")
    assert head.multiply_adds == 259 * 16 * (proposed + passes)
    assert head.weight_bytes == 4 * 259 * 16 * passes
    assert ffn.multiply_adds == 3 * 16 * 24 * (len(PROMPT) - 1 + proposed + passes)
    draft_head = counts.total("decode.draft.model.head")
    assert draft_head.multiply_adds == 259 * 8 * proposed
    assert proposed > passes > 0


# Together with other techniques ------------------------------------------------------------------


@pytest.mark.parametrize("technique", techniques(), ids=lambda t: t.name)
@pytest.mark.parametrize("draft", ["self", "lookup"])
@pytest.mark.filterwarnings("ignore:speculative.*use a smaller draft")  # with half of the layers
@pytest.mark.filterwarnings("ignore:.*no shipped model shares the vocabulary")
def test_another_technique_in_the_target_keeps_its_text(technique, draft):
    """Also an approximate one, if it decides per token and can be rewound. In the first family that
    has both, beginning with another one from technique to technique."""
    if technique.name == "speculative":
        return
    options = {"stories": 2} if "stories" in technique.options else {}
    families, start = list(FAMILIES), len(technique.name) % len(FAMILIES)
    for family in families[start:] + families[:start]:
        try:
            alone = apply(tiny_lm(family, dtype=np.float64), {technique.name: options})
            both = apply(alone, {"speculative": {"draft": draft, "gamma": 3}})
        except MinitxError:
            continue
        if decides(alone.model) != "token":  # it decides otherwise for several tokens at once
            continue
        assert both.generate(PROMPT, 30) == alone.generate(PROMPT, 30)
        return


@pytest.mark.parametrize("other", ["prefix_cache", "padding_skip", "speculative"])
def test_decoding_loop_that_is_there_is_not_dropped_silently(other):
    lm = apply(tiny_lm(), {other: {"draft": "lookup"} if other == "speculative" else True})
    with pytest.raises(MinitxError, match=f"already has that of {other}; apply both at once"):
        apply(lm, {"speculative": {"draft": "lookup"}})
