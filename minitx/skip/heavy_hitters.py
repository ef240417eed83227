"""H2O: keep the cache rows that have received the most attention, and the most recent ones.

This file: the card and options, the two parts that run (online), their state, notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger, ops
from minitx.model import Attend, Attention
from minitx.shared.attention_weights import attend_in_blocks
from minitx.shared.random_baseline import random_scores
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="attention",
    exact=False,
    neutral={"heavy": 1 << 40},
    after=("quantize_cache",),
    demo={"heavy": 4, "recent": 4},
    event="cache rows evicted",
    presets={"aggressive": {"heavy": 64, "recent": 64}},
)
def heavy_hitters(
    lm,
    *,
    heavy: Annotated[
        int, "rows kept for the attention they received, per key head", at_least(0)
    ] = 128,
    recent: Annotated[int, "most recent rows, which are always kept", at_least(0)] = 128,
    choose: Annotated[
        Literal["attention", "random"], "accumulated attention, or a random baseline"
    ] = "attention",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Evict the cache rows with the least accumulated attention (H2O).

    Paper:     Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large
               Language Models", NeurIPS 2023, arXiv 2306.14048.
    Fidelity:  the authors' code. Ours: the query heads of a group add up their attention weights
               on the key head that they share; rows are evicted at the start of the next step.
    Kind:      approximate; exact while a text is no longer than heavy + recent.
    Idea:      A few tokens receive most of the attention, step after step. Add up what each cached
               token receives, and evict those that receive least.
    Offline:   nothing.
    Online:    in each key head, for each cache row r (a step: the tokens that run together):
               acc[r] += sum of the softmax weights that the queries of this step give to r
               before the keys of the next step are stored, if there are more than heavy + recent
               rows: keep the ``recent`` latest rows and, of the others, the ``heavy`` with the
               largest acc (ties go to the lower index); free the rest.
    Saves:     cache rows: at most heavy + recent + the new tokens (0.50x on stories of 512 tokens).
               A decoded token takes 2 H d (heavy + recent) multiply-adds for attention instead of
               2 H d S (H query heads of width d, S cached tokens).
    In NumPy:  saves memory, not time: every step gathers the rows that stay, head by head, which
               takes longer than the attention that it saves (Notes).
    Not for:   a prompt run in one step, which is dense, however long; techniques that need a cache
               row for every token (elsa, a3, dota, ...).
    Proof:     tests/skip/test_heavy_hitters.py; literal version:
               tests/skip/literal_heavy_hitters.py
    """
    if heavy + recent >= lm.model.config.context:
        return lm
    L, context = len(blocks_of(lm)), lm.model.config.context
    random = random_scores(L, context, seed) if choose == "random" else None

    def change(attn: Part, index: int) -> Part:
        need(attn, Attention)
        need(attn.attend, Attend)
        drawn = None if random is None else random[index]
        cache = HeavyCache(attn.cache, heavy, recent, drawn)
        return replace(attn, cache=cache, attend=AccumulatingAttend(attn.attend.scale))

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class HeavyCache(Part):
    """Evicts the rows above the budget, then stores the new ones."""

    # Declared for techniques that are combined with this one (tree.Part):
    decides = "step"  # which rows stay depends on how the text is divided into steps
    frees_rows = True
    has_history = True  # remembers the accumulated attention, too

    inner: Part  # the KV cache
    heavy: int
    recent: int
    random: np.ndarray | None = table(default=None)  # (context,) scores of the baseline

    @property
    def one_sequence(self) -> bool:
        """True: no batches of different lengths. Random scores are by position, which differs
        between the sequences of a padded batch."""
        return self.random is not None

    def store(self, k, v, layer: Layer):
        if layer.remember:
            begins = accumulated(layer, v.dtype).begin(layer)
            if begins and layer.count > self.heavy + self.recent:
                self.evict(layer)
        self.inner.store(k, v, layer)

    def read(self, layer: Layer):
        return self.inner.read(layer)

    def evict(self, layer: Layer) -> None:
        acc = accumulated(layer)
        scores = acc.total  # (..., K, S)
        if self.random is not None:
            scores = np.broadcast_to(self.random[layer.row_tokens().array], scores.shape)
        if min(layer.keys.shape[-3], layer.values.shape[-3]) < scores.shape[-2]:
            scores = scores.sum(-2, keepdims=True)  # one head is cached for all (absorb_products)
        rows = heaviest_and_latest(scores, self.heavy, self.recent)  # (..., K, heavy + recent)
        ledger.event("cache rows evicted", scores.size - rows.size)
        layer.keep(rows)
        acc.keep(rows)


def heaviest_and_latest(acc, heavy: int, recent: int):
    """The rows (..., heavy + recent) to keep, in ascending order: the ``recent`` last ones of acc
    (..., S) and the ``heavy`` largest of the others; ties go to the lower index."""
    S = acc.shape[-1]
    older = acc[..., : S - recent]
    largest = np.argsort(-older, axis=-1, kind="stable")[..., :heavy]
    latest = np.broadcast_to(np.arange(S - recent, S), (*acc.shape[:-1], recent))
    return np.concatenate([np.sort(largest, -1), latest], -1)


@part
class AccumulatingAttend(Part):
    """Softmax attention that adds up how much each cache row receives."""

    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, layer: Layer):
        if not layer.remember:  # one pass: nothing is ever evicted
            return ops.attention(q, k, v, self.scale, layer.mask())
        T, S = q.shape[-2], k.shape[-2]
        mask, out = layer.mask(), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        received = np.zeros((*k.shape[:-2], S), q.dtype)  # (..., K, S) by each row
        given = None  # (..., K, T, S) by each token to each row
        if T <= fast.ROWS:  # a step of at most 64 tokens: only such a step can be undone in part
            given = np.zeros((*k.shape[:-2], T, S), q.dtype)
        # A block of t = b - a queries at a time, with their softmax weights p (..., K, G*t, end):
        for a, b, end, p in attend_in_blocks(q, k, v, self.scale, mask, out):
            by_token = p.reshape(*k.shape[:-2], -1, b - a, end).sum(-3)  # (..., K, t, end)
            if layer.start is not None:  # what padding attends to does not count
                by_token *= (layer.tokens.own >= 0)[:, None, a:b, None]
            received[..., :end] += by_token.sum(-2)
            if given is not None:
                given[..., a:b, :end] = by_token
        if layer.keys.shape[-3] < k.shape[-3]:  # one head is cached for all (absorb_products)
            received = received.sum(-2, keepdims=True)
            given = None if given is None else given.sum(-3, keepdims=True)
        accumulated(layer).add(received, given, layer)
        return out  # (..., H, T, d)


# State -------------------------------------------------------------------------------------------


def accumulated(layer: Layer, dtype=np.float32) -> "Accumulated":
    return layer.memory.recall(Accumulated, lambda: Accumulated(dtype))


class Accumulated:
    """The attention that each cache row has received, total (..., K, S).

    A step can be undone in part (speculative decoding rejects tokens): then the total is that from
    before the step, plus the attention that the remaining tokens of the step gave. Not all tokens
    of a step need to attend (early_exit), nor at once: so each call notes which ones did.
    """

    def __init__(self, dtype):
        self.dtype = dtype
        self.total: np.ndarray | None = None
        self.before: np.ndarray | None = None  # (..., K, rows before this step): the total then
        self.stored: list[np.ndarray] = []  # positions of the rows that this step has added
        # Of each call in this step, the positions of its T tokens and what each of them gave:
        self.given: list[tuple[np.ndarray, np.ndarray]] = []  # (T,), (..., K, T, S)
        self.step: int | None = None  # the position at which this step began; None: none has

    def begin(self, layer: Layer) -> bool:
        """Tokens are about to be stored. True if they begin a step: before it rows may be evicted,
        so earlier steps can no longer be undone."""
        begins = self.step != layer.shared.step
        if begins:
            self.step = layer.rewindable_to = layer.shared.step
            layer.evicted_by = "heavy_hitters"
            if layer.count:  # rows stored without attending (early_exit) have 0 so far
                self.total = padded(self.total, (*layer.keys.shape[:-2], layer.count), self.dtype)
            self.before, self.stored, self.given = self.total, [], []
        self.stored.append(layer.tokens.array)
        return begins

    def keep(self, rows) -> None:
        """Only rows (..., K, n) are kept."""
        rows = np.broadcast_to(rows, (*self.total.shape[:-1], rows.shape[-1]))
        self.total = self.before = np.take_along_axis(self.total, rows, -1)

    def add(self, received, given, layer: Layer) -> None:
        """Add what each row received from these tokens, (..., K, S). given: token by token,
        (..., K, T, S), or None for many tokens: then their step can only be undone as a whole."""
        positions = layer.tokens.array
        if given is None:
            layer.rewindable_to = max(layer.rewindable_to, int(positions[-1]) + 1)
        else:
            self.given.append((positions, given))
        self.total = padded(self.total, received.shape, self.dtype) + received

    def rewind(self, position: int) -> None:
        """Undo this step's tokens from ``position`` on. The next tokens begin a new step."""
        self.step = None
        stored = np.concatenate(self.stored) if self.stored else np.array([], int)
        if position == 0:
            self.total = self.before = None
            self.stored, self.given = [], []
        elif (stored >= position).any():
            self.undo(stored < position, position)

    def undo(self, left, position: int) -> None:
        """``left``: which of the rows that this step has added stay."""
        first = 0 if self.before is None else self.before.shape[-1]
        rows = np.append(np.arange(first), first + np.flatnonzero(left))
        self.stored = [np.concatenate(self.stored)[left]]
        given, self.given = self.given, []
        for positions, by_token in given:
            attended = by_token[..., positions < position, :]
            seen = rows[rows < by_token.shape[-1]]  # those that were stored by then
            self.given.append((positions[positions < position], attended[..., seen]))
        self.total = self.before
        for _, by_token in self.given:
            received = by_token.sum(-2)
            self.total = padded(self.total, received.shape, self.dtype) + received


def padded(total, shape: tuple, dtype):
    """The total (..., n), or None for 0, with zeros for further rows: as ``shape`` (..., S)."""
    found = np.zeros(shape, dtype)
    if total is not None:
        found[..., : total.shape[-1]] = total
    return found


# Notes:
#
# - Rows are freed when the next step begins, not when this one ends, so the last step can be undone
#   in part if it is short (speculative decoding). Verifying several drafted tokens is one step,
#   without evictions in between: once rows are evicted, the text may differ from that of plain
#   decoding, as with any other division into steps.
# - Figures on stories, 8 chains of 512 tokens, the first 32 in one step and the others one by one.
#   A chain: several stories joined to 512 tokens. Hops: how many facts an answer has to combine.
#   (minitx sweep heavy-hitters heavy=64 recent=64 choose=attention,random --chains 8 --stories 20,
#   then with heavy=128 recent=128 and with heavy=32 recent=32.)
#
#       heavy + recent    choose       cache    loss above dense    1 / 2 / 3 hops
#       128 + 128         attention    0.50x    +0.001              100 / 100 / 92 %
#       128 + 128         random       0.50x    +0.010              100 / 100 / 92 %
#        64 +  64         attention    0.25x    +0.019               92 /  78 / 77 %
#        64 +  64         random       0.25x    +0.081               98 /  72 / 77 %
#        32 +  32         attention    0.13x    +0.128               66 /  28 / 39 %
#        32 +  32         random       0.13x    +0.229               74 /  44 / 39 %
#
#   The rows that have received most attention predict the next word best. But a later question may
#   need others: at an eighth of the cache, random rows answer more questions.
# - Speed: decoding alone, with 440 to 500 tokens in the dense cache, 0.3x of dense at heavy=64
#   recent=64 (one BLAS thread); the speed that sweep prints includes the prompt, which is dense.
