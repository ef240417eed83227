"""``minitx keys``: which keys each query attends to, and how much attention it misses.

    minitx keys "Once upon a time" --elsa p=2 --layer 4 --head 2
    minitx keys "Once upon a time" --sink-window sinks=2 window=16 --svg keys.svg

A row is a query, a column a key. The dense model says how much attention each key deserves; the
mass that a query misses is what it gives to keys that the technique leaves out.

It works for whatever selects, evicts or lacks keys, since it looks at the result: attention is a
weighted sum of the values, so with the rows of an identity matrix appended to the values, the
weights themselves come out beside the sum.

    [v1  1 0 0]
    [v2  0 1 0]      p1 v1 + p2 v2 + p3 v3,  p1, p2, p3
    [v3  0 0 1]

This file: the weights, the comparison, and its text. keys_kept_svg.py draws it.
"""

from dataclasses import dataclass, replace

import numpy as np

from minitx.decode import Autoregressive, new_state
from minitx.errors import MinitxError
from minitx.lm import LM
from minitx.pictures.token_columns import Column, columns_of, width
from minitx.state import Layer
from minitx.technique import blocks_of, owner
from minitx.tree import Part, field_names, part, rebuild

LEVELS = ((0.4, "█"), (0.15, "▓"), (0.05, "▒"), (0.01, "░"), (0.0, "·"))  # of the dense weight
MISSED = ((0.05, "X"), (0.01, "x"), (0.0, " "))  # the same, of a key that is left out
MOST = 512  # tokens of a picture: it has a cell for each pair
LABEL = 13  # characters of a query's text


@dataclass(frozen=True)
class KeysKept:
    """For one head of one layer: dense (T, T), the dense attention weights, which are 0 above the
    diagonal; kept (T, T): does the query of this row attend to the key of this column?
    ran (T,): did the layer compute attention weights for this query at all?"""

    title: str
    columns: list[Column]
    layer: int
    head: int
    dense: np.ndarray
    kept: np.ndarray
    ran: np.ndarray

    @property
    def missed(self) -> np.ndarray:
        """(T,) the share of each query's attention that lies on keys which are left out."""
        return (self.dense * ~self.kept).sum(-1)

    @property
    def counts(self) -> np.ndarray:
        """(T,) keys that each query attends to."""
        return self.kept.sum(-1)

    def __str__(self) -> str:
        return self.text()

    def text(self, room: int = 100) -> str:
        """The map as text, at most ``room`` characters wide."""
        T = len(self.columns)
        group = -(-T // max(room - LABEL - 18, 1))  # keys for each character, rounded up
        wide = max(-(-T // group), 4)
        lines = [f"{'query':{LABEL}} {'keys':{wide}}  {'kept':>7}  missed"]
        for i, column in enumerate(self.columns):
            end = f"{self.counts[i]}/{i + 1}"
            missed = f"{self.missed[i]:6.1%}" if self.ran[i] else "not run"
            label = clipped(column.text, LABEL)
            lines.append(f"{label} {self.row(i, group):{wide}}  {end:>7}  {missed}")
        weights = "  ".join(f"{c} {p:.0%}" for p, c in LEVELS)
        legend = [
            f"A kept key, by its attention weight in the dense model: {weights} or more.",
            f"A skipped key with a weight of: X {MISSED[0][0]:.0%}, x {MISSED[1][0]:.0%} or more.",
        ]
        if group > 1:
            legend.append(f"A character stands for {group} keys, and shows the largest weight.")
        return "\n".join([self.title, "", *lines, "", *legend, "", self.sentence])

    def row(self, i: int, group: int) -> str:
        """The characters of one query, one for each ``group`` keys."""
        found = ""
        for a in range(0, i + 1, group):
            keys = slice(a, min(a + group, i + 1))
            p, kept = self.dense[i, keys], self.kept[i, keys]
            j = int(p.argmax())
            if kept.any() and not (not kept[j] and p[j] >= MISSED[1][0]):
                j = int(np.where(kept, p, -1).argmax())
            levels = LEVELS if kept[j] else MISSED
            found += next(c for least, c in levels if p[j] >= least)
        return found

    @property
    def sentence(self) -> str:
        ran = self.ran
        if not ran.any():
            return f"Layer {self.layer} computed no attention weights for any query."
        seen = (np.flatnonzero(ran) + 1).sum()
        worst = int(np.where(ran, self.missed, -1).argmax())
        text = (
            f"Layer {self.layer}, head {self.head}: {self.counts[ran].sum() / seen:.1%} of the "
            f"keys kept. They miss {self.missed[ran].mean():.1%} of the attention on average, "
            f"{self.missed[worst]:.1%} at most (token {worst})."
        )
        if not ran.all():
            text += f" No attention weights were computed for {int((~ran).sum())} queries."
        return text

    def as_dict(self) -> dict:
        return {
            "title": self.title,
            "layer": self.layer,
            "head": self.head,
            "tokens": [{"id": c.id, "text": c.text} for c in self.columns],
            "ran": self.ran.tolist(),
            "kept": [np.flatnonzero(row).tolist() for row in self.kept],
            "missed": [round(float(m), 6) for m in self.missed],
            "mean_missed": float(self.missed[self.ran].mean()) if self.ran.any() else None,
            "dense": [
                [round(float(p), 6) for p in row[: i + 1]] for i, row in enumerate(self.dense)
            ],
        }


def clipped(text: str, room: int) -> str:
    """The text in exactly so many columns of the terminal."""
    while width(text) > room:
        text = text[:-1]
    return " " * (room - width(text)) + text


# Making one ---------------------------------------------------------------------------------------


def keys_kept(
    dense: LM,
    changed: LM,
    title: str,
    prompt,
    max_new_tokens: int,
    layer: int | None = None,
    head: int = 0,
    **options,
) -> KeysKept:
    """Generate a completion with ``changed``, one token after the prompt at a time, and compare the
    keys of one head of one layer (default: the middle one) with ``dense``, the same model without
    techniques. options: those of the sampler."""
    changed.need_tokenizer()
    need_comparable(dense, changed)
    prompt = changed.encode(prompt)
    L, H = len(blocks_of(changed)), changed.model.config.heads
    layer = L // 2 if layer is None else layer
    check(layer, head, L, H)
    if len(prompt) + max_new_tokens > MOST:
        raise MinitxError(
            f"minitx keys draws a cell for each pair of tokens, and at most {MOST} tokens; got a "
            f"prompt of {len(prompt)} and {max_new_tokens} new ones: shorten it."
        )
    ids, calls = generated(changed, prompt, max_new_tokens, layer, options)
    T = len(ids)
    kept, ran = np.zeros((T, T), bool), np.zeros(T, bool)
    for call in calls:
        call.need_head(head, H, layer)
        for t, position in enumerate(call.queries):
            ran[position] = True
            kept[position, call.keys_of(head)] = call.weights[head, t] > 0
    return KeysKept(
        title,
        columns_of(changed.tokenizer, ids),
        layer,
        head,
        dense_weights(dense, ids, layer, head),
        kept & np.tri(T, dtype=bool),
        ran,
    )


def need_comparable(dense: LM, changed: LM) -> None:
    before, after = len(blocks_of(dense)), len(blocks_of(changed))
    if before != after:
        raise MinitxError(
            f"The techniques leave {after} of {before} layers, so layers cannot be compared by "
            "their number; leave out the one that removes them."
        )
    if changed.tokenizer is not dense.tokenizer:
        raise MinitxError(
            "The techniques number the tokens anew, so the dense model cannot read the same text; "
            "leave out the one that does (vocab_prune)."
        )


def check(layer: int, head: int, L: int, H: int) -> None:
    for name, value, count in (("layer", layer, L), ("head", head, H)):
        if not 0 <= value < count:
            raise MinitxError(
                f"There is no {name} {value}; the model has {count}: give 0 to {count - 1}."
            )


def generated(lm: LM, prompt: list[int], limit: int, layer: int, options: dict):
    """(ids, calls): prompt and completion, without the last token, which no query is made of, and
    every call of the attention of this layer."""
    lm, calls = with_recorder(lm, layer)
    lm = replace(lm, decode=Autoregressive())  # speculation would also ask for rejected tokens
    ids = prompt + list(lm.tokens(prompt, limit, **options))
    if not limit:
        lm.model.hidden(prompt, new_state(lm.model, prompt))
    return ids[: max(len(ids) - 1, len(prompt))], calls


def dense_weights(lm: LM, ids: list[int], layer: int, head: int) -> np.ndarray:
    """The attention weights (T, T) of one head, of the whole text in one step."""
    lm, calls = with_recorder(lm, layer)
    lm.model.hidden(ids)
    return calls[0].weights[head].astype(np.float64)


def with_recorder(lm: LM, layer: int) -> tuple[LM, list["Call"]]:
    """The LM with the attention of one layer recorded, and where its calls will be."""
    calls: list[Call] = []

    def record(node: Part) -> Part | None:
        if "attend" not in field_names(type(node)):
            return None
        return replace(node, attend=RecordedAttend(node.attend, calls))

    block = blocks_of(lm)[layer]
    new = rebuild(block, record)
    if new is block:
        raise MinitxError(
            f"Layer {layer} has no attention weights to show: its block, a "
            f"{type(block).__name__}, has none or has lost them to a technique; use another layer."
        )
    return rebuild(lm, lambda node: new if node is block else None), calls


@dataclass(frozen=True)
class Call:
    """weights (H, T, S) of the queries at these positions (T,) over the keys at these positions:
    (S,), or (K, S) if every key head holds other rows."""

    weights: np.ndarray
    queries: np.ndarray
    keys: np.ndarray

    def keys_of(self, head: int) -> np.ndarray:
        if self.keys.ndim == 1:
            return self.keys
        return self.keys[head * len(self.keys) // len(self.weights)]

    def need_head(self, head: int, H: int, layer: int) -> None:
        if len(self.weights) != H:
            raise MinitxError(
                f"Layer {layer} has {len(self.weights)} heads instead of {H}, so heads cannot be "
                "compared by their number; leave out the technique that removes them."
            )


@part
class RecordedAttend(Part):
    """Attention that records its weights; its result stays the same."""

    inner: Part
    calls: list

    def __call__(self, q, k, v, layer, *more):
        """q (H, T, d), k (K, S, d), v (K, S, n) -> (H, T, n)"""
        if not isinstance(layer, Layer) or q.ndim != 3:
            raise MinitxError(
                f"minitx keys cannot see which keys {type(self.inner).__name__} uses, the "
                f"attention of {owner(self.inner)}; leave it out."
            )
        S = k.shape[-2]
        identity = np.broadcast_to(np.eye(S, dtype=v.dtype), (*v.shape[:-1], S))
        out = self.inner(q, k, np.concatenate([v, identity], -1), layer, *more)
        n = v.shape[-1]
        self.calls.append(Call(out[..., n:], layer.tokens.array, layer.row_tokens().array))
        return out[..., :n]
