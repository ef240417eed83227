"""Early exit: a token leaves the stack of blocks once it seems to be decided.

Here are the measures of that, the thresholds, and two ways to settle what a token that left owes to
the layers above: the keys and values that later tokens will look for there. A threshold with a
guarantee is found by ``minitx.lab.learn_then_test``, offline. Not here: heads trained for each
layer (DeeBERT), waiting until several layers agree (PABEE), and depths fixed by position
(SkipDecode). Training a model for this is ``minitx.training.layerskip``.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import Stack, Transformer
from minitx.shared.confidence import Drawn, Limit, Probe, Saturation, SoftmaxGap, draws
from minitx.state import Layer, State, Tokens
from minitx.technique import blocks_of, need, owner, swap, technique
from minitx.tree import Part, part


@technique(
    level="stack",
    exact=False,
    neutral={"threshold": 1.1},
    demo={"measure": "random", "threshold": 0.5},
    event="layers skipped",
)
def early_exit(
    lm,
    *,
    measure: Literal["softmax", "saturation", "probe", "random"] = "softmax",
    threshold: float = 0.9,
    tau: float | None = None,
    N: int | None = None,
    fill: Literal["copy", "deferred"] = "copy",
    first: int = 1,
    every: int = 1,
    warm_up: int = 0,
    seed: int = 0,
):
    """A token leaves the blocks early if it seems decided; its keys and values are made up for.

    Paper: Tal Schuster, Adam Fisch, Jai Gupta, Mostafa Dehghani, Dara Bahri, Vinh Tran, Yi Tay and
        Donald Metzler, 2022, "Confident Adaptive Language Modeling", arXiv 2207.07061 (CALM): the
        measures, the decaying threshold and the copied state, whose formulas were taken from notes
        on the paper and from its published code. Deferring after Sangmin Bae et al., 2023, "Fast
        and Robust Early-Exiting Framework", arXiv 2310.05424 (FREE); that tokens may leave at any
        layer was chosen here.
    Kind: approximate.
    Skips or precomputes: for each token by itself, the blocks behind the one it leaves after.
    Offline: measure=probe is trained: a logistic read-out of the stream h, w (D,) and b for all
        layers, of whether final norm and head read from h_i what they read from h_L, both outcomes
        weighted alike, on calibration stories (train_probe). The other measures need nothing, but a
        model whose last layers alone were trained to be read is read badly before.
    Online: h_i is the stream after i blocks. At i = first, first + every, ... < L a token leaves if
        c >= lam_t, with c by measure: softmax, p_(1) - p_(2), the gap between the two likeliest
        tokens in softmax(head(norm(h_i))); saturation, cos(h_i, h_(i-1)), from i = 2 on; probe,
        sigmoid(w . h_i + b); random, drawn evenly from 0 to 1 for each i and t: a baseline, with
        threshold=0 for all to leave after first. lam_t = threshold; with tau,
        clip(0.9 threshold + 0.1 exp(-tau t / N), 0, 1) (CALM's code has tau = 4).
        fill=copy: where a layer l was not run, its keys and values are made of the state that the
        token left with, by that layer's norm, W_k and W_v at the token's position. fill=deferred:
        they are owed; when a later token enters l, all that are owed there run through l first, in
        one causal chunk with it. Then all that a token sees is what the dense model has; what was
        read off a token that left is not changed.
        Unconfirmed in the paper and chosen here: t is the position in the token's own sequence and
        N by default the context; the first warm_up tokens, prompt included, run in full; tokens of
        a prompt leave as any others, so that it does not matter in what pieces a text is run.
    Saves: for each block passed by, 2 D (H + K) d + 2 D K d + 3 D F (2 D F without a gate)
        multiply-adds and the attention's 2 S H d; copying takes 2 D K d of it back. Deferring saves
        what is still owed at the end; else the work comes later, many rows at once. A check costs
        V D (softmax), 3 D (saturation) or D (probe): with V D near a block's (about 12 D^2) softmax
        does not pay, and every=2 halves it. The head reads the state left with once more, V D.
        A prompt, in NumPy, is cut into pieces where tokens leave, and can take longer than dense:
        warm_up as long as the prompt avoids that.
    Neutral: threshold = 1.1, or any above 1: no token leaves, tau or not, and nothing is measured.
        So are first >= L and a warm_up as long as the text.
    Not for: fill=copy with blocks that cannot make keys and values alone; measure=probe without a
        tokenizer. In a batch, a block is passed by only by tokens whose whole column has left.
    """
    L = len(blocks_of(lm))
    check(threshold=(threshold, 0), first=(first, 1), every=(every, 1), warm_up=(warm_up, 0))
    check(tau=(tau, 0), N=(N, 1), seed=(seed, 0))
    if measure == "saturation":
        first = max(first, 2)  # what enters block 0 may be no stream (a row of a table)

    def change(model: Transformer) -> Transformer:
        need(model.stack, Stack)
        length = model.config.context if N is None else N
        kinds = {
            "softmax": lambda: SoftmaxGap(model.norm, model.head),
            "saturation": Saturation,
            "probe": lambda: Probe(*story_probe(lm)),
            "random": lambda: Drawn(draws(L, model.config.context, seed)),
        }
        limit = Limit(threshold, tau, length, warm_up)
        if fill == "copy":
            check_backfill(model.stack.blocks[first:])
        fills = {"copy": CopiedState, "deferred": Deferred}[fill]()
        stack = ExitingStack(model.stack, kinds[measure](), limit, fills, first, every)
        return replace(model, stack=stack)

    return swap(lm, Transformer, change)


def check(**values: tuple) -> None:
    """Refuse values below the least that goes with them; None is left out."""
    for name, (value, least) in values.items():
        if value is not None and value < least:
            raise MinitxError(f"early_exit: {name} is {value:g}; it must be at least {least}.")


def check_backfill(blocks: Sequence[Part]) -> None:
    for node in [*blocks, *(block.attn for block in blocks if hasattr(block, "attn"))]:
        if not hasattr(node, "backfill"):
            raise MinitxError(
                f"early_exit cannot copy into the {type(node).__name__} of {owner(node)}, "
                "which does not make keys and values alone; use fill=deferred, or one of the two."
            )


# Who exits ---------------------------------------------------------------------------------------


@part
class ExitingStack(Part):
    """The blocks one after another; after some of them each token is asked whether it exits."""

    inner: Part
    measure: Part
    limit: Part
    fill: Part
    first: int
    every: int

    @property
    def blocks(self) -> tuple:
        return self.inner.blocks

    def __call__(self, x, state: State):
        L, first = len(self.blocks), self.first
        t = np.broadcast_to(state.tokens.own, x.shape[:-1])  # (..., T)
        lam = self.limit(t)  # (..., T)
        may = lam <= 1  # no confidence is larger
        if first >= L or not may.any():
            x = self.inner.run(x, state, 0, L)
            self.fill.all_ran(state)
            return x
        before = self.inner.run(x, state, 0, first - 1)
        x = self.inner.run(before, state, first - 1, first)
        self.fill.begin(x, state)
        ledger.event("layers that may be skipped", lambda: may.sum() * (L - first))
        if x.size == x.shape[-1]:
            return self.one_token(x, before, state, t.reshape(1), lam.item())
        live = t >= 0  # padding has exited from the start
        for depth in range(first, L):
            if (depth - first) % self.every == 0:
                leave = self.leaving(x, before, depth, t, lam, live & may)
                live = live & ~leave
                note(leave, depth, L)
            block, layer = self.blocks[depth], state.layers[depth]
            before, x = x, self.fill.run(block, x, live, layer, state)
        return x

    def one_token(self, x, before, state: State, t, lam: float):
        """The rest for one token, without masks: it runs until it exits."""
        L = len(self.blocks)
        for depth in range(self.first, L):
            if (depth - self.first) % self.every == 0:
                row, earlier = x.reshape(1, -1), before.reshape(1, -1)  # (1, D)
                if self.measure(row, earlier, depth, t)[0] >= lam:
                    note(ALIVE, depth, L)
                    self.fill.skip(self.blocks[depth:], x, state.layers[depth:], state)
                    break
            block, layer = self.blocks[depth], state.layers[depth]
            before, x = x, self.fill.run(block, x, ALIVE, layer, state)
        return x

    def leaving(self, x, before, depth: int, t, lam, asked):
        """Which of the tokens that are ``asked`` (..., T) exit after ``depth`` blocks."""
        leave = np.zeros_like(asked)
        if asked.any():
            c = self.measure(x[asked], before[asked], depth, t[asked])
            leave[asked] = c >= lam[asked]
        return leave


ALIVE = np.ones(1, bool)  # the one token of a step


def note(leave, depth: int, L: int) -> None:
    ledger.event("layers skipped", lambda: leave.sum() * (L - depth))
    ledger.event(f"tokens that left after {depth}", leave)


# Keys and values of tokens that have exited ------------------------------------------------------


@part
class CopiedState(Part):
    """Later layers get keys and values made from the hidden state that a token exited with."""

    def begin(self, x, state: State) -> None:
        pass

    def all_ran(self, state: State) -> None:
        pass

    def run(self, block: Part, x, live, layer: Layer, state: State):
        """One block over those of x (..., T, D) that are live (..., T); the others stay.

        First the keys and values of all are stored (x holds the exit states of those that have
        exited), then the live tokens attend. In a batch, a token that has exited is carried along
        where another row is live, and what comes out is thrown away.
        """
        layer.tokens = state.tokens
        if live.all():
            return block(x, layer)
        block.backfill(x, layer)
        going = np.flatnonzero(columns(live))
        if not len(going):
            return x
        layer.tokens = state.tokens.only(going)
        y, rows = x.copy(), x[..., going, :]
        y[..., going, :] = np.where(live[..., going, None], block.attend_from(rows, layer), rows)
        return y

    def skip(self, blocks, x, layers, state: State) -> None:
        """What ``run`` does in all these layers for the one token x (..., 1, D), which exited."""
        for block, layer in zip(blocks, layers, strict=True):
            layer.tokens = state.tokens
            block.backfill(x, layer)


def columns(live):
    """(T,) booleans: is any row of the batch live (..., T) there?"""
    return live.reshape(-1, live.shape[-1]).any(0)


@part
class Deferred(Part):
    """Later layers get keys and values when a later token needs them: then the tokens that skipped
    a layer run through it in full, in one chunk with that token.

    ``Streams.done`` says how far each layer has come. The tokens from there on have been through
    all layers before and none after, since whoever enters a layer takes them all along.
    """

    has_history = True

    def begin(self, x, state: State) -> None:
        self.streams(x, state).rows[..., state.tokens.positions, :] = x

    def all_ran(self, state: State) -> None:
        if self in state.shared.kept:
            state.shared.kept[self].done = [state.tokens.end] * len(state.layers)

    def run(self, block: Part, x, live, layer: Layer, state: State):
        """One block over all deferred tokens up to the last of x (..., T, D) that is live (..., T);
        what comes out for those that have exited is kept for the next layer, and not returned."""
        going = np.flatnonzero(columns(live))
        if not len(going):
            return x
        at, streams = state.position, self.streams(x, state)
        a, b = streams.done[layer.index], at + int(going[-1]) + 1
        layer.tokens = Tokens(slice(a, b), state.start)
        streams.rows[..., a:b, :] = block(streams.rows[..., a:b, :], layer)
        streams.done[layer.index] = b
        if a < at:
            ledger.event("layers made up for", (at - a) * math.prod(x.shape[:-2]))
        return np.where(live[..., None], streams.rows[..., at : at + x.shape[-2], :], x)

    def skip(self, blocks, x, layers, state: State) -> None:
        """Nothing yet for the one token x (..., 1, D), which exited."""

    def streams(self, x, state: State) -> "Streams":
        shape = (*x.shape[:-2], state.capacity, x.shape[-1])
        # What came before the first exit was run through all layers.
        done = [state.position] * len(state.layers)
        return state.shared.recall(self, lambda: Streams(shape, x.dtype, done))


class Streams:
    """rows (..., capacity, D): each token as it came out of the last layer it has been through.
    done: for each layer, up to which position tokens have been through it."""

    def __init__(self, shape: tuple, dtype, done: list[int]):
        self.rows = np.empty(shape, dtype)
        self.done = done

    def rewind(self, position: int) -> None:
        self.done = [min(done, position) for done in self.done]


# Offline -----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # a sweep over thresholds needs one probe
def story_probe(lm) -> tuple[np.ndarray, float]:
    """w and b of the probe for a model that reads stories."""
    from minitx.training.calibration import texts_for  # only for this measure
    from minitx.training.exit_probe import TEXTS, train_probe

    texts = texts_for("early_exit", lm, TEXTS, "use measure=softmax or saturation")
    return train_probe(lm, texts)
