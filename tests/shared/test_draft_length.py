"""How many tokens a round proposes: each rule by hand; no rule changes the distribution."""

import numpy as np
import pytest
from enumeration import exact_distribution, total_variation
from markov import markov
from tiny import decode

from minitx import ledger
from minitx.shared import draft_length as module
from minitx.shared.draft_and_verify import Proposal, Speculative
from minitx.shared.draft_length import (
    AdaptiveLength,
    AdaptiveStop,
    FixedLength,
    MovingStop,
    StopWhenUnsure,
    draft_length,
)
from minitx.skip.speculative import DraftModel


def proposals(*confidences, asked=None):
    """Proposals 0, 1, ... with these confidences; ``asked`` collects those that were drafted."""
    for x, c in enumerate(confidences):
        if asked is not None:
            asked.append(x)
        rest = (1 - c) / (len(confidences) - 1)
        yield Proposal(x, None, np.log([c if i == x else rest for i in range(len(confidences))]))


# By hand -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room, expected", [(9, 3), (2, 2), (0, 0)])
def test_fixed_length_takes_gamma_tokens_or_what_there_is_room_for(room, expected):
    asked = []
    found = FixedLength(3).begin().take(proposals(*[0.5] * 9, asked=asked), room)
    assert [proposal.x for proposal in found] == asked == list(range(expected))


def test_stop_keeps_the_token_that_was_unsure_and_drafts_no_other():
    asked, rule = [], StopWhenUnsure(9, 0.5).begin()
    found = rule.take(proposals(0.9, 0.6, 0.4, 0.9, asked=asked), 9)
    assert [proposal.x for proposal in found] == asked == [0, 1, 2]
    assert len(rule.take(proposals(0.9, 0.9, 0.9, 0.9), 2)) == 2
    assert len(StopWhenUnsure(3, 0.5).begin().take(proposals(*[0.9] * 9), 9)) == 3


def test_confidence_is_the_draft_probability_before_temperature():
    logits = np.log(np.array([0.2, 0.5, 0.3]))
    assert Proposal(1, None, logits).confidence == pytest.approx(0.5)
    assert Proposal(2, np.array([0, 0.9, 0.1]), logits).confidence == pytest.approx(0.3)
    assert Proposal(1).confidence == 1


def test_adaptive_stop_by_hand():
    """rate := 0.5 rate + 0.5 accepted / proposed;  stop := 0.9 stop + 0.1 (stop +- 0.01)

    round   accepted    rate      below 0.9?   stop
      1      4 of 4     0.5       yes          0.5 + 0.001
      2      2 of 4     0.5       yes          0.502
      3      4 of 4     0.75      yes          0.503
      4      5 of 5     0.875     yes          0.504
      5      2 of 2     0.9375    no           0.503
      6      8 of 8     0.96875   no, but the round was ended by gamma = 8: 0.503
    """
    rule, found = AdaptiveStop(8, 0.5).begin(), []
    for accepted, proposed in ((4, 4), (2, 4), (4, 4), (5, 5), (2, 2), (8, 8)):
        rule.learn(proposed, accepted)
        found.append(rule.stop)
    assert found == pytest.approx([0.501, 0.502, 0.503, 0.504, 0.503, 0.503])
    assert rule.rate == pytest.approx(0.96875)
    rule.learn(0, 0)
    assert rule.stop == found[-1], "a round without proposals says nothing"
    assert AdaptiveStop(8, 0.5).begin().stop == 0.5, "each sequence begins anew"


def test_adaptive_length_by_hand():
    rule, found = AdaptiveLength(4).begin(), []
    for accepted, proposed in ((4, 4), (5, 6), (0, 0), (0, 5), (0, 4), (0, 3), (0, 2), (0, 1)):
        rule.learn(proposed, accepted)
        found.append(rule.gamma)
    assert found == [6, 5, 5, 4, 3, 2, 1, 1]
    assert len(rule.take(proposals(*[0.5] * 4), 9)) == 1


def test_options_name_the_rule():
    assert repr(draft_length(4, 0.0, False)) == "FixedLength(gamma=4)"
    assert repr(draft_length(4, 0.5, False)) == "StopWhenUnsure(gamma=4, stop=0.5)"
    assert repr(draft_length(4, 0.5, True)) == "AdaptiveStop(gamma=4, stop=0.5)"


# Exactness, by enumeration -----------------------------------------------------------------------


RULES = [StopWhenUnsure(3, 0.4), AdaptiveStop(3, 0.4), AdaptiveLength(2)]
TOKENS = 4
P, Q = markov(0, V=2), markov(1, V=2)


def distribution(rule):
    """That of the next tokens, and the different divisions into rounds that were seen."""
    loop, rounds = Speculative(DraftModel(Q), rule), set()

    def run(sampler):
        with ledger.counting(loop) as counts:
            text = tuple(decode(loop, P, (1, 0), sampler, TOKENS))
        rounds.add(tuple(counts.events.values()))
        return text

    return exact_distribution(run), rounds


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_no_rule_changes_the_distribution(rule, monkeypatch):
    monkeypatch.setattr(MovingStop, "step", 4.0)  # so that a few rounds move the threshold far
    found, rounds = distribution(rule)
    assert total_variation(found, P.distribution((1, 0), TOKENS)) < 1e-13, "not exact"
    _, without = distribution(FixedLength(rule.gamma))
    assert rounds != without, "the rule does nothing"


def test_dropping_the_unsure_token_would_change_the_distribution(monkeypatch):
    """So the test above can fail."""

    def without_it(proposals, most, stop, real=module.until_unsure):
        return [proposal for proposal in real(proposals, most, stop) if proposal.confidence >= stop]

    monkeypatch.setattr(module, "until_unsure", without_it)
    found, _ = distribution(StopWhenUnsure(3, 0.4))
    assert total_variation(found, P.distribution((1, 0), TOKENS)) > 0.02
