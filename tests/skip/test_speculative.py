"""Speculative decoding must sample from the target model's distribution, to the last digit.

Every random choice of the loop is a draw of its sampler, so ``exact_distribution`` can follow each
possible outcome of the real loop and weigh it. The result is compared with the target model itself
and with the literal version.
"""

import math
from collections import Counter
from dataclasses import replace
from functools import cache
from itertools import islice

import literal_speculative as literal
import numpy as np
import pytest
from enumeration import exact_distribution, model_distribution, total_variation
from markov import constant, markov
from same import assert_same
from tiny import FAMILIES, decode, tiny_folder, tiny_lm, tiny_model

import minitx
from minitx import ledger
from minitx.checkpoints import find
from minitx.decode import Sampler
from minitx.errors import MinitxError, MinitxWarning
from minitx.lm import LM
from minitx.second_model import first_half
from minitx.shared import draft_and_verify as module
from minitx.shared.draft_and_verify import (
    Draft,
    Drafting,
    Proposal,
    Speculative,
    accept_or_resample,
    residual_distribution,
    verify,
)
from minitx.shared.draft_length import FixedLength
from minitx.skip.speculative import (
    DraftModel,
    multiply_adds,
    speculative,
    speedup,
    tokens_per_round,
)
from minitx.technique import REGISTRY, apply, decides, techniques
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
    assert_same(emitted(propose_and_verify), P, tolerance=1e-7)
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
    assert_same(residual_distribution(P, Q), [1, 0, 0], tolerance=1e-7)
    assert_same(residual_distribution(Q, P), [0, 2 / 3, 1 / 3], tolerance=1e-7)
    one_hot = np.array([0, 1, 0])
    assert_same(residual_distribution(P, one_hot), [5 / 7, 0, 2 / 7], tolerance=1e-7)


def test_residual_distribution_of_equal_distributions_is_p():
    assert_same(residual_distribution(P, P), P)
    certain = np.array([1.0, 0, 0])
    assert_same(residual_distribution(certain, certain), certain)


def test_two_common_bugs_change_the_distribution(monkeypatch):
    """So the tests above can fail. Bug 1: the draft decodes greedily, but its token is verified
    with the softmax q. Bug 2: a rejected token is resampled from p instead of the residual."""
    greedy = exact_distribution(lambda s: accept_or_resample(P, Q, int(Q.argmax()), s))
    assert [greedy[i] for i in range(3)] == pytest.approx([0.4, 0.6, 0])
    monkeypatch.setattr(module, "residual_distribution", lambda p, q: p)
    assert_same(emitted(propose_and_verify), [0.35, 0.39, 0.26], tolerance=1e-7)


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


def loop(draft, gamma):
    """The decoding loop of the technique, with this draft model."""
    return Speculative(DraftModel(draft), FixedLength(gamma))


def decoded(target, draft, gamma, n, text=(1, 2)):
    """{n tokens: probability} of the real loop."""
    decoding = loop(draft, gamma)
    return exact_distribution(lambda sampler: tuple(decode(decoding, target, text, sampler, n)))


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_round_equals_the_literal_version(gamma):
    """Not only which tokens, but also how many a round gives, and so how many were accepted."""
    p, q = markov(2), markov(3, 0.5)

    def one_round(sampler):
        tokens = decode(loop(q, gamma), p, [2, 0], sampler, 99)
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
    ],
    ids=str,
)
def test_transformer_sequence_distribution_is_the_targets(family, draft, options):
    """Three tokens from a vocabulary of three, against the model's own probabilities."""
    model = tiny_model(family, vocab_size=3, bos=None, eos=(), dtype=np.float64)
    chosen = {
        "another": DraftModel(tiny_model("llama", seed=5, vocab_size=3, bos=None, eos=())),
        "self": DraftModel(first_half(model, "speculative", "draft")),
    }[draft]
    prompt = [1, 2, 0, 1]
    expected = model_distribution(model, prompt, 3, **options)
    proposed = 0

    def run(sampler):
        nonlocal proposed
        with ledger.counting(chosen) as counts:
            new = tuple(decode(Speculative(chosen, FixedLength(2)), model, prompt, sampler, 3))
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
    expected, decoding = p.distribution((1, 2), 3), loop(q, 2)

    def counted():
        sampler = Sampler(temperature=1.0, seed=0)
        return Counter(tuple(decode(decoding, p, (1, 2), sampler, 3)) for _ in range(n))

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
        list(decode(loop(q, 3), p, [1, 2], sampler, 2000))
    error = math.sqrt(sum(b * (1 - b) for b in overlaps)) / len(overlaps)
    assert abs(np.mean(accepted) - np.mean(overlaps)) < 4 * error
    assert 0.2 < np.mean(accepted) < 0.95


# Greedy decoding ---------------------------------------------------------------------------------


@part
class Scripted(Draft):
    """A greedy draft that proposes what a function of the text returns; None ends its proposals.
    ``look`` is called at the beginning of every round with the text and the target's state."""

    next: object
    look: object = None

    def begin(self, model, state):
        return ScriptedDrafting(model, state, self)


class ScriptedDrafting(Drafting):
    def __init__(self, model, state, script):
        super().__init__(model, state)
        self.script = script

    def propose(self, text, sampler):
        if self.script.look:
            self.script.look(text, self.state)
        text = list(text)
        while (token := self.script.next(text)) is not None:
            yield Proposal(token)
            text.append(token)


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
        (DraftModel(first_half(lm.model, "speculative", "draft")), None),
        (DraftModel(lm.model), all_accepted),
    ]
    for draft, passes in drafts:
        changed = replace(lm, decode=Speculative(draft, FixedLength(gamma)))
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
        changed = replace(lm, decode=loop(other, gamma))
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


def assert_cache_equals_prefill(model, state, text):
    """The KV cache holds ``text``, as if it had been read in one pass."""
    fresh = model.new_state()
    model(text, fresh)
    assert state.position == len(text)
    for kept, new in zip(state.layers, fresh.layers):
        n = len(text)
        assert kept.count == new.count == n
        assert_same(kept.keys[..., :n, :], new.keys[..., :n, :], atol=1e-10)
        assert_same(kept.values[..., :n, :], new.values[..., :n, :], atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_every_token_except_the_last_between_rounds(family):
    lm, seen = tiny_lm(family, dtype=np.float64), []

    def look(text, state):
        assert_cache_equals_prefill(lm.model, state, text[:-1])
        seen.append(len(text))

    def next(text):
        return (text[-1] * 3 + len(text)) % 259 if len(text) % 4 else text[-1]

    decoding = Speculative(Scripted(next, look), FixedLength(3))
    assert len(list(decode(decoding, lm.model, PROMPT, Sampler(), 20))) == 20 and len(seen) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_draft_has_read_a_prefix_of_the_text_between_rounds(family):
    """All but the last token, and after a round that accepted every proposal all but two."""
    model, other = tiny_model(family, dtype=np.float64), tiny_model(seed=5, dtype=np.float64)
    lengths = set()
    for draft in (model, other):
        drafting, text = DraftModel(draft).begin(model, model.new_state()), list(PROMPT)
        model(text[:-1], drafting.state)
        for _ in range(5):
            assert drafting.own.position < len(text)
            lengths.add(len(text) - drafting.own.position)
            if drafting.own.position:
                assert_cache_equals_prefill(draft, drafting.own, text[: drafting.own.position])
            found = list(islice(drafting.propose(text, Sampler()), 3))
            logits = drafting.score([text[-1], *(proposal.x for proposal in found)])
            text += verify(logits, found, Sampler())
            drafting.rewind(len(text) - 1)
    assert lengths == {len(PROMPT), 1, 2}


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
    changed = replace(lm, decode=loop(tiny_model(seed=1, context=20), 4))
    with ledger.counting(changed) as counts:
        assert changed.generate(PROMPT, 30) == lm.generate(PROMPT, 30)
    assert counts.events["draft tokens proposed"]
    for length, expected in ((16, 4), (18, 3), (20, 1), (21, 0), (40, 0)):
        drafting = changed.decode.draft.begin(lm.model, lm.model.new_state())
        found = list(islice(drafting.propose([1] * length, Sampler()), 4))
        assert len(found) == expected, f"{length} tokens before a context of 20 ends"


def test_text_may_end_within_accepted_tokens():
    lm = tiny_lm(dtype=np.float64)
    truth = lm.generate(PROMPT, 20)
    end = next(i for i in range(1, 20) if i % 5 not in (0, 4) and truth[i] not in truth[:i])
    model = tiny_model(dtype=np.float64, eos=(truth[end],))
    draft = Scripted(lambda text: (PROMPT + truth)[len(text)])
    changed = LM(model, decode=Speculative(draft, FixedLength(4)))
    assert changed.generate(PROMPT, 20) == truth[:end] == LM(model).generate(PROMPT, 20)


# Seeds and batches -------------------------------------------------------------------------------


def test_seed_repeats_a_sample_and_batch_rows_equal_single_runs():
    lm = apply(tiny_lm(), {"speculative": {"draft": "self", "gamma": 3}})
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


# Which draft -------------------------------------------------------------------------------------


def test_gamma_0_changes_nothing_and_loads_no_draft():
    lm = tiny_lm()
    assert speculative(lm, draft="./nowhere", gamma=0) is lm


def test_draft_is_a_part_of_the_tree():
    lm = apply(tiny_lm(), {"speculative": {"draft": "self"}})
    drawn = repr(lm.decode)
    assert drawn.startswith("Speculative\n  draft: DraftModel\n    model: Transformer")
    assert drawn.endswith("\n  length: StopWhenUnsure(gamma=8, stop=0.3)")
    assert len(lm.decode.draft.model.stack.blocks) == 1 and len(lm.model.stack.blocks) == 2
    assert lm.decode.draft.model.stack.blocks[0] is lm.model.stack.blocks[0], "weights are shared"


def test_draft_auto_is_the_shipped_draft_if_its_vocabulary_fits(monkeypatch, tmp_path):
    lm = minitx.load("stories", speculative=True)
    assert type(lm.decode.draft) is DraftModel
    assert lm.decode.draft.model.config == minitx.load("stories-draft").model.config
    monkeypatch.setattr(find, "SHIPPED", [tmp_path])
    for lm in (tiny_lm(), tiny_lm(tokenizer=None)):
        with pytest.warns(
            MinitxWarning, match="first half .* is the draft model; .*or use prompt_lookup"
        ):
            changed = apply(lm, {"speculative": True})
        assert len(changed.decode.draft.model.stack.blocks) == 1


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
        (
            tiny_lm,
            {"draft": "./nowhere"},
            "cannot load its draft model: There is no model './nowhere'",
        ),
        (
            tiny_lm,
            {"draft": "stories-draft"},
            "cannot use 'stories-draft' as its draft model: it has 1022 tokens and this model 259; "
            "give "
            "a model that shares the tokenizer, or draft=self, or use prompt_lookup.",
        ),
        (lambda: tiny_lm(model=tiny_model(layers=1)), {"draft": "self"}, "a model of one block"),
        (
            tiny_lm,
            {"draft": "lookup"},
            "got 'lookup', which is a technique of its own now; use prompt_lookup.",
        ),
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
    changed = replace(lm, decode=loop(tiny_model(seed=5), 3))
    assert changed.generate(PROMPT, 9) == tiny_lm().generate(PROMPT, 9), "as a target it will do"


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
    decoding = loop(constant(Q), gamma)

    def tokens(sampler):
        with ledger.counting(decoding) as counts:
            next(decode(decoding, constant(P), [1, 2], sampler, 99))
        return counts.events["draft tokens accepted"] + 1

    found = sum(n * share for n, share in exact_distribution(tokens).items())
    alpha = np.minimum(P, Q).sum()
    assert found == pytest.approx(tokens_per_round(alpha, gamma))


def test_counted_work_follows_from_proposals_and_target_passes():
    """Each token that is run takes its multiply-adds; each pass reads the head's weights once."""
    lm, small = tiny_lm(), tiny_model("llama", seed=9, layers=1, width=8, hidden=8)
    changed = replace(lm, decode=loop(small, 3))
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

LOOPS = {
    "speculative": {"draft": "self", "gamma": 3},
    "prompt_lookup": {"gamma": 3},
    "self_speculative": {"gamma": 3},
}


@cache
def with_technique(name, family):
    """A tiny model with a technique, and its text; None if it refuses the family, or does not
    decide token by token: then several tokens at once are decided otherwise."""
    options = {"stories": 2} if "stories" in REGISTRY[name].options else {}
    try:
        lm = apply(tiny_lm(family, dtype=np.float64), {name: options})
    except MinitxError:
        return None
    return (lm, lm.generate(PROMPT, 12)) if decides(lm.model) == "token" else None


INSIDE = [t for t in techniques() if t.level not in ("decode", "answer")]


@pytest.mark.parametrize("technique", INSIDE, ids=lambda t: t.name)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.filterwarnings("ignore::minitx.errors.MinitxWarning")  # half of the layers as draft
def test_another_technique_in_the_target_keeps_its_text(technique, loop):
    """Also an approximate one, if it can be rewound. In the first family that has both, beginning
    with another one from technique to technique."""
    families, start = list(FAMILIES), len(technique.name) % len(FAMILIES)
    for family in families[start:] + families[:start]:
        if found := with_technique(technique.name, family):
            alone, text = found
            try:
                both = apply(alone, {loop: LOOPS[loop]})
            except MinitxError:
                continue
            assert both.generate(PROMPT, 12) == text
            return


@pytest.mark.parametrize("other", ["prefix_cache", "padding_skip", "answer_cache", "prompt_lookup"])
def test_decoding_loop_that_is_there_is_not_dropped_silently(other):
    """A loop that goes around this one could be applied later; one that replaces it cannot."""
    lm = apply(tiny_lm(), {other: REGISTRY[other].demo})
    what = "use one" if other == "prompt_lookup" else "apply both at once"
    with pytest.raises(MinitxError, match=f"already has that of {other}; {what}"):
        apply(lm, {"speculative": {"draft": "self"}})
