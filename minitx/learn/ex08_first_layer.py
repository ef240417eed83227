"""Exercise 8: The first layer is a table (30 minutes)

Before the first layer's attention compares anything, each token goes through a norm and three
matrices:

    x = E[token]                        its row of the embedding
    n = rms_norm(x)
    q = n Wq,  k = n Wk,  v = n Wv      query, key and value, all heads side by side

None of this depends on the other tokens. None of it depends on the position either: q and k are
rotated to their position afterwards. So the same token always has the same x, q, k and v, and there
are only V different tokens. Compute them all once, and keep them in a table with one row per token:

    table[token] = [x, q, k, v]         in this order, q and k not rotated yet

x is in the table as it is, without the norm: the layer adds its results to x, not to n.

    make_table(E, gain, Wq, Wk, Wv, eps) -> table

    E     (V, D)      the embedding: V tokens, D columns
    gain  (D,)        of the norm; eps: of the norm, too
    Wq    (D, H * d)  H query heads of width d
    Wk    (D, K * d)  K key heads; K is smaller than H in grouped-query attention
    Wv    (D, K * d)
    table (V, D + H * d + 2 * K * d)

When text comes, one row is read for each token, cut into its four pieces, and only now q and k are
rotated (v and x never are). rms_norm and rotate are given.

    look_up(table, ids, positions, widths, d) -> x, q, k, v

    ids        (T,)  token ids, integers
    positions  (T,)  where these tokens stand in the text
    widths           the widths of the four pieces: (D, H * d, K * d, K * d)
    d                the width of a head, which rotate needs
    x (T, D),  q (T, H * d),  k (T, K * d),  v (T, K * d)

By hand: a vocabulary of one token with x = (2, -2). Its RMS is 2, so n = (1, -1), and with the
matrices below q = (1, -1), k = (2, 0), v = (1, 0). At position 0 nothing is rotated. At position 1,
k is rotated by 1 radian and becomes (2 cos 1, 2 sin 1) = (1.08, 1.68).

    >>> E, gain = np.array([[2.0, -2.0]]), np.ones(2)
    >>> Wq = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> Wk = np.array([[2.0, 0.0], [0.0, 0.0]])
    >>> Wv = np.array([[1.0, 1.0], [0.0, 1.0]])
    >>> table = make_table(E, gain, Wq, Wk, Wv, 0.0)
    >>> table.tolist()
    [[2.0, -2.0, 1.0, -1.0, 2.0, 0.0, 1.0, 0.0]]
    >>> x, q, k, v = look_up(table, np.array([0, 0]), np.array([0, 1]), (2, 2, 2, 2), 2)
    >>> k.round(2).tolist()
    [[2.0, 0.0], [1.08, 1.68]]
    >>> v.tolist()
    [[1.0, 0.0], [1.0, 0.0]]

Source: Graef, "Transformer tricks: Precomputing the first layer", 2024.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np

from minitx import ledger
from minitx.learn.exercise import Exercise, Mistake
from minitx.learn.outcomes import unpack
from minitx.model import NoRope
from minitx.precompute.first_layer import FirstBlock, InTable, Split
from minitx.tree import Part, part


# given
def rms_norm(x, gain, eps):
    """Exercise 1: x (T, D), gain (D,), eps -> (T, D)"""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def rotate(x, positions, d):
    """Exercise 2: x (T, heads * d) -> the same shape, each head of width d rotated to the position
    of its token, positions (T,)."""
    frequency = 100.0 ** (-np.arange(0, d, 2) / d)  # (d / 2,)
    angle = positions[:, None, None] * frequency  # (T, 1, d / 2)
    a, b = np.split(x.reshape(len(x), -1, d), 2, axis=-1)  # (T, heads, d / 2) each
    a, b = a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)
    return np.concatenate([a, b], axis=-1).reshape(x.shape)


# end of given


# solution
def make_table(E, gain, Wq, Wk, Wv, eps):
    """E (V, D), gain (D,), Wq (D, H*d), Wk and Wv (D, K*d), eps -> (V, D + H*d + 2*K*d)"""
    n = rms_norm(E, gain, eps)
    return np.concatenate([E, n @ Wq, n @ Wk, n @ Wv], axis=1)


def look_up(table, ids, positions, widths, d):
    """ids (T,), positions (T,), widths of x, q, k, v, head width d -> x, q, k, v, each (T, ...)"""
    rows = table[ids]
    x, q, k, v = np.split(rows, np.cumsum(widths[:3]), axis=1)
    return x, rotate(q, positions, d), rotate(k, positions, d), v


# end of solution


def table_in_loops(E, gain, Wq, Wk, Wv, eps):
    """Row by row, number by number."""
    table = []
    for x in E:
        rms = (sum(number**2 for number in x) / len(x) + eps) ** 0.5
        n = [number / rms * g for number, g in zip(x, gain)]
        row = list(x)
        for W in (Wq, Wk, Wv):
            for column in W.T:
                row.append(sum(a * b for a, b in zip(n, column)))
        table.append(row)
    return np.array(table)


def look_up_in_loops(table, ids, positions, widths, d):
    """Token by token."""
    pieces = [], [], [], []
    for token, position in zip(ids, positions):
        start = 0
        for piece, width in zip(pieces, widths):
            part_of_row = table[token, start : start + width]
            if piece is pieces[1] or piece is pieces[2]:
                part_of_row = rotate(part_of_row[None], np.array([position]), d)[0]
            piece.append(part_of_row)
            start += width
    return tuple(np.array(piece) for piece in pieces)


in_loops = SimpleNamespace(make_table=table_in_loops, look_up=look_up_in_loops)


def flawed_table(E, gain, Wq, Wk, Wv, eps, *, norm=True, residual="x", order="xqkv"):
    n = rms_norm(E, gain, eps) if norm else E
    pieces = dict(x=E if residual == "x" else n, q=n @ Wq, k=n @ Wk, v=n @ Wv)
    return np.concatenate([pieces[name] for name in order], axis=1)


def flawed_look_up(table, ids, positions, widths, d, *, order="xqkv", rotated="qk", by="positions"):
    widths = dict(zip("xqkv", widths))
    ends = np.cumsum([widths[name] for name in order])[:3]
    pieces = dict(zip(order, np.split(table[ids], ends, axis=1)))
    where = dict(positions=positions, ids=ids, counting=np.arange(len(ids)))[by]
    for name in rotated:
        pieces[name] = rotate(pieces[name], where, d)
    return tuple(pieces[name] for name in "xqkv")


MISTAKES = (
    Mistake("q, k and v are made from x; they are made from rms_norm(x, gain, eps).", norm=False),
    Mistake(
        "The normalized row is in the table instead of x. The layer adds to x itself, the residual "
        "stream.",
        residual="n",
    ),
    Mistake("The pieces of a row are in another order: x comes first, not last.", order="qkvx"),
    Mistake(
        "Keys and values have changed places: the order is x, query, key, value.", order="xqvk"
    ),
    Mistake(
        "q and k are never rotated: their position is not known before look_up, so do it there.",
        rotated="",
    ),
    Mistake("You rotate the keys only; queries are rotated to their positions, too.", rotated="k"),
    Mistake("You rotate the queries only; keys are rotated to their positions, too.", rotated="q"),
    Mistake("You rotate the values, too; only queries and keys are rotated.", rotated="qkv"),
    Mistake(
        "You rotate by token ids. A token's id says which word it is; where it stands is in "
        "positions.",
        by="ids",
    ),
    Mistake(
        "You count the positions from 0. These tokens may continue a text; where they stand is in "
        "positions.",
        by="counting",
    ),
)


def observe(answer, E, gain, Wq, Wk, Wv, eps, ids, positions, d):
    """Both functions: the table, and what is looked up in it."""
    table = answer.make_table(E, gain, Wq, Wk, Wv, eps)
    widths = E.shape[1], Wq.shape[1], Wk.shape[1], Wv.shape[1]
    pieces = unpack(answer.look_up(table, ids, positions, widths, d), "look_up", *"xqkv")
    return {"table": table} | dict(zip("xqkv", pieces))


def cases(rng):
    """As many key heads as query heads, and fewer; texts that start at 0, and later."""
    for V, D, H, K, d, T, start in ((6, 8, 2, 1, 4, 3, 7), (5, 4, 2, 2, 2, 4, 0)):
        E = rng.standard_normal((V, D)) * rng.uniform(0.5, 4, (V, 1))
        gain = rng.uniform(0.5, 2, D)
        W = (rng.standard_normal((D, heads * d)) for heads in (H, K, K))
        ids, positions = rng.integers(V, size=T), np.arange(start, start + T)
        ids[-1] = ids[0]  # the same token twice, at two positions
        yield E, gain, *W, 0.01, ids, positions, d


# In the model ------------------------------------------------------------------------------------


@part
class StudentRows(Part):
    """Rows of the student's table, looked up by the student's function."""

    w: np.ndarray  # (V, D + H*d + 2*K*d)
    widths: tuple
    d: int
    look_up: object

    def __call__(self, ids, positions):
        where = np.arange(10**4)[positions]  # a slice, or indices
        pieces = self.look_up(self.w, ids, where, self.widths, self.d)
        rows = np.concatenate(pieces, axis=-1).astype(self.w.dtype)
        ledger.count(weight_bytes=rows.nbytes)
        return rows  # (T, D + H*d + 2*K*d)


def into_model(lm, answer):
    """Layer 0 from the rows of the table, in which q and k are rotated already."""
    model = lm.model
    first, *others = model.stack.blocks
    norm, qkv = first.attn.norm, first.attn.qkv
    arrays = model.embed.w, norm.gain, qkv.q.w, qkv.k.w, qkv.v.w
    wide = [array.astype(np.float64) for array in arrays]
    table = answer.make_table(*wide, norm.eps).astype(np.float32)
    widths = [array.shape[1] for array in wide if array.ndim == 2]
    rows = StudentRows(table, tuple(widths), model.config.head_width, answer.look_up)
    attn = replace(first.attn, norm=InTable(), qkv=InTable(), rope=NoRope())
    first = FirstBlock(Split(*widths[:3]), attn, first.ffn)
    model = replace(model, embed=rows, stack=replace(model.stack, blocks=(first, *others)))
    return replace(lm, model=model)


EXERCISE = Exercise(
    title="The first layer is a table",
    minutes=30,
    difficulty="medium",
    names=("make_table", "look_up"),
    cases=lambda rng: list(cases(rng)),
    observe=observe,
    flawed={"make_table": flawed_table, "look_up": flawed_look_up},
    mistakes=MISTAKES,
    axes=("row", "column"),
    hints=(
        "All rows of the table are made at once: E is a text in which each token occurs once. And "
        "table[ids] takes a row for each id.",
        "make_table: n = rms_norm(E, gain, eps), then np.concatenate of E and three products with "
        "n, axis=1. look_up: x is the first D columns of table[ids], q the next H * d, and so on; "
        "np.split with np.cumsum(widths[:3]) cuts there. Then rotate q and k to positions.",
    ),
    library="minitx/precompute/first_layer.py: token_table",
    into_model=into_model,
    saves=(
        "A layer's norm and three of its matrices, for one layer out of 8: the more layers, the "
        "smaller the share. The table takes more memory than the matrices did, but of it a token "
        "reads only one row."
    ),
)
