"""Delta networks: multiply only the input coordinates that changed since an earlier token.

This file: the card and options, the product that runs (online), its state, a baseline, checks,
notes.
"""

from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.products_with_layer import WHERE, StatefulProduct, replace_products
from minitx.shared.quality_monitor import Limit, Monitor, monitored
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, technique, wrap
from minitx.tree import Part, part


@technique(
    level="ffn",
    exact=False,
    neutral={"refresh": 1},
    after=("function_tables",),
    demo={"threshold": 0.5, "refresh": 8},
    event=("coordinates sent", "coordinates"),
    presets={"aggressive": {"threshold": 0.5}},
)
def delta(
    lm,
    *,
    threshold: Annotated[
        float,
        "a coordinate is sent (multiplied) if it differs from the value last sent by more than "
        "this times the rms of the input; 0: if it differs at all",
        at_least(0),
    ] = 0.3,
    where: Annotated[
        Literal["all", "attention", "ffn", "out", "down"],
        "which products: of attention (q, k, v, out), of the FFN, or only the last one of "
        "attention (out) or of the FFN (down)",
    ] = "all",
    refresh: Annotated[
        int, "all coordinates are sent once in this many tokens; 1: always", at_least(1)
    ] = 64,
    choose: Annotated[
        Literal["delta", "zero", "random"],
        "delta: send the coordinates that changed. Baselines: zero compares with 0 instead, so "
        "small inputs are dropped and nothing is reused; random sends as many at random",
    ] = "delta",
    monitor: Monitor = 0,
    limit: Limit = 0.2,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Multiply only the input coordinates that changed since an earlier token (delta networks).

    Paper:     Neil et al., "Delta Networks for Optimized Recurrent Network Computation", ICML 2017,
               arXiv 1612.05571. The same idea with quantized inputs: Riera et al., "Computation
               Reuse in DNNs by Exploiting Input Similarity", ISCA 2018.
    Fidelity:  a reconstruction from the abstract and from notes. The paper trains for it, here
               nothing is trained. Ours: a threshold relative to the rms of each input; refresh.
    Kind:      approximate; exact up to rounding at threshold=0, dense at refresh=1. On text little
               of what it saves is reuse: choose=zero, which remembers nothing, saves more at a
               lower loss, except in the products ``out`` (Notes).
    Idea:      If an input changes a little, so does its product: x' W = x W + (x' - x) W.
               Coordinates that do not change need no multiplication, and their rows of W are not
               read. In audio and video, most inputs hardly change from step to step.
    Offline:   a copy of each W with contiguous rows.
    Online:    for each product y = x W + b, token by token; sent and y are those of the token
               before; at the first one, and once in ``refresh`` tokens: sent = x, y = x W + b
               tolerance = threshold * rms(x)
               i         = the coordinates with |x - sent| > tolerance
               y        += sum over i of (x_i - sent_i) W_i
               sent_i    = x_i for these i only: the others keep their difference, so the error of
                           an input coordinate never exceeds the tolerance (no drift)
               Norms, activations and attention read y and are computed anew for every token; the
               KV cache stores results.
    Saves:     (in - n) out multiply-adds for a matrix (in, out) if n coordinates are sent, and as
               many weights read, less 2 in for the rms and the comparisons. Instead in + out
               numbers are stored per product (and per token, so that rewind can go back) and
               read for each token, like a cache.
    In NumPy:  slower: on stories at the default generation is 0.3x as fast as dense and a prompt,
               which runs token by token, 0.1x. A large matrix pays if less than about a third of
               the coordinates are sent, a small one hardly ever (Notes).
    Not for:   inputs that jump from token to token, which those of a language model do; batches:
               sequences run one by one.
    Proof:     tests/skip/test_delta.py; literal version: tests/skip/literal_delta.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    if refresh == 1:
        return lm
    check_monitor(where, monitor)

    def make(linear: Linear, name: str, index: int) -> Part:
        w = linear.w.copy()  # row-major, beside the dense one where the monitor needs both
        if choose == "zero":
            return LargeInputs(w, linear.b, threshold)
        drawn = (seed, index, WHERE["all"].index(name)) if choose == "random" else None
        return DeltaLinear(w, linear.b, threshold, refresh, drawn)

    changed = replace_products(lm, where, make)
    if not monitor:
        return changed
    dense: dict[int, Part] = {}
    wrap(lm, "ffn", lambda node, index: dense.setdefault(index, node))
    return wrap(changed, "ffn", lambda node, i: monitored(dense[i], [node], monitor, limit))


# Online ------------------------------------------------------------------------------------------


@part
class DeltaLinear(StatefulProduct):
    """x W + b, updated from the token before by the coordinates of x that changed."""

    matrix_layout = "row-major"  # rows of W are gathered
    w: np.ndarray  # (in, out)
    b: np.ndarray | None
    threshold: float
    refresh: int
    random: tuple | None = None  # seeds of the baseline

    def one(self, x, layer: Layer):
        """x (T, in) -> (T, out), for the tokens of one sequence in order."""
        kept = layer.memory.recall(self, Sent)
        y = np.empty((len(x), self.w.shape[1]), x.dtype)
        for t, position in enumerate(layer.tokens.array.tolist()):
            if position > kept.position:
                kept.after.append(self.token(x[t], kept.after, position))
                y[t] = kept.after[-1].y
            else:  # later tokens have been here already: this one is not part of their sequence
                y[t] = ops.linear(x[t], self.w, self.b)
        return y

    def token(self, x, before: "list[Token]", position: int) -> "Token":
        """The state after one token x (in,), from the state before it."""
        ledger.event("coordinates", x.size)
        if not before or position // self.refresh != before[-1].position // self.refresh:
            ledger.event("coordinates sent", x.size)
            return Token(position, x, ops.linear(x, self.w, self.b))
        _, sent, y = before[-1]
        ledger.count(cache_bytes=sent.nbytes + y.nbytes)
        i = self.changed(x, sent, position)
        ledger.event("coordinates sent", len(i))
        y = y + ops.linear(x[i] - sent[i], self.w[i])
        sent = sent.copy()
        sent[i] = x[i]  # the others keep their difference until it is large enough
        return Token(position, sent, y)

    def changed(self, x, sent, position: int):
        """The indices of the coordinates to send."""
        i = far(x, sent, self.threshold)
        if self.random is None:
            return i
        rng = np.random.default_rng((*self.random, position))
        return np.sort(rng.permutation(x.size)[: len(i)])


def far(x, sent, threshold: float):
    """The indices of the coordinates of x (in,) that are far from what was sent."""
    wide = x.astype(np.float64)  # in float32 large squares overflow, tiny ones are 0
    tolerance = threshold * np.sqrt(np.vecdot(wide, wide) / x.size)
    ledger.count(2 * x.size)  # the rms and the comparisons
    return np.flatnonzero(~(abs(x - sent) <= tolerance))  # so that NaN is sent, too


class Token(NamedTuple):
    """The state after a token."""

    position: int
    sent: np.ndarray  # (in,) of each coordinate, the value that was last sent
    y: np.ndarray  # (out,) sent W + b


class Sent:
    """The state after each token of a sequence. Only the last one is read; the others are what
    ``rewind`` goes back to."""

    def __init__(self):
        self.after: list[Token] = []

    @property
    def position(self) -> int:
        return self.after[-1].position if self.after else -1

    def rewind(self, position: int) -> None:
        while self.position >= position:
            self.after.pop()

    def __deepcopy__(self, memo) -> "Sent":
        other = Sent()
        other.after = list(self.after)  # arrays are never changed
        return other


@part
class LargeInputs(Part):
    """A baseline without memory: x W + b of the coordinates that are far from 0."""

    matrix_layout = "row-major"
    w: np.ndarray  # (in, out)
    b: np.ndarray | None
    threshold: float

    def __call__(self, x, layer: Layer):
        y = np.empty((*x.shape[:-1], self.w.shape[1]), x.dtype)
        for t in np.ndindex(x.shape[:-1]):
            i = far(x[t], 0.0, self.threshold)
            ledger.event("coordinates", x.shape[-1])
            ledger.event("coordinates sent", len(i))
            y[t] = ops.linear(x[t][i], self.w[i], self.b)
        return y


# Checks ------------------------------------------------------------------------------------------


def check_monitor(where: str, monitor: int) -> None:
    if monitor and where in ("attention", "out"):
        raise MinitxError(
            f"delta: monitor={monitor} watches the FFN, which where={where} leaves dense; use "
            "where=all, or monitor=0."
        )


# Notes:
#
# - Does it pay to compare with the last token's input instead of with 0? Only if |x_t - x_(t-1)| is
#   below |x_t|. For independent inputs the ratio is sqrt(2) = 1.41. Coordinates sent at the default
#   threshold, of 6 stories (python -m minitx.lab.layer_events delta choose=delta -m MODEL --stories
#   6 --parts, and with choose=zero):
#
#       model               choose    q, k, v    out     gate, up    down
#       stories             delta       82 %     59 %      80 %      47 %
#                           zero        74 %     73 %      74 %      32 %
#       stories-parallel    delta       81 %     70 %      81 %      43 %
#                           zero        77 %     72 %      76 %      43 %
#       stories-relu        delta       75 %     48 %      71 %      31 %
#                           zero        77 %     75 %      76 %      20 %
#
#   So consecutive tokens are nearly unrelated; only what attention returns, an average over earlier
#   tokens, changes slowly, in two of the models. On inputs x_t = 0.9 x_(t-1) + noise (ratio 0.45)
#   threshold=0.3 sends 51 % of the coordinates, choose=zero 77 % (tests/skip/test_delta.py).
# - Figures on stories (minitx sweep delta threshold=0.2,0.3,0.5 choose=delta --stories 30, and with
#   choose=zero; choose=random threshold=0.02,0.2). Loss: above dense, in nats per token. Hops: % of
#   answers that are right, by the facts that they combine.
#
#       choose    threshold    multiply-adds    loss       1 / 2 / 3 hops
#       dense                     1.000x        0.0000     100 / 96 / 100
#       delta     0.2             0.812x       +0.0012     100 / 93 / 100
#       delta     0.3             0.742x       +0.0036     100 / 93 / 100
#       delta     0.5             0.625x       +0.0222     100 / 93 / 100
#       zero      0.2             0.749x       +0.0011     100 / 93 / 100
#       zero      0.3             0.670x       +0.0037     100 / 93 / 100
#       zero      0.5             0.547x       +0.0168     100 / 93 /  95
#       random    0.02            0.979x       +0.5194      82 / 79 /  79
#       random    0.2             0.599x       +7.1042       4 /  4 /   0
#
#   where=out, on 16 stories: delta threshold=0.5 0.957x +0.0013, zero threshold=0.3 0.980x +0.0018.
#   (choose=random: "as many" is counted along its own text, whose hidden states differ; so compare
#   at equal multiply-adds, not at an equal threshold.)
# - Drift: a difference that is not sent is at most the tolerance, however long the text. The naive
#   variant, which compares with the previous input, forgets it, and errors add up: on
#   x_t = 0.9 x_(t-1) + noise, threshold=0.3, its relative error (over 50 tokens each) reaches 4.6
#   within 1,000 tokens, with refresh=20 0.55; here it is at most 0.14. So refresh only clears
#   rounding (float32, threshold=0: below 1e-6 with refresh=20, above it without).
# - Time of one product with a decoded token, relative to dense (one BLAS thread), by the share of
#   coordinates sent. Gathering rows costs a copy of each.
#
#       python -m minitx.lab.product_times ...    0.1     0.2     0.3     0.5     0.75
#       delta 352 128                             2.6x    2.9x    3.1x    3.4x    5.3x
#       delta 128 704                             1.4x    1.5x    1.7x    2.6x    3.1x
#       delta 576 3072                            0.4x    0.7x    0.9x    1.6x    2.1x
#
#   With the bookkeeping of the whole model: minitx compare --delta, and minitx first-token --delta
#   for prompts.
# - A token that reaches a layer after later ones have (techniques that skip and revive tokens) is
#   multiplied densely, and does not count as the token before.
# - The monitor compares an FFN's result with that of the dense FFN. minitx sweep delta where=ffn
#   threshold=0.5 monitor=16 limit=0.2,0.3 --stories 16: 0.894x at +0.0039 and 0.794x at +0.0062;
#   without it (monitor=0) 0.716x at +0.0088. A lower threshold does better (0.3: 0.799x at
#   +0.0004), and needs no second copy of the matrices.
