"""How many tokens a draft proposes in a round: a fixed number, or until the draft is unsure.

Any rule leaves the distribution of the text unchanged, as long as every token that was drawn is
also verified. ``accept_or_resample`` turns one proposal, whatever came before it, into a token with
the target's distribution. Whether there is a next proposal may depend on all tokens and draft
distributions so far, and on earlier rounds, since none of these depend on the target's logits in
this round. What would be wrong is to draw x and then drop it because it is unlikely: the remaining
proposals would not be distributed as q. So the unlikely token at which a draft stops is proposed
too, as the last one.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Annotated

from minitx.shared.draft_and_verify import Proposal
from minitx.technique import at_least, between
from minitx.tree import Part, part

# The options of the techniques. Stop and Adapt are for drafts that are models.
Gamma = Annotated[
    int, "draft tokens per round, at most; 0 is plain decoding", at_least(0, limit=1024)
]
Stop = Annotated[
    float,
    "end a round after a token to which the draft gives a probability below this; 0: never",
    between(0, 1),
]
Adapt = Annotated[
    bool,
    "adjust stop after each round, so that 90 % of the draft tokens are accepted (Draft & Verify)",
]


def draft_length(gamma: int, stop: float, adapt: bool) -> Part:
    """The rule that these options describe."""
    if adapt:
        return AdaptiveStop(gamma, stop)
    return StopWhenUnsure(gamma, stop) if stop else FixedLength(gamma)


@part
class FixedLength(Part):
    """``gamma`` tokens in every round."""

    gamma: int

    def begin(self) -> "FixedLength":
        """The rule for one sequence, with its state; this one has none."""
        return self

    def take(self, proposals: Iterator[Proposal], room: int) -> list[Proposal]:
        """The proposals of a round, at most ``room``. Those that are not taken are never computed,
        since the iterator is lazy."""
        return list(islice(proposals, min(self.gamma, room)))

    def learn(self, proposed: int, accepted: int) -> None:
        """Adjust the rule after a round; this one is fixed."""


@part
class AdaptiveLength(Part):
    """``gamma`` tokens in the first round; two more after a round in which all were accepted, one
    fewer after any other: for drafts without probabilities (the "heuristic" schedule of the
    transformers library)."""

    gamma: int

    def begin(self) -> "GrowOrShrink":
        return GrowOrShrink(self.gamma)


class GrowOrShrink:
    """An ``AdaptiveLength`` at work on one sequence."""

    def __init__(self, gamma: int):
        self.gamma = gamma

    def take(self, proposals: Iterator[Proposal], room: int) -> list[Proposal]:
        return list(islice(proposals, min(self.gamma, room)))

    def learn(self, proposed: int, accepted: int) -> None:
        if proposed:  # a round without proposals says nothing about gamma
            self.gamma = self.gamma + 2 if accepted == proposed else max(1, self.gamma - 1)


@part
class StopWhenUnsure(Part):
    """At most ``gamma`` tokens, up to the first that the draft gives a probability below
    ``stop``."""

    gamma: int
    stop: float

    def begin(self) -> "StopWhenUnsure":
        return self

    def take(self, proposals: Iterator[Proposal], room: int) -> list[Proposal]:
        return until_unsure(proposals, min(self.gamma, room), self.stop)

    def learn(self, proposed: int, accepted: int) -> None:
        """This rule is fixed too."""


@part
class AdaptiveStop(Part):
    """``StopWhenUnsure`` with a threshold that starts at ``stop`` and is adjusted so that 90 % of
    the proposals are accepted (Zhang et al., "Draft & Verify", ACL 2024, arXiv 2309.08168)."""

    gamma: int
    stop: float

    def begin(self) -> "MovingStop":
        return MovingStop(self.gamma, self.stop)


class MovingStop:
    """An ``AdaptiveStop`` at work on one sequence. The constants are those of the authors' code.
    The threshold moves by (1 - stop_kept) * step = 0.001 a round."""

    target, step = 0.9, 0.01  # the acceptance rate to reach; how far to move the threshold
    rate_kept, stop_kept = 0.5, 0.9  # the weight of the old value in each moving average

    def __init__(self, gamma: int, stop: float):
        self.gamma, self.stop = gamma, stop
        self.rate = 0.0  # moving average of the acceptance rate

    def take(self, proposals: Iterator[Proposal], room: int) -> list[Proposal]:
        return until_unsure(proposals, min(self.gamma, room), self.stop)

    def learn(self, proposed: int, accepted: int) -> None:
        if not proposed:
            return
        self.rate = self.rate_kept * self.rate + (1 - self.rate_kept) * accepted / proposed
        if self.rate < self.target:
            wanted = self.stop + self.step
        elif proposed < self.gamma:  # the threshold ended the round: it is too high
            wanted = self.stop - self.step
        else:
            wanted = self.stop
        self.stop = self.stop_kept * self.stop + (1 - self.stop_kept) * wanted


def until_unsure(proposals: Iterator[Proposal], most: int, stop: float) -> list[Proposal]:
    """The proposals up to the first with a confidence below ``stop``, that one included."""
    taken: list[Proposal] = []
    for proposal in islice(proposals, most):
        taken.append(proposal)
        if proposal.confidence < stop:
            break
    return taken
