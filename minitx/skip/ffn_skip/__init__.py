"""FFN-SkipLLM: once an FFN hardly changes a token's hidden state, skip the FFNs of the next layers.

This file: the card and options, the FFN that may be skipped (online), notes. Read next:
calibration.py (cold layers and a threshold from text, offline) and baselines.py (random and static
skipping).

Letters: B batch, T new tokens, D width, F hidden width of the FFN, L layers, numbered from 0.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.shared.cosine import cosine
from minitx.state import Layer, Tokens
from minitx.technique import SEEDS, at_least, between, blocks_of, technique, wrap
from minitx.tree import Part, part, walk


@technique(
    level="ffn",
    exact=False,
    neutral={"threshold": 1.1},
    demo={"threshold": -2.0, "skip": 1, "warm_up": 3, "cold_start": 0, "cold_end": 2},
    event="FFNs skipped",
    presets={"aggressive": {"threshold": 0.9, "cold_start": 1, "warm_up": 0}},
)
def ffn_skip(
    lm,
    *,
    choose: Annotated[
        Literal["similarity", "random", "static"],
        "which FFNs are skipped. Baselines: random skips each FFN from cold_start to cold_end - 1 "
        "with equal probability, static the last of these",
    ] = "similarity",
    threshold: Annotated[
        float, "cosine from which the next FFNs are skipped; above 1: none"
    ] = 0.98,
    skip: Annotated[
        int | None,
        "how many FFNs are skipped then (paper: k); default: L // 4, at least 1",
        at_least(0),
    ] = None,
    warm_up: Annotated[int, "first tokens, prompt included, that skip none", at_least(0)] = 25,
    cold_start: Annotated[
        int | None,
        "first layers that are never skipped; default: L // 2, or fewer if that leaves only one "
        "layer to be skipped, at least 1",
        at_least(0),
    ] = None,
    cold_end: Annotated[
        int | None,
        "layers from this one on are never skipped; default: L - 1, so the last layer always runs "
        "(L, so none, in models of fewer than 4 layers)",
        at_least(0),
    ] = None,
    rate: Annotated[
        float,
        "of the baselines: share of all L FFNs to skip after the warm-up, at most "
        "(cold_end - cold_start) / L",
        between(0, 1),
    ] = 0.2,
    seed: Annotated[int, "of the baselines", SEEDS] = 0,
):
    """Skip the next FFNs once an FFN hardly changes the hidden state.

    Paper:     Jaiswal et al., "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive
               Feed Forward Skipping", EMNLP 2024, arXiv 2404.03865.
    Fidelity:  a reconstruction from three summaries, which agree on the rule below. What they leave
               open was chosen here (Notes).
    Kind:      approximate; exact with a threshold above 1, which no cosine reaches.
    Idea:      In the middle layers, most FFNs turn the hidden state by a small angle. If one does,
               the next ones are likely to as well: skip those. Attention always runs, so unlike
               with early exit, every layer has the keys and values of every token.
    Offline:   calibration.py proposes cold_start, cold_end and threshold for a wanted share of
               skipped FFNs, from the mean cosine of each layer on some text. Nothing is trained.
    Online:    for each token after the warm-up: run_skip = 0; then for each layer l in
               cold_start .. cold_end - 1, with a = the hidden state after attention:
                 if run_skip > 0:  y = a;  run_skip -= 1
                 else:             y = a + FFN(a)               (FFN includes its norm)
                                   if cos(a, y) >= threshold:  run_skip = skip
               y goes on to the next layer. Other FFNs run as usual.
               Parallel blocks (attention and FFN both read the block's input): a is that input;
               the attention output is added to y only after the cosine.
    Saves:     3 D F multiply-adds per FFN skipped (2 D F without a gate), less 3 D per cosine.
    In NumPy:  no faster than dense on stories (0.97x to 1.04x at 0.74 of the multiply-adds: Notes):
               its FFNs are small, and skipping one takes a few NumPy calls.
    Not for:   models of one or two layers (the defaults skip nothing) or without residual
               connections (config.skipless). Batches and prompts: the weights of an FFN are read
               unless every token skips it.
    Proof:     tests/skip/test_ffn_skip.py; literal version: tests/skip/literal_ffn_skip.py
    Tutorial:  tutorials/05_skipping_feed_forward_networks.py
    """
    check_residual(lm)
    L = len(blocks_of(lm))
    cold_end = L - (L >= 4) if cold_end is None else cold_end  # below 4 layers, none at the end
    if cold_start is None:
        cold_start = max(1, min(L // 2, cold_end - 2))  # the first of two or more is measured
    check_layers(L, cold_start=cold_start, cold_end=cold_end)
    skip = default_skip(L) if skip is None else min(skip, L)
    region = range(cold_start, cold_end)
    if choose != "similarity":
        from minitx.skip.ffn_skip.baselines import skip_by_plan

        return skip_by_plan(lm, choose, rate, region, warm_up, seed)

    def change(ffn: Part, index: int) -> Part:
        if index not in region:
            return ffn
        is_last = index == cold_end - 1  # a run_skip set here is never read: save the cosine
        return SkippableFFN(ffn, threshold, 0 if is_last else skip, warm_up)

    return wrap(lm, "ffn", change)


def default_skip(L: int) -> int:
    return max(1, L // 4)


def check_residual(lm) -> None:
    if lm.model.config.skipless:
        raise MinitxError(
            "ffn_skip needs residual connections and this model is skipless: skipping an FFN would "
            "drop the hidden state; leave ffn_skip out."
        )


def check_layers(L: int, **values: int) -> None:
    for name, value in values.items():
        if value > L:
            raise MinitxError(
                f"ffn_skip: {name} must be at most {L}, the number of layers; got {value}."
            )


# Online ------------------------------------------------------------------------------------------


@part
class SkippableFFN(Part):
    """An FFN that is skipped while run_skip > 0. Otherwise it runs, and may set run_skip."""

    inner: Part
    threshold: float
    skip: int  # 0: nothing is measured
    warm_up: int

    def __call__(self, x, layer: Layer):
        """x (..., T, D), the hidden states a -> FFN(a), or zeros where it is skipped."""
        if x.size == x.shape[-1]:
            return self.one_token(x, layer)
        skippable = past_warm_up(self.warm_up, x, layer)  # (..., T)
        if not skippable.any():
            return self.inner(x, layer)
        counters, where = self.counters(x, layer), layer.tokens.positions
        run_skip = counters[..., where]  # (..., T): how many FFNs each token has still to skip
        skipped = run_skip > 0
        run_skip = run_skip - skipped
        f = run_except(self.inner, x, layer, skipped, skippable)  # (..., T, D)
        if self.skip:
            measured = skippable & ~skipped
            a = x[measured]  # (tokens, D)
            similar = cosine(a, a + f[measured]) >= self.threshold
            run_skip[measured] = np.where(similar, self.skip, 0)
        counters[..., where] = run_skip
        return f

    def counters(self, x, layer: Layer):
        """run_skip of every token, by position: (..., capacity)."""
        return layer.shared.recall(RunSkip, lambda: RunSkip(x.shape[:-2], layer.capacity)).count

    def one_token(self, x, layer: Layer):
        """The same for one token, without masks, which make decoding on stories 1.29x slower."""
        position = int(layer.tokens.array[0])
        if position - (0 if layer.start is None else layer.start[0]) < self.warm_up:
            return self.inner(x, layer)
        counters = self.counters(x, layer).reshape(-1)  # (capacity,), a view
        skipped = counters[position] > 0
        note_skipped(1, skipped)
        if skipped:
            counters[position] -= 1
            return np.zeros_like(x)
        f = self.inner(x, layer)
        if self.skip:
            a = x.reshape(1, -1)  # (1, D)
            similar = cosine(a, a + f.reshape(1, -1))[0] >= self.threshold
            counters[position] = self.skip if similar else 0
        return f


class RunSkip:
    """run_skip of every token, shared by all layers: one layer sets it, later ones count it down.

    It is stored by position, so that it belongs to its token whatever is run beside it. It is 0 for
    a token that has not come yet, or that was rewound.
    """

    def __init__(self, batch: tuple, capacity: int):
        self.count = np.zeros((*batch, capacity), np.int64)

    def rewind(self, position: int) -> None:
        self.count[..., position:] = 0


def past_warm_up(warm_up: int, x, layer: Layer):
    """(..., T) booleans: which tokens of x (..., T, D) come after the warm-up. Never padding."""
    return np.broadcast_to(layer.tokens.own >= warm_up, x.shape[:-1])


def run_except(ffn: Part, x, layer: Layer, skipped, skippable):
    """FFN(x) (..., T, D), and zeros where ``skipped`` (..., T): the FFN gets only the other tokens,
    and is not called if there are none."""
    note_skipped(skippable, skipped)
    if not skipped.any():
        return ffn(x, layer)
    f = np.zeros_like(x)
    if skipped.all():
        return f
    if x.ndim == 2:  # one sequence: an FFN may remember something of its tokens
        tokens, layer.tokens = layer.tokens, layer.tokens.only(~skipped)
        f[~skipped] = ffn(x[~skipped], layer)
        layer.tokens = tokens
    elif any(node.one_sequence for _, node in walk(ffn)):
        for b, kept in enumerate(~skipped):
            alone = Layer(layer.capacity, remember=False)
            own = layer.tokens.own
            alone.tokens = Tokens((own if own.ndim == 1 else own[b])[kept])
            if kept.any():
                f[b, kept] = ffn(x[b, kept], alone)
    else:
        f[~skipped] = ffn(x[~skipped], layer)
    return f


def note_skipped(skippable, skipped) -> None:
    """Count FFNs, once per layer and token."""
    ledger.event("skippable FFNs", skippable)  # not cold, and after the warm-up
    ledger.event("FFNs skipped", skipped)


# Notes:
#
# - Unconfirmed in the paper and chosen here: measuring again after ``skip`` layers (skip=L never
#   does); the defaults threshold=0.98, skip = L // 4 (at least 1), cold_start = L // 2 (fewer if
#   only one layer were left) and cold_end = L - 1 (L below 4 layers); a warm-up that counts the
#   prompt's tokens too, and skipping in the rest of the prompt, so that it does not matter in what
#   chunks a text is run.
# - The model is also the dense one with skip=0, with cold_start >= cold_end, with a warm-up as long
#   as the text, and, for the baselines, with rate=0.
# - A high cosine does not prove that an FFN can be spared: in any pre-norm model |a| grows with
#   depth and |FFN(a)| does not, so the cosine rises by itself, with random weights too. Measure the
#   loss (minitx compare).
# - The cosine is taken between a and a + FFN(a), on the residual stream. a and FFN(a) themselves
#   are nearly orthogonal.
# - Figures on stories (minitx sweep ffn-skip ... cold_start=3 cold_end=8 warm_up=0 --stories 60;
#   speed on a busy machine). Answers: % of questions answered correctly that need 1 / 2 / 3 facts
#   of the story.
#
#       setting                     multiply-adds   loss       answers       speed
#       dense                           1.00x      0.0000    99 / 93 / 100    1.0x
#       threshold=0.9 skip=8            0.74x     +0.0071    99 / 91 / 100    0.97x to 1.04x
#       choose=random rate=0.4          0.73x     +0.0323    98 / 93 /  94    1.0x
