"""A cascade of two models: the small one answers first, and its answer is kept if it is confident.

This file: the card and options, the token loop (online), the scores, the calibration to a
probability and the threshold under a budget (offline), the cost formula, notes. The small model's
answers and the calibration examples are in shared/small_answers.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger
from minitx.decode import Sampler, TokenLoop, new_state
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.second_model import SMALL_NAMES, small_model
from minitx.shared.break_even import warn
from minitx.shared.small_answers import (
    Answer,
    AnswerTokens,
    Cuts,
    Stories,
    answer_of,
    cut_for_share,
    examples_of,
    finite,
    halves,
    relative_cost,
    uniform_of,
)
from minitx.state import State
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, part


@technique(
    level="answer",
    exact=False,
    neutral={"threshold": 2.0},
    after=("majority_vote",),
    demo={"small": "self", "choose": "random", "threshold": 0.5, "seed": 29},
    event="small answers kept",
)
def cascade(
    lm,
    *,
    small: Annotated[str, "the model that answers first: " + SMALL_NAMES] = "auto",
    threshold: Annotated[
        float | None,
        "keep an answer whose calibrated probability of being right is at least this; 0 keeps all, "
        "above 1 the small model never runs; default: 0.9 without a budget",
        between(0, 2),
    ] = None,
    budget: Annotated[
        float | None,
        "instead of a threshold: mean multiply-adds allowed, relative to the big model alone",
        at_least(0),
    ] = None,
    score: Annotated[
        Literal["logprob", "lowest", "entropy"],
        "confidence in an answer: logprob: mean log-probability of its tokens; lowest: the lowest "
        "probability of a token; entropy: 1 - mean entropy / ln V",
    ] = "lowest",
    choose: Annotated[
        Literal["score", "random"], "keep answers by their score, or a random baseline"
    ] = "score",
    tokens: AnswerTokens = 1,
    stories: Stories = 32,
    cuts: Cuts = 8,
    seed: Annotated[int, "seed of choose=random", SEEDS] = 0,
):
    """A small model answers first; the big one answers where it is not confident (FrugalGPT).

    Paper:     Chen et al., "FrugalGPT: How to Use Large Language Models While Reducing Cost and
               Improving Performance", 2023, arXiv 2305.05176; of it, the cascade.
    Fidelity:  a reconstruction from the abstract and the authors' code. Two models, not three or
               more; the scorer is a formula with isotonic calibration, not a trained DistilBERT.
    Kind:      approximate; exact with threshold > 1, where the big model answers alone.
    Idea:      Many requests are easy. Let the small model answer, look at its answer, and run the
               big model only where the answer is doubtful.
    Offline:   prompts x from calibration texts; y_s, y_b: both models' greedy answers; an answer is
               right if y_s = y_b, so no labels are needed
               first half:  g = isotonic fit of P(right) on the score (pool adjacent violators)
               second half: with a budget, the threshold that keeps the share a = 1 + c_s / c_b -
                            budget of the answers
    Online:    y_s = the small model's whole answer to the prompt
               score = the lowest p(token) of its tokens, the end of text included
               g(score) >= threshold: y_s is the answer
               else: the big model answers, from the prompt (what y_s took is lost)
    Saves:     E[cost] = c_s + (1 - a) c_b multiply-adds; c_s, c_b: an answer of each model (c_s
               with its scores, V per token); a: share of the small answers that is kept. Less than
               c_b only if a > c_s / c_b.
    In NumPy:  2.7x the throughput at 0.31x of the multiply-adds (stories, one token after prompts
               of 130). The first token of a longer answer comes late: after the whole small answer
               and, if that is not kept, after the big model's prefill.
    Not for:   streaming; long completions (for minitx generate the answer is all of it), where the
               small answer is hardly ever the big model's. Calibrate on prompts and answers of your
               kind and length (calibrate, cuts, tokens): a threshold need not hold for others
               (Notes).
    Proof:     tests/skip/test_cascade.py; literal version: tests/skip/literal_cascade.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if threshold is not None and budget is not None:
        raise MinitxError("cascade: got both threshold and budget; give only one of them.")
    if threshold is None and budget is None:
        threshold = 0.9
    if threshold is not None and threshold > 1:
        return lm
    model = small_model(lm, small, "cascade", "small")
    rate = SCORES[score] if choose == "score" else AtRandom(seed)
    if threshold == 0:
        cut = -np.inf
    elif threshold is not None and choose == "random":
        cut = threshold  # of a uniform number: keeps 1 - threshold of the answers
    else:
        examples = examples_of(
            "cascade", lm, model, stories, cuts, tokens, "use threshold=0 or choose=random"
        )
        ratio = relative_cost(
            lm, examples, tokens,
            lambda ids: answer_of(model, new_state(model, ids), ids, Sampler(), tokens),
        )  # fmt: skip
        scores = [rate(e.answer, e.prompt) for e in examples]
        learn, tune = halves([*zip(scores, [e.agrees for e in examples])])
        if budget is not None:
            share = share_for(budget, ratio)
            cut = cut_for_share([s for s, _ in tune], share)
        else:
            cut = isotonic(*zip(*learn)).cut(threshold)
        check_pays(np.mean([s >= cut for s, _ in tune]), ratio)
    return replace(lm, decode=Cascade(lm.decode, model, rate, finite(cut)))


# Online ------------------------------------------------------------------------------------------


@part
class Cascade(TokenLoop):
    """The small model's answer if its score reaches the cut, else what the inner loop yields."""

    inner: Part
    small: Transformer
    score: Part  # (answer, prompt) -> a number: the higher, the more confident
    cut: float  # in units of the score: g(score) >= threshold if and only if score >= cut

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        if not limit:
            return
        ledger.event("requests")
        answer = answer_of(self.small, new_state(self.small, ids), ids, choose, limit)
        if answer.complete and self.keeps(answer, ids):
            ledger.event("small answers kept")
            yield from answer.tokens
            # After the end of a text a row may yield anything (see ``TokenLoop.batch``).
            yield from repeat(answer.tokens[-1], limit - len(answer.tokens))
        else:
            yield from self.inner(model, state, ids, choose, limit)

    def keeps(self, answer: Answer, ids: Sequence[int]) -> bool:
        return self.score(answer, ids) >= self.cut


# Scores: the more confident, the higher ----------------------------------------------------------


@part
class MeanLogprob(Part):
    def __call__(self, answer: Answer, ids: Sequence[int] = ()) -> float:
        return float(np.mean(answer.logprobs))


@part
class LowestProbability(Part):
    def __call__(self, answer: Answer, ids: Sequence[int] = ()) -> float:
        return float(np.exp(np.min(answer.logprobs)))


@part
class Certainty(Part):
    """1 - mean entropy / ln V: 1 if every token was certain, 0 if all were equally likely."""

    def __call__(self, answer: Answer, ids: Sequence[int] = ()) -> float:
        return 1 - float(np.mean(answer.entropies))


@part
class AtRandom(Part):
    """The baseline: a uniform number, always the same for a prompt."""

    seed: int

    def __call__(self, answer: Answer, ids: Sequence[int]) -> float:
        return uniform_of(ids, self.seed)


SCORES = {"logprob": MeanLogprob(), "lowest": LowestProbability(), "entropy": Certainty()}


# Offline: calibration ----------------------------------------------------------------------------


class Isotonic(NamedTuple):
    """A non-decreasing step function: g(score) = p[i] from score[i] up to score[i + 1]."""

    score: np.ndarray  # (m,) ascending: where each step begins
    p: np.ndarray  # (m,) ascending

    def __call__(self, score: float) -> float:
        """Scores below all steps have the first step's probability."""
        return float(self.p[max(int(self.score.searchsorted(score, side="right")) - 1, 0)])

    def cut(self, threshold: float) -> float:
        """The lowest score with g(score) >= threshold: -Inf if all have it, +Inf if none has."""
        enough = np.flatnonzero(self.p >= threshold)
        if not len(enough):
            return np.inf
        return -np.inf if enough[0] == 0 else float(self.score[enough[0]])


def isotonic(scores: Sequence[float], right: Sequence[bool]) -> Isotonic:
    """The non-decreasing step function with the least squared error to ``right`` (1 or 0), by
    pooling adjacent violators: go up the scores, each a block of its own; while the mean of the
    last block is not above that of the block before it, merge the two."""
    blocks: list[list] = []  # [first score, sum of right, count]
    for score, is_right in sorted(zip(scores, map(float, right))):
        if blocks and blocks[-1][0] == score:  # equal scores cannot be told apart
            blocks[-1][1:] = blocks[-1][1] + is_right, blocks[-1][2] + 1
        else:
            blocks.append([score, is_right, 1])
        while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
            _, total, count = blocks.pop()
            blocks[-1][1:] = blocks[-1][1] + total, blocks[-1][2] + count
    first, total, count = map(np.array, zip(*blocks))
    return Isotonic(first, total / count)


def share_for(budget: float, ratio: float) -> float:
    """The share of the small answers that has to be kept; ratio: c_s / c_b."""
    if budget < ratio:
        raise MinitxError(
            f"cascade: the small model alone takes {ratio:.3f} of the big one's multiply-adds, so "
            f"no threshold meets budget={budget:g}; give at least that, or a smaller model."
        )
    return max(1 + ratio - budget, 0.0)


# Cost --------------------------------------------------------------------------------------------


def expected_cost(accept: float, c_s: float, c_b: float) -> float:
    """Mean cost of a request of which the share ``accept`` of the small answers is kept."""
    return c_s + (1 - accept) * c_b


def break_even(c_s: float, c_b: float) -> float:
    """The accept rate above which a cascade costs less than the big model alone."""
    return c_s / c_b


def check_pays(accept: float, ratio: float) -> None:
    if accept <= ratio:
        warn(
            f"cascade: {accept:.0%} of the small answers to calibration prompts are kept, and the "
            f"small model takes {ratio:.0%} of the big one's multiply-adds, so both together take "
            "at least as much as the big model alone; use a lower threshold or a smaller model."
        )


# Notes:
#
# Accuracy by hops against cost, on 592 questions of 100 held-out stories. Half of 623 questions of
# the calibration split fitted g, the other half set the thresholds. Cost: multiply-adds, relative
# to stories alone. The last column is the difference to random routing at the same cost, in points,
# with its 95 % bootstrap interval over stories:
#
#                        right   counts    1 hop   2 hops   3 hops     cost   above random
#     stories-draft     43.2 %   63.3 %   43.6 %   44.2 %   23.3 %    0.056
#     budget=0.3        62.2 %   63.3 %   64.9 %   53.7 %   56.7 %    0.340   +2.7 (-1 to +7)
#     budget=0.5        78.2 %   65.3 %   81.7 %   69.5 %   80.0 %    0.606   +3.6 (0 to +7)
#     budget=0.7        86.5 %   73.5 %   88.9 %   80.0 %   91.7 %    0.752   +3.5 (0 to +6)
#     budget=0.9        94.6 %   77.6 %   97.4 %   90.5 %   96.7 %    0.911   +2.5 (+1 to +4)
#     threshold=0.9     96.6 %   77.6 %   99.5 %   93.7 %   98.3 %    1.007   -0.5 (-1 to 0)
#     stories           97.1 %   81.6 %   99.5 %   93.7 %  100.0 %    1.000
#
# ``python -m minitx.lab.answer_front --stories 100 --calibration 100`` prints it, and the router's
# rows. The draft recalls hardly anything, so few of its answers to questions are worth keeping. The
# cascade beats random routing, over all these settings, where one or three hops are asked for, but
# not on two hops and counts. At 90 % certainty it keeps 5 % of the answers and costs more than
# stories alone. Budgets are exceeded by up to 0.11, since fewer held-out answers than calibration
# answers reach the threshold.
#
# Calibrated by default, on prompts cut from stories anywhere, threshold=0.9 keeps 30 % of the
# answers to questions, of which a third is wrong: 86.8 % right at a cost of 0.759, 3.5 points above
# random routing ("by text" in that table). Most prompts of that kind are easy (both models agree on
# 88 % of them), and the same probability of the next word need not mean the same before a name as
# before an article. On held-out prompts of the kind that it was calibrated on, at least 90 % of the
# answers are right by default, as asked for (480 prompts of 60 stories; right: what stories says;
# the last row is the router's default):
#
#                        right     cost   above random
#     stories-draft     86.5 %    0.056
#     budget=0.3        94.4 %    0.223   +5.5 (+4 to +8)
#     budget=0.5       100.0 %    0.436   +8.1 (+6 to +10)
#     threshold=0.9     99.4 %    0.304   +9.4 (+7 to +12)
#     router            97.5 %    0.601   +3.2 (+2 to +5)
#
# ``python -m minitx.lab.answer_front --stories 60 --cuts 8`` prints it.
#
# Which score: on answers of one token, logprob and lowest are the same, and rank an answer that
# agrees above another in 89.7 % of all pairs, entropy in 86.4 % (of 4 tokens: lowest in 78.9 %,
# logprob in 77.3 %, entropy in 75.3 %; --score, --tokens). lowest is the default since its
# thresholds hold for other lengths: calibrated on one token and asked for four, 98.3 % of all
# answers agree, at a cost of 0.69; with logprob 73.5 %, at 0.30 (--cuts 8 --tokens 4 --score
# logprob). A mean favours long answers with one doubtful word; the sum of ln p would favour short
# ones.
#
# An answer that is kept ends where the small model ends it. If the caller asks for more tokens
# after the end of a text (a batch, until its last row ends), the end is repeated.
#
# An answer that the small model's context cuts off is never kept.
#
# With a temperature the small model's answer is a sample, whose score is that of the tokens drawn.
# Calibration is greedy.
#
# The big model cannot use the small one's keys and values, so the work of a rejected answer is
# lost.
#
# Two models only. For three, ``inner`` would be a second cascade; the registry applies each
# technique once.
