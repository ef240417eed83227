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
from minitx.shared.draft_length import AdaptiveLength, FixedLength
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
    gamma: Annotated[
        int, "draft tokens per round, at most; 0 is plain decoding", at_least(0, limit=1024)
    ] = 4,
    longest: Annotated[int, "tokens to search for, at most", at_least(1, limit=64)] = 3,
    adapt: Annotated[
        bool, "after each round, gamma grows by 2 if all was accepted, else it shrinks by 1"
    ] = False,
):
    """Propose what followed the last tokens earlier in the text; one forward pass verifies it.

    Paper:     none; Saxena, "Prompt Lookup Decoding", 2023, github.com/apoorvumang/prompt-lookup-
               decoding.
    Fidelity:  the authors' code, from notes on it. Its search takes the first occurrence, and only
               one that gamma tokens follow; ours takes the latest, and fewer tokens if it ends.
    Kind:      exact: samples follow the model's distribution; greedy text is the same, except for
               ties that rounding decides.
    Idea:      Texts repeat themselves: names, phrases, code. What followed the last few tokens the
               last time is a guess that costs nothing, and one pass checks several tokens.
    Offline:   nothing.
    Online:    one round; t[1..T]: the prompt and the completion so far
               for n = longest, ..., 1: find the latest i < T with t[i-n+1..i] = t[T-n+1..T];
                   stop at the first n that occurs
               x = t[i+1 .. i+gamma]             fewer where the text ends; none if nothing occurs
               verify x in one pass, as in speculative, with a one-hot q: accept x[j] with
               probability p[j](x[j]), else draw from p[j] without x[j]
    Saves:     sequential passes of the model, so bytes of weights read. Multiply-adds rise by those
               of the rejected tokens.
    In NumPy:  0.56x the weight bytes on stories, about as fast as plain decoding there (Notes).
    Not for:   text that does not repeat itself; high temperatures, which seldom accept; batches,
               whose sequences are decoded one by one.
    Proof:     tests/skip/test_prompt_lookup.py; literal version:
               tests/skip/literal_prompt_lookup.py
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
