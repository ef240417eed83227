"""LazyLLM: deep layers run only the prompt tokens that the next token needs.

This file: the card and options, the stack that runs (online), its state, notes.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger
from minitx.model import Attend, Stack, Transformer
from minitx.shared.break_even import warn
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import row_by_row
from minitx.shared.token_subset import consecutive, last_and_best, rounded_up, run_subset
from minitx.state import Layer, State, Tokens
from minitx.technique import SEEDS, above, at_least, need, swap, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="stack",
    exact=False,
    neutral={"keep": 1.0},
    demo={"keep": 0.5},
    event="tokens pruned",
    presets={"paper": {"keep": 0.7, "every": 0.3, "first": 1}},
)
def lazy_tokens(
    lm,
    *,
    keep: Annotated[
        float, "share of its tokens that each pruning layer passes on; 1 prunes none", above(0, 1)
    ] = 0.7,
    every: Annotated[
        float,
        "share of the L layers between prunings: after floor(every * i * L) layers",
        above(0, 1),
    ] = 0.3,
    first: Annotated[
        int | None, "layers that always run all tokens; default: L // 2, at least 1", at_least(1)
    ] = None,
    choose: Annotated[
        Literal["attention", "random"], "attention of the last token, or a random baseline"
    ] = "attention",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Prune tokens that the last token ignores; revive them when a later token needs them.

    Paper:     Fu et al., "LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference",
               2024, arXiv 2407.14057.
    Fidelity:  a reconstruction from notes on the paper's full text. As there, generated tokens may
               be pruned too. Ours: the last token always stays; rewinding undoes revivals.
    Kind:      approximate; exact at keep=1, which prunes nothing. No setting pays on the shipped
               models: what a prompt saves, later tokens spend on reviving (0.97x multiply-adds for
               464 + 48 tokens), and answers that need several facts of a story get lost.
    Idea:      To predict one token, later layers need only the tokens that it attends to. The
               others are not lost: their hidden states wait in an auxiliary cache, from which any
               later step may resume them at the layer that they had reached.
    Offline:   nothing.
    Online:    in each step (the prompt, then each new token):
               aux[0] = embeddings of the new tokens, cand = all tokens so far; for each layer l:
                 todo = the tokens of cand without keys and values in l
                 run l for todo, from their hidden states aux[l], attending to cand (causally, at
                 original positions); aux[l+1] = output
                 after floor(every i L) of the L layers, i = 1, 2, ... (a pruning layer):
                   score[j] = mean over heads of softmax(q_last k^T / sqrt(d))[j]
                   cand     = the last token and the best others, ceil(keep |cand|) in all
    Saves:     if n_l of a prompt's n tokens are candidates in layer l, it costs n_l / n of its
               dense products and (n_l / n)^2 of its attention; a pruning layer costs H n_l d more
               for the scores (H query heads of width d). No token ever runs twice through a layer.
    In NumPy:  preset=paper: first token 1.2x to 1.4x sooner (stories, 320 tokens), but each new
               token takes 2 to 2.5 times as long: its step also runs the tokens that it revives
               through deep layers, and copies the visible rows (Notes).
    Not for:   long outputs, which revive nearly every token; scoring a text in one pass, which is
               pruned for its last token; batches with a KV cache (generate decodes prompts one by
               one); attention without softmax over all keys (elsa, a3, ...).
    Proof:     tests/skip/test_lazy_tokens.py; literal version: tests/skip/literal_lazy_tokens.py
    Tutorial:  tutorials/14_which_tokens_matter.py
    """
    need(lm.model.stack, Stack)
    L, context = len(lm.model.stack.blocks), lm.model.config.context
    first = max(1, L // 2) if first is None else first
    cuts = pruning_layers(L, every, first)

    def score(attn: Part, index: int) -> Part:
        return swap(attn, Attend, ScoringAttend) if index + 1 in cuts else attn

    if keep < 1 and rounded_up(keep, context) == context:
        warn(
            f"lazy_tokens: keep={keep:g} of at most {context:,} tokens prunes none, but scores "
            "them in each pruning layer; keep fewer, or use keep=1."
        )
    if cuts and keep < 1 and choose == "attention":
        lm = wrap(lm, "attn", score)
    random = random_scores(L, context, seed) if choose == "random" else None

    def change(model: Transformer) -> Transformer:
        return replace(model, stack=LazyStack(model.stack, keep, cuts, random))

    return swap(lm, Transformer, change)


def pruning_layers(L: int, every: float, first: int) -> tuple[int, ...]:
    """After how many layers tokens are pruned: floor(every * i * L) for i = 1, 2, ... (paper: after
    9, 19 and 28 of 32 layers)."""
    every = max(every, 1 / L)  # a smaller share means after every layer
    wanted = {math.floor(every * i * L + 1e-9) for i in range(1, math.ceil(1 / every) + 1)}
    return tuple(sorted(cut for cut in wanted if first <= cut < L))


# Online ------------------------------------------------------------------------------------------


@part
class LazyStack(Part):
    """The blocks in groups; between two groups, the tokens that go on are selected.

    All layers of a group run the same tokens, so the auxiliary cache is only needed between groups.
    A token that is a candidate in a group was one in every group before, in this step, so it has
    left the layer before, now or in an earlier step.
    """

    # Declared for techniques that are combined with this one (tree.Part):
    decides = "step"  # the last token of a step selects for all
    frees_rows = True  # deep layers have no row for a pruned token
    needs_all_rows = True  # but of the others every row: it knows which row it has stored where
    has_history = True  # the auxiliary cache
    one_sequence = True  # no batches of different lengths

    inner: Part  # the dense stack
    keep: float
    cuts: tuple  # the numbers of layers after which a group ends
    random: np.ndarray | None = table(default=None)  # (L, context) scores of the baseline

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D). For a pruned token, the hidden state that it has reached."""
        if x.ndim > 2:
            return row_by_row(
                self, x, state, "lazy_tokens keeps different tokens for each sequence"
            )
        tokens = state.tokens
        step = tokens.array[0]  # the first position of a step identifies it
        cand = np.arange(tokens.array[-1] + 1)
        for a, b in zip((0, *self.cuts), (*self.cuts, len(self.blocks))):
            layers = state.layers[a:b]
            if a > 0:
                cand = self.select(cand, state.layers[a - 1])
                aux = aux_cache(x, layers)
                aux.rows[tokens.array] = x
                todo = cand[aux.stored[cand] == NEVER]
                note_revived(todo, tokens, x)
                aux.stored[todo] = step
                x, tokens = aux.rows[todo], consecutive(todo)
            x = run_subset(self.blocks[a:b], layers, x, tokens, cand)
            if a == 0:
                out = x.copy()  # all tokens of the step have run
            else:  # those that were not pruned have run further
                new = tokens.array >= step
                out[tokens.array[new] - step] = x[new]
        return out

    def select(self, cand, layer: Layer):
        """The candidates (c,) that go on after a pruning layer, in order: the last one, and the
        others with the best scores. Ties go to the lower index."""
        count = rounded_up(self.keep, len(cand))
        if count == len(cand):
            return cand
        scores = last_row(layer).weights if self.random is None else self.random[layer.index, cand]
        ledger.event("tokens pruned", len(cand) - count)
        return cand[last_and_best(scores, count)]


def note_revived(todo, tokens: Tokens, x) -> None:
    """Count the tokens that come from the aux cache: pruned in an earlier step, and revived."""

    def revived() -> int:
        return len(np.setdiff1d(todo, tokens.array))

    ledger.event("tokens revived", revived)
    ledger.count(cache_bytes=lambda: revived() * x[0].nbytes)


@part
class ScoringAttend(Part):
    """Attention that also records the last token's attention weights, for the stack to read."""

    inner: Part

    def __call__(self, q, k, v, layer: Layer):
        last_row(layer).weights = self.weights(q[:, -1:], k)
        return self.inner(q, k, v, layer)

    def weights(self, q, k):
        """The last token's attention weights, averaged over heads (S,); q (H, 1, d), k (K, S, d).
        It sees all keys, so nothing is masked."""
        ledger.count(q.size * k.shape[-2], cache_bytes=k.nbytes)
        p = fast.unnormalized_weights(q, k, self.inner.scale)  # (K, G, S)
        p /= p.sum(-1, keepdims=True)
        return p.mean((0, 1))


# State -------------------------------------------------------------------------------------------

NEVER = np.iinfo(np.int64).max


def aux_cache(x, layers: list[Layer]) -> "AuxCache":
    first = layers[0]
    return first.memory.recall(AuxCache, lambda: AuxCache(first.capacity, x, layers))


class AuxCache:
    """The paper's aux cache, in front of a group of layers, indexed by position.

    rows (capacity, D): the hidden state of each token that has reached these layers. stored
    (capacity,): the first position of the step in which they stored its keys and values; NEVER
    while the token waits here, or has not reached these layers.
    """

    def __init__(self, capacity: int, x, layers: list[Layer]):
        self.layers = layers
        self.rows = np.empty((capacity, x.shape[-1]), x.dtype)
        self.stored = np.full(capacity, NEVER)

    def rewind(self, position: int) -> None:
        """Undo the steps that begin at ``position`` or later: the tokens that they revived are
        pruned again."""
        undone = self.stored >= position
        for layer in self.layers:
            if layer.row_positions is not None:  # else no token was ever revived
                layer.keep(np.flatnonzero(~undone[layer.row_positions]))
        self.stored[undone] = NEVER
        self.stored[position:] = NEVER  # tokens from there on, too, if an earlier step ran them


def last_row(layer: Layer) -> "LastRow":
    return layer.memory.recall(ScoringAttend, LastRow)


class LastRow:
    """weights (S,): how much the last token of this step attends to each candidate."""

    weights: np.ndarray

    def rewind(self, position: int) -> None:
        """Nothing to do: the next step overwrites it before it is read."""


# Notes:
#
# - Generated tokens. The paper's step takes all positions as candidates, so generated tokens may be
#   pruned and revived like those of the prompt, and where the prompt ends does not matter. Several
#   tokens run together (a chunk) are one step: the last of them selects for all.
# - The aux cache is a table of one hidden state (D) per token and pruning layer. The paper frees an
#   entry once its keys and values are stored; here it stays, because ``state.rewind`` has to undo
#   the revivals of the steps that it forgets. Only groups of layers need a table: inside a group, a
#   token runs through all layers at once.
# - A revived token attends to the earlier candidates of the step that revives it, so its keys and
#   values are not those of the dense model, nor those that another step would have made.
# - choose=random has one fixed score per layer and token, so it hardly ever revives a token. The
#   prompt costs the same as with choose=attention, each later token less.
# - Cost of revived tokens. Their attention is one product with all visible rows, where later tokens
#   are masked. So it may count more multiply-adds than the same token did in the dense prompt.
#   Everything else never costs more than dense.
# - Figures on stories, as asserted in the tests: with first=1 a prompt of 320 tokens takes 0.62 of
#   the multiply-adds at keep=0.7; 40 new tokens later the last layer holds nearly all of them. At
#   keep=0.3, the KL divergence of the next token's distribution from the dense one is about half
#   that of choose=random.
# - Speed with first=1, dense = 1, on one core of a busy machine: prompt of 320 tokens, then 48 new.
#
#       keep    first token    each new token    both
#       0.9     1.1x           0.5x              0.6x
#       0.7     1.2x to 1.4x   0.4x to 0.5x      0.6x
#       0.5     1.8x           0.4x              0.6x
#       0.3     2.3x           0.4x              0.6x
#
#   To time it yourself (once more without lazy_tokens for the dense model):
#
#       import time, minitx
#       from minitx.lab.evaluate import encode, held_out
#       lm = minitx.load("stories", lazy_tokens={"preset": "paper"})
#       ids = sum((story.ids[:-1] for story in encode(lm.tokenizer, held_out(lm, 8))), [])[:320]
#       for _ in range(9):
#           start, tokens = time.perf_counter(), lm.tokens(ids, 48)
#           next(tokens); first = time.perf_counter() - start
#           list(tokens); print(f"{first:.4f} s, then {time.perf_counter() - start - first:.4f} s")
#
# - Answers of stories (minitx sweep lazy-tokens first=1 keep=0.9,0.7,0.5 --stories 60; the first
#   32 tokens of a story in one step, the others one by one), in per cent of those with 1 / 2 / 3
#   hops (how many facts an answer has to combine). Dense: 99 / 93 / 100.
#   61 / 69 / 47 at keep=0.9, 51 / 76 / 33 at 0.7, 45 / 66 / 25 at 0.5. With first=4 and keep=0.7:
#   99 / 78 / 72; random pruning there: 96 / 82 / 81.
