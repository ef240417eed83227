"""Early exit: a token stops at the first layer after which its prediction seems settled.

This file: the card and options, the stack of layers with exits (online), notes. Read next:
confidence.py (the measures and the threshold), kv_fill.py (keys and values of skipped layers), and
exit_probe.py (training the probe, offline).

Letters: B batch, T new tokens, S cached tokens, D width, H query heads, K key heads, d head width,
F hidden width of the FFN, V vocabulary, L layers, which are numbered from 0.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids, remembered
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.shared.break_even import head, skipped_layer, warn
from minitx.shared.random_baseline import random_scores
from minitx.skip.early_exit.confidence import (
    ExitProbe,
    RandomConfidence,
    Saturation,
    SoftmaxGap,
    ThresholdSchedule,
)
from minitx.skip.early_exit.kv_fill import CopyExitState, DeferLayers
from minitx.state import State
from minitx.technique import SEEDS, at_least, blocks_of, need, owner, swap, technique
from minitx.tree import Part, part, walk


@technique(
    level="stack",
    exact=False,
    neutral={"threshold": 1.1},
    demo={"measure": "random", "threshold": 0.5},
    event="layers skipped",
    presets={
        "paper": {"measure": "softmax", "threshold": 0.9, "first": 1},
        "aggressive": {"measure": "saturation", "threshold": 0.9, "first": 2},
    },
)
def early_exit(
    lm,
    *,
    measure: Annotated[
        Literal["softmax", "saturation", "probe", "random"],
        "confidence measure; softmax runs the head at each check, probe is trained first, random "
        "is a random baseline",
    ] = "saturation",
    threshold: Annotated[
        float, "confidence at which a token exits; above 1: never", at_least(0)
    ] = 0.98,
    decay: Annotated[
        float | None,
        "how fast the threshold falls along the sequence (paper: tau); None: constant",
        at_least(0),
    ] = None,
    horizon: Annotated[
        int | None,
        "tokens over which the threshold falls (paper: N); default: the context",
        at_least(1),
    ] = None,
    kv_fill: Annotated[
        Literal["copy", "deferred"],
        "keys and values of skipped layers: from the exit state, or by running the layers later",
    ] = "copy",
    first: Annotated[
        int | None,
        "layers that every token runs; measure=saturation: at least 2; default: L // 2",
        at_least(1),
    ] = None,
    every: Annotated[int, "layers from one check of the confidence to the next", at_least(1)] = 1,
    warm_up: Annotated[int, "first tokens, prompt included, that run all layers", at_least(0)] = 0,
    seed: Annotated[int, "of measure=random", SEEDS] = 0,
):
    """Stop at the first confident layer and backfill the KV cache.

    Paper:     Schuster et al., "Confident Adaptive Language Modeling" (CALM), NeurIPS 2022,
               arXiv 2207.07061. kv_fill=deferred: Bae et al., "Fast and Robust Early-Exiting
               Framework" (FREE), EMNLP 2023, arXiv 2310.05424.
    Fidelity:  a reconstruction from summaries and CALM's code (see Notes).
    Kind:      approximate; exact with a threshold above 1, which no confidence reaches.
    Idea:      Easy tokens need few of the L layers. But later tokens attend to them in every layer,
               so skipped layers still need their keys and values.
    Offline:   measure=probe: w (D,) and b by logistic regression on h[1] .. h[L-1]; label: does
               head(norm(h[i])) predict the same token as head(norm(h[L]))?
    Online:    h[i]: hidden state after i layers, the input of layer i;  t: the token's position.
               Check after i = first, first + every, ... < L layers (saturation: first >= 2), if
               t >= warm_up:
                 c = p1 - p2, top two of softmax(head(norm(h[i])))               softmax
                     cos(h[i], h[i-1])                                           saturation
                     sigmoid(w . h[i] + b)                                       probe
                 exit if c >= threshold[t]; logits: head(norm(h[i]))
               threshold[t] = never reached                                      threshold > 1
                     threshold                                                   no decay
                     clip(0.9 threshold + 0.1 exp(-decay t / horizon), 0, 1)     decay
               in each skipped layer l = i .. L-1:
                 copy:      cache the keys and values that layer l makes from h[i] instead of h[l]
                 deferred:  when a later token enters layer l, run l on it and all earlier tokens
                            that have not run l: one causal chunk, each from its own output of
                            layer l-1
    Saves:     multiply-adds per skipped layer: 2 D H d (q, out) + 2 S H d (attention) + 3 D F
               (FFN). copy still makes k and v; deferred saves only layers that no later token
               enters. A check costs V D (softmax), 3 D (saturation) or D (probe).
               On stories 0.68x multiply-adds for 0.005 nats.
    In NumPy:  1.1x to 1.3x on stories; with softmax not faster (Notes).
    Not for:   models trained to predict at the last layer alone; large batches (Notes).
    Proof:     tests/skip/test_early_exit.py; literal version: tests/skip/literal_early_exit.py
    Tutorial:  tutorials/04_knowing_when_to_stop.py
    """
    L, context = len(blocks_of(lm)), lm.model.config.context
    first = max(1, L // 2) if first is None else first
    if measure == "saturation":
        first = max(first, 2)  # h[0] is a table row with first_layer, no hidden state
    schedule = ThresholdSchedule(threshold, decay, context if horizon is None else horizon, warm_up)
    if threshold <= 1:
        warn_if_checks_cost_more_than_layers(lm.model.config, measure, first, every, L)

    def confidence(model: Transformer) -> Part:
        if measure == "softmax":
            return SoftmaxGap(model.norm, model.head)
        if measure == "saturation":
            return Saturation()
        if measure == "probe":
            return ExitProbe(*trained_probe(lm))
        return RandomConfidence(random_scores(L, context, seed))

    def change(model: Transformer) -> Transformer:
        need(model.stack, Stack)
        if kv_fill == "copy":
            check_backfill(model.stack.blocks[first:])
        else:
            check_deferring(model.stack.blocks[first:])
        fill = CopyExitState() if kv_fill == "copy" else DeferLayers()
        stack = ExitingStack(model.stack, confidence(model), schedule, fill, first, every)
        return replace(model, stack=stack)

    return swap(lm, Transformer, change)


def warn_if_checks_cost_more_than_layers(
    c: Config, measure: str, first: int, every: int, L: int
) -> None:
    """If all checks of a token take more multiply-adds than all layers that they could skip, exits
    do not pay even where tokens exit at each depth equally often."""
    check = {"softmax": head(c), "saturation": 3 * c.width, "probe": c.width, "random": 0}[measure]
    layer, skippable = skipped_layer(c), max(L - first, 0)

    def checks(every: int) -> int:
        return len(range(first, L, every))

    if checks(every) * check <= skippable * layer:
        return
    pays = (n for n in range(every, skippable + 1) if checks(n) * check < skippable * layer)
    interval = next((f" or every={n}" for n in pays), "")
    warn(
        f"early_exit: {checks(every)} checks with measure={measure} take {check:,} multiply-adds "
        f"each, in all {checks(every) * check / (skippable * layer):.1f} times those of the "
        f"{skippable} layers that they could skip ({layer:,} each), so they cost more than they "
        f"save; use measure=saturation ({3 * c.width:,} each){interval}."
    )


def check_deferring(blocks: Sequence[Part]) -> None:
    """Layers that run in a later step must compute what they would have in their own."""
    parts = (node for block in blocks for _, node in walk(block))
    if other := next((node for node in parts if node.decides != "token"), None):
        raise MinitxError(
            f"early_exit with kv_fill=deferred runs skipped layers in a later step, and "
            f"{owner(other)} decides step by step; use kv_fill=copy, or leave out one of the two "
            "techniques."
        )


def check_backfill(blocks: Sequence[Part]) -> None:
    for node in [*blocks, *(block.attn for block in blocks if hasattr(block, "attn"))]:
        if not hasattr(node, "backfill"):
            raise MinitxError(
                f"early_exit cannot backfill the KV cache: the {type(node).__name__} of "
                f"{owner(node)} does not compute keys and values separately; use "
                "kv_fill=deferred, or leave out one of the two techniques."
            )


# Online ------------------------------------------------------------------------------------------


@part
class ExitingStack(Part):
    """The blocks, one after another; after some of them, tokens may exit."""

    inner: Part  # Stack
    confidence: Part  # one of the measures in confidence.py
    threshold: Part  # ThresholdSchedule
    kv_fill: Part  # CopyExitState or DeferLayers
    first: int
    every: int

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    @property
    def one_sequence(self) -> bool:
        """True: no batches in which sequences exit at different layers. There, a token that has
        exited runs on with those of the others and its result is dropped; a part that remembers
        more of what ran than keys and values would remember that too."""
        return any(node.has_history for _, node in walk(self.inner))

    def __call__(self, x, state: State):
        """x (..., T, D) -> (..., T, D): the hidden state of each token after its last layer."""
        L, first = len(self.blocks), self.first
        # own: the position in the token's own sequence, below 0 in padding
        t = np.broadcast_to(state.tokens.own, x.shape[:-1])  # (..., T)
        threshold = self.threshold(t)  # (..., T), Inf where a token must not exit
        may_exit = np.isfinite(threshold)
        if first >= L or not may_exit.any():
            x = self.inner.run(x, state, 0, L)
            self.kv_fill.ran_all_layers(state)
            return x
        previous = self.inner.run(x, state, 0, first - 1)  # h[first - 1], for saturation
        x = self.inner.run(previous, state, first - 1, first)  # h[first]
        self.kv_fill.begin(x, state)
        ledger.event("skippable layers", lambda: may_exit.sum() * (L - first))
        one = x.size == x.shape[-1]
        run = self.run_one_until_exit if one else self.run_until_exit
        return run(x, previous, state, t, threshold)

    def run_until_exit(self, x, previous, state: State, t, threshold):
        """Layers ``first`` .. L - 1, for the tokens that have not exited. In each turn of the loop,
        x (..., T, D) is h[depth] of these tokens and the exit state of the others, and ``previous``
        is x one layer earlier."""
        L = len(self.blocks)
        live = t >= 0  # (..., T); padding does not run further
        for depth in range(self.first, L):
            if self.checks_at(depth):
                candidates = live & np.isfinite(threshold)
                exits = self.exits(x, previous, depth, t, threshold, candidates)
                note_exits(exits, depth, L)
                live = live & ~exits
            block, layer = self.blocks[depth], state.layers[depth]
            previous, x = x, self.kv_fill.run(block, x, live, layer, state)
        return x

    def checks_at(self, depth: int) -> bool:
        return (depth - self.first) % self.every == 0

    def exits(self, x, previous, depth: int, t, threshold, candidates):
        """(..., T) booleans: which ``candidates`` (..., T) are confident after ``depth`` layers."""
        exits = np.zeros_like(candidates)
        if candidates.any():
            h, before = x[candidates], previous[candidates]  # (tokens, D)
            conf = self.confidence(h, before, depth, t[candidates])  # (tokens,)
            exits[candidates] = conf >= threshold[candidates]
        return exits

    def run_one_until_exit(self, x, previous, state: State, t, threshold):
        """``run_until_exit`` for one token, without masks: with them, decoding on stories is 1.05x
        to 1.12x slower."""
        L = len(self.blocks)
        t, threshold = t.reshape(1), threshold.item()
        for depth in range(self.first, L):
            if self.checks_at(depth):
                conf = self.confidence(x.reshape(1, -1), previous.reshape(1, -1), depth, t)[0]
                if conf >= threshold:
                    note_exits(LIVE, depth, L)
                    self.kv_fill.skip(self.blocks[depth:], x, state.layers[depth:], state)
                    break
            block, layer = self.blocks[depth], state.layers[depth]
            previous, x = x, self.kv_fill.run(block, x, LIVE, layer, state)
        return x


LIVE = np.ones(1, bool)  # one token that has not exited


def note_exits(exits, depth: int, L: int) -> None:
    ledger.event("layers skipped", lambda: exits.sum() * (L - depth))
    ledger.event(f"tokens exited after {depth} layers", exits)


# Offline -----------------------------------------------------------------------------------------


def trained_probe(lm) -> tuple[np.ndarray, float]:
    """w and b of the exit probe, trained on calibration texts."""
    from minitx.skip.early_exit.exit_probe import TEXTS, train_exit_probe  # only for this measure

    texts = calibration_ids("early_exit", lm, TEXTS, "use measure=softmax or saturation")
    return remembered("early_exit", lm, texts, (), lambda: train_exit_probe(lm, texts))


# Notes:
#
# - We did not have CALM's text, but summaries of it by others, and its published code (which uses
#   decay=4, and multiplies the exponential by the threshold as well; the formula on the card is
#   that of the summaries). Ours: exits within a prompt; with kv_fill=deferred, exits after any
#   layer.
# - Unconfirmed in the paper and chosen here: t is the position in the token's own sequence; horizon
#   is the context by default; the first warm_up tokens, prompt included, run all layers, and the
#   tokens of a prompt exit like any others, so that it does not matter in what chunks a text is
#   run.
# - A threshold above 1 means that no token exits, with decay or without: the confidence is not even
#   measured. The formula alone would clip it to 1, which a saturated softmax in float32 reaches.
#   The model is also the dense one with first >= L, or with a warm_up as long as the text.
# - minitx/lab/learn_then_test.py finds a threshold that bounds the error.
# - The FFN takes 2 D F instead of 3 D F without a gate. kv_fill=deferred saves nothing in a layer
#   that a later token enters: the layer only runs later, in a larger matrix product.
# - A softmax check costs more than a layer (about 12 D^2) where V > 12 D, and then the checks of a
#   token cost more than all layers that they could skip: such a setting warns. every=2 halves the
#   checks. The head also runs once more on the exit state: it belongs to the model, not the stack.
# - With kv_fill=deferred, every token sees the keys and values that the dense model has for the
#   same text; only the logits of tokens that exited are approximate.
# - A batch skips a layer only where all sequences do: a token that has exited is computed, and the
#   result dropped, as long as the token at the same place of another sequence has not exited.
# - A prompt whose tokens exit at different layers is gathered and scattered in each layer, which
#   can take longer than running it in full: a warm_up as long as the prompt avoids that.
# - measure=random draws one number, uniform in [0, 1), for each layer and position. With
#   threshold=0 every token exits after ``first`` layers. measure=probe needs a tokenizer, to read
#   the calibration stories.
# - Figures on stories (minitx sweep early-exit SETTING --stories 60; speed on a busy machine).
#   Answers: % of questions answered correctly that need 1 / 2 / 3 facts of the story.
#
#       setting                                     multiply-adds   loss       answers       speed
#       dense                                           1.00x      0.0000    99 / 93 / 100    1.0x
#       default                                         0.68x     +0.0045    99 / 94 / 100    1.2x
#       measure=saturation first=6 threshold=0.95       0.78x     +0.0015    99 / 93 / 100    1.1x
#       measure=saturation first=4 threshold=0.95       0.67x     +0.0038    99 / 91 /  97    1.2x
#         ... kv_fill=deferred                          0.67x     +0.0038    99 / 91 /  97    1.3x
#       measure=softmax first=4 threshold=0.9           0.93x     +0.0003    99 / 93 / 100    0.95x
#       measure=random threshold=0.93                   0.82x     +0.0939    82 / 84 /  89    1.0x
#
# - Training a model to predict at every layer: minitx/training/layerskip.py. Not here: heads
#   trained for each layer (DeeBERT), waiting until several layers agree (PABEE), layers fixed by
#   position (SkipDecode).
