"""Prompt lookup decoding: the text so far is the draft, and one forward pass verifies it.

From top to bottom: the card and the options; the draft, which searches the text; notes. The rule
that accepts or replaces a draft token and the decoding loop are in
minitx/shared/draft_and_verify.py.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated

from minitx.decode import Sampler
from minitx.model import Transformer
from minitx.shared.draft_and_verify import Draft, Drafting, Proposal, Speculative
from minitx.shared.draft_length import AdaptiveLength, FixedLength, Gamma
from minitx.shared.plain_loop import need_plain_loop
from minitx.state import State
from minitx.technique import at_least, technique
from minitx.tree import part


@technique(
    level="decode",
    exact=True,
    neutral={"gamma": 0},
    demo={"gamma": 3},
    event="draft tokens proposed",
    presets={"author": {"longest": 3, "gamma": 10}},
)
def prompt_lookup(
    lm,
    *,
    gamma: Gamma = 4,
    longest: Annotated[
        int, "length of the longest n-gram that is searched for", at_least(1, limit=64)
    ] = 3,
    adapt: Annotated[
        bool, "after each round, gamma grows by 2 if all tokens were accepted, else shrinks by 1"
    ] = False,
):
    """Propose what followed the last tokens earlier in the text; one forward pass verifies it.

    Paper:     none; Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/
               prompt-lookup-decoding.
    Fidelity:  the authors' code. Theirs takes the first occurrence that gamma tokens follow
               (gamma=10); ours the latest, and fewer tokens if the text ends (Notes).
    Kind:      exact: samples follow the model's distribution; greedy text is the same, except for
               ties that rounding decides.
    Idea:      Texts repeat themselves: names, phrases, code. What followed the last few tokens at
               their previous occurrence is a draft that costs nothing; one pass verifies all of it.
    Offline:   nothing.
    Online:    one round; t[1..T]: the prompt and the completion so far
               for n = longest, ..., 1: find the latest i < T with t[i-n+1..i] = t[T-n+1..T];
                   stop at the first n for which there is one
               x = t[i+1 .. i+gamma]             fewer where the text ends; none if there is no i
               p[1], ..., p[gamma+1]             one pass over t[T] and x
               accept x[j] with probability p[j](x[j]), j = 1, 2, ... (greedy: if it is the argmax)
               at the first rejection, draw from p[j] without x[j], normalized; drop the rest of x
               if all are accepted, draw one more token from p[gamma+1]
    Saves:     sequential passes, so bytes of weights read (0.71x on stories); multiply-adds rise
               (1.68x), by those of the rejected tokens.
    In NumPy:  about as fast as plain decoding on stories, slower at temperature 1 (minitx frontier
               decoding --methods prompt_lookup).
    Not for:   text that does not repeat itself; high temperatures, at which p[j](x[j]) is small;
               batches, whose sequences are decoded one by one.
    Proof:     tests/skip/test_prompt_lookup.py; literal version:
               tests/skip/literal_prompt_lookup.py
    Tutorial:  tutorials/18_guessing_without_a_draft.py
    """
    if gamma == 0:
        return lm
    need_plain_loop(lm, "prompt_lookup")
    length = AdaptiveLength(gamma) if adapt else FixedLength(gamma)
    return replace(lm, decode=Speculative(PromptLookup(longest), length))


# Online ------------------------------------------------------------------------------------------


@part
class PromptLookup(Draft):
    """No model: proposes what followed the last tokens where they occurred earlier in the text."""

    longest: int  # n of the longest n-gram that is searched for

    def begin(self, model: Transformer, state: State) -> Drafting:
        return Searching(model, state, self.longest)


class Searching(Drafting):
    """A ``PromptLookup`` at work on one sequence. Its index of the text only grows, since the loop
    shows it no token that may still be rejected."""

    def __init__(self, model: Transformer, state: State, longest: int):
        super().__init__(model, state)
        self.index = NgramIndex(longest)

    def propose(self, text: list[int], sampler: Sampler) -> Iterator[Proposal]:
        return map(Proposal, self.index.continuation(text))


class NgramIndex:
    """The latest occurrence of each n-gram, n = 1 .. ``longest``, of a growing text."""

    def __init__(self, longest: int):
        self.longest = longest
        self.after: dict[tuple[int, ...], int] = {}  # n-gram: where its latest occurrence ends
        self.read = 1  # the n-grams text[end - n : end] are indexed for every end below this

    def continuation(self, text: list[int]) -> list[int]:
        """The tokens that followed an earlier occurrence of the last n tokens, for the largest n
        that has one; the latest occurrence if there are several. The text must begin with that of
        the last call."""
        for end in range(self.read, len(text)):
            for n in range(1, min(self.longest, end) + 1):
                self.after[tuple(text[end - n : end])] = end
        self.read = max(self.read, len(text))
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            if (end := self.after.get(tuple(text[-n:]))) is not None:
                return text[end:]
        return []


# Notes:
#
# - The draft is deterministic, so q is one-hot, and min(1, p(x) / q(x)) is p(x).
# - The index holds at most ``longest`` n-grams per token; a search takes as long in a long text.
# - adapt=true is the "heuristic" schedule of the transformers library. It needs no probabilities of
#   the draft, and a lookup has none.
# - python -m minitx.lab.loops prompt_lookup gamma=1,2,4,10
#   on stories, 20 prompts of 32 tokens, 48 new ones each (adapt=true; --temperature 1). Relative to
#   plain decoding, prefill included, which is one of the passes:
#
#                               accepted   passes a token   multiply-adds   weight bytes
#       gamma=1                    48 %         0.81            1.15x           0.81x
#       gamma=2                    34 %         0.76            1.32x           0.76x
#       gamma=4 (default)          22 %         0.72            1.68x           0.71x
#         adapt=true               33 %         0.74            1.36x           0.74x
#         temperature 1            10 %         0.86            1.96x           0.86x
#       gamma=10                   12 %         0.70            2.57x           0.69x
#
#   longest=1 and 2 give the same within 1 %: a story seldom repeats three tokens. A text repeats
#   more the longer it is: 1.9 tokens per pass after 400 tokens (minitx frontier decoding --methods
#   prompt_lookup --length 400 --new 60), 1.5 after 32.
# - The first occurrence instead of the latest gave fewer tokens per pass at the same gamma, in a
#   variant that is not kept here: 1.55 instead of 1.65 on 16 stories continued by 100 tokens. So
#   there is no option for it.
