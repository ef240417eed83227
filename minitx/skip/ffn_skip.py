"""FFN-SkipLLM: skip some feed-forward networks of a token, attention never.

Two parts stand in the place of an FFN: one decides by what it measures, the other follows a fixed
plan, for comparison. ``calibrate`` proposes settings, offline. That a layer changes the stream
little does not prove that it can be spared (the stream grows with depth in any model, what a layer
adds does not), so what skipping costs is left to ``minitx compare``.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError
from minitx.model import SkiplessBlock, SkiplessParallelBlock
from minitx.state import Layer
from minitx.technique import blocks_of, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="ffn",
    exact=False,
    neutral={"threshold": 1.1},
    demo={"threshold": -2.0, "k": 1, "warm_up": 3, "cold_start": 0, "cold_end": 2},
    event="FFNs skipped",
)
def ffn_skip(
    lm,
    *,
    choose: Literal["similarity", "random", "static"] = "similarity",
    threshold: float = 0.98,
    k: int | None = None,
    warm_up: int = 25,
    cold_start: int | None = None,
    cold_end: int | None = None,
    rate: float = 0.2,
    seed: int = 0,
):
    """A token whose stream an FFN hardly turned skips the FFNs of the next k layers.

    Paper: Ajay Jaiswal, Bodun Hu, Lu Yin, Yeonju Ro, Tianlong Chen, Shiwei Liu and Aditya Akella,
        2024, "FFN-SkipLLM: A Hidden Gem for Autoregressive Decoding with Adaptive Feed Forward
        Skipping", EMNLP 2024, arXiv 2404.03865. Its text was not at hand: the rule below is the one
        on which three summaries of it agree.
    Kind: approximate.
    Skips or precomputes: the FFNs of layers cold_start <= l < cold_end, for each token by itself,
        but none of the first warm_up tokens of a sequence. Attention always runs, so that every
        layer has the keys and values of every token.
    Offline: cold_start, cold_end and threshold follow from the mean cosine c_l of each layer on
        some text (calibrate, in this file); nothing is trained.
    Online: s = a.y / (|a| |y|), a being the stream as it enters the FFN and y = a + FFN(a). Where
        s >= threshold, the next k FFNs before cold_end add nothing: y = a. Then s is measured
        again. In a parallel block, a is the block's input and y = a + FFN(a) leaves attention out.
        Unconfirmed in the paper and chosen here: measuring again after k layers (k = L never does);
        a warm-up that counts the prompt's tokens too, and skipping in the rest of the prompt, so
        that it does not matter in what pieces a text is run; the values threshold = 0.98,
        k = L // 4 (at least 1), cold_start = 1 + L // 8 and cold_end = L - 1 (L below 4 layers).
        Baselines: choose = random skips each FFN that is not cold with the same probability, drawn
        once for each layer and position; choose = static skips the last of them, for all tokens
        alike. For these, rate is the share of all L FFNs that a token skips after the warm-up.
    Saves: 3 D F multiply-adds for each FFN that a token skips (2 D F without a gate), less 3 D for
        each cosine. With several rows at once, weights are still read unless every row skips.
    Neutral: threshold = 1.1, which no cosine reaches. So are k = 0, cold_start >= cold_end, a
        warm-up as long as the text, and, for the baselines, rate = 0.
    Not for: models of one or two layers, where the defaults leave nothing to skip: the first layer
        is cold, and the first that is not has to be measured.
    """
    L = len(blocks_of(lm))
    need_residual_adds(lm)
    cold_start = 1 + L // 8 if cold_start is None else cold_start
    cold_end = L - (L >= 4) if cold_end is None else cold_end
    k = default_k(L) if k is None else min(k, L)
    check(L, cold_start=cold_start, cold_end=cold_end)
    check(None, k=k, warm_up=warm_up, seed=seed)
    warm = range(cold_start, cold_end)
    if choose != "similarity":
        plan = planned(choose, rate, warm, L, lm.model.config.context, seed)

    def change(ffn: Part, index: int) -> Part:
        if index not in warm:
            return ffn
        if choose != "similarity":
            return PlannedFFN(ffn, plan[index - cold_start], warm_up)
        later = cold_end - 1 - index  # how many there are to skip after this one
        return SimilarityFFN(ffn, threshold, k if later else 0, warm_up)

    return wrap(lm, "ffn", change)


def need_residual_adds(lm) -> None:
    """Refuse a model in which an FFN that adds nothing would leave nothing of the token."""
    if any(type(block) in (SkiplessBlock, SkiplessParallelBlock) for block in blocks_of(lm)):
        raise MinitxError(
            "ffn_skip needs residual adds, and this model is skipless: without its FFN nothing of "
            "a token would be left; leave ffn_skip out."
        )


def default_k(L: int) -> int:
    return max(1, L // 4)


def check(most: int | None, **values: int) -> None:
    """Refuse values that are negative or above ``most``, the number of layers."""
    for name, value in values.items():
        if value < 0 or most is not None and value > most:
            upper = "" if most is None else f" and at most {most}, the number of layers"
            raise MinitxError(f"ffn_skip: {name} is {value}; it must be at least 0{upper}.")


def planned(choose: str, rate: float, warm: range, L: int, context: int, seed: int):
    """What the baselines skip: booleans (layers that are not cold, context)."""
    if not 0 <= rate * L <= len(warm):
        raise MinitxError(
            f"ffn_skip: rate is {rate:g}; it must be at least 0 and at most {len(warm) / L:g}, "
            f"since {len(warm)} of the {L} FFNs are not cold."
        )
    if choose == "random":
        share = np.full(len(warm), rate * L / max(len(warm), 1))
    else:  # from the last one down; rate * L need not be whole, so one is skipped now and then
        share = np.clip(rate * L - np.arange(len(warm))[::-1], 0, 1)
    return np.random.default_rng(seed).random((len(warm), context)) < share[:, None]


# Online ------------------------------------------------------------------------------------------


@part
class SimilarityFFN(Part):
    """Skips if a layer below said so; otherwise runs, and may tell the next k to skip."""

    inner: Part
    threshold: float
    k: int  # 0: nothing to tell, so nothing is measured
    warm_up: int

    def __call__(self, x, layer: Layer):
        if x.size == x.shape[-1]:
            return self.one_token(x, layer)
        may = past(self.warm_up, x, layer)  # (..., T)
        if not may.any():
            return self.inner(x, layer)
        counts, where = self.run_skip(x, layer), layer.tokens.positions
        run_skip = counts[..., where]  # (..., T)
        skip = run_skip > 0
        run_skip = run_skip - skip
        f = run_kept(self.inner, x, layer, skip, may)  # (..., T, D)
        if self.k:
            measured = may & ~skip
            a = x[measured]  # (tokens, D)
            run_skip[measured] = np.where(cosine(a, a + f[measured]) >= self.threshold, self.k, 0)
        counts[..., where] = run_skip
        return f

    def one_token(self, x, layer: Layer):
        """The same without masks, which for one token take as long as the FFN of a small model."""
        at = int(layer.tokens.array[0])
        if at - (0 if layer.start is None else layer.start[0]) < self.warm_up:
            return self.inner(x, layer)
        run_skip = self.run_skip(x, layer).reshape(-1)  # (capacity,), a view
        skip = run_skip[at] > 0
        note(1, skip)
        if skip:
            run_skip[at] -= 1
            return np.zeros_like(x)
        f = self.inner(x, layer)
        if self.k:
            a = x.reshape(1, -1)  # (1, D)
            similar = cosine(a, a + f.reshape(1, -1))[0] >= self.threshold
            run_skip[at] = self.k if similar else 0
        return f

    def run_skip(self, x, layer: Layer):
        """How many FFNs each token has yet to skip, by position: (..., capacity)."""
        return layer.shared.recall(RunSkip, lambda: RunSkip(x.shape[:-2], layer.capacity)).count


class RunSkip:
    """The paper's run_skip of every token. All layers see it: one sets it, those above count down.

    It is kept by position, so that it belongs to its token whatever others are run beside it. A
    token that was not seen yet, or was forgotten, has 0.
    """

    def __init__(self, batch: tuple, capacity: int):
        self.count = np.zeros((*batch, capacity), np.int64)

    def rewind(self, position: int) -> None:
        self.count[..., position:] = 0


@part
class PlannedFFN(Part):
    """Skips at fixed positions, whatever the token: the baselines."""

    inner: Part
    skipped: np.ndarray = table()  # (context,) booleans
    warm_up: int = 0

    def __call__(self, x, layer: Layer):
        may = past(self.warm_up, x, layer)  # (..., T)
        return run_kept(self.inner, x, layer, may & self.skipped[at(x, layer)], may)


def past(warm_up: int, x, layer: Layer):
    """(..., T) booleans: tokens x (..., T, D) that have the warm-up behind them; never padding."""
    return np.broadcast_to(at(x, layer) >= warm_up, x.shape[:-1])


def at(x, layer: Layer):
    """Positions of the tokens x (..., T, D) in their own sequences."""
    return layer.tokens.own


def run_kept(ffn: Part, x, layer: Layer, skip, may):
    """What the FFN adds to x (..., T, D), and zeros where ``skip`` (..., T) says so. It is called
    with the other rows alone, and not at all if there are none."""
    note(may, skip)
    if not skip.any():
        return ffn(x, layer)
    f = np.zeros_like(x)
    if not skip.all():
        f[~skip] = ffn(x[~skip], layer)
    return f


def note(may, skipped) -> None:
    """Count FFNs, each layer and token by itself: not cold and after the warm-up; skipped."""
    ledger.event("FFNs that may be skipped", may)
    ledger.event("FFNs skipped", skipped)


def cosine(a, y):
    """Cosines (tokens,) of the angles between the rows of a and of y (tokens, D); 0 for zeros."""
    ledger.count(3 * a.size)
    ay, aa, yy = (np.einsum("td,td->t", u, v) for u, v in ((a, y), (a, a), (y, y)))
    return ay / (np.sqrt(aa) * np.sqrt(yy) + 1e-30)


# Offline -----------------------------------------------------------------------------------------


@part
class Probe(Part):
    """Runs the FFN and keeps the cosine of every token."""

    inner: Part
    found: list  # of arrays (T,), one for each text

    def __call__(self, x, layer: Layer):
        f = self.inner(x, layer)
        self.found.append(cosine(x, x + f))
        return f


def similarities(lm, texts: Sequence, warm_up: int = 0) -> np.ndarray:
    """Cosines (L, tokens) in a dense model, for the tokens of some texts (lists of ids, or strings)
    from position ``warm_up`` on. The mean of row l is the paper's c_l."""
    found: list[list] = [[] for _ in blocks_of(lm)]
    probed = wrap(lm, "ffn", lambda ffn, index: Probe(ffn, found[index]))
    for text in texts:
        probed.logits(lm.encode(text))
    rows = [[c[warm_up:] for c in row] for row in found]
    if not any(map(len, rows[0])):
        raise MinitxError(f"ffn_skip: no text is longer than the warm-up of {warm_up} tokens.")
    return np.stack([np.concatenate(row) for row in rows])


def calibrate(lm, texts: Sequence, rate: float, k: int | None = None, warm_up: int = 25) -> dict:
    """Options of ``ffn_skip`` with which a dense model skips about the share ``rate`` of all FFNs
    of the texts' tokens after the warm-up.

    texts: lists of ids, or strings. Cold are the layers at either end whose c_l is below the mean
    over all layers. The threshold is one of the cosines found; those tried, by halving, are run,
    because what is skipped changes the cosines above it. Raises MinitxError if no text outlasts the
    warm-up, or if so many FFNs cannot be skipped.
    """
    check(None, warm_up=warm_up)
    cosines = similarities(lm, texts, warm_up)
    c = cosines.mean(1)
    high = np.flatnonzero(c >= min(c.mean(), c.max()))  # rounding may put the mean above all
    cold = dict(cold_start=int(high[0]), cold_end=int(high[-1]) + 1)
    options = cold | dict(k=default_k(len(c)) if k is None else k, warm_up=warm_up)

    def share(threshold: float) -> float:
        return skipped(ffn_skip(lm, threshold=threshold, **options), texts) / cosines.size

    most = share(-2)  # every cosine reaches that
    if not 0 <= rate <= most:
        raise MinitxError(
            f"ffn_skip: the rate is {rate:g}; at least 0 and at most {most:.3g} is possible on "
            f"these texts with k={options['k']} and layers {high[0]} to {high[-1]}."
        )
    tried = np.unique(cosines[cold["cold_start"] : cold["cold_end"]])
    enough, too_high = 0, len(tried)
    while too_high - enough > 1:
        middle = (enough + too_high) // 2
        if share(float(tried[middle])) >= rate:
            enough = middle
        else:
            too_high = middle
    return options | dict(threshold=float(tried[enough]))


def skipped(lm, texts) -> int:
    """FFNs skipped while the texts are read."""
    with ledger.counting(lm) as counts:
        for text in texts:
            lm.logits(lm.encode(text))
    return counts.events["FFNs skipped"]
