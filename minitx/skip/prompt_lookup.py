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
    longest: Annotated[int, "tokens to search for, at most", at_least(1, limit=64)] = 3,
    adapt: Annotated[
        bool, "after each round, gamma grows by 2 if all was accepted, else it shrinks by 1"
    ] = False,
):
    """Propose what followed the last tokens earlier in the text; one forward pass verifies it.

    Paper:     none; Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/
               prompt-lookup-decoding.
    Fidelity:  the authors' code. Theirs takes the first occurrence that gamma tokens follow
               (gamma=10); ours the latest, and fewer tokens if the text ends (Notes).
    Kind:      exact: samples follow the model's distribution; greedy text is the same, except for
               ties that rounding decides.
    Idea:      Texts repeat themselves: names, phrases, code. What followed the last few tokens the
               last time is a guess that costs nothing, and one pass checks several guesses.
    Offline:   nothing.
    Online:    one round; t[1..T]: the prompt and the completion so far
               for n = longest, ..., 1: find the latest i < T with t[i-n+1..i] = t[T-n+1..T];
                   stop at the first n for which there is one
               x = t[i+1 .. i+gamma]             fewer where the text ends; none without an i
               p[1], ..., p[gamma+1]             one pass over t[T] and x
               accept x[j] with probability p[j](x[j]), j = 1, 2, ... (greedy: if it is the argmax);
               at the first rejection, stop; draw from p[j] without x[j]
               if all are accepted, draw one more token from p[gamma+1]
    Saves:     sequential passes, so bytes of weights read (0.70x on stories); multiply-adds rise
               (1.71x), by those of the rejected tokens.
    In NumPy:  about as fast as plain decoding on stories; slower at temperature 1 (Notes).
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

    longest: int  # tokens to search for, at most

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
    """Where each run of 1 .. ``longest`` tokens of a growing text was seen last."""

    def __init__(self, longest: int):
        self.longest = longest
        self.after: dict[tuple[int, ...], int] = {}  # run: the position that followed it last
        self.read = 1  # the runs before the positions below this are in

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
# - The proposals are certain, so q is one-hot, and min(1, p(x) / q(x)) is p(x).
# - The index holds ``longest`` entries per token: a search takes no longer in a longer text.
# - adapt=true is the "heuristic" schedule of the transformers library. It needs no probabilities,
#   which there are none of here.
# - On stories: 12 held-out stories, prompts of 60 tokens, 60 new ones, relative to plain decoding
#   (minitx compare --prompt-lookup counts the same on shorter prompts):
#
#                               accepted   tokens per pass   multiply-adds   weight bytes
#       gamma=1                    45 %         1.30             1.15x           0.79x
#       gamma=2                    30 %         1.39             1.34x           0.74x
#       gamma=4 (default)          19 %         1.47             1.71x           0.70x
#         adapt=true               28 %         1.39             1.39x           0.74x
#         temperature 1            11 %         1.24             1.90x           0.82x
#       gamma=10                   10 %         1.51             2.68x           0.68x
#
#   longest=1 and 2 give the same within 1 %: a story seldom repeats three tokens. It repeats more
#   the longer it is: 2.3 tokens per pass after 400 tokens of other stories.
# - The first occurrence instead of the latest gives fewer tokens per pass at the same gamma: 1.55
#   instead of 1.65 on 16 stories continued by 100 tokens, 2.0 instead of 2.3 after 400 tokens of
#   other stories. So there is no option for it.
