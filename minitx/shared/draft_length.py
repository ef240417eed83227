"""How many tokens a draft proposes in a round."""

from collections.abc import Iterator
from itertools import islice

from minitx.shared.draft_and_verify import Proposal
from minitx.tree import Part, part


@part
class FixedLength(Part):
    """``gamma`` tokens in every round."""

    gamma: int

    def begin(self) -> "FixedLength":
        """What decides for one sequence: there is nothing to remember."""
        return self

    def take(self, proposals: Iterator[Proposal], room: int) -> list[Proposal]:
        """The proposals of a round, at most ``room``."""
        return list(islice(proposals, min(self.gamma, room)))

    def learn(self, proposed: int, accepted: int) -> None:
        """Note how a round went: nothing to learn."""
