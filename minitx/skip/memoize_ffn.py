"""Memoize the FFN: a token near one that was seen before gets the stored output of that one.

This file: the card and options, the FFN with a table (online), how the table is filled (offline),
notes. The table itself is minitx/shared/memo_table.py.

Letters: T new tokens, D width, F hidden width of the FFN, N stored tokens, r principal components.
"""

from dataclasses import fields
from typing import Annotated, Literal

import numpy as np

from minitx import ledger
from minitx.calibration import calibration_ids
from minitx.model import FFN
from minitx.progress import bar
from minitx.shared.memo_table import MemoTable, RadiusMonitor, check_options, cover, principal
from minitx.shared.quality_monitor import Limit, Monitor
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import each_sequence
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="ffn",
    exact=False,
    neutral={"size": 0},
    after=("ffn_skip", "function_tables"),
    demo={"size": 64, "radius": 0.8, "first": 0, "stories": 2},
    event=("hits", "lookups"),
    presets={
        "aggressive": {"radius": 0.4},
        "monitored": {"radius": 0.5, "monitor": 16},
    },
)
def memoize_ffn(
    lm,
    *,
    size: Annotated[int, "stored tokens N in each layer; 0: no table", at_least(0)] = 256,
    radius: Annotated[
        float,
        "distance |x - key| / |key| from a stored token up to which a token gets its output",
        at_least(0),
    ] = 0.35,
    rank: Annotated[
        int, "principal components r by which the nearest key is found", at_least(1)
    ] = 8,
    first: Annotated[int, "layers at the beginning that have no table", at_least(0)] = 1,
    choose: Annotated[
        Literal["nearest", "random", "random_tokens"],
        "nearest: tokens within the radius of a stored one get its output. Baselines: as many "
        "random tokens get a random stored output (random), or the nearest one's (random_tokens)",
    ] = "nearest",
    monitor: Monitor = 0,
    limit: Limit = 0.4,
    halvings: Annotated[
        int,
        "of the monitor: how many times it may halve the radius; 0: it only counts false hits",
        at_least(0),
    ] = 3,
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=64)
    ] = 16,
    seed: Annotated[int, "of the baselines", SEEDS] = 0,
):
    """Memoize FFN outputs: a token near a stored one gets the output of that one from a table.

    Paper:     Alvarez et al., "Fuzzy Memoization for Floating-Point Multimedia Applications", IEEE
               Transactions on Computers 54(7), 2005: similar inputs share one stored result.
    Fidelity:  our own form for transformers, after the abstract (the paper memoizes single
               floating-point operations in hardware). Memoization is also a strategy in Mittal's
               survey of approximate computing (ACM Computing Surveys 48(4), 2016).
    Kind:      approximate; exact at size=0. At radius=0 only equal inputs hit.
    Idea:      The same words recur in similar contexts, and an FFN sees one token at a time. Look
               the token up in a table of tokens seen before; if one is near, use its output.
    Offline:   x = norm(hidden state), y = FFN output    of all calibration tokens, in each layer
               store N of them, greedily: each time the one with most uncovered others in its radius
               key = x,  value = y,  A = the first r principal components of all x
    Online:    i = the key for which |x A - key_i A| is smallest         (r numbers, not D)
               |x - key_i| <= radius |key_i|:  y = value_i                         (a hit)
               otherwise:                      y = FFN(x), as usual                (a miss)
               The table never changes, so what a token gets depends on that token alone.
               With monitor=n, every n-th token that hits also runs exactly: if its error is above
               limit (a false hit) the radius is halved, if below limit / 2 it is doubled again.
    Saves:     3 D F multiply-adds for a hit (2 D F without a gate), less D r + N r + D for every
               lookup. The tables take N (2 D + r) numbers a layer, so memory grows.
    In NumPy:  decoding stories 0.95x as fast as dense at a hit rate of 0.5, 1.2x if all tokens hit:
               a lookup is a dozen small calls, which take more than half as long as an FFN.
    Not for:   text unlike the calibration text (no token is near); FFNs that another technique has
               changed (ffn_skip, ...). The first layer of stories: errors there cost most.
    Proof:     tests/skip/test_memoize_ffn.py; literal version: tests/skip/literal_memoize_ffn.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    check_options("memoize_ffn", lm, first, choose, monitor)
    if size == 0:
        return lm
    texts = calibration_ids("memoize_ffn", lm, stories)
    seen = inputs_and_outputs(lm, texts)
    drawn = random_scores(len(blocks_of(lm)), lm.model.config.context, seed)

    def change(ffn: Part, index: int) -> Part:
        if index < first:
            return ffn
        x, y = seen[index]
        stored = cover(x, radius, size)
        parts = {f.name: getattr(ffn, f.name) for f in fields(FFN)}
        parts["memo"] = memo = MemoTable.of(x[stored], principal(x, rank))
        parts |= {"values": y[stored], "radius": radius}
        if choose != "nearest":
            if choose == "random":
                parts["values"] = np.random.default_rng(seed).permutation(y[stored])
            others = np.delete(x, stored, axis=0)  # a token that is stored always hits
            rate = float((memo.nearest(others)[1] <= radius).mean()) if len(others) else 1.0
            return RandomHits(**parts, scores=drawn[index], rate=rate)
        if monitor:
            return MonitoredFFN(**parts, every=monitor, limit=limit, halvings=halvings)
        return MemoizedFFN(**parts)

    return wrap(lm, "ffn", change)


# Online ------------------------------------------------------------------------------------------


@part
class MemoizedFFN(FFN):
    """An FFN that looks its normalized input up first."""

    needs_inner_first = True  # the stored outputs are those of the matrices as they are

    memo: Part
    values: np.ndarray = table()  # (N, D) the outputs that belong to the keys
    radius: float = 0.0

    def __call__(self, x, layer: Layer):
        x = self.norm(x)
        entry, distance = self.memo.nearest(x)  # (..., T)
        return self.answer(x, entry, distance <= self.radius, layer)

    def answer(self, x, entry, hit, layer: Layer):
        """The outputs (..., D) for the normalized x (..., D): stored ones where ``hit`` (...)."""
        ledger.event("lookups", hit.size)
        ledger.event("hits", hit)
        if hit.all():
            return self.stored(entry, layer)
        if not hit.any():
            return self.exact(x, layer)
        y = np.empty_like(x)
        y[hit] = self.stored(entry[hit], layer)
        y[~hit] = self.exact(x[~hit], layer)
        return y

    def stored(self, entry, layer: Layer):
        found = self.values[entry]
        ledger.count(weight_bytes=found.nbytes)
        return found

    def exact(self, x, layer: Layer):
        return self.down(self.expand(x))


@part
class RandomHits(MemoizedFFN):
    """A baseline: tokens hit by a fixed plan, whatever is near them."""

    scores: np.ndarray = table(default=None)  # (context,) by position, from 0 to 1
    rate: float = 0.0

    def __call__(self, x, layer: Layer):
        x = self.norm(x)
        entry, _ = self.memo.nearest(x)
        hit = self.scores[layer.tokens.lookup] < self.rate  # (T,) or (B, T)
        return self.answer(x, entry, np.broadcast_to(hit, entry.shape), layer)


@part
class MonitoredFFN(RadiusMonitor, MemoizedFFN):
    """The same under the quality monitor, which halves the radius after a false hit."""

    one_sequence = True  # each sequence has its own radius

    def __call__(self, x, layer: Layer):
        if x.ndim > 2:
            because = "memoize_ffn with a monitor uses another radius for each sequence"
            return each_sequence(self, x, layer, because)
        x = self.norm(x)
        return self.adapted(x, *self.memo.nearest(x), layer)


# Offline -----------------------------------------------------------------------------------------


def inputs_and_outputs(lm, texts) -> dict[int, tuple]:
    """For each layer with an FFN: the normalized inputs (tokens, D) and the outputs (tokens, D)."""
    found: dict[int, list] = {}

    def watch(ffn: Part, index: int) -> Part:
        need(ffn, FFN)
        parts = {f.name: getattr(ffn, f.name) for f in fields(FFN)}
        return WatchedFFN(**parts, found=found.setdefault(index, []))

    watched = wrap(lm, "ffn", watch)
    for ids in bar(texts, "memoize ffn", unit="text", delay=1.0):
        watched.model.hidden(ids)
    return {i: tuple(map(np.concatenate, zip(*seen, strict=True))) for i, seen in found.items()}


@part
class WatchedFFN(FFN):
    """Runs the FFN and records its normalized inputs and its outputs."""

    found: list

    def __call__(self, x, layer: Layer):
        x = self.norm(x)
        y = self.down(self.expand(x))
        self.found.append((x, y))
        return y


# Notes:
#
# - Figures on stories (minitx sweep memoize-ffn radius=0.25,0.35,0.4,0.5 --stories 60, then with
#   first=0, with choose=random,random_tokens radius=0.29 and with preset=monitored). Loss: above
#   dense, in nats per token. Hops: % of answers that are right, by the facts of the story that they
#   combine. The baselines hit as often as calibration tokens do that are not stored, which is more
#   often than new tokens do: radius=0.29 gives them the cost of the default.
#
#       setting                 multiply-adds  memory   loss       1 / 2 / 3 hops
#       dense                       1.000x     1.000x    0.0000     99 / 93 / 100
#       radius=0.25                 0.745x     1.295x   +0.0004     99 / 93 / 100
#       radius=0.35 (default)       0.684x     1.295x   +0.0010     99 / 93 / 100
#       radius=0.4                  0.654x     1.295x   +0.0031     99 / 93 / 100
#       radius=0.5                  0.615x     1.295x   +0.0582     99 / 93 / 100
#       radius=0.35 first=0         0.663x     1.337x   +0.0270     99 / 93 / 100
#       preset=monitored            0.712x     1.295x   +0.0202     99 / 93 / 100
#       choose=random_tokens        0.687x     1.297x   +1.3250     45 / 62 /  33
#       choose=random               0.687x     1.297x   +4.5298     36 / 24 /  28
#
#   Stories are made by a grammar, so tokens recur in much the same context: a table of 256 tokens
#   serves half of all others. Expect far fewer hits on natural text.
# - On the smaller models (the same with radius=0.25,0.35 and -m), above dense:
#       stories-parallel   0.824x  +0.0024    0.752x  +0.0078    few answers are right in any case
#       stories-relu       0.893x  +0.0072    0.852x  +0.0262
# - Layers 0 to 7 on 20 stories. The hit rates, and of the hits those whose output is off by more
#   than 0.4 (false hits), which the monitor counts if it checks all and changes nothing:
#       python -m minitx.lab.layer_events memoize_ffn first=0 --stories 20
#       python -m minitx.lab.layer_events memoize_ffn first=0 monitor=1 halvings=0 --stories 20
#
#       hits           0.48  0.42  0.44  0.45  0.59  0.60  0.61  0.59
#       false hits     0.02  0.12  0.06  0.03  0.16  0.15  0.18  0.10
#
#   Layer 0 has the fewest false hits, but its FFN writes 19 times the length of the embeddings:
#   first=0 costs most.
# - The monitor: radius=0.5 costs 0.020 with it instead of 0.058, but a smaller radius without it is
#   cheaper still. It is for text that may be unlike the calibration text.
# - The table is filled offline and then frozen. Filled by the sequence itself (store each miss), it
#   hit less and worse in a trial. Kept from one sequence to the next it would hit more, but then a
#   result depends on what was run before.
# - The calibration tokens stored are those near most others (a greedy cover). In a trial as many
#   random tokens, or those of k-means, were hit less often.
# - The search in r = 8 of 128 dimensions may miss the nearest key; the distance is then measured in
#   full to the one that it found. Rank 16 finds few more hits:
#       python -m minitx.lab.layer_events memoize_ffn radius=0.3 rank=16 --stories 12
#   prints 47.2 % instead of 46.4 %.
