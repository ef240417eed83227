"""Several tokens from one pass of the model: something cheap drafts them, the model checks them.

Here are the token loop that does so, what may draft (a small model, the model's own first blocks, a
look into the text so far), and what it should gain. Not here: drafts that share the model's cache,
trees of drafts, and drafts of a length that adapts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minitx import ledger
from minitx.checkpoints.find import shipped
from minitx.decode import Sampler, TokenLoop
from minitx.errors import MinitxError
from minitx.lm import load
from minitx.model import Stack, Transformer
from minitx.second_model import first_blocks, load_second, why_another_vocabulary
from minitx.state import State
from minitx.technique import need, owner, technique
from minitx.tree import Part, part, walk

SHIPPED_DRAFT = "stories-draft"
Drafted = list[tuple[int, np.ndarray | None]]  # (x_i, q_i); None for a q that is all on x_i


@technique(
    level="decode",
    exact=True,
    neutral={"gamma": 0},
    demo={"draft": "lookup", "gamma": 3},
    event="tokens drafted",
)
def speculative(lm, *, draft: str = "auto", gamma: int = 4):
    """Something cheap drafts gamma tokens, and one pass of the model checks all of them.

    Paper: Yaniv Leviathan, Matan Kalman and Yossi Matias, 2022, "Fast Inference from Transformers
        via Speculative Decoding", arXiv 2211.17192; the same rule in Charlie Chen et al., 2023,
        "Accelerating Large Language Model Decoding with Speculative Sampling", arXiv 2302.01318.
        Drafting with the first blocks is after LayerSkip (Mostafa Elhoushi et al., 2024, arXiv
        2404.16710), looking into the text after Apoorv Saxena's prompt-lookup-decoding, which is
        code and no paper.
    Kind: exact: greedily the same text (but for ties that rounding decides), and when sampling the
        same distribution. It draws other random numbers, so that a seed gives another sample than
        without it; the same one on every run.
    Skips or precomputes: passes of the model that wait for each other, and with each the reading of
        all weights. No multiply-add is skipped, and some are wasted on tokens that are refused.
    Offline: nothing is computed. draft = the name or path of a model with the same vocabulary;
        "self": the model's own first half of its blocks and its head; "lookup": the longest of the
        last 3, 2 or 1 tokens that stood in the text before, and what followed them there; "auto",
        chosen here: stories-draft if it has the model's tokenizer, else "lookup".
    Online: one round, with P tokens so far, of which the last has not been run yet: x_i ~ q_i for
        i = 1..gamma from the draft; p_1..p_(gamma+1) from one pass of the model on the last token
        and x_1..x_gamma. Accept x_i with probability min(1, p_i(x_i) / q_i(x_i)) up to the first
        that is refused, which is replaced by t ~ max(0, p_i - q_i), normalised; if none is, t ~
        p_(gamma+1). That gives n accepted tokens and t. Both caches are rewound to P + n tokens.
        p and q are what the sampler draws from, after temperature, top-k and top-p; greedily, and
        for "lookup", q_i is all on x_i.
    Saves: with alpha = E[sum min(p, q)], tokens a round = (1 - alpha^(gamma+1)) / (1 - alpha) in
        the place of 1, for the time gamma c + v: c is one step of the draft and v the pass over
        gamma + 1 tokens, both in steps of the model. The paper has v = 1, as weights are read once;
        in NumPy it is not 1, because several rows cost a matrix product more than one row.
    Neutral: gamma = 0, which leaves the token loop as it is and needs no draft.
    Not for: a draft of another vocabulary; "self" on one block, or on a stack that another
        technique has replaced. Rows of a batch accept different numbers of tokens, so each is
        decoded by itself, in turns: right, but nothing is shared between rows.
    """
    if gamma < 0:
        raise MinitxError(f"speculative drafts gamma = {gamma} tokens; give 0 or more.")
    if gamma == 0:
        return lm
    return replace(lm, decode=Speculative(find_draft(lm, draft), gamma))


# What it should gain -----------------------------------------------------------------------------


def tokens_per_round(alpha: float, gamma: int) -> float:
    """Expected tokens from one pass of the model, if each drafted one is accepted with probability
    alpha whatever happened before: 1 + alpha + ... + alpha^gamma (Leviathan et al., equation 1)."""
    return sum(alpha**i for i in range(gamma + 1))


def speedup(alpha: float, gamma: int, c: float, v: float = 1.0) -> float:
    """Expected tokens a second over those of plain decoding. c: the time of one step of the draft,
    v: that of the model's pass over gamma + 1 tokens, both in steps of the model."""
    return tokens_per_round(alpha, gamma) / (gamma * c + v)


def operations(alpha: float, gamma: int, c: float) -> float:
    """Expected multiply-adds a token over those of plain decoding; c: the draft's for one token, in
    those of the model."""
    return (gamma * c + gamma + 1) / tokens_per_round(alpha, gamma)


# The loop ----------------------------------------------------------------------------------------


@part
class Speculative(TokenLoop):
    """Rounds of gamma drafted tokens and one pass of the model, which give 1 to gamma + 1 tokens.

    draft: called with (text, gamma, choose, memory), gives at most gamma pairs (x_i, q_i).
    Between rounds the model's state holds all tokens but the last, which waits for its pass.
    """

    draft: Part
    gamma: int

    def __call__(
        self, model: Transformer, state: State, ids: Sequence[int], choose: Sampler, limit: int
    ) -> Iterator[int]:
        """Yield at most ``limit`` tokens after the prompt ``ids``: see ``TokenLoop``."""
        text = list(ids)
        end = len(text) + limit
        memory = self.draft.new_state()
        if limit and state.position < len(text) - 1:
            model.hidden(text[state.position : -1], state)  # nothing is chosen there: no head
        while len(text) < end:
            room = end - len(text) - 1  # one token comes from the model in any case
            drafted = self.draft(text, min(self.gamma, room), choose, memory)
            logits = model(text[-1:] + [x for x, _ in drafted], state)  # (gamma + 1, V)
            new = accepted(logits, drafted, choose)
            text += new
            state.rewind(len(text) - 1)  # what was run of the refused tokens is forgotten
            memory.rewind(min(memory.position, len(text) - 1))
            ledger.event("tokens drafted", len(drafted))
            ledger.event("tokens accepted", len(new) - 1)
            ledger.event("target calls")
            yield from new


def accepted(logits: np.ndarray, drafted: Drafted, choose: Sampler) -> list[int]:
    """The 1 to gamma + 1 tokens of a round: the drafted ones up to the first that is refused, then
    one of the model's own. logits (gamma + 1, V): row i scores the token in the place of x_i."""
    new = []
    for row, (x, q) in zip(logits, drafted):
        new.append(agreed(row, x, q, choose))
        if new[-1] != x:
            return new
    return [*new, choose(logits[-1])]


def agreed(logits: np.ndarray, x: int, q: np.ndarray | None, choose: Sampler) -> int:
    """A token drawn from the model's p, but such that it is x, drawn from q, as often as possible.

    It is x with probability min(1, p(x) / q(x)), which in all is min(p, q)(x); what p has beyond
    q is drawn otherwise. The sum of both is p.
    """
    if choose.temperature == 0:
        return choose(logits)
    p = choose.probabilities(logits)  # (V,)
    q_x = 1.0 if q is None else q[x]
    keep = min(p[x], q_x)
    if choose.draw(np.array([q_x - keep, keep])):
        return x
    return choose.draw(beyond(p, x, q))


def beyond(p: np.ndarray, x: int, q: np.ndarray | None) -> np.ndarray:
    """max(0, p - q) (V,), not normalised; p itself should rounding leave nothing of it."""
    if q is None:
        rest = p.copy()
        rest[x] = 0
    else:
        rest = np.maximum(p - q, 0)
    return rest if rest.any() else p


# What drafts -------------------------------------------------------------------------------------


def find_draft(lm, draft: str) -> Part:
    """The part that drafts for this language model, by the option's value."""
    if draft == "lookup":
        return PromptLookup()
    if draft == "self":
        return DraftModel(first_half(lm.model))
    if draft == "auto":
        if SHIPPED_DRAFT not in shipped():
            return PromptLookup()
        other = load(SHIPPED_DRAFT)
        known = lm.tokenizer is not None and not why_another_vocabulary(lm, other)
        return DraftModel(other.model) if known else PromptLookup()
    instead = "draft=self or draft=lookup"
    return DraftModel(load_second(lm, draft, "speculative", "draft", instead).model)


def first_half(model: Transformer) -> Transformer:
    """The model with the first half of its blocks only, rounded down; weights are shared."""
    for _, node in walk(model):
        if node.frees_rows:
            raise MinitxError(
                f"speculative cannot draft with draft=self: {owner(node)} frees cache rows, so the "
                "draft could not take back tokens that are rejected; use draft=lookup."
            )
    need(model.stack, Stack)
    half = len(model.stack.blocks) // 2
    if not half:
        raise MinitxError(
            "speculative cannot draft with half of a model of one block; give another draft."
        )
    return first_blocks(model, half, "speculative")


@part
class DraftModel(Part):
    """A model that drafts token by token, with a cache of its own."""

    model: Transformer

    def new_state(self) -> State:
        return self.model.new_state()

    def __call__(self, text: list[int], gamma: int, choose: Sampler, memory: State) -> Drafted:
        """At most gamma tokens after ``text``, of which ``memory`` may have seen the beginning;
        fewer where the draft's context ends. Each with the q (V,) that it was drawn from."""
        drafted: Drafted = []
        ids = text[memory.position :]  # after a round in which all were accepted: two tokens
        # The last drafted token is not run, so it needs no room in the draft's context.
        for _ in range(min(gamma, self.model.config.context - len(text) + 1)):
            logits = self.model.next_logits(ids, memory)
            drafted.append(self.drawn(logits, choose))
            ids = [drafted[-1][0]]
        return drafted

    def drawn(self, logits: np.ndarray, choose: Sampler) -> tuple[int, np.ndarray | None]:
        if choose.temperature == 0:
            return choose(logits), None
        q = choose.probabilities(logits)
        return choose.draw(q), q


@part
class PromptLookup(Part):
    """Drafts what followed the last tokens where they stood in the text before."""

    longest: int = 3  # tokens that are looked for, at most

    def new_state(self) -> State:
        return State(0, 0)  # the text is all that it needs to know

    def __call__(self, text: list[int], gamma: int, choose: Sampler, memory: State) -> Drafted:
        return [(x, None) for x in continuation(text, self.longest, gamma)]


def continuation(text: list[int], longest: int, k: int) -> list[int]:
    """At most k tokens that followed an earlier place of the text's last n tokens, for the largest
    n <= longest that has one; of several places the last, chosen here. Nothing if there is none."""
    ids = np.array(text)  # (P,)
    for n in range(min(longest, len(text) - 1), 0, -1):
        before = sliding_window_view(ids[:-1], n)  # (P - n, n): all but the last tokens themselves
        places = np.flatnonzero((before == ids[-n:]).all(-1))
        if len(places):
            after = int(places[-1]) + n
            return text[after : after + k]
    return []
