"""Ensembles: two models predict each token together.

From top to bottom: the card and the options; the rule that combines two predictions; the loop;
notes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.decode import Sampler, TokenLoop, new_state
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.second_model import SMALL_NAMES, small_model
from minitx.shared.log_softmax import log_softmax
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import between, technique
from minitx.tree import Part, part


@technique(
    level="decode",
    exact=False,
    neutral={"weight": 0.0},
    demo={"member": "self", "weight": 0.5},
    event="tokens predicted together",
)
def ensemble(
    lm,
    *,
    member: Annotated[str, f"the other model: {SMALL_NAMES}"] = "auto",
    weight: Annotated[
        float,
        "weight of the other model; this model has 1 - weight; 0: this model alone",
        between(0, 1),
    ] = 0.5,
    average: Annotated[
        Literal["probability", "logit"],
        "what is averaged: the probabilities (a mixture), or the logits (a weighted geometric mean "
        "of the probabilities, normalized)",
    ] = "probability",
):
    """Average the next-token predictions of two models.

    Paper:     none in particular. Ensembles: Hansen and Salamon, "Neural Network Ensembles", IEEE
               PAMI 1990; a normalized geometric mean is a product of experts (Hinton, Neural
               Computation 2002).
    Fidelity:  common practice, from notes; no particular paper is followed.
    Kind:      approximate; exact at weight=0, or if both models are the same. It skips nothing: it
               spends a second model's work on quality, the opposite of a cascade. No setting pays
               on the shipped models: two equally good ones gain 0.004 nats, at twice the cost
               (Notes).
    Idea:      Two models err in different places. Where one is confidently right and the other is
               unsure, their average is right.
    Offline:   nothing; the weight can be picked by the loss on held-out text (Notes).
    Online:    w: weight of the other model; p, q: the two distributions of the next token
               probability:  (1 - w) p + w q            a mixture: tokens that are likely for either
               logit:        p^(1 - w) q^w / its sum    the softmax of the averaged logits: tokens
                                                        that are likely for both
               the sampler draws from this; BOTH models read the token, each with its own KV cache
    Saves:     nothing: per token the multiply-adds, bytes and KV cache of both models (stories with
               stories-draft: 1.1x the multiply-adds; two of a size: 2x).
    In NumPy:  slower by the time that the other model takes.
    Not for:   a member with another vocabulary or a shorter context; a much weaker member: stories
               gains nothing from stories-draft (Notes). average=logit: two models of different
               calibration, since the one with the larger logits dominates.
    Proof:     tests/skip/test_ensemble.py; literal version: tests/skip/literal_ensemble.py
    """
    if weight == 0:
        return lm
    need_plain_loop(lm, "ensemble")
    other = small_model(lm, member, "ensemble", "member")
    ours, theirs = lm.model.config.context, other.config.context
    if theirs < ours:
        raise MinitxError(
            f"ensemble: the context of its member is {theirs} tokens and this model's is {ours}, "
            "so it could not go on to the end; give a member with as long a context."
        )
    return replace(lm, decode=Ensemble(other, AVERAGES[average](weight)))


# Online: the rule --------------------------------------------------------------------------------


@part
class ProbabilityAverage(Part):
    """A mixture: one model or the other is right, with these probabilities."""

    weight: float  # of the second model

    def __call__(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """ln p (..., V) of the mixture of two predictions, given as logits (..., V)."""
        a, b = log_softmax(ours), log_softmax(theirs)
        return np.logaddexp(a + ln(1 - self.weight), b + ln(self.weight))


@part
class LogitAverage(Part):
    """A product of experts: a token must be likely for both."""

    weight: float  # of the second model

    def __call__(self, ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        """ln p (..., V) of the normalized geometric mean of two predictions, given as logits."""
        if self.weight == 1:  # p^0 is 1, also where p is 0
            return log_softmax(theirs)
        a, b = log_softmax(ours), log_softmax(theirs)
        return log_softmax((1 - self.weight) * a + self.weight * b)


AVERAGES = {"probability": ProbabilityAverage, "logit": LogitAverage}


def ln(weight: float) -> float:
    return math.log(weight) if weight else -math.inf


# Online: the loop --------------------------------------------------------------------------------


@part
class Ensemble(TokenLoop):
    """The decoding loop: both models read the same token, each with its own KV cache."""

    member: Part
    average: Part

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        member_state = new_state(self.member, ids)
        new, new_to_member = ids[state.position :], ids
        for _ in range(limit):
            ours = model.next_logits(new, state)  # (V,)
            theirs = self.member.next_logits(new_to_member, member_state)  # (V,)
            token = choose(self.average(ours, theirs))
            ledger.event("tokens predicted together")
            yield token
            new = new_to_member = (token,)


# Notes:
#
# - python -m minitx.lab.ensemble_loss stories-parallel -m stories-relu (--average logit)
#   python -m minitx.lab.ensemble_loss stories-relu -m stories
#   python -m minitx.lab.ensemble_loss stories-draft -m stories (--average logit)
#   60 held-out stories, read with teacher forcing; loss in nats per token of ordinary text; right:
#   answers in percent. weight: of the second model; at 0 and 1 one model is alone.
#
#       weight                        0       0.1      0.25     0.5      0.75     1
#       stories-relu and stories-parallel: 2.0x the multiply-adds
#         probability   loss        0.8094   0.8072   0.8057   0.8060   0.8095   0.8191
#                       right         53.3     54.8     56.2     57.1     58.6     56.2
#         logit         loss        0.8094   0.8071   0.8049   0.8049   0.8096   0.8191
#                       right         53.3     55.1     55.9     58.0     59.1     56.2
#       stories and stories-relu: 1.6x (read only: a context of 320 tokens is too short to generate)
#         probability   loss        0.7900   0.7890   0.7896   0.7929   0.7988   0.8094
#                       right         96.8     96.5     96.5     96.5     87.2     53.3
#       stories and stories-draft: 1.1x
#         probability   loss        0.7900   0.7922   0.7971   0.8083   0.8242   0.8572
#                       right         96.8     96.8     96.8     96.2     93.0     44.1
#         logit         loss        0.7900   0.7899   0.7911   0.7972   0.8137   0.8572
#                       right         96.8     96.8     96.5     96.5     94.2     44.1
#
#   Two models that are as good as each other gain 0.004 nats over the better one and 2 to 3 points
#   of answers, for twice the work; stories, one model with that much work, has a loss of 0.79. A
#   weaker member gains at most 0.001 nats, at a small weight, and costs at larger ones: it is
#   unsure where the other one is sure.
# - The random baseline is one of the two models, drawn with the weights for each token ("a random
#   one" in the table of ensemble_loss): 0.8143 for stories-relu and stories-parallel at 0.5, where
#   the mixture has 0.8060. -ln is convex (Jensen), so a mixture is never worse than that on
#   average, but it may well be worse than the better model.
# - At temperature 1, drawing a token from the mixture is the same as drawing one of the two models,
#   with the weights, and then a token from it. That takes one model's prediction for each token.
#   The other model has to read the token sooner or later, but may read several at once.
# - Right answers by number of hops, stories alone and with stories-draft at 0.5 (probability):
#   counts 82.8 and 75.9 %; 1 hop 99.1, 2 hops 92.7 and 3 hops 100.0 % in both.
# - The sampler's temperature, top-k and top-p apply to the average, not to each model.
# - Majority votes are an ensemble of samples of one model: majority_vote.
