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
        float, "of the other model; this one has the rest, and 0 is this one alone", between(0, 1)
    ] = 0.5,
    average: Annotated[
        Literal["probability", "logit"],
        "what is averaged: the probabilities (a mixture), or the logits (a weighted geometric mean "
        "of the probabilities, normalized)",
    ] = "probability",
):
    """Average the next-token predictions of two models.

    Paper:     practice: averaging classifiers is older than neural networks (Hansen and Salamon,
               "Neural Network Ensembles", IEEE PAMI 1990); a normalized geometric mean is a product
               of experts (Hinton, Neural Computation 2002).
    Fidelity:  common practice, from notes; no particular paper is followed.
    Kind:      approximate; exact at weight=0, or if both models are the same. It skips nothing: it
               spends a second model's work for quality, the opposite of a cascade, and is here as
               what cascades and routers are measured against. No setting pays on the shipped
               models: two that are as good as each other gain 0.004 nats, at twice the cost.
    Idea:      Two models err in different places. Where one is right with confidence and the other
               undecided, their average is right.
    Offline:   nothing; the weight can be picked by the loss on held-out text (Notes).
    Online:    w: weight of the other model; p, q: the two distributions of the next token
               probability:  (1 - w) p + w q                     a mixture: likely for either
               logit:        p^(1 - w) q^w / its sum             likely for both; the softmax of
                                                                 the averaged logits
               the sampler draws from this; BOTH models read the token, each with its own KV cache
    Saves:     nothing: per token the multiply-adds, bytes and KV cache of both models (stories with
               stories-draft: 1.1x the multiply-adds; two of a size: 2x).
    In NumPy:  as much slower as the other model takes.
    Not for:   a model with another vocabulary or a shorter context; a weaker member: stories loses
               with stories-draft at every weight (Notes). Of logit: models that are not calibrated
               alike, as the one with the larger logits dominates.
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
