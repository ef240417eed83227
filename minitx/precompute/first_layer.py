"""A table for the first block: all that it does with a token before looking at other tokens."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import (
    FFN,
    Attention,
    Block,
    Linear,
    ParallelBlock,
    PositionEmbedding,
    Stack,
    TokenEmbedding,
    Transformer,
)
from minitx.state import Layer
from minitx.technique import need, swap, technique
from minitx.tree import Part, children, map_weights, part


@technique(level="block", exact=True, neutral=None, after=("layer_skip",))
def first_layer(lm):
    """Look up what block 0 computes from the token alone, instead of computing it.

    Paper: Nils Graef, 2024, "Transformer tricks: Precomputing the first layer", arXiv 2402.13388,
        figures 1 and 2, tables of section 3. The split for learned positions is not in the paper,
        which rules them out: it was derived here.
    Kind: exact in real arithmetic; float32 rounds differently.
    Skips or precomputes: in block 0 the norm and W_q, W_k, W_v; in a parallel block (GPT-NeoX) the
        FFN and its norm too. Not the scores, the mix, W_o, nor the FFN of a serial block, whose
        input has seen other tokens.
    Offline: for each token t with x = E[t]: n = norm(x), q = n W_q + b_q, k = n W_k + b_k,
        v = n W_v + b_v, not rotated; s = x (serial) or x + FFN(x) (parallel, the FFN with its own
        norm). table[t] = [s, q, k, v]. By the parts as they are then, folded or fused; in float64
        and rounded once.
        Learned positions, x = E[t] + P[p]: a norm is linear up to one scalar a token, so
        [q, k, v] = r(x) (Y(E[t]) + Y(P[p])) + c. r = 1 / sqrt(mean(x^2) + eps) (for a LayerNorm,
        x minus its mean stands for x), Y(x) = (x g) W, c = bias W + b. One table [E, Y(E)] over
        tokens, one [P, Y(P)] over positions. c and Y are found by calling norm and projections:
        c = qkv(norm(0)), Y(x) = (qkv(norm(x)) - c) / r(x).
    Online: s, q, k, v = table[t];  y = s + Attention's rest(q, k, v), with rotation by the true
        positions;  serial: y + FFN(y). Learned positions: the rows of both tables are added, then
        q, k, v scaled by r and moved by c: D + H d + 2 K d multiplications and no product.
    Saves: with A = H d + 2 K d, D A multiply-adds a token, and in a parallel block its FFN's 2 D F
        (3 D F with a gate). A pass over B tokens reads those weights less and B A numbers of the
        table more: fewer in all while B < D (serial; parallel D + 2 D F / A). At most 1 / L of the
        work. Memory: V A numbers more, those weights less, and V D more if the head is tied, since
        it keeps E. Learned positions: 2 B A read and (V + context) A kept, in the places of B A
        and V A.
    Neutral: nothing to set.
    Not for: block 0 with an attention that another technique has wrapped. An FFN that one has
        wrapped (it may remember), or that reads learned positions (they do not add up behind its
        activation), stays out of the table and runs as before. A table is of these weights: change
        them and it is wrong.
    """
    return swap(lm, Transformer, with_table)


def with_table(model: Transformer) -> Transformer:
    need(model.embed, TokenEmbedding, PositionEmbedding)
    need(model.stack, Stack)
    block = model.stack.blocks[0]
    need(block, Block, ParallelBlock)
    need(block.attn, Attention)
    fixed = type(model.embed) is TokenEmbedding  # the same at every position
    with_ffn = fixed and type(block) is ParallelBlock and type(block.ffn) is FFN
    norm, qkv = in_float64(block.attn.norm), in_float64(block.attn.qkv)
    if fixed:
        ffn = in_float64(block.ffn) if with_ffn else None
        embed = FirstLayerTable(token_table(model.embed.w, norm, qkv, ffn))
    else:
        need(model.embed.tokens, TokenEmbedding)
        embed = added_tables(model.embed.tokens.w, model.embed.w, norm, qkv)
    attn = replace(block.attn, norm=InTable(), qkv=InTable())
    split = Split.like(norm, qkv, model.config.width)
    if type(block) is Block:
        first = FirstBlock(split, attn, block.ffn)
    elif with_ffn:
        first = FirstParallelBlock(split, attn)
    else:
        first = FirstParallelBlockAndFFN(split, attn, block.ffn)
    stack = replace(model.stack, blocks=(first, *model.stack.blocks[1:]))
    return replace(model, embed=embed, stack=stack)


# Offline -----------------------------------------------------------------------------------------

ROWS = 1024  # of the embedding at a time, so that the FFN's hidden neurons fit in memory


def in_float64(node: Part) -> Part:
    return map_weights(node, lambda w: w.astype(np.float64) if w.dtype.kind == "f" else w)


def token_table(embedding, norm: Part, qkv: Part, ffn: Part | None) -> np.ndarray:
    """[s, q, k, v] for each row x of the embedding (V, D); s = x + ffn(x), or x without one."""

    def rows(x):
        s = x if ffn is None else x + ffn(x, None)  # an FFN needs no memory
        return np.concatenate([s, *qkv(norm(x))], axis=-1)

    with np.errstate(over="ignore"):  # as in Transformer.hidden: silu far below 0
        return in_pieces(rows, embedding)


def in_pieces(make: Callable, embedding) -> np.ndarray:
    """``make(rows)`` for all rows, computed in float64 and rounded to the embedding's type."""
    pieces = [embedding[a : a + ROWS] for a in range(0, len(embedding), ROWS)]
    return np.concatenate(
        [make(piece.astype(np.float64)).astype(embedding.dtype) for piece in pieces]
    )


def added_tables(tokens, positions, norm: Part, qkv: Part) -> "AddedTables":
    """The two tables of learned positions, from tokens (V, D) and positions (context, D)."""
    width = tokens.shape[-1]
    zero, one = np.zeros((1, width)), np.ones((1, width))

    def project(x):
        return np.concatenate(qkv(norm(x)), axis=-1)  # (..., H*d + 2*K*d)

    # To a LayerNorm a constant is as good as nothing; to an RMSNorm it is not.
    scale = layer_scale if np.array_equal(norm(one), norm(zero)) else rms_scale
    eps = getattr(norm, "eps", 0.0)
    c = project(zero)

    def rows(x):
        return np.concatenate([x, (project(x) - c) / scale(x, eps)], axis=-1)

    # All of this stands on a norm and projections of the right kind: try it on a few rows.
    e, p = (table[: min(len(tokens), len(positions), 8)] for table in (tokens, positions))
    x = e.astype(np.float64) + p
    right, found = project(x), (rows(e) + rows(p))[:, width:] * scale(x, eps) + c
    if not abs(found - right).max() <= 1e-5 * abs(right).max():
        for _, child in children(qkv):
            need(child, Linear)  # which names the technique that has put something else there
        raise MinitxError(
            "first_layer cannot split tokens from learned positions unless block 0 has an RMSNorm "
            f"or a LayerNorm and linear projections; it has {type(norm).__name__} and "
            f"{type(qkv).__name__}."
        )
    tables = in_pieces(rows, tokens), in_pieces(rows, positions)
    return AddedTables(*tables, c[0].astype(tokens.dtype), scale, eps)


def rms_scale(x, eps):
    """r (..., 1) by which an RMSNorm multiplies the rows x (..., D)."""
    mean_square = np.einsum("...d,...d->...", x, x) / x.shape[-1]
    return 1 / np.sqrt(mean_square + eps)[..., None]


def layer_scale(x, eps):
    """r (..., 1) by which a LayerNorm multiplies the rows x (..., D) less their means."""
    return rms_scale(x - x.mean(-1, keepdims=True), eps)


# Online ------------------------------------------------------------------------------------------


@part
class FirstLayerTable(Part):
    """Token ids to finished rows [s, q, k, v]."""

    w: np.ndarray  # (V, D + H*d + 2*K*d)

    def __call__(self, ids, where):
        return ops.rows(self.w, ids)  # (..., T, D + H*d + 2*K*d)


@part
class AddedTables(Part):
    """Token ids and positions to finished rows [x, q, k, v]: added, then scaled and moved."""

    tokens: np.ndarray  # (V, D + H*d + 2*K*d)
    positions: np.ndarray  # (context, D + H*d + 2*K*d)
    c: np.ndarray  # (H*d + 2*K*d,)
    scale: Callable
    eps: float

    def __call__(self, ids, where):
        rows = ops.rows(self.tokens, ids) + ops.rows(self.positions, where)  # a new array
        width = rows.shape[-1] - len(self.c)
        qkv = rows[..., width:]  # a view, so what is done to it is done to the rows
        qkv *= self.scale(rows[..., :width], self.eps)
        qkv += self.c
        return rows  # (..., T, D + H*d + 2*K*d)


@part
class Split(Part):
    """A row of the table to its four pieces."""

    width: int  # D
    q_width: int  # H * d
    k_width: int  # K * d

    @staticmethod
    def like(norm: Part, qkv: Part, width: int) -> "Split":
        """For pieces as wide as what these parts give for a stream of that width."""
        q, k, _ = qkv(norm(np.zeros((1, width))))
        return Split(width, q.shape[-1], k.shape[-1])

    def __call__(self, rows):
        b = self.width + self.q_width
        c = b + self.k_width
        return rows[..., : self.width], rows[..., self.width : b], rows[..., b:c], rows[..., c:]


@part
class FirstBlock(Part):
    """Block 0 from rows of the table: what is left of attention, then the FFN."""

    split: Part
    attn: Attention
    ffn: Part

    def __call__(self, rows, layer: Layer):
        x, q, k, v = self.split(rows)
        x = x + self.attn.from_qkv(q, k, v, layer)  # (..., T, D)
        return x + self.ffn(x, layer)


@part
class FirstParallelBlock(Part):
    """Parallel block 0 from rows of the table, which hold what the FFN adds to the stream."""

    split: Part
    attn: Attention

    def __call__(self, rows, layer: Layer):
        s, q, k, v = self.split(rows)
        return s + self.attn.from_qkv(q, k, v, layer)  # (..., T, D)


@part
class FirstParallelBlockAndFFN(Part):
    """Parallel block 0 from rows of the table, with an FFN that could not go into it."""

    split: Part
    attn: Attention
    ffn: Part

    def __call__(self, rows, layer: Layer):
        x, q, k, v = self.split(rows)
        return x + self.attn.from_qkv(q, k, v, layer) + self.ffn(x, layer)  # (..., T, D)


@part
class InTable(Part):
    """In the place of a part whose results are in the table. Nothing is left to call."""

    def __call__(self, x):
        raise MinitxError(
            "The norm and projections of block 0 are rows of first_layer's table and cannot be "
            "called on their own; leave first_layer out."
        )

    q = __call__
