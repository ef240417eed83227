"""The semantic cache: a prompt that is similar to an earlier one gets that one's answer.

This file: the card and options, the token loop and the embedding of a prompt (online), the store
with its LRU eviction, the arithmetic of false hits, notes.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, NamedTuple

import numpy as np

from minitx import ledger
from minitx.decode import Sampler
from minitx.model import Transformer
from minitx.shared.answer_key import key_of, request
from minitx.shared.answer_loop import AnswerLoop
from minitx.shared.turns import Turns
from minitx.state import State
from minitx.technique import at_least, between, decides, technique
from minitx.tree import Part, part


@technique(
    level="answer",
    exact=False,
    neutral={"entries": 0},
    after=("answer_cache", "cascade", "majority_vote", "router"),
    demo={"threshold": 0.9999, "entries": 8},
    event="semantic hits",
    presets={"gptcache": {"threshold": 0.8}},
)
def semantic_cache(
    lm,
    *,
    threshold: Annotated[
        float,
        "lowest cosine similarity of a hit; above 1: no hits; -1: every prompt hits",
        between(-1, 2),
    ] = 0.9999,
    entries: Annotated[int, "number of answers stored, at most; 0: no cache", at_least(0)] = 1000,
    audit: Annotated[
        int, "every n-th hit is also generated, and compared; 1: every hit", at_least(1)
    ] = 20,
):
    """Answer a prompt with the stored answer of a similar prompt, by embedding similarity.

    Paper:     Bang, "GPTCache: An Open-Source Semantic Cache for LLM Applications Enabling Faster
               Answers and Cost Savings", NLP-OSS 2023.
    Fidelity:  a reconstruction from notes on GPTCache's code. Ours: the embedding; all settings
               must be equal (GPTCache ignores the temperature); hits are audited.
    Kind:      approximate: another prompt's answer. At entries=0 there is no cache.
    Idea:      Many prompts ask what was asked before, in other words. If a stored prompt is similar
               enough, its answer is returned. If the right answer is another one, that is a false
               hit.
    Offline:   nothing.
    Online:    e = mean of the embeddings of the prompt's tokens, scaled to unit norm       (D,)
               sims = M @ e         M (N, D): stored prompts with the same model, loop, limit and
                                    temperature, top_k, top_p, seed
               hit if max(sims) >= threshold: yield the answer stored there
               every n-th hit (audit=n): also generate, and compare; yield the generated answer, and
               store it if it differs
               miss: run the inner loop, store its answer; above entries: evict the least recently
               used answer. Above temperature 0 without a seed: run the inner loop only
    Saves:     the pass over the prompt and all new tokens of a hit, which takes T D additions and
               (N + 2) D multiply-adds instead (T prompt tokens). Nothing if no prompts are similar:
               a miss adds that and a second search, N D, for an answer to replace.
               wrong answers = hit rate * P(wrong | hit)                 of all requests; on stories
               at 0.9995: 0.38 * 0.057 = 0.022, at 0.999: 0.53 * 0.093 = 0.050
               0 wrong of n audited hits: P < 1 - 0.05^(1/n) at 95 %, 0.99 % for n = 300
    In NumPy:  a hit takes 1.3 ms with 1,000 answers stored; generating after 139 prompt tokens of
               stories takes 9 ms for 1 new token, 24 ms for 20. A miss adds the time of two hits.
    Not for:   prompts where one word matters (who? where?): no threshold separates those with
               different answers (Notes). Requests without max_new_tokens, whose limit depends on
               the prompt's length.
    Proof:     tests/skip/test_semantic_cache.py; literal version:
               tests/skip/literal_semantic_cache.py
    Tutorial:  tutorials/17_answer_once.py
    """
    if not entries:
        return lm
    return replace(lm, decode=SemanticCache(lm.decode, SemanticStore(entries), threshold, audit))


# Online ------------------------------------------------------------------------------------------


@part
class SemanticCache(AnswerLoop):
    """Yields the answer of the most similar prompt, or stores what the inner loop yields."""

    inner: Part
    store: Part
    threshold: float
    audit: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``. If the caller
        goes on after the end of a stored text, the model continues it."""
        held = state.position if state.position and decides(model) != "token" else 0
        stored, new = self.begin(model, ids, choose, limit, held)
        yield from stored
        if len(stored) < limit:
            text, left = [*ids, *stored], limit - len(stored)
            for token in self.inner(model, state, text, choose, left):
                new.add(token)
                yield token

    def begin(
        self, model: Transformer, ids: Sequence[int], choose: Sampler, limit: int, held: int = 0
    ) -> "tuple[list[int], Generated]":
        """The stored answer, or [] if it has to be generated, and the generated one: see
        ``AnswerLoop``."""
        fields = request(model, self.inner, choose, limit, held)
        if fields is None or not limit:
            ledger.event("bypassed", fields is None)
            return [], Generated(model, limit, None)
        key, e = key_of(fields), embedding(model, ids)
        hit = self.look_up(e, key)
        if hit is not None and not hit.is_audited:
            return hit.ids, Generated(model, limit, None)
        return [], Generated(model, limit, partial(self.note, e, key, hit))

    def look_up(self, e: np.ndarray, key: bytes) -> "Hit | None":
        """The answer of the most similar prompt, if that is similar enough."""
        with self.store.turns:
            number, similarity = self.store.nearest(e, key)
            if similarity < self.threshold:
                ledger.event("semantic misses")
                return None
            ledger.event("semantic hits")
            answer = self.store.use(number)
            return Hit(answer.ids, self.store.count["hits"] % self.audit == 0)

    def note(self, e: np.ndarray, key: bytes, hit: "Hit | None", ids: list[int]) -> None:
        """Store a new answer; after an audited hit, compare first. A wrong answer stays, beside the
        right one, which is nearer to this prompt."""
        if hit is not None:
            ledger.event("audited hits")
            ledger.event("audited hits that were wrong", ids != hit.ids)
        if hit is None or ids != hit.ids:
            self.store.put(e, key, ids)


class Hit(NamedTuple):
    ids: list[int]  # the stored answer
    is_audited: bool  # the answer is also generated


class Generated:
    """An answer that is being generated. ``note(ids)`` is called once it is complete: at the end of
    the text or the limit."""

    def __init__(self, model: Transformer, limit: int, note: Callable[[list[int]], None] | None):
        self.ends, self.limit, self.note = model.config.eos, limit, note
        self.ids: list[int] = []
        self.ended = False

    def add(self, token: int) -> None:
        """Called before the token is yielded, since the caller may not come back after the last."""
        self.ids.append(token)
        complete = token in self.ends or len(self.ids) == self.limit
        if complete and self.note and not self.ended:
            self.note(list(self.ids))
        self.ended |= complete


def embedding(model: Transformer, ids: Sequence[int]) -> np.ndarray:
    """The embedding (D,) of a prompt: the mean of the embeddings of its tokens, at unit norm."""
    x = model.embed(np.array(ids), slice(0, len(ids)))  # (T, D)
    ledger.count(2 * x.shape[-1], additions=x.size)
    return unit_mean(x)


def unit_mean(x: np.ndarray) -> np.ndarray:
    """The mean (D,) of rows x (T, D), scaled to unit norm."""
    mean = x.mean(0, dtype=np.float64)
    return (mean / max(np.sqrt(mean @ mean), 1e-300)).astype(x.dtype)


# The store ---------------------------------------------------------------------------------------

STEPS = 1 << 20  # similarities are rounded to multiples of 1 / STEPS, so rounding decides no tie


class Answer(NamedTuple):
    e: np.ndarray  # (D,) the embedding of its prompt
    key: bytes  # a hash of everything else that it depends on
    ids: list[int]


@part
class SemanticStore(Part):
    """Answers by number, in LRU order: the least recently used one comes first. It lives as long as
    the language model that it belongs to."""

    entries: int

    def __post_init__(self):
        # Not dataclass fields: a store that is copied or read from a file starts empty.
        object.__setattr__(self, "answers", OrderedDict())  # number -> Answer
        object.__setattr__(self, "count", Counter())  # answers put, hits
        object.__setattr__(self, "turns", Turns())

    def forget(self) -> None:
        with self.turns:
            self.answers.clear()
            self.count.clear()

    def nearest(self, e: np.ndarray, key: bytes) -> tuple[int, float]:
        """(number, similarity) of the answer with this key whose prompt is most similar: the cosine
        of the angle between both embeddings, or -Inf if there is none. Ties go to the older one."""
        numbers = sorted(n for n, answer in self.answers.items() if answer.key == key)
        if not numbers:
            return -1, -np.inf
        M = np.stack([self.answers[n].e for n in numbers])  # (N, D)
        ledger.product(e, M.T)
        similarity = np.rint(M @ e * STEPS) / STEPS  # (N,)
        best = int(similarity.argmax())
        return numbers[best], float(similarity[best])

    def use(self, number: int) -> Answer:
        self.answers.move_to_end(number)
        self.count["hits"] += 1
        return self.answers[number]

    def put(self, e: np.ndarray, key: bytes, ids: list[int]) -> None:
        """Store an answer, instead of one with the same embedding if there is one."""
        with self.turns:
            self._put(e, key, ids)

    def _put(self, e: np.ndarray, key: bytes, ids: list[int]) -> None:
        number, similarity = self.nearest(e, key)
        if similarity >= 1:
            del self.answers[number]
        elif len(self.answers) == self.entries:
            self.answers.popitem(last=False)
            ledger.event("answers evicted")
        self.count["answers"] += 1
        self.answers[self.count["answers"]] = Answer(e, key, ids)


# Notes:
#
# python -m minitx.lab.semantic_hits --stories 200: 2,250 questions about stories. Each question is
# followed by two prompts that differ from it in one word of the story (another name, thing, mood)
# and by the same question about another person or thing of the story. The answer is one word. No
# hit is audited here, and the store has 1,000 entries. random: the baseline, which hits for the
# same requests, but answers with a random stored answer; its P(wrong | hit).
#
#       threshold   hit rate    hits   wrong   P(wrong | hit), 95 % bound   wrong answers   random
#       -1           100.0 %   2,249   2,193        97.5 %     98.0 %          97.5 %         98 %
#       0.9           99.3 %   2,234   2,126        95.2 %     95.9 %          94.5 %         97 %
#       0.99          82.8 %   1,863     833        44.7 %     46.6 %          37.0 %         96 %
#       0.999         53.4 %   1,201     112         9.3 %     10.8 %           5.0 %         97 %
#       0.9995        38.4 %     865      49         5.7 %      7.1 %           2.2 %         97 %
#       0.9999         8.8 %     197       0         0.0 %      1.5 %           0.0 %         98 %
#       1              0.2 %       4       0         0.0 %     52.7 %           0.0 %        100 %
#
# GPTCache's 0.8 (preset=gptcache) is meant for another embedding: with this one every question hits
# and 97 % of the answers are wrong (--stories 60 --thresholds 0.8).
#
# Each question and one that follows it are a pair: 1,678 pairs, of which 247 have two different
# answers. AUC: the probability that a pair with the same answer is more similar than one with
# different answers (0.5: chance). Nearer half: of the more similar half of the pairs, how many have
# different answers?
#
#       embedding                      same answer   another answer (highest)   AUC    nearer half
#       mean of the token embeddings   0.9996        0.9989 (0.9999)            0.74   5.5 % wrong
#       counts of words                0.9982        0.9961 (0.9995)            0.72   5.5 % wrong
#       state of the last token        0.9996        0.6080 (0.9992)            0.98   0.0 % wrong
#
# No threshold separates them: Tom replaced by Ben changes the similarity as much as a sunny day
# replaced by a rainy one. If half of the pairs hit, one hit in 18 is wrong; the default hits only
# where a word is replaced by one with nearly the same embedding. And prompts that differ only in
# word order have a similarity of 1: "Tom sent it to Eva", "Eva sent it to Tom". The hidden state of
# the last token separates most pairs, since the answer is computed from it; but it takes the whole
# pass over the prompt, so that only the new tokens are left to save.
#
# Why an audited hit returns the generated answer: it has been computed, and it is right. It is
# stored if it differs, so from then on the same prompt gets its own answer, at a similarity of 1.
# If the similarity was 1 before (another word order), the new answer replaces the old one. An audit
# counts once its answer is complete; if the caller stops earlier, it does not.
#
# The bound is Clopper and Pearson's: the p at which as many wrong answers among n, or fewer, have
# the probability 0.05. 2 wrong of 300: 2.08 %.
#
# Answers are complete: they end with the text or at the limit. A caller who goes on after the end
# of a stored text gets what the model writes after the prompt and that answer.
