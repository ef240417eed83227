"""Memoize attention weights: a token near one seen at the same position gets the weights of that.

This file: the card and options, the attention with a database (online), how the database is filled
(offline), notes. The search for the nearest key is minitx/shared/memo_table.py.

Letters: T new tokens, S cached tokens, D width, H query heads of width d, K key heads, N stored
tokens at one position, r principal components.
"""

from dataclasses import fields, replace
from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger
from minitx.calibration import calibration_ids
from minitx.model import Attend, Attention, merge_heads
from minitx.progress import bar
from minitx.shared.attention_weights import attend_in_blocks
from minitx.shared.memo_table import MemoTable, RadiusMonitor, check_options, cover, principal
from minitx.shared.quality_monitor import Limit, Monitor
from minitx.shared.random_baseline import random_scores
from minitx.shared.row_by_row import each_sequence
from minitx.state import Layer
from minitx.technique import SEEDS, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="attention",
    exact=False,
    neutral={"size": 0},
    after=("quantize_cache",),
    demo={"size": 4, "radius": 1.0, "first": 0, "stories": 4},
    event=("hits", "lookups"),
    presets={"aggressive": {"radius": 0.6}},
)
def memoize_attention(
    lm,
    *,
    size: Annotated[
        int, "stored tokens N at each position and layer; 0: no database", at_least(0)
    ] = 8,
    radius: Annotated[
        float,
        "distance |x - key| / |key| from a stored token up to which a token gets its weights",
        at_least(0),
    ] = 0.3,
    rank: Annotated[
        int, "principal components r by which the nearest key is found", at_least(1)
    ] = 8,
    first: Annotated[
        int | None, "layers at the beginning that have no database; default: L // 4", at_least(0)
    ] = None,
    choose: Annotated[
        Literal["nearest", "random"],
        "nearest: tokens within the radius of a stored one get its weights. Baseline: as many "
        "random tokens get random stored weights of their position",
    ] = "nearest",
    monitor: Monitor = 0,
    limit: Limit = 0.4,
    halvings: Annotated[
        int,
        "of the monitor: how many times it may halve the radius; 0: it only counts false hits",
        at_least(0),
    ] = 3,
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=256)
    ] = 32,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Memoize attention weights: a token near a stored one reuses the attention map of that one.

    Paper:     Feng et al., "AttMEMO: Accelerating Transformers with Memoization on Big Memory
               Systems", 2023, arXiv 2301.09262.
    Fidelity:  a reconstruction from the abstract and summaries. Theirs: a trained embedding (an
               MLP), maps of whole sequences, a model of the layers where it pays. Ours: principal
               components; the map of one token (its row), for causal models with a KV cache; first
               layers without a database.
    Kind:      approximate; exact at size=0. No setting pays on the shipped models: hits are few and
               save little, and the database is several times as large as the model (Notes).
    Idea:      Tokens in similar contexts have similar attention weights. If a stored token of the
               same position is near, take its weights: query and scores need not be computed. Only
               the weights are reused, the values are those of this sequence.
    Offline:   x = norm(hidden state), p = softmax(q k^T / sqrt(d))    of all calibration tokens
               at each position store N, greedily: those with most others within their radius
               key = x,  value = p (H, S),  A = the first r principal components of all x
    Online:    for each token, at position S - 1:   k, v are computed and cached
               i = of the keys at that position, the one for which |x A - key_i A| is smallest
               |x - key_i| <= radius |key_i|:  p = p_i                             (a hit)
               otherwise:                      p = softmax(q k^T / sqrt(d))        (a miss)
               attention = p v W_o             v: of this sequence
               With monitor=n, every n-th token that hits also runs exactly: if its error is above
               limit (a false hit) the radius is halved, if below limit / 2 it is doubled again.
    Saves:     D H d + S H d multiply-adds for a hit, of 2 D (H + K) d + 2 S H d, and the bytes of
               its S keys, less D r + N r + D for every lookup (K: key heads). A stored map is H S
               numbers, so a position takes N (H S + D + r) numbers in each layer.
    In NumPy:  slower, decoding stories 0.78x as fast as dense: a lookup takes longer than the
               queries and scores that a hit saves, at a few hundred keys.
    Not for:   sequences longer than the calibration text (no maps there); techniques that free
               cache rows or replace the attention (elsa, heavy_hitters, ...).
    Proof:     tests/skip/test_memoize_attention.py; literal version:
               tests/skip/literal_memoize_attention.py
    Tutorial:  tutorials/16_nothing_new_under_the_sun.py
    """
    L = len(blocks_of(lm))
    first = L // 4 if first is None else first
    check_options("memoize_attention", lm, first, choose, monitor)
    if size == 0:
        return lm
    texts = calibration_ids("memoize_attention", lm, stories)
    inputs = record_inputs(lm, texts, first)
    chosen = {index: choose_tokens(x, radius, size) for index, x in inputs.items()}
    maps = record_maps(lm, texts, chosen)
    drawn = random_scores(2 * L, lm.model.config.context, seed).reshape(L, 2, -1)

    def change(attn: Part, index: int) -> Part:
        if index < first:
            return attn
        parts = {f.name: getattr(attn, f.name) for f in fields(Attention)}
        parts |= database(inputs[index], chosen[index], maps[index], rank) | {"radius": radius}
        if choose == "random":
            rate = hit_rate(MemoizedAttention(**parts), inputs[index])
            return RandomMaps(**parts, scores=drawn[index], rate=rate)
        if monitor:
            return MonitoredAttention(**parts, every=monitor, limit=limit, halvings=halvings)
        return MemoizedAttention(**parts)

    return wrap(lm, "attn", change)


# Online ------------------------------------------------------------------------------------------


@part
class MemoizedAttention(Attention):
    """Attention that looks its normalized input up first, among tokens at the same position."""

    # Declared for techniques that are combined with this one (tree.Part):
    needs_inner_first = True  # the stored weights are those of the matrices as they are
    needs_all_rows = True  # a stored row of weights has one for every earlier token
    one_sequence = True

    memo: Part  # the keys of all positions, those of position 0 first
    ends: np.ndarray = table()  # (positions,) where in the keys those of each position end
    maps: np.ndarray = table()  # the weights (H, S) of all keys, one after the other
    starts: np.ndarray = table()  # (keys + 1,) where in ``maps`` those of each key begin
    radius: float = 0.0

    def __call__(self, x, layer: Layer):
        if x.ndim > 2:
            because = "memoize_attention looks up each sequence's tokens by itself"
            return each_sequence(self, x, layer, because)
        x = self.norm(x)
        self.store(*self.qkv.kv(x), layer)  # of hits too: later tokens need them
        return self.from_normalized(x, layer)

    def attend_from(self, x, layer: Layer):
        if x.ndim > 2:  # a batch in which some tokens exit early: exactly
            return super().attend_from(x, layer)
        return self.from_normalized(self.norm(x), layer)

    def from_normalized(self, x, layer: Layer):
        """y (T, D) for normalized tokens x (T, D) whose keys and values are cached."""
        entry, distance = self.look_up(x, layer.tokens.array)
        return self.answer(x, entry, distance <= self.radius, layer)

    def look_up(self, x, positions):
        """For each token the nearest key of its position, and its distance; Inf if there is
        none."""
        entry, distance = np.zeros(len(x), int), np.full(len(x), np.inf)
        for t, position in enumerate(positions):
            first, end = self.keys_of(position)
            if first < end:
                entry[t], distance[t] = self.memo.nearest_of(x[t], first, end)
        return entry, distance

    def keys_of(self, position: int) -> tuple[int, int]:
        """The keys first .. end - 1 belong to this position."""
        if position >= len(self.ends):
            return 0, 0
        return int(self.ends[position - 1]) if position else 0, int(self.ends[position])

    def answer(self, x, entry, hit, layer: Layer):
        """y (T, D): by stored weights where ``hit`` (T,), as usual elsewhere."""
        ledger.event("lookups", hit.size)
        ledger.event("hits", hit)
        if not hit.any():
            return self.exact(x, layer)
        y, tokens = np.empty_like(x), layer.tokens
        if not hit.all():
            layer.tokens = tokens.only(~hit)
            y[~hit] = self.exact(x[~hit], layer)
        layer.tokens = tokens.only(hit)
        y[hit] = self.stored(entry[hit], layer)
        layer.tokens = tokens
        return y

    def exact(self, x, layer: Layer):
        return self.read(self.qkv.q(x), layer)

    def stored(self, entries, layer: Layer):
        """y (T, D): the values of this sequence, weighted by the stored maps."""
        positions = layer.tokens.array
        _, v = self.cache.read(layer)  # (K, S, n)
        context = np.empty((self.heads, len(entries), v.shape[-1]), v.dtype)
        for a in range(0, len(entries), fast.ROWS):  # a block of tokens at a time
            block = slice(a, a + fast.ROWS)
            p = self.maps_of(entries[block], positions[block], v.dtype)  # (H, t, end)
            seen = v[:, : p.shape[-1]]
            ledger.count(p.size * v.shape[-1], cache_bytes=seen.nbytes)
            grouped = p.reshape(len(v), -1, p.shape[-1]) @ seen  # (K, G*t, n)
            context[:, block] = grouped.reshape(self.heads, -1, v.shape[-1])
        return self.out(merge_heads(context))

    def maps_of(self, entries, positions, dtype):
        """The stored weights (H, t, S) of t tokens, 0 after each token's position."""
        p = np.zeros((self.heads, len(entries), positions[-1] + 1), dtype)
        for t, (entry, position) in enumerate(zip(entries, positions)):
            stored = self.maps[self.starts[entry] : self.starts[entry + 1]]  # (H * S)
            ledger.count(weight_bytes=stored.nbytes)
            p[:, t, : position + 1] = stored.reshape(self.heads, -1)
        return p


@part
class RandomMaps(MemoizedAttention):
    """A baseline: tokens hit by a fixed plan, and get random stored weights of their position."""

    scores: np.ndarray = table(default=None)  # (2, context) by position, from 0 to 1
    rate: float = 0.0

    def look_up(self, x, positions):
        entry, distance = super().look_up(x, positions)
        for t, position in enumerate(positions):
            first, end = self.keys_of(position)
            hit, which = self.scores[:, position]
            entry[t] = first + int(which * (end - first))
            distance[t] = 0 if hit < self.rate and first < end else np.inf
        return entry, distance


@part
class MonitoredAttention(RadiusMonitor, MemoizedAttention):
    """The same under the quality monitor, which halves the radius after a false hit."""

    def from_normalized(self, x, layer: Layer):
        return self.adapted(x, *self.look_up(x, layer.tokens.array), layer)


# Offline -----------------------------------------------------------------------------------------


def record_inputs(lm, texts, first: int) -> dict[int, list]:
    """For each layer from ``first`` on: the normalized inputs (T, D) of each text."""
    found: dict[int, list] = {}

    def watch(attn: Part, index: int) -> Part:
        if index < first:
            return attn
        need(attn, Attention)
        need(attn.attend, Attend)
        found[index] = []
        return replace(attn, norm=WatchedNorm(attn.norm, found[index]))

    watched = wrap(lm, "attn", watch)
    for ids in bar(texts, "memoize attention: tokens", unit="text", delay=1.0):
        watched.model.hidden(ids)
    return found


@part
class WatchedNorm(Part):
    """Runs a norm and records its output."""

    inner: Part
    found: list

    def __call__(self, x):
        self.found.append(self.inner(x))
        return self.found[-1]


def choose_tokens(inputs, radius: float, size: int) -> list[list[int]]:
    """For each position, the texts whose token there is stored: see ``cover``."""
    chosen = []
    for position in range(max(map(len, inputs))):
        texts = [i for i, x in enumerate(inputs) if position < len(x)]
        keys = np.stack([inputs[i][position] for i in texts])
        chosen.append([texts[j] for j in cover(keys, radius, size)])
    return chosen


def record_maps(lm, texts, chosen: dict[int, list]) -> dict[int, dict]:
    """For each of these layers the attention weights (H, S) of the chosen tokens, by (position,
    text)."""
    found: dict[int, dict] = {index: {} for index in chosen}
    for i, ids in enumerate(bar(texts, "memoize attention: maps", unit="text", delay=1.0)):

        def watch(attn: Part, index: int, i: int = i) -> Part:
            if index not in chosen:
                return attn
            wanted = [p for p, stored in enumerate(chosen[index]) if i in stored]
            return replace(attn, attend=WatchedAttend(attn.attend.scale, i, wanted, found[index]))

        wrap(lm, "attn", watch).model.hidden(ids)
    return found


@part
class WatchedAttend(Attend):
    """Softmax attention that records the weights of some of the tokens of a text."""

    text: int
    wanted: list  # positions
    found: dict

    def __call__(self, q, k, v, layer: Layer):
        out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        for a, b, end, p in attend_in_blocks(q, k, v, self.scale, layer.mask(), out):
            p = p.reshape(-1, b - a, end)  # (H, b - a, end)
            for position in (w for w in self.wanted if a <= w < b):
                self.found[position, self.text] = p[:, position - a, : position + 1].copy()
        return out


def database(inputs, chosen, maps: dict, rank: int) -> dict:
    """The fields of ``MemoizedAttention``: keys and maps in order of position."""
    stored = [(position, text) for position, texts in enumerate(chosen) for text in texts]
    keys = np.stack([inputs[text][position] for position, text in stored])
    rows = [maps[key].ravel() for key in stored]
    return {
        "memo": MemoTable.of(keys, principal(np.concatenate(inputs), rank)),
        "ends": np.cumsum([len(texts) for texts in chosen]),
        "maps": np.concatenate(rows),
        "starts": np.cumsum([0, *map(len, rows)]),
    }


def hit_rate(memo: MemoizedAttention, inputs) -> float:
    """The share of the calibration tokens that hit, without those that are stored themselves."""
    distance = np.concatenate([memo.look_up(x, range(len(x)))[1] for x in inputs])
    others = distance[distance > 0]
    return float((others <= memo.radius).mean()) if len(others) else 0.0


# Notes:
#
# - Figures on stories (minitx sweep memoize-attention radius=0.2,0.3,0.6 --stories 60, then with
#   choose=random, with first=4 radius=0.6 and with first=0). Loss: above dense, in nats per token.
#   Hops: % of answers that are right, by the facts of the story that they combine.
#
#       first  radius         choose    multiply-adds  memory   loss       1 / 2 / 3 hops
#       dense                               1.000x     1.000x    0.0000     99 / 93 / 100
#       2      0.2            nearest       0.986x     5.000x   +0.0006     98 / 93 / 100
#       2      0.3 (default)  nearest       0.982x     4.989x   +0.0028     98 / 93 / 100
#       2      0.3            random        0.990x     4.992x   +0.0461     91 / 80 /  83
#       2      0.6            nearest       0.971x     4.977x   +0.0367     95 / 93 /  94
#       2      0.6            random        0.979x     4.980x   +0.0778     72 / 73 /  67
#       4      0.6            nearest       0.981x     3.650x   +0.0033     99 / 93 / 100
#       4      0.6            random        0.985x     3.653x   +0.0031     99 / 91 / 100
#       0      0.3            nearest       0.975x     6.317x   +0.2920     95 / 84 /  83
#
#   From layer 4 on, random maps do as well: there attention hardly matters in stories, and leaving
#   it out (layer_skip unit=attention) saves more and needs no memory.
# - Why it saves so little: at S = 200 a hit saves 42 % of the multiply-adds of attention, which is
#   two fifths of the model; but one token in six hits, mostly early in a story, where S is small:
#   before the first events, all stories are much alike. Four times as many maps hit for one token
#   in four (python -m minitx.lab.layer_events memoize_attention size=32 stories=64), at 16 times
#   the memory of the model: AttMEMO uses terabytes.
# - Layers 0 to 7 on 20 stories. The hit rates, and of the hits those whose output is off by more
#   than 0.4 (false hits), which the monitor counts if it checks all and changes nothing:
#     python -m minitx.lab.layer_events memoize_attention first=0 --stories 20
#     python -m minitx.lab.layer_events memoize_attention first=0 monitor=1 halvings=0 --stories 20
#
#       hits           0.31  0.14  0.12  0.13  0.16  0.16  0.16  0.16
#       false hits     0.62  0.41  0.34  0.49  0.16  0.28  0.29  0.18
#
#   In layer 0 the input is the embedding, so a hit is the same word at the same position, and yet
#   most are false: the input says what a token looks for, but not where in this sequence that is.
# - One false hit can cost an answer: the weights of another story may point at another place than
#   the one that is asked for.
# - The monitor helps with that, but its checks take much of what little is saved: minitx sweep
#   memoize-attention radius=0.6 monitor=0,8 --stories 8 has 0.973x of the multiply-adds at +0.037
#   nats per token without it, and 0.983x at +0.010 with it.
# - The random baseline hits at random positions, as often as calibration tokens do that are not
#   stored themselves.
