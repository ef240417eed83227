"""For techniques in which a small model may answer instead of the big one: its answers, and the
examples that calibrate which model answers.

An example is a prompt with the greedy answers of both models. The small answer counts as right if
it equals the big one's, token by token. That needs no labels, so any text will do, and it is what
such a technique promises: the big model's answer for less work. (Labels, where a measurement has
them, can grade both.)
"""

from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.decode import Sampler, new_state, up_to_end
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.model import Transformer
from minitx.progress import bar
from minitx.shared.log_softmax import log_softmax
from minitx.shared.same_beginning import state_for
from minitx.state import State
from minitx.tree import with_empty_stores
from minitx.values import at_least

# The options stories, cuts and tokens of every technique that calibrates like this.
Stories = Annotated[
    int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
]
Cuts = Annotated[
    int,
    "calibration prompts made of each text, which is cut at equal distances; 1: only before its "
    "last tokens",
    at_least(1, limit=1000),
]
AnswerTokens = Annotated[
    int, "tokens of a calibration answer; give the length of the answers that you will ask for",
    at_least(1, limit=1000),
]  # fmt: skip


# The small model's answer ------------------------------------------------------------------------


class Answer(NamedTuple):
    """n tokens, the last of which may be end-of-text, and the model's confidence in each."""

    tokens: list[int]
    logprobs: list[float]  # (n,) of the tokens, under the model's own softmax
    entropies: list[float]  # (n,) of that softmax, relative to the largest possible: 0 to 1
    complete: bool  # ended, or as long as was asked for


def answer_of(
    small: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
) -> Answer:
    """The whole answer after the prompt ``ids``: up to an end of text, at most ``limit`` tokens, or
    fewer where the context of the small model ends."""
    tokens, logprobs, entropies = [], [], []
    room = min(limit, small.config.context - len(ids) + 1)
    ids = ids[state.position :]
    for _ in range(room):
        logits = small.next_logits(ids, state)
        token = choose(logits)
        logprob, entropy = confidence(logits, token)
        tokens.append(token)
        logprobs.append(logprob)
        entropies.append(entropy)
        if token in small.config.eos:
            return Answer(tokens, logprobs, entropies, True)
        ids = (token,)
    return Answer(tokens, logprobs, entropies, room == limit)


def confidence(logits: np.ndarray, token: int) -> tuple[float, float]:
    """(ln p(token), entropy of p / ln V) for p = softmax(logits) (V,), whatever the sampler's
    temperature is."""
    log_p = log_softmax(logits)
    ledger.count(multiply_adds=log_p.size)  # p ln p, summed
    possible = log_p[log_p > -np.inf]  # 0 ln 0 is 0
    entropy = -(np.exp(possible) * possible).sum() / np.log(max(log_p.size, 2))  # of one token: 0
    return float(log_p[token]), float(entropy)


# Who answers -------------------------------------------------------------------------------------


def uniform_of(ids: Sequence[int], seed: int) -> float:
    """A number in [0, 1) drawn for this prompt: the score of a random baseline, which is the same
    whenever the prompt comes."""
    return float(np.random.default_rng([seed, *ids]).random())


def cut_for_share(scores: Sequence[float], share: float) -> float:
    """The threshold that keeps this share of the scores, rounded up: the lowest score that is kept;
    +Inf keeps none and -Inf all, of any other scores too."""
    keep = int(np.ceil(round(len(scores) * share, 6)))
    if keep <= 0:
        return float("inf")
    return float("-inf") if keep >= len(scores) else float(np.sort(scores)[-keep])


def finite(cut: float) -> float:
    """The cut, but no Inf, which cannot be written to a file: any score is between these."""
    return float(np.clip(cut, -1e99, 1e99))


# Calibration -------------------------------------------------------------------------------------


class Example(NamedTuple):
    prompt: list[int]
    answer: Answer  # of the small model
    agrees: bool  # with that of the big one


def examples_of(
    who: str, lm: LM, small: Transformer, stories: int, cuts: int, tokens: int, instead: str
) -> list[Example]:
    """Calibration examples for the technique ``who``, text after text. MinitxError if there are not
    at least two."""
    texts, found = calibration_ids(who, lm, stories, instead), []
    lm = with_empty_stores(lm)
    for ids in bar(texts, f"{who}: calibrate", unit="text", delay=1.0):
        prompts = [ids[:at] for at in cuts_of(len(ids), cuts, tokens)]
        prompts = [p for p in prompts if len(p) + tokens <= small.config.context]

        def of_small(state, prompt):
            return answer_of(small, state, prompt, Sampler(), tokens)

        def of_big(state, prompt):
            return up_to_end(
                lm.decode(lm.model, state, prompt, Sampler(), tokens), lm.model.config.eos
            )

        small_answers, big_answers = (
            in_turn(small, prompts, of_small), in_turn(lm.model, prompts, of_big)
        )  # fmt: skip
        for prompt, answer, big in zip(prompts, small_answers, big_answers):
            found.append(Example(prompt, answer, answer.tokens == big))
    if len(found) < 2:
        raise MinitxError(
            f"{who} needs two calibration prompts or more, cut from texts of more than "
            f"tokens={tokens} tokens, and got {len(found) or 'none'}; give more text, or {instead}."
        )
    return found


def cuts_of(length: int, cuts: int, tokens: int) -> list[int]:
    """Where a text is cut, ascending: the last ``tokens`` tokens are always left to be answered."""
    last = length - tokens
    places = {last - last * j // cuts for j in range(cuts)}
    return sorted(at for at in places if at >= 1)


def in_turn(model: Transformer, prompts: Sequence[list[int]], answer: Callable) -> list:
    """``answer(state, prompt)`` for each of the prompts, every one of which begins with the one
    before it, so that only the rest has to be run."""
    state, held, found = None, (), []
    for prompt in prompts:
        state, held = state_for(model, prompt, held, state), prompt
        found.append(answer(state, prompt))
    return found


def halves(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """The first half, to learn from, and the second, to set thresholds with: other texts, unless
    there is only one."""
    middle = len(examples) // 2
    return examples[:middle], examples[middle:]


def relative_cost(lm: LM, examples: Sequence[Example], tokens: int, work: Callable) -> float:
    """Multiply-adds of ``work(prompt)`` for some of the prompts, relative to those of the model's
    own answers to them."""
    total, of_model = 0, 0
    for example in examples[:: max(len(examples) // SAMPLED, 1)]:
        prompt = example.prompt
        lm = with_empty_stores(lm)
        with ledger.counting(lm) as counts:
            work(prompt)
        total += counts.total().multiply_adds
        with ledger.counting(lm) as counts:
            state = new_state(lm.model, prompt)
            up_to_end(lm.decode(lm.model, state, prompt, Sampler(), tokens), lm.model.config.eos)
        of_model += counts.total().multiply_adds
    return total / of_model


SAMPLED = 6  # prompts whose costs are counted
