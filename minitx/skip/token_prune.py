"""SpAtten's cascade token pruning: tokens that receive little attention leave all later layers.

This file: the card and options, the stack that runs (online), its state, notes.
"""

import math
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.model import Attend, Stack, Transformer
from minitx.shared.attention_weights import attend_in_blocks
from minitx.shared.break_even import warn
from minitx.shared.coarse import coarse
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import row_by_row
from minitx.shared.token_subset import consecutive, last_and_best, rounded_up, run_subset
from minitx.state import Layer, State
from minitx.technique import SEEDS, above, at_least, need, swap, technique
from minitx.tree import Part, part, table


@technique(
    level="stack",
    exact=False,
    neutral={"keep": 1.0},
    demo={"keep": 0.4, "first": 1},
    event="tokens pruned",
    presets={"aggressive": {"keep": 0.25}, "paper": {"correct": False}},
)
def token_prune(
    lm,
    *,
    keep: Annotated[
        float, "share of all tokens so far that the last layer keeps; 1 prunes none", above(0, 1)
    ] = 0.5,
    first: Annotated[
        int | None,
        "layers that always run all tokens; default: 3 or 15 % of L, whichever is more, but at "
        "most L - 1",
        at_least(1),
    ] = None,
    schedule: Annotated[
        Literal["linear", "constant"],
        "linear: the share falls layer by layer to keep; constant: it is keep in all layers after "
        "the first ones",
    ] = "linear",
    correct: Annotated[
        bool,
        "divide the attention that a token received by what uniform attention would have given "
        "it; false: the plain sum, which favors early tokens",
    ] = True,
    choose: Annotated[
        Literal["attention", "random"], "accumulated attention, or a random baseline"
    ] = "attention",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Prune tokens that receive little attention from all later layers, for good.

    Paper:     Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and
               Head Pruning", HPCA 2021, arXiv 2012.09852. Its token pruning only.
    Fidelity:  a reconstruction from a review and from other people's code. Ours: the correction for
               causal attention; the last token of a step always stays, since it makes the logits.
    Kind:      approximate; exact at keep=1, which prunes nothing. Better than random scores where a
               text grows token by token; in a prompt that runs in one step, it is not (Notes).
    Idea:      A token that hardly any other attends to matters little: the deeper layers can do
               without it. Add up the attention that each token receives, over all heads, layers and
               steps so far, and let the least attended tokens drop out from layer to layer.
    Offline:   share[l] of the L layers: 1 in the first ones, then falling linearly to ``keep``.
    Online:    in each step (the prompt, then each new token), alive = all n tokens so far;
               for each layer l:
                 alive = the tokens of alive that layer l has not lost in an earlier step
                 if there are more than ceil(share[l] n): keep the last token and those with the
                   best received / uniform, ceil(share[l] n) in all; the rest leave l and all later
                   layers: they run no more, and their cache rows there are freed
                 run l for the new tokens that are alive, attending to alive; with p (H, T, S):
                 received[j] += sum over heads and queries of p[h, i, j]
                 uniform[j]  += the same sum, had each query spread its attention evenly
    Saves:     with n_l = ceil(share[l] n), layer l takes n_l / n of a prompt's dense products,
               (n_l / n)^2 of its attention, and n_l cache rows; a decoded token attends to n_l
               rows. Adding up costs 1 multiply-add for each weight, to 2 d of attention (d: head
               width).
    In NumPy:  a prompt of 320 tokens 1.1x faster (1.3x at keep=0.25), but each new token takes 2.4
               times as long: bookkeeping in every layer outweighs the rows that are saved (Notes).
    Not for:   text whose early tokens are needed again later: what is pruned never comes back
               (lazy_tokens revives it); batches with a KV cache (generate decodes prompts one by
               one); techniques that need a cache row for every token (elsa, dota, ...).
    Proof:     tests/skip/test_token_prune.py; literal version: tests/skip/literal_token_prune.py
    Tutorial:  tutorials/14_which_tokens_matter.py
    """
    need(lm.model.stack, Stack)
    L, context = len(lm.model.stack.blocks), lm.model.config.context
    shares = layer_shares(L, keep, first_layers(L) if first is None else first, schedule)
    if all(rounded_up(share, context) == context for share in shares):
        if keep < 1:
            warn(
                f"token_prune: keep={keep:g} and first={first} prune none of at most {context:,} "
                f"tokens in the {L} layers of this model; use a lower keep or a lower first."
            )
        return lm
    random = random_scores(1, context, seed)[0] if choose == "random" else None
    if random is None:
        lm = swap(lm, Attend, lambda attend: WeightsAdded(attend.scale))

    def change(model: Transformer) -> Transformer:
        return replace(model, stack=PruningStack(model.stack, shares, correct, random))

    return swap(lm, Transformer, change)


def first_layers(L: int) -> int:
    """How many layers run all tokens by default."""
    return max(1, min(max(3, math.ceil(0.15 * L)), L - 1))


def layer_shares(L: int, keep: float, first: int, schedule: str) -> tuple[float, ...]:
    """The share of the tokens that each layer keeps."""
    later = L - first  # layers that prune
    if schedule == "constant":
        falling = [keep] * later
    else:
        falling = [1 - (1 - keep) * i / later for i in range(1, later + 1)]
    return (*[1.0] * min(first, L), *falling)


# Online ------------------------------------------------------------------------------------------


@part
class PruningStack(Part):
    """The blocks; before each one that keeps a smaller share, the tokens that go on are selected.

    The alive tokens of a layer are alive in all earlier ones.
    """

    # Declared for techniques that are combined with this one (tree.Part):
    decides = "step"  # the attention of all tokens of a step decides before the next layer
    frees_rows = True  # deep layers have no row for a pruned token
    needs_all_rows = True  # but of the others every row
    has_history = True  # the attention received so far, and which tokens are pruned where
    one_sequence = True  # no batches of different lengths
    needs_inner_first = True  # a share for each layer that there is

    inner: Part  # the dense stack
    shares: tuple  # of the tokens that each layer keeps
    correct: bool
    random: np.ndarray | None = table(default=None)  # (context,) scores of the baseline

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        """x (T, D) -> (T, D). For a pruned token, the hidden state that it has reached."""
        if x.ndim > 2:
            because = "token_prune keeps different tokens for each sequence"
            return row_by_row(self, x, state, because)
        tokens = state.tokens
        step = tokens.array[0]  # the first position of a step identifies it
        alive = np.arange(tokens.array[-1] + 1)
        first = self.shares.count(1.0)
        begin_step(state, first)
        x = self.inner.run(x, state, 0, first)
        out = x.copy()
        for block, layer in zip(self.blocks[first:], state.layers[first:], strict=True):
            alive = self.select(alive, layer)
            going = alive[alive >= step]  # tokens of this step
            x, tokens = x[np.searchsorted(tokens.array, going)], consecutive(going)
            x = run_subset((block,), (layer,), x, tokens, alive)
            out[going - step] = x
        return out

    def select(self, alive, layer: Layer):
        """Of the tokens alive in the layer before (n,), those that are alive in this one. Ties go
        to the lower index."""
        pruned, n = pruned_tokens(layer), alive[-1] + 1
        alive = alive[pruned.step[alive] == NEVER]
        count = rounded_up(self.shares[layer.index], n)
        if count < len(alive):
            ledger.event("tokens pruned", len(alive) - count)
            alive = alive[last_and_best(self.scores(alive, layer), count)]
        pruned.all_but(alive, layer.shared.step)
        return alive

    def scores(self, alive, layer: Layer):
        if self.random is not None:
            return self.random[alive]
        attention = received_attention(layer)
        if not self.correct:
            return coarse(attention.received[alive])
        ledger.count(len(alive))
        # A token that no query has seen yet has 0 of both: all attention was dropped (layer_skip).
        return coarse(attention.received[alive] / np.maximum(attention.uniform[alive], 1e-30))


@part
class WeightsAdded(Part):
    """Softmax attention that adds up how much each token receives, over all heads and queries."""

    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, layer: Layer):
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        received = np.zeros(k.shape[-2])
        for _, _, end, p in attend_in_blocks(q, k, v, self.scale, layer.mask(), out):
            received[:end] += p.reshape(-1, end).sum(0)
            ledger.count(p.size)
        received_attention(layer).add(received, len(q), layer)
        return out  # (H, T, d)


# State -------------------------------------------------------------------------------------------

NEVER = np.iinfo(np.int64).max


def begin_step(state: State, first: int) -> None:
    """Free the rows of tokens that earlier steps have pruned, which cannot be undone from here
    on."""
    step = state.shared.step
    for layer in state.layers[first:]:
        if layer.count:
            pruned = pruned_tokens(layer).step[layer.row_tokens().array] != NEVER
            if pruned.any():
                layer.keep(np.flatnonzero(~pruned))
        layer.rewindable_to, layer.evicted_by = step, "token_prune"
    received_attention(state.layers[0]).begin(step)


def pruned_tokens(layer: Layer) -> "Pruned":
    return layer.memory.recall(Pruned, lambda: Pruned(layer.capacity))


class Pruned:
    """step (capacity,): the first position of the step that pruned each token out of this layer;
    NEVER for those that are alive. Their rows stay, unseen, until the next step begins."""

    def __init__(self, capacity: int):
        self.step = np.full(capacity, NEVER)

    def all_but(self, alive, step: int) -> None:
        """All tokens up to the last of ``alive`` (n,) that are not among them are pruned now,
        unless they were before."""
        gone = self.step[: alive[-1] + 1] == NEVER
        gone[alive] = False
        self.step[: alive[-1] + 1][gone] = step

    def rewind(self, position: int) -> None:
        """Undo the steps that begin at ``position`` or later; an earlier one stays decided."""
        self.step[self.step >= position] = NEVER
        self.step[position:] = NEVER


def received_attention(layer: Layer) -> "ReceivedAttention":
    return layer.shared.recall(ReceivedAttention, lambda: ReceivedAttention(layer.capacity))


class ReceivedAttention:
    """The attention that each token has received from all queries in all heads and layers so far,
    received (capacity,), and uniform (capacity,): what it would have received if each query had
    spread its attention evenly over the tokens that it saw. By position, in float64."""

    def __init__(self, capacity: int):
        self.received, self.uniform = np.zeros(capacity), np.zeros(capacity)
        self.begin(0)

    def begin(self, step: int) -> None:
        self.step, self.before = step, (self.received.copy(), self.uniform.copy())

    def add(self, received, heads: int, layer: Layer) -> None:
        """Add what the tokens of the visible rows received (S,) from this step's queries."""
        seen = layer.row_tokens().array  # (S,) their positions
        self.received[seen] += received
        self.uniform[seen] += heads * uniform_attention(layer.tokens.array, seen)

    def rewind(self, position: int) -> None:
        """Undo the last step, if it began at ``position``. Of a step that is undone in part, the
        remaining tokens keep what all its queries gave them, as its decisions stay, too."""
        if position <= self.step:
            self.received, self.uniform = (a.copy() for a in self.before)
        self.received[position:] = self.uniform[position:] = 0


def uniform_attention(queries, seen):
    """What each of the tokens at the positions ``seen`` (S,) receives if each query (T,) attends
    evenly to those up to its own position: the sum of 1 / how many it sees, over the queries that
    see it. All positions are ascending."""
    each = 1 / np.searchsorted(seen, queries, "right")  # (T,) what a query gives to each
    from_here_on = np.append(np.cumsum(each[::-1])[::-1], 0)  # (T + 1,) this query and later ones
    return from_here_on[np.searchsorted(queries, seen)]


# Notes:
#
# - What the correction does. Token j is seen by itself and all later queries, and an early query
#   has few tokens to spread its attention over. So in a causal model the plain column sum ranks by
#   position even where attention is uniform: 11/6, 5/6, 2/6 for three tokens. Dividing by the
#   number of queries that saw a token is not enough (11/18, 5/12, 1/3). Divided by what uniform
#   attention would have given, all three have 1. Deep layers, where fewer tokens share the
#   attention, then count like the others, too.
# - PoWER-BERT (Goyal et al., ICML 2020, arXiv 2001.08950) prunes by column sums, too, but in an
#   encoder, where every token sees every token, so the sums are fair. It takes the mean over heads
#   in one layer alone, leaves out what a token gives to itself (in a causal model that is all that
#   the last token receives), always keeps CLS, whose output is used (here: the last token), and
#   trains how many tokens each layer retains. It reads a whole text at once and never generates.
# - The hidden state that a one-pass forward returns for a pruned token is the one that it has
#   reached, so ``lm.logits`` has a row for it: those of a model with fewer layers.
# - Steps. The tokens of a step run together, and all of them add to what is received before the
#   next layer selects. A row is freed when the step after that which pruned it begins: so the last
#   step can be undone, and earlier ones cannot. A step that is undone in part (speculative decoding
#   rejects drafted tokens) keeps what it decided, and what the rejected queries gave to others.
# - What stays alive in layer l was alive in all layers before. Their scores change in between, so a
#   layer may lose a token that it had kept in an earlier step, and then hold fewer than ceil(share
#   n) until new tokens have come: it takes none back.
# - A layer whose attention another technique has replaced or dropped adds nothing to the scores.
# - Figures on stories, 8 chains of 512 tokens, the first 32 in one step and the others one by one.
#   A chain: several stories joined to 512 tokens. Hops: how many facts an answer has to combine.
#   Dense: 100 / 94 / 100 %. (minitx sweep token-prune keep=0.75,0.5,0.25 choose=attention,random
#   --chains 8; then with correct=false; minitx sweep lazy-tokens keep=0.3 first=4,1 --chains 8.)
#
#                               multiply-adds   cache    loss above dense    1 / 2 / 3 hops
#       keep=0.75               0.90x           0.91x    +0.001               98 / 94 / 100 %
#         correct=false         0.90x           0.91x    +0.007               94 / 78 / 69 %
#         choose=random         0.90x           0.91x    +0.004               92 / 94 / 85 %
#       keep=0.5                0.80x           0.81x    +0.003               97 / 89 / 92 %
#         correct=false         0.80x           0.81x    +0.010               93 / 78 / 69 %
#         choose=random         0.80x           0.81x    +0.012               90 / 83 / 85 %
#       keep=0.25               0.72x           0.72x    +0.004               94 / 83 / 92 %
#         correct=false         0.72x           0.72x    +0.016               90 / 61 / 62 %
#         choose=random         0.71x           0.72x    +0.018               83 / 83 / 77 %
#       lazy_tokens keep=0.3    0.90x           0.75x    +0.013              100 / 67 / 46 %
#         with first=1          0.74x           0.50x    +0.129               37 / 78 / 62 %
#
#   The correction is worth more than the scores: without it they answer fewer questions of two and
#   three hops than random ones do.
# - Prompts in one step: a token that only the question needs is not yet popular there. 99 questions
#   of 20 stories (67, 19 and 13 of 1, 2 and 3 hops), each in one step with the story before it:
#   91 / 79 / 85 % at keep=0.5, random 94 / 84 / 85 %; at keep=0.25 84 / 63 / 69 %, random
#   91 / 84 / 85 %. The KL divergence of the next token's distribution from the dense one after 40,
#   60 and 80 % of 16 stories: 0.004 at keep=0.6, random 0.02 (four seeds); at keep=0.3 0.10,
#   random 0.05.
# - Speed (CPU time on one core, a prompt of 320 tokens, then 48; dense = 1): first token 1.1x
#   and each new token 0.4x at keep=0.5; 1.3x and 0.4x at keep=0.25.
