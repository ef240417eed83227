"""A cascade of two models: the small one answers, and a confident answer is kept.

This file: the card and options, the token loop (online), the scores, the calibration to a
probability and the threshold under a budget (offline), the cost formula, notes. The small model's
answers and the calibration examples are in shared/small_answers.py.
"""

from collections.abc import Callable, Iterator, Sequence
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
        "confidence: mean log-probability of the answer's tokens; the lowest probability of one; "
        "1 - mean entropy / ln V",
    ] = "lowest",
    choose: Annotated[
        Literal["score", "random"], "keep answers by their score, or a random baseline"
    ] = "score",
    tokens: AnswerTokens = 1,
    stories: Stories = 32,
    cuts: Cuts = 8,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """A small model answers first; the big one answers where it is not confident (FrugalGPT).

    Paper:     Chen et al., "FrugalGPT: How to Use Large Language Models While Reducing Cost and
               Improving Performance", 2023, arXiv 2305.05176; of it, the cascade.
    Fidelity:  a reconstruction from the abstract and the authors' code. Two models, not three or
               more; the scorer is a formula with isotonic calibration, not a trained DistilBERT.
    Kind:      approximate; exact with threshold > 1, where the big model answers alone.
    Idea:      Many requests are easy. Let the small model answer, look at its answer, and pay for
               the big model only where the answer is doubtful.
    Offline:   prompts x from calibration texts; y_s, y_b: both models' greedy answers; an answer is
               right if y_s = y_b, so no labels are needed
               first half:  g = isotonic fit of P(right) on the score (pool adjacent violators)
               second half: with a budget, the threshold that keeps a = 1 + c_s / c_b - budget
    Online:    y_s = the small model's whole answer to the prompt
               score = the lowest p(token) of its tokens, the end of text included
               g(score) >= threshold: y_s is the answer
               else: the big model answers, from the prompt (what y_s took is lost)
    Saves:     E[cost] = c_s + (1 - a) c_b multiply-adds; a: share that is kept. Less than the big
               model's c_b only if a > c_s / c_b. Scores take V multiply-adds per token.
    In NumPy:  0.65x of the time at 0.57x of the multiply-adds; the small model alone 0.13x at 0.06x
               (stories, prompts of 130 tokens). The first token comes late: it waits for the whole
               small answer, and then for the big model's prefill if that is not kept.
    Not for:   streaming; long completions (minitx generate: the answer is all of it), of which
               hardly any is the big model's. Calibrate on prompts and answers of your kind and
               length (calibrate, cuts, tokens): a threshold need not hold for others (Notes).
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
    confidence = SCORES[score] if choose == "score" else None
    if threshold == 0:
        cut = -np.inf
    elif threshold is not None and confidence is None:
        cut = threshold  # of a uniform number: keeps 1 - threshold of the answers
    else:
        examples = examples_of(
            "cascade", lm, model, stories, cuts, tokens, "use threshold=0 or choose=random"
        )
        ratio = relative_cost(
            lm, examples, tokens,
            lambda ids: answer_of(model, new_state(model, ids), ids, Sampler(), tokens),
        )  # fmt: skip
        scores = [score_of(e.answer, e.prompt, confidence, seed) for e in examples]
        learn, tune = halves([*zip(scores, [e.agrees for e in examples])])
        if budget is not None:
            share = share_for(budget, ratio)
            cut = cut_for_share([s for s, _ in tune], share)
        else:
            cut = isotonic(*zip(*learn)).cut(threshold)
        check_pays(np.mean([s >= cut for s, _ in tune]), ratio)
    loop = Cascade(lm.decode, model, score if confidence else "random", finite(cut), seed)
    return replace(lm, decode=loop)


# Online ------------------------------------------------------------------------------------------


@part
class Cascade(TokenLoop):
    """The small model's answer if its score reaches the cut, else what the inner loop yields."""

    inner: Part
    small: Transformer
    score: str
    cut: float  # in units of the score: g(score) >= threshold if and only if score >= cut
    seed: int

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
            # Past the end of a text (if the caller asks on) anything will do.
            yield from repeat(answer.tokens[-1], limit - len(answer.tokens))
        else:
            yield from self.inner(model, state, ids, choose, limit)

    def keeps(self, answer: Answer, ids: Sequence[int]) -> bool:
        return score_of(answer, ids, SCORES.get(self.score), self.seed) >= self.cut


# Scores: the more confident, the higher ----------------------------------------------------------


def mean_logprob(answer: Answer) -> float:
    return float(np.mean(answer.logprobs))


def lowest_probability(answer: Answer) -> float:
    return float(np.exp(np.min(answer.logprobs)))


def certainty(answer: Answer) -> float:
    """1 - mean entropy / ln V: 1 if every token was certain, 0 if all were equally likely."""
    return 1 - float(np.mean(answer.entropies))


SCORES: dict[str, Callable[[Answer], float]] = {
    "logprob": mean_logprob,
    "lowest": lowest_probability,
    "entropy": certainty,
}


def score_of(answer: Answer, ids: Sequence[int], confidence, seed: int) -> float:
    """The score of an answer to the prompt ``ids``; without a confidence a uniform number."""
    return uniform_of(ids, seed) if confidence is None else confidence(answer)


# Offline: calibration ----------------------------------------------------------------------------


class Isotonic(NamedTuple):
    """A step function that never falls: g(score) = p[i] from score[i] up to score[i + 1]."""

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
    """The step function with the least squared error to ``right`` (1 or 0) among those that never
    fall, by pooling adjacent violators: walk up the scores, each a block of its own; while a block
    has a lower mean than the one before, or the same, merge the two."""
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
# Accuracy by hops against cost, on 592 questions of 100 held-out stories; half of 623 questions of
# the calibration split taught, the other half set the thresholds. Cost: multiply-adds, relative to
# stories alone. The last column is the difference to random routing at the same cost, in points,
# with its 95 % bootstrap interval over stories:
#
#                        right   counts    1 hop   2 hops   3 hops     cost   above random
#     stories-draft     51.4 %   49.0 %   52.1 %   56.8 %   40.0 %    0.056
#     budget=0.3        69.4 %   59.2 %   69.1 %   77.9 %   66.7 %    0.364   +3.2 (0 to +6)
#     budget=0.5        81.1 %   79.6 %   80.7 %   83.2 %   81.7 %    0.574   +4.6 (+2 to +8)
#     budget=0.7        88.5 %   81.6 %   89.4 %   87.4 %   90.0 %    0.725   +4.7 (+2 to +7)
#     budget=0.9        95.8 %   81.6 %   97.7 %   92.6 %  100.0 %    0.927   +2.2 (+1 to +3)
#     threshold=0.9     96.8 %   81.6 %   99.0 %   93.7 %  100.0 %    0.988   +0.2 (0 to +1)
#     stories           97.1 %   81.6 %   99.5 %   93.7 %  100.0 %    1.000
#
# ``python -m minitx.lab.answer_front --stories 100 --calibration 100`` prints it, and the router's
# rows. With this draft, which recalls hardly anything, few answers to questions are worth keeping:
# at 90 % certainty nearly everything goes to the big model. Budgets are exceeded by up to 0.07,
# since fewer held-out answers than calibration answers reach the threshold.
#
# Calibrated by default, on prompts cut from stories anywhere, threshold=0.9 keeps 44 % of the
# answers to questions, of which a third is wrong: 83.8 % right at a cost of 0.617, 5.2 points above
# random routing ("by text" in that table). With stories=16 it kept 75 %, of which 44 % were wrong.
# Most prompts of that kind are easy (the models agree on 72 % of held-out ones), and a probability
# of 0.5 for the next word means another thing before a name than before an article. On held-out
# prompts of its own kind the default keeps its promise: 95.8 % agree at 0.34 of the multiply-adds
# and 0.43 of the bytes of weights; random routing at this cost would have 80 % (96 prompts of 12
# stories; tests/lab/test_defaults.py measures the same on fewer).
#
# Which score: on answers of one token, logprob and lowest are the same, and rank answers that agree
# above others in 97.7 % of all pairs, entropy in 95.1 % (4 tokens: 93.7, 94.3 and 91.5 %; 96
# prompts). lowest is the default since its thresholds hold for other lengths: calibrated on one
# token and asked for four, 95.8 % of all answers agree, at a cost of 0.72; with logprob 72.9 %, at
# 0.43. A mean favours long answers with one doubtful word; the sum of ln p would favour short ones.
#
# An answer that is kept ends where the small model ends it. If the caller asks for more tokens
# after the end of a text (a batch, until its last row ends), the end is repeated.
#
# An answer that the small model's context cuts off is never kept.
#
# With a temperature the small model's answer is a sample, whose score is that of the tokens drawn.
# Calibration is greedy.
#
# The small model's keys and values are of no use to the big one, so what a rejected answer took is
# lost.
#
# Two models only. For three, ``inner`` would be a second cascade; the registry applies each
# technique once.
