"""Speculative decoding: a draft model proposes tokens, the target model verifies them in one pass.

Read minitx/shared/draft_and_verify.py first: the rule that accepts or replaces a draft token and
the decoding loop are there, since prompt_lookup and self_speculative use them too. This file: the
card and the options; the draft model (online); the cost formula; notes.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Annotated

import numpy as np

from minitx.decode import Sampler
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.second_model import SMALL_NAMES, need_rewind, small_model
from minitx.shared.break_even import warn
from minitx.shared.draft_and_verify import (
    Draft,
    Drafting,
    Proposal,
    Speculative,
    draw_one_by_one,
)
from minitx.shared.draft_length import Adapt, Gamma, Stop, draft_length
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import technique
from minitx.tree import nbytes, part


@technique(
    level="decode",
    exact=True,
    neutral={"gamma": 0},
    demo={"draft": "self", "gamma": 3},
    event="draft tokens proposed",
    presets={"draft-and-verify": {"gamma": 8, "stop": 0.8, "adapt": True}},
)
def speculative(
    lm,
    *,
    draft: Annotated[str, f"the model that proposes tokens: {SMALL_NAMES}"] = "auto",
    gamma: Gamma = 8,
    stop: Stop = 0.3,
    adapt: Adapt = False,
):
    """A draft model proposes tokens; one forward pass verifies them all.

    Paper:     Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", ICML
               2023, arXiv 2211.17192. Chen et al., arXiv 2302.01318, have the same rule.
               stop, adapt: Zhang et al., "Draft & Verify", ACL 2024, arXiv 2309.08168.
    Fidelity:  the paper's text; stop and adapt: the authors' code. draft=auto and self are ours.
    Kind:      exact: samples follow the target model's distribution; greedy text is the same,
               except for ties that rounding decides.
    Idea:      Decoding is memory-bandwidth bound: each pass reads all weights for one token. A pass
               over several tokens also reads them only once, so a cheap draft model proposes
               several tokens, and one pass of the target verifies them.
    Offline:   nothing.
    Online:    one round; p[i] and q[i]: the target's and the draft's distributions of the token
               after the text and x[1..i-1]
               x[i] ~ q[i]             i = 1..n: the draft proposes tokens one by one; n = gamma, or
                                       fewer: up to the first with a probability below stop
               p[1], ..., p[n+1]       one target pass over the text's last token and x[1..n]
               accept x[i] with probability min(1, p[i](x[i]) / q[i](x[i])), i = 1, 2, ...
               at the first rejection, draw from the residual max(0, p[i] - q[i]) / its sum instead
               if all are accepted, draw one more token from p[n+1]
               truncate both KV caches to the accepted tokens; the token drawn last is fed to the
               models in the next round
    Saves:     sequential passes of the target, so bytes of weights read (0.37x on stories, those of
               the draft included); multiply-adds rise (1.17x). With stop=0, if every proposal is
               accepted independently with the rate
               alpha   = E[sum over tokens x of min(p(x), q(x))]
               tokens  = (1 - alpha^(gamma+1)) / (1 - alpha)       per round, on average
               speedup = tokens / (gamma c + v);  c, v: time of one draft step and of the target's
               pass, both divided by the time of a plain decoding step (paper: v = 1)
    In NumPy:  1.2x to 1.3x the throughput on stories (minitx frontier decoding), whose weights fit
               the CPU's cache: a pass over five tokens takes as long as 1.6 plain steps (python -m
               minitx.lab.rows 128x8 --rows 1,5), a draft step as long as 0.24 (tutorial 11).
    Not for:   a draft with another vocabulary, or one whose parts free cache rows; batches, whose
               sequences are decoded one by one.
    Proof:     tests/skip/test_speculative.py; literal version: tests/skip/literal_speculative.py
    Tutorial:  tutorials/11_guess_and_check.py
    """
    if draft == "lookup":
        raise MinitxError(
            "speculative: draft must be auto, self, or a model's name or path, got 'lookup', which "
            "is a technique of its own now; use prompt_lookup."
        )
    if gamma == 0:
        return lm
    need_plain_loop(lm, "speculative")
    found = small_model(lm, draft, "speculative", "draft", "use prompt_lookup")
    need_rewind(found, "speculative", "draft", "use prompt_lookup")
    if nbytes(found) >= nbytes(lm.model):
        warn(
            f"speculative: a step of the draft reads {nbytes(found):,} bytes of weights and a pass "
            f"of the target {nbytes(lm.model):,}, so proposing costs more than it saves even if "
            "every token is accepted; use a smaller draft, or prompt_lookup."
        )
    return replace(lm, decode=Speculative(DraftModel(found), draft_length(gamma, stop, adapt)))


# Online: the draft -------------------------------------------------------------------------------


@part
class DraftModel(Draft):
    """A smaller model, which proposes one token at a time and has a KV cache of its own."""

    model: Transformer

    def begin(self, model: Transformer, state: State) -> Drafting:
        return SecondModel(model, state, self.model)


class SecondModel(Drafting):
    """A ``DraftModel`` at work on one sequence."""

    def __init__(self, model: Transformer, state: State, draft: Transformer):
        super().__init__(model, state)
        self.draft, self.own = draft, draft.new_state()

    def propose(self, text: list[int], sampler: Sampler) -> Iterator[Proposal]:
        """Tokens after ``text``, a prefix of which is in the draft's KV cache; they end where the
        draft's context does."""
        # To propose n tokens it reads the text and n - 1 of them.
        room = self.draft.config.context - len(text) + 1
        ids = text[self.own.position :]  # two tokens, if the last round accepted every proposal
        return islice(draw_one_by_one(self.next_logits, ids, sampler), max(room, 0))

    def next_logits(self, ids: list[int]) -> np.ndarray:
        return self.draft.next_logits(ids, self.own)

    def rewind(self, position: int) -> None:
        super().rewind(position)
        self.own.rewind(min(self.own.position, position))


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
# - stop is compared with the draft's probability before temperature, top-k and top-p.
# - With the same seed, speculative decoding gives another sample than plain decoding, since it uses
#   the random numbers for other draws. Repeated with that seed, it gives the same sample.
# - The target's cache never holds the last token, which waits for the next pass. The draft has not
#   read its own last proposal either: if all are accepted, its next step reads two tokens.
# - A prompt takes two passes: all tokens but the last, and then the last with the first proposals.
#   So the first token comes later than in plain decoding, and an answer of one token costs more
#   (first token: minitx frontier decoding). The same holds for prompt_lookup, self_speculative,
#   jacobi and lookahead.
# - Near the limit a round proposes fewer tokens, because the target always adds one.
# - The sequences of a batch accept different numbers of tokens, so each is decoded separately; they
#   take turns.
# - Why samples stay exact although a draft token may end a round: minitx/shared/draft_length.py.
# - python -m minitx.lab.loops speculative gamma=1,2,4,8 stop=0
#   on stories, 20 prompts of 32 tokens, 48 new ones each (stop=0.3,0.4,0.6,0.8; draft=self; and all
#   with --temperature 1). Relative to plain decoding, prefill included; passes: of the target, one
#   of them the prefill; steps: of the draft.
#
#                                   accepted   passes   steps    multiply-adds   weight bytes
#                                              a token  a token
#       greedy
#         gamma=1 stop=0               86 %     0.56     0.53        1.11x           0.61x
#         gamma=2 stop=0               84 %     0.40     0.73        1.14x           0.46x
#         gamma=4 stop=0               73 %     0.29     1.01        1.25x           0.37x
#         gamma=8 stop=0               58 %     0.21     1.39        1.47x           0.32x
#         gamma=8 stop=0.3 (default)   83 %     0.30     0.88        1.17x           0.37x
#         gamma=8 stop=0.4             88 %     0.33     0.79        1.13x           0.39x
#         gamma=8 stop=0.6             89 %     0.34     0.77        1.12x           0.40x
#         gamma=8 stop=0.8             89 %     0.35     0.76        1.12x           0.41x
#         draft=self                   85 %     0.29     0.86        1.61x           0.75x
#       temperature 1
#         gamma=1 stop=0               95 %     0.54     0.51        1.08x           0.58x
#         gamma=2 stop=0               90 %     0.39     0.71        1.11x           0.44x
#         gamma=4 stop=0               86 %     0.26     0.89        1.15x           0.33x
#         gamma=8 stop=0               73 %     0.18     1.15        1.28x           0.27x
#         gamma=8 stop=0.3 (default)   90 %     0.32     0.78        1.12x           0.38x
#         gamma=8 stop=0.6             92 %     0.36     0.72        1.10x           0.42x
#         draft=self                   93 %     0.29     0.79        1.56x           0.72x
#
#   Greedy decoding rejects whenever the two argmaxes differ, which is likely where the draft is
#   unsure: stopping there saves multiply-adds. It costs passes, since many of those tokens would
#   have been accepted. Sampling rejects with probability 1 - sum(min(p, q)), which is small where q
#   is close to p, unsure or not: there stop=0 needs far fewer passes. adapt=true moves the
#   threshold by 0.001 a round, so it matters only in long texts.
# - minitx frontier decoding, CPU time, medians of three runs on a busy machine: 1.27x to 1.30x the
#   throughput by default (single rounds 1.18x to 1.36x), 1.28x to 1.33x with gamma=4 stop=0, 1.23x
#   to 1.28x with gamma=8 stop=0; at temperature 1 1.23x to 1.27x, 1.37x to 1.39x, 1.35x to 1.40x.
#   So in greedy decoding stop=0.3 only saves multiply-adds; for sampling take stop=0.
# - The loop itself costs little: verifying a greedy round takes 8 microseconds, a sampled one 80
#   (mostly softmaxes over the vocabulary), a plain step of stories 600.
