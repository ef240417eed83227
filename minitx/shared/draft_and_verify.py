"""Draft and verify: a cheap draft proposes tokens, one pass of the target model verifies them all.

From top to bottom: the rule that accepts or replaces a draft token, which keeps the target's
distribution exact; the verification of a round; the decoding loop; the interface of a draft. Each
technique brings its own draft (speculative: a second model; prompt_lookup: the text so far;
self_speculative: the model's own first layers). How many tokens a round proposes is decided in
draft_length.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from minitx import ledger, ops
from minitx.decode import Sampler, TokenLoop, prefill
from minitx.model import Transformer
from minitx.state import State
from minitx.tree import Part, part

# The rule ----------------------------------------------------------------------------------------


def accept_or_resample(p: np.ndarray, q: np.ndarray, x: int, sampler: Sampler) -> int:
    """Accept the draft token x, which was drawn from q (V,), or reject it and draw another one from
    the residual distribution: the token returned has the target's distribution p (V,).

    Why this is exact: token y is proposed and accepted with probability
        q(y) min(1, p(y) / q(y)) = min(p(y), q(y)).
    Summed over all y, that leaves 1 - sum(min(p, q)) = sum(max(0, p - q)) for a rejection, after
    which y is drawn with probability max(0, p(y) - q(y)) / sum(max(0, p - q)). In all, y is emitted
    with probability
        min(p(y), q(y)) + max(0, p(y) - q(y)) = p(y).
    """
    accept = min(1.0, p[x] / q[x])  # q[x] > 0, since x was drawn from q
    if sampler.draw(np.array([1 - accept, accept])) == 1:  # with probability ``accept``
        return x
    return sampler.draw(residual_distribution(p, q))


def residual_distribution(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """max(0, p - q) (V,), normalized; p itself if rounding leaves nothing of it (p equals q)."""
    residual = np.maximum(p - q, 0)
    total = residual.sum()
    return residual / total if total else p


# A round -----------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """A draft token, and the distribution that it was drawn from."""

    x: int
    q: np.ndarray | None = None  # (V,); None: one-hot, of a deterministic draft (greedy, a lookup)
    logits: np.ndarray | None = None  # (V,) the draft's; None: no model proposed x

    @property
    def confidence(self) -> float:
        """The draft's probability of x, before temperature, top-k and top-p."""
        return 1.0 if self.logits is None else float(ops.softmax(self.logits)[self.x])


def verify(logits: np.ndarray, proposals: Sequence[Proposal], sampler: Sampler) -> list[int]:
    """The 1 to gamma + 1 tokens of a round: the proposals up to the first rejection, then one
    token from the target. Row i of the logits (gamma + 1, V) scores the position of proposal i."""
    tokens = []
    for row, (x, q, _) in zip(logits, proposals):
        if sampler.temperature == 0:  # the rule for a one-hot p: accept x if it is the argmax
            tokens.append(sampler(row))
        else:
            p = sampler.probabilities(row)
            tokens.append(accept_or_resample(p, one_hot(x, p.size) if q is None else q, x, sampler))
        if tokens[-1] != x:  # rejected: the residual distribution does not contain x
            return tokens
    return [*tokens, sampler(logits[-1])]


def one_hot(x: int, size: int) -> np.ndarray:
    q = np.zeros(size)
    q[x] = 1
    return q


# The loop ----------------------------------------------------------------------------------------


@part
class Speculative(TokenLoop):
    """The decoding loop: propose tokens, verify them, roll back what was rejected."""

    draft: Part  # a ``Draft``
    length: Part  # how many tokens a round proposes (draft_length.py)

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], sampler: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        text = list(ids)
        end = len(text) + limit
        if limit:
            prefill(model, text, state)
        drafting, length = self.draft.begin(model, state), self.length.begin()
        while len(text) < end:
            # Here the target's KV cache always holds every token except the last one.
            room = end - len(text) - 1  # the target adds a token of its own
            proposals = length.take(drafting.propose(text, sampler), room)
            logits = drafting.score([text[-1], *(x for x, *_ in proposals)])  # (gamma + 1, V)
            new = verify(logits, proposals, sampler)
            text += new
            drafting.rewind(len(text) - 1)  # forget the rejected tokens
            length.learn(len(proposals), len(new) - 1)
            ledger.event("draft tokens proposed", len(proposals))
            ledger.event("draft tokens accepted", len(new) - 1)
            ledger.event("target passes")
            yield from new


# The interface of a draft ------------------------------------------------------------------------


class Draft(Part):
    """Base class of what proposes tokens."""

    def begin(self, model: Transformer, state: State) -> "Drafting":
        """Begin to draft for one sequence of the target ``model``; its state holds the text without
        the last token."""
        raise NotImplementedError


class Drafting:
    """A draft at work on one sequence. It lives as long as the loop, so ``rewind`` must undo
    whatever it keeps about rejected tokens."""

    def __init__(self, model: Transformer, state: State):
        self.model, self.state = model, state  # of the target

    def propose(self, text: list[int], sampler: Sampler) -> Iterator[Proposal]:
        """Tokens after ``text``, one by one: each is computed when it is asked for, so whoever
        stops asking saves the work. The iterator may end by itself."""
        raise NotImplementedError

    def score(self, tokens: list[int]) -> np.ndarray:
        """The target's logits (gamma + 1, V) after the text's last token and after each of the
        proposals, in one pass."""
        return self.model(tokens, self.state)

    def rewind(self, position: int) -> None:
        """Forget every token from ``position`` on."""
        self.state.rewind(position)


def draw_one_by_one(
    next_logits: Callable[[list[int]], np.ndarray], ids: list[int], sampler: Sampler
) -> Iterator[Proposal]:
    """The proposals of a draft model, one at a time. ``next_logits(ids)`` feeds it the ids and
    returns the logits (V,) of the next token. A proposal is fed back when the next one is asked
    for."""
    while True:
        logits = next_logits(ids)
        if sampler.temperature == 0:
            q, x = None, ops.argmax_token(logits)
        else:
            q = sampler.probabilities(logits)
            x = sampler.draw(q)
        yield Proposal(x, q, logits)
        ids = [x]
