"""Speculative decoding: a draft model proposes tokens, the target model verifies them in one pass.

From top to bottom: the card and the options; the rule that accepts or replaces a draft token; the
decoding loop; the drafts (a second model, prompt lookup); the cost formula; notes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minitx import ledger
from minitx.checkpoints.find import shipped
from minitx.decode import Sampler, TokenLoop
from minitx.errors import MinitxError
from minitx.lm import load
from minitx.model import Stack, Transformer
from minitx.second_model import first_blocks, load_second, why_another_vocabulary
from minitx.shared.break_even import warn
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import at_least, need, owner, technique
from minitx.tree import Part, nbytes, part, walk

SHIPPED_DRAFT = "stories-draft"


@technique(
    level="decode",
    exact=True,
    neutral={"gamma": 0},
    demo={"draft": "lookup", "gamma": 3},
    event="draft tokens proposed",
)
def speculative(
    lm,
    *,
    draft: Annotated[
        str,
        "what proposes tokens: a model with the same vocabulary, by name or path; self: the first "
        "half of this model's blocks; lookup: what followed the last tokens earlier in the text; "
        "auto: stories-draft if its vocabulary fits, else lookup",
    ] = "auto",
    gamma: Annotated[
        int, "draft tokens per round; 0 is plain decoding", at_least(0, limit=1024)
    ] = 4,
):
    """A draft model proposes tokens; one forward pass verifies them all.

    Paper:     Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML
               2023, arXiv 2211.17192. Chen et al., arXiv 2302.01318, have the same rule.
    Fidelity:  the paper's text. draft=self is after LayerSkip (arXiv 2404.16710), draft=lookup
               after Saxena's prompt-lookup-decoding (code, no paper); draft=auto is ours.
    Kind:      exact: samples follow the target model's distribution; greedy text is the same,
               except for ties that rounding decides.
    Idea:      Decoding is memory-bandwidth bound: each pass reads all weights for one token. A pass
               over several tokens reads them once too, so let a cheap draft guess, then check.
    Offline:   nothing.
    Online:    one round; p[i] and q[i]: the target's and the draft's distributions of the token
               after the text and x[1..i-1]
               x[i] ~ q[i]             for i = 1..gamma: the draft proposes, token by token
               p[1], ..., p[gamma+1]   one target pass over the text's last token and x[1..gamma]
               accept x[i] with probability min(1, p[i](x[i]) / q[i](x[i])), i = 1, 2, ...
               at the first rejection, stop; draw from the residual max(0, p[i] - q[i]) / its sum
               if all are accepted, draw one more token from p[gamma+1]
               drop rejected tokens from both KV caches; the token drawn last enters them in the
               next round
    Saves:     sequential passes of the target, so bytes of weights read (0.38x on stories, those of
               the draft included); multiply-adds rise (1.3x). If every proposal is accepted
               independently with the rate
               alpha   = E[sum over tokens x of min(p(x), q(x))]
               tokens  = (1 - alpha^(gamma+1)) / (1 - alpha)       per round, on average
               speedup = tokens / (gamma c + v);  c, v: time of one draft step and of the target's
               pass, both divided by the time of a plain decoding step (paper: v = 1)
    In NumPy:  0.7x to 1.3x the throughput on stories, whose weights fit the CPU's cache: v = 1.5
               at gamma=4, c = 0.28 (Notes).
    Not for:   a draft with another vocabulary; batches, whose sequences are decoded one by one.
    Proof:     tests/skip/test_speculative.py; literal version: tests/skip/literal_speculative.py
    Tutorial:  tutorials/11_guess_and_check.py
    """
    if gamma == 0:
        return lm
    need_plain_loop(lm, "speculative")
    found = find_draft(lm, draft)
    if nbytes(found) >= nbytes(lm.model):
        warn(
            f"speculative: a step of the draft reads {nbytes(found):,} bytes of weights and a pass "
            f"of the target {nbytes(lm.model):,}, so proposing costs more than it saves even if "
            "every token is accepted; use a smaller draft, or draft=lookup."
        )
    return replace(lm, decode=Speculative(found, gamma))


# Online: the rule --------------------------------------------------------------------------------


def accept_or_resample(p: np.ndarray, q: np.ndarray, x: int, sampler: Sampler) -> int:
    """A token with the target's distribution p (V,), made from a token x with the distribution
    q (V,): x itself if it is accepted, a token from the residual distribution if it is rejected.

    Why this is exact: token y is proposed and accepted with probability
        q(y) min(1, p(y) / q(y)) = min(p(y), q(y)).
    Summed over all y, that leaves 1 - sum(min(p, q)) = sum(max(0, p - q)) for a rejection, which
    then gives y with probability max(0, p(y) - q(y)) / sum(max(0, p - q)). In all, the probability
    that y is emitted is
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


# Online: the loop --------------------------------------------------------------------------------


@part
class Speculative(TokenLoop):
    """The decoding loop: propose gamma tokens, verify them, roll back what was rejected."""

    draft: Part  # has ``propose(text, gamma, sampler, state)`` and ``new_state()``
    gamma: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], sampler: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        text = list(ids)
        end = len(text) + limit
        draft_state = self.draft.new_state()
        if limit and state.position < len(text) - 1:
            model.hidden(text[state.position : -1], state)  # prefill; no logits are needed
        while len(text) < end:
            # Here the target's KV cache always holds every token except the last one.
            gamma = min(self.gamma, end - len(text) - 1)  # the target adds a token of its own
            proposals = self.draft.propose(text, gamma, sampler, draft_state)
            logits = model([text[-1], *(x for x, _ in proposals)], state)  # (gamma + 1, V)
            new = verify(logits, proposals, sampler)
            text += new
            state.rewind(len(text) - 1)  # forget the rejected tokens
            draft_state.rewind(min(draft_state.position, len(text) - 1))
            ledger.event("draft tokens proposed", len(proposals))
            ledger.event("draft tokens accepted", len(new) - 1)
            ledger.event("target passes")
            yield from new


class Proposal(NamedTuple):
    """A draft token and the distribution that it was drawn from."""

    x: int
    q: np.ndarray  # (V,)


def verify(logits: np.ndarray, proposals: Sequence[Proposal], sampler: Sampler) -> list[int]:
    """The 1 to gamma + 1 tokens of a round: the proposals up to the first rejection, then one
    token from the target. Row i of the logits (gamma + 1, V) scores the position of proposal i."""
    tokens = []
    for row, (x, q) in zip(logits, proposals):
        if sampler.temperature == 0:  # the rule for a one-hot p: accept x if it is the argmax
            tokens.append(sampler(row))
        else:
            p = sampler.probabilities(row)
            tokens.append(accept_or_resample(p, q, x, sampler))
        if tokens[-1] != x:  # rejected: the residual distribution does not contain x
            return tokens
    return [*tokens, sampler(logits[-1])]


# Drafts ------------------------------------------------------------------------------------------


@part
class DraftModel(Part):
    """A smaller model, which proposes one token at a time and has a KV cache of its own."""

    model: Transformer

    def new_state(self) -> State:
        return self.model.new_state()

    def propose(
        self, text: list[int], gamma: int, sampler: Sampler, state: State
    ) -> list[Proposal]:
        """At most gamma tokens after ``text``, a prefix of which is in the state; fewer where the
        draft's context ends."""
        proposals: list[Proposal] = []
        ids = text[state.position :]  # two tokens, if the last round accepted every proposal
        # n proposals feed the text and n - 1 proposals, so n <= context - len(text) + 1
        room = self.model.config.context - len(text) + 1
        for _ in range(min(gamma, room)):
            q = sampler.probabilities(self.model.next_logits(ids, state))
            x = int(q.argmax()) if sampler.temperature == 0 else sampler.draw(q)
            proposals.append(Proposal(x, q))
            ids = [x]
        return proposals


@part
class PromptLookup(Part):
    """No model: proposes what followed the last tokens where they occurred earlier in the text.

    Such a proposal is certain, so its q is one-hot: x is accepted with probability p(x).
    """

    vocab_size: int
    longest: int = 3  # tokens to search for, at most

    def new_state(self) -> State:
        return State(0, 0)  # the text is all that it needs

    def propose(
        self, text: list[int], gamma: int, sampler: Sampler, state: State
    ) -> list[Proposal]:
        found = continuation(text, self.longest, gamma)
        return [Proposal(x, np.eye(1, self.vocab_size, x)[0]) for x in found]


def continuation(text: list[int], longest: int, limit: int) -> list[int]:
    """At most ``limit`` tokens that followed an earlier occurrence of the last n tokens, for the
    largest n <= ``longest`` that occurs; the latest occurrence if there are several."""
    ids = np.array(text)
    for n in range(min(longest, len(text) - 1), 0, -1):
        earlier = sliding_window_view(ids[:-1], n)  # all runs of n tokens, except the last one
        matches = np.flatnonzero((earlier == ids[-n:]).all(-1))
        if len(matches):
            after = int(matches[-1]) + n
            return text[after : after + limit]
    return []


def find_draft(lm, draft: str) -> Part:
    """The draft that the option names."""
    lookup = PromptLookup(lm.model.config.vocab_size)
    if draft == "lookup":
        return lookup
    if draft == "self":
        return DraftModel(first_half(lm.model))
    if draft == "auto":
        if lm.tokenizer is None or SHIPPED_DRAFT not in shipped():
            return lookup
        other = load(SHIPPED_DRAFT)
        return lookup if why_another_vocabulary(lm, other) else DraftModel(other.model)
    instead = "draft=self or draft=lookup"
    return DraftModel(load_second(lm, draft, "speculative", "draft", instead).model)


def first_half(model: Transformer) -> Transformer:
    """The first half of the model's blocks (rounded down) with its final norm and head, as a model
    that shares the weights."""
    for _, node in walk(model):
        if node.frees_rows:
            raise MinitxError(
                f"speculative cannot draft with draft=self: {owner(node)} frees cache rows, so the "
                "draft could not take back tokens that are rejected; use draft=lookup."
            )
    need(model.stack, Stack)
    half = len(model.stack.blocks) // 2
    if not half:
        raise MinitxError(
            "speculative cannot draft with half of a model of one block; use another draft."
        )
    return first_blocks(model, half, "speculative")


# Cost --------------------------------------------------------------------------------------------


def tokens_per_round(alpha: float, gamma: int) -> float:
    """Expected tokens per target pass if each proposal is accepted with probability alpha,
    independently: 1 + alpha + ... + alpha^gamma (Leviathan et al., equation 1)."""
    return sum(alpha**i for i in range(gamma + 1))


def speedup(alpha: float, gamma: int, c: float, v: float = 1.0) -> float:
    """Expected throughput relative to plain decoding. c: time of a draft step; v: time of the
    target's pass over gamma + 1 tokens; both relative to a plain decoding step."""
    return tokens_per_round(alpha, gamma) / (gamma * c + v)


def multiply_adds(alpha: float, gamma: int, c: float) -> float:
    """Expected multiply-adds per token relative to plain decoding; c: those of the draft for one
    token, relative to the target's."""
    return (gamma * c + gamma + 1) / tokens_per_round(alpha, gamma)


# Notes:
#
# - p and q are what the sampler draws from: after temperature, top-k and top-p. At temperature 0
#   both are one-hot, and the rule becomes "accept x if it is the target's argmax".
# - With the same seed, speculative decoding gives another sample than plain decoding, since it uses
#   the random numbers for other draws. Repeated with that seed, it gives the same sample.
# - The target's cache never holds the last token, which waits for the next pass. The draft has not
#   read its own last proposal either: if all are accepted, its next step reads two tokens.
# - Near the limit a round proposes fewer tokens, because the target always adds one.
# - The sequences of a batch accept different numbers of tokens, so each is decoded by itself, in
#   turns.
# - Not here: a draft that shares the target's cache, trees of proposals, and a gamma that adapts.
# - If the last tokens occur several times, prompt lookup takes the latest occurrence (our choice).
# - On stories, five prompts continued by 100 tokens, fastest of four runs with one BLAS thread:
#
#                           tokens per target pass       throughput, plain = 1
#       draft     gamma     greedy    temperature 1      greedy    temperature 1
#       auto        2        2.18         2.60            0.96         1.09
#       auto        4        2.89         3.74            0.98         1.18
#       auto        8        3.11         4.92            0.69         1.03
#       self        4        3.62         4.64            0.86         1.07
#       lookup      4        2.00         1.21            1.26         0.80
#
#   With auto and self, sampling accepts more than greedy decoding: greedy rejects whenever the two
#   argmaxes differ, sampling with probability 1 - sum(min(p, q)), which is small where q is close
#   to p. With lookup q is one-hot, so a proposal x is accepted only with probability p(x).
#
#   A step of stories-draft takes 0.28 steps of stories, a step of its first half 0.62; a pass over
#   2, 5, 9 tokens takes 1.24, 1.48, 1.90 steps. For auto, gamma=4 and temperature 1, the formula on
#   the card gives 3.74 / (4 * 0.28 + 1.48) = 1.44, not 1.18: it leaves out the sampler and the loop
#   (about 0.3 steps a round), and a target pass that alternates with the draft takes about 1.2
#   times as long as the same pass repeated.
