"""Routing between two models: decide from the prompt alone which one answers.

This file: the card and options, the token loop (online), the features, the logistic regression and
the threshold under a budget (offline), the cost formula, notes. The calibration examples are in
shared/small_answers.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.decode import Autoregressive, Sampler, TokenLoop, new_state
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.second_model import SMALL_NAMES, small_model
from minitx.shared.logistic_regression import fit_logistic, sigmoid
from minitx.shared.small_answers import (
    AnswerTokens,
    Cuts,
    Example,
    Stories,
    cut_for_share,
    examples_of,
    finite,
    halves,
    relative_cost,
    uniform_of,
)
from minitx.state import State
from minitx.technique import SEEDS, at_least, between, technique
from minitx.tree import Part, float_type, part


@technique(
    level="answer",
    exact=False,
    neutral={"threshold": 2.0},
    after=("cascade", "majority_vote"),
    demo={"small": "self", "choose": "random", "threshold": 0.5, "seed": 29},
    event="requests routed to the small model",
)
def router(
    lm,
    *,
    small: Annotated[str, "the model for easy prompts: " + SMALL_NAMES] = "auto",
    threshold: Annotated[
        float | None,
        "the small model answers if the predicted probability that it is good enough is at least "
        "this; 0: always, above 1: never",
        between(0, 2),
    ] = None,
    budget: Annotated[
        float | None,
        "instead of a threshold: mean multiply-adds allowed, relative to the big model alone; "
        "default: 0.7 if no threshold is given",
        at_least(0),
    ] = None,
    features: Annotated[
        Literal["tokens", "perplexity"],
        "what the classifier sees of a prompt, besides its length: tokens: its last 16 tokens; "
        "perplexity: how well the small model predicts it, which takes a pass of that model over "
        "every prompt",
    ] = "tokens",
    choose: Annotated[
        Literal["learned", "random"], "route by the classifier, or at random, a baseline"
    ] = "learned",
    tokens: AnswerTokens = 1,
    stories: Stories = 32,
    cuts: Cuts = 8,
    seed: Annotated[int, "seed of choose=random", SEEDS] = 0,
):
    """Route each prompt to a small or the big model by a learned classifier of the prompt.

    Paper:     Ong et al., "RouteLLM: Learning to Route LLMs with Preference Data", 2024, arXiv
               2406.18665, is the best known of several.
    Fidelity:  a reconstruction of the idea from the abstract, as quoted in notes. The paper's
               routers learn from human preferences; ours, a logistic regression, where two models
               agree.
    Kind:      approximate; exact with threshold > 1, where the big model answers everything. On
               questions of stories it is no better than random routing (Notes).
    Idea:      Many requests are easy, and some of them look easy. Whole requests are routed, before
               anything is generated (layer_router and head_router route tokens inside a model).
    Offline:   prompts x from calibration texts; the small model is good enough for x if its greedy
               answer is the big one's
               first half:  w, b = logistic regression of that on f(x)
               second half: with a budget, the threshold that routes a share a of the prompts to the
                            small model, such that E[cost] = budget * c_b
    Online:    f(x) = ln length; the last token; a bag of the last 16 tokens (hashed to 256 buckets)
               r = sigmoid(w f(x) + b)
               r >= threshold: the small model answers, else the big one; the other never runs
    Saves:     E[cost] = c_r + a c_s + (1 - a) c_b multiply-adds; c_s, c_b: an answer of each model;
               a: share of the prompts routed to the small one. Unlike in a cascade, only one model
               runs, but nobody looks at its answer. c_r, the routing: 513; with features=perplexity
               a pass of the small model over the prompt (which c_s then does not repeat).
    In NumPy:  1.3x the throughput at 0.74x of the multiply-adds (stories, one token after prompts
               of 130). Tokens are streamed.
    Not for:   prompts with the same last words, of which earlier text makes some hard and others
               easy. A prompt and its limit must fit the small model's context, else the big model
               answers.
    Proof:     tests/skip/test_router.py; literal version: tests/skip/literal_router.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if threshold is not None and budget is not None:
        raise MinitxError("router: got both threshold and budget; give only one of them.")
    if threshold is not None and threshold > 1:
        return lm
    model = small_model(lm, small, "router", "small")
    rate: Part = AtRandom(seed) if choose == "random" else Always()
    cut = threshold
    if threshold is None or threshold > 0 and choose == "learned":
        examples = examples_of(
            "router", lm, model, stories, cuts, tokens, "use threshold=0 or choose=random"
        )
        learn, tune = halves(examples)
        if choose == "learned":
            seen = PromptTokens() if features == "tokens" else PromptLoss()
            rate = Classifier(seen, *learned(seen, model, learn, float_type(lm.model)))
        if threshold is None:
            trial = Router(Autoregressive(), model, rate, -np.inf)  # all to the small model
            state = new_state(lm.model, [])
            c_s, c_r = (
                relative_cost(lm, examples, tokens, work) for work in (
                    lambda ids: list(trial(lm.model, state, ids, Sampler(), tokens)), trial.score
                )
            )  # fmt: skip
            share = share_for(0.7 if budget is None else budget, c_s, c_r)
            cut = cut_for_share([trial.score(e.prompt)[0] for e in tune], share)
    return replace(lm, decode=Router(lm.decode, model, rate, finite(cut)))


# Online ------------------------------------------------------------------------------------------


@part
class Router(TokenLoop):
    """The small model's plain loop for prompts whose score reaches the cut, else the inner loop."""

    inner: Part
    small: Transformer
    rate: Part  # r: is the small model good enough for a prompt?
    cut: float

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        if not limit:
            return
        ledger.event("requests")
        fits = len(ids) + limit <= self.small.config.context + 1
        score, small_state = self.score(ids) if fits else (-np.inf, None)
        if fits and score >= self.cut:
            ledger.event("requests routed to the small model")
            yield from Autoregressive()(self.small, small_state, ids, choose, limit)
        else:
            yield from self.inner(model, state, ids, choose, limit)

    def score(self, ids: Sequence[int]) -> tuple[float, State]:
        """r, and the small model's state, which may hold most of the prompt by now."""
        state = new_state(self.small, ids)
        return self.rate(self.small, state, ids), state


@part
class Classifier(Part):
    """r = sigmoid(w f(x) + b) of a prompt x."""

    features: Part  # f
    w: np.ndarray  # (features,)
    b: float

    def __call__(self, small: Transformer, state: State, ids: Sequence[int]) -> float:
        x = self.features(small, state, ids)
        ledger.count(multiply_adds=len(x))
        return float(sigmoid(x @ self.w + self.b))


@part
class AtRandom(Part):
    """The baseline: a uniform number, always the same for a prompt."""

    seed: int

    def __call__(self, small: Transformer, state: State, ids: Sequence[int]) -> float:
        return uniform_of(ids, self.seed)


@part
class Always(Part):
    """threshold=0: every prompt goes to the small model, whatever it is."""

    def __call__(self, small: Transformer, state: State, ids: Sequence[int]) -> float:
        return 1.0


# Features ----------------------------------------------------------------------------------------

LAST, BUCKETS = 16, 256  # tokens of the prompt's end that are seen, and hash buckets for them


@part
class PromptTokens(Part):
    """ln length; the last token; a bag of the last 16 tokens."""

    def __call__(self, small: Transformer, state: State, ids: Sequence[int]) -> np.ndarray:
        x = np.zeros(1 + 2 * BUCKETS)
        x[0] = np.log(len(ids))
        x[1 + bucket(ids[-1])] = 1
        for token in ids[-LAST:]:
            x[1 + BUCKETS + bucket(token)] += 1
        return x


def bucket(token: int) -> int:
    """A token's hash bucket, below 256: the leading bits of the token times a constant
    (multiplicative hashing). So the number of weights does not depend on the vocabulary."""
    return (token * 2654435769 % 2**32) * BUCKETS >> 32


@part
class PromptLoss(Part):
    """ln length; the small model's mean loss on the prompt, and on its last 16 tokens."""

    def __call__(self, small: Transformer, state: State, ids: Sequence[int]) -> np.ndarray:
        from minitx.training.loss import token_losses  # training imports techniques

        if len(ids) == 1:
            return np.zeros(3)
        logits = small(ids[:-1], state)  # the last token is run when the answer begins
        losses = token_losses(logits, np.array(ids[1:]))
        return np.array([np.log(len(ids)), losses.mean(), losses[-LAST:].mean()])


# Offline -----------------------------------------------------------------------------------------

RIDGE = 1.0  # penalty of the weights of standardized features


def learned(features: Part, small: Transformer, examples: Sequence[Example], dtype):
    """Logistic regression of "the small answer is right" on the features of the prompt."""
    x = np.array([features(small, new_state(small, e.prompt), e.prompt) for e in examples])
    right = np.array([e.agrees for e in examples], float)
    w, b = fit_logistic(x, right, np.ones(len(right)), RIDGE)
    return w.astype(dtype), b


def share_for(budget: float, c_s: float, c_r: float) -> float:
    """The share of the prompts that the small model has to answer. c_s: cost of a request that is
    routed to it, routing included; c_r: of routing alone; both relative to the big model."""
    if budget < c_s:
        raise MinitxError(
            f"router: the small model alone takes {c_s:.3f} of the big one's multiply-adds, so no "
            f"threshold meets budget={budget:g}; give at least that, or a smaller model."
        )
    return min(max((1 + c_r - budget) / (1 + c_r - c_s), 0.0), 1.0)


# Cost --------------------------------------------------------------------------------------------


def expected_cost(share: float, c_s: float, c_b: float, c_r: float = 0.0) -> float:
    """Mean cost of a request if this share is routed to the small model. c_s: of its answer, c_b:
    of the big one's, c_r: of routing."""
    return c_r + share * c_s + (1 - share) * c_b


# Notes:
#
# On 592 questions of 100 held-out stories, compared with random routing at the same cost, which it
# does not beat. Half of 623 questions of the calibration split trained the classifier, the other
# half set the threshold (``python -m minitx.lab.answer_front --stories 100 --calibration 100``;
# more in skip/cascade.py):
#
#                        right   counts    1 hop   2 hops   3 hops     cost   above random
#     stories-draft     43.2 %   63.3 %   43.6 %   44.2 %   23.3 %    0.056
#     budget=0.3        57.1 %   71.4 %   59.5 %   51.6 %   38.3 %    0.309   -0.6 (-3 to +2)
#     budget=0.5        69.8 %   73.5 %   71.1 %   70.5 %   56.7 %    0.533   -0.7 (-4 to +2)
#     budget=0.7        81.2 %   77.6 %   82.2 %   82.1 %   76.7 %    0.707   +0.8 (-2 to +4)
#     budget=0.9        91.4 %   81.6 %   93.3 %   91.6 %   86.7 %    0.903   -0.2 (-3 to +2)
#     stories           97.1 %   81.6 %   99.5 %   93.7 %  100.0 %    1.000
#
# The last words of a question tell its kind, and the draft is right on some questions of every kind
# and wrong on others: on which depends on who was where earlier, which the end of a prompt does not
# tell. On prompts cut from stories anywhere the router does better: whether the small model is
# right depends on what comes next, a name or a full stop, and the last token tells that
# (tests/skip/test_router.py). The default (budget=0.7) agrees with
# stories on 97.5 % of 480 such prompts at a cost of 0.601, 3.2 points (+2 to +5) above random
# routing; a cascade has 99.4 % at 0.304 (python -m minitx.lab.answer_front --stories 60 --cuts 8).
#
# features=perplexity costs a pass of the small model with all logits over every prompt, 0.09 of the
# big model's multiply-adds on stories. On 345 questions it has 82.6 % right at a cost of 0.949
# (python -m minitx.lab.answers --stories 60 --router features=perplexity); random routing at that
# cost has 94 %, on the line between 44.1 % at 0.056 and 96.8 % at 1.
#
# With a cascade applied too, the cascade answers what is not routed to the small model.
