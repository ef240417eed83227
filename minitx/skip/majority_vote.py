"""Majority vote: sample several answers and return the most frequent one.

From top to bottom: the card and the options; the loop; when voting may stop; what counts as the
same answer; the arithmetic of independent and of copying voters; notes.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from minitx import ledger
from minitx.decode import Sampler, TokenLoop, up_to_end
from minitx.errors import MinitxError
from minitx.model import Transformer
from minitx.shared.token_text import TokenText
from minitx.state import State
from minitx.technique import SEEDS, above, at_least, technique
from minitx.tree import Part, part


@technique(
    level="answer",
    exact=False,
    neutral={"votes": 1},
    demo={"votes": 3, "temperature": 0.5},
    event="votes cast",
)
def majority_vote(
    lm,
    *,
    votes: Annotated[
        int, "answers that are sampled, at most; 1: one answer, no vote", at_least(1, limit=1024)
    ] = 5,
    temperature: Annotated[
        float,
        "temperature of the votes if the request is greedy; one that samples keeps its own",
        above(0),
    ] = 0.7,
    same: Annotated[
        Literal["text", "sentence"],
        "which answers are the same: text: those with the same text; sentence: those whose first "
        "sentences end in the same word",
    ] = "text",
    choose: Annotated[
        Literal["majority", "random"],
        "which answer is returned; random: any of the votes, a baseline at the same cost",
    ] = "majority",
    seed: Annotated[int, "seed of the votes if the request is greedy", SEEDS] = 0,
):
    """Sample several answers and return the most frequent one (self-consistency).

    Paper:     Wang et al., "Self-Consistency Improves Chain of Thought Reasoning in Language
               Models", ICLR 2023, arXiv 2203.11171.
    Fidelity:  a reconstruction from the abstract and summaries. Ours: ties go to the answer seen
               first; voting stops when further votes cannot change the result; same=sentence, where
               the paper parses the final answer out of a chain of thought.
    Kind:      approximate: another answer than greedy decoding's; exact at votes=1. It spends more.
               No setting pays on the shipped models: their answers are one word without reasoning,
               so at best the vote finds the word that greedy decoding gives at once (Notes).
    Idea:      Many chains of thought lead to the right answer, and wrong ones to different wrong
               answers. The most likely answer, summed over all chains that lead to it, need not be
               the one at the end of the most likely chain.
    Offline:   nothing.
    Online:    run the prompt once; fork the state for each vote
               vote i = 1..n: sample a completion with a seed made of the request's seed, i and the
                   prompt; a greedy request samples at the option temperature, since n greedy
                   answers would be the same one n times
               two votes are the same if their texts are, without end-of-text (of models without a
                   tokenizer: their ids)
               stop when the leader's margin exceeds the votes left: the result is that of all n
               return the first completion that has the most frequent answer
    Saves:     nothing: at most n completions instead of one; the prompt is read once. Of n
               independent voters (n odd), each right with probability p, the majority is right with
               probability
               sum over k > n/2 of binom(n, k) p^k (1-p)^(n-k)     n = 5: .837 at p = .7, .317 at .4
    In NumPy:  votes run one after another: n times the time of decoding. Nothing is streamed before
               the last vote.
    Not for:   questions that the model gets wrong more often than right, in the same way: a vote
               makes that worse. Open-ended text, where every vote is different and the first wins.
    Proof:     tests/skip/test_majority_vote.py; literal version:
               tests/skip/literal_majority_vote.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if votes == 1:
        return lm
    if same == "sentence" and lm.tokenizer is None:
        raise MinitxError(
            "majority_vote: same=sentence needs a tokenizer, and this model has none; use "
            "same=text."
        )
    text = None if lm.tokenizer is None else TokenText.of(lm.tokenizer)
    canonical = {"text": WholeText, "sentence": LastWord}[same](text)
    loop = AnyVote if choose == "random" else MajorityVote
    return replace(lm, decode=loop(lm.decode, canonical, votes, temperature, seed))


# Online ------------------------------------------------------------------------------------------


@part
class MajorityVote(TokenLoop):
    """Samples answers with the inner loop, and yields the one with the most votes."""

    inner: Part
    canonical: Part  # answer -> its canonical form, which is equal for the same answers
    votes: int
    temperature: float
    seed: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        if not limit:
            return
        self.prefill(model, state, ids)
        first: dict[Any, list[int]] = {}  # canonical form -> the first answer with it, in order
        counts: list[int] = []  # how many answers there are of each form, in the same order
        for voter in self.voters(choose, ids):
            tokens = self.inner(model, state.fork(), ids, voter, limit)
            answer = up_to_end(tokens, model.config.eos)
            form = self.canonical(answer, model.config.eos)
            if form not in first:
                first[form] = answer
                counts.append(0)
            counts[list(first).index(form)] += 1
            left = self.votes - sum(counts)
            if is_decided(counts, left):
                break
        ledger.event("votes cast", sum(counts))
        ledger.event("votes allowed", self.votes)
        found = self.elect(list(first.values()), counts)
        yield from found
        for _ in range(limit - len(found)):  # it has ended: the rows of a batch go on together
            yield found[-1]

    def elect(self, answers: list[list[int]], counts: list[int]) -> list[int]:
        return answers[winner(counts)]

    def prefill(self, model: Transformer, state: State, ids: Sequence[int]) -> None:
        """Run the prompt up to its last token, once for all votes. The inner loop runs it, since it
        may have part of it stored (a prefix cache); the token that it generates is dropped."""
        if state.position < len(ids) - 1:
            next(self.inner(model, state, ids[:-1], Sampler(), 1), None)
            state.rewind(min(state.position, len(ids) - 1))

    def voters(self, choose: Sampler, ids: Sequence[int]) -> Iterator[Sampler]:
        """A sampler for each vote. Their seeds follow from the seed and the prompt of the request,
        so the same request gets the same answer; without a seed, one is drawn."""
        if choose.temperature == 0:
            temperature, seed = self.temperature, self.seed
        else:
            temperature, seed = choose.temperature, choose.seed
        if seed is None:
            seed = int(choose.uniform() * 2**53)
        for number in range(self.votes):
            rng = random.Random(f"vote {number}, seed {seed}: {list(ids)}")
            yield Sampler(temperature, choose.top_k, choose.top_p, rng.getrandbits(53))


@part
class AnyVote(MajorityVote):
    """The random baseline: one of the votes, whatever the others say."""

    def elect(self, answers: list[list[int]], counts: list[int]) -> list[int]:
        return random.Random(self.seed).choices(answers, counts)[0]


def winner(counts: Sequence[int]) -> int:
    """The index of the largest count; ties go to the answer that was seen first."""
    return counts.index(max(counts))


def is_decided(counts: Sequence[int], left: int) -> bool:
    """Is the winner certain, whatever the ``left`` further votes are? counts: in the order in which
    the answers were first seen. In a tie with the leader, an earlier answer wins, a later loses."""
    leader = winner(counts)
    most = [count + left for count in counts] + [left]  # the last: an answer not seen yet
    beaten = (
        i == leader or n < counts[leader] or n == counts[leader] and i > leader
        for i, n in enumerate(most)
    )  # fmt: skip
    return all(beaten)


# The same answer ---------------------------------------------------------------------------------


@part
class WholeText(Part):
    """Answers are the same if their texts are, except for spaces at the ends and end-of-text."""

    text: Part | None  # None: of a model without a tokenizer, ids are compared

    def __call__(self, answer: Sequence[int], eos: Sequence[int]):
        ids = answer[:-1] if answer[-1] in eos else answer
        return (
            tuple(ids) if self.text is None else self.text(ids).decode("utf-8", "replace").strip()
        )


@part
class LastWord(Part):
    """Answers are the same if the last word of their first sentence is."""

    text: Part

    def __call__(self, answer: Sequence[int], eos: Sequence[int]):
        ids = answer[:-1] if answer[-1] in eos else answer
        sentence = self.text(ids).decode("utf-8", "replace").partition(".")[0]
        return "".join(sentence.split()[-1:])


# The arithmetic of voters ------------------------------------------------------------------------


def majority_accuracy(p: float, n: int, copying: float = 0.0) -> float:
    """How often the majority of n voters (n odd) is right, of two possible answers, if each is
    right with probability p. copying: how often all of them copy the first; else they are
    independent."""
    most = range(n // 2 + 1, n + 1)
    independent = sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in most)
    return copying * p + (1 - copying) * independent


# Notes:
#
# - Graded questions of held-out stories, answered in one word; prompt, then n votes at temperature
#   0.7. Right answers in percent (345 questions of stories-draft, 169 of stories), and forward
#   passes for each question, of which the prompt takes one.
#
#                             stories-draft                                stories
#                        all   counts   1 hop   2 hops   3 hops   passes   all   passes
#       greedy          44.1     62.1    43.1     50.9     25.0      1.0   98.2     1.0
#       3 votes         35.4     48.3    33.8     40.0     27.8      3.6   98.2     3.0
#       5 votes         33.9     48.3    30.7     43.6     27.8      5.3   98.2     4.0
#       9 votes         36.8     55.2    34.2     45.5     25.0      8.9   98.2     6.1
#       random of 9     30.1     37.9    27.6     38.2     27.8      8.9   98.2     6.1
#
#   python -m minitx.lab.answers -m stories-draft --stories 60 --majority-vote votes=9 prints a row.
#   9 votes are 7.2 points below greedy (0.9 to 13.3), and 6.7 above one of those votes at random,
#   which costs as much. At best, a vote over one word finds the most likely word, which greedy
#   decoding gives at once; votes of a model that is unsure are worse, since they do not always find
#   it.
# - Whole sentences, of which many have the same answer, right by their last word, in percent:
#
#                                         stories-draft   stories-parallel
#       greedy                                     42.8               54.9
#       9 votes, same=sentence                     41.0               56.9
#       9 votes, same=text                         37.3               48.0
#       random of 9                                41.0               52.0
#
#   python -m minitx.lab.written_answers -m stories-draft --stories 60 --majority-vote votes=9
#   same=sentence (166 questions; stories-parallel: 40 stories, 102 questions) prints two rows. What
#   counts as the same answer matters: whole texts split the votes among phrasings. Otherwise all
#   rows of a column are within chance of each other (the 95 % intervals are +- 7 and wider): here
#   the vote is no better than one of its voters.
# - Early stop saves 1.2 of 9 votes where the model is unsure (stories-draft) and 3.9 of 9 where it
#   is sure (stories), and never changes the result.
# - Why voting may stop where a tie is still possible: the leader wins a tie against an answer that
#   was seen later, so against those "margin = votes left" is enough; against an answer that was
#   seen earlier the margin has to exceed the votes left.
# - The seeds of the votes depend on the prompt too. With the same random numbers for every prompt,
#   the errors of all questions would be correlated.
# - A vote ends at end-of-text. If the answer that wins is shorter than the limit, its end-of-text
#   is repeated, since the rows of a batch go on together.
# - The paper samples up to 40 answers (from memory, unconfirmed). Its gains are on chains of
#   thought, which the story models do not write.
# - With prefix_cache, the prompt is looked up once, before the first vote.
