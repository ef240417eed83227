"""A lookup table instead of the first block's projections.

The card; block 0 from rows of a table (online); the table (offline); learned positions, which the
paper rules out and which take two tables; notes.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from minitx import ops
from minitx.errors import MinitxError
from minitx.model import (
    FFN,
    Attention,
    Block,
    LayerNorm,
    Linear,
    ParallelBlock,
    PositionEmbedding,
    RMSNorm,
    Stack,
    TokenEmbedding,
    Transformer,
)
from minitx.state import Layer
from minitx.technique import NoSuchPart, need, swap, technique
from minitx.tree import Part, children, map_weights, part


@technique(level="block", exact=True, neutral=None, after=("layer_skip",))
def first_layer(lm):
    """Precompute block 0's queries, keys and values for every token and look them up.

    Paper:     Graef, "Transformer tricks: Precomputing the first layer", 2024, arXiv 2402.13388,
               figures 1 and 2, tables of section 3.
    Fidelity:  the paper's text. It rules out learned positions; two tables for them are ours.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               1e-6 of the largest one).
    Idea:      What block 0 computes before it attends depends on the token alone, not on its
               position or on other tokens (RoPE comes later).
    Offline:   for every token t:  x = embedding[t];  n = norm(x)
                   q = n W_q,  k = n W_k,  v = n W_v    biases included, no rotation yet
                   s = x                                serial block
                   s = x + FFN(x)                       parallel block; FFN includes its norm
                   table[t] = [s, q, k, v]              (V, D + (H + 2 K) d)
               for V tokens, width D, H query heads and K key/value heads of width d. The table
               replaces the embedding; block 0 gets its rows as the hidden state.
    Online:    s, q, k, v = table[t]
               y = s + attention(rope(q), rope(k), v) W_o
               output of block 0: y in a parallel block, y + FFN(y) in a serial one
    Saves:     D (H + 2 K) d multiply-adds per token, and in a parallel block the FFN's 2 D F
               (3 D F with a gate; F hidden neurons): at most 1/L of the work of L blocks. Those
               weights go; the table has V (H + 2 K) d numbers more than the embedding; with a tied
               head the old embedding stays as well, V D numbers. A pass over fewer than D tokens
               reads fewer numbers than before.
    In NumPy:  faster for parallel blocks: decoding and prompts 1.2x on stories-parallel, 1.0x on
               stories and stories-relu.
    Not for:   an attention that another technique has replaced. If weights change, the table has
               to be made again.
    Proof:     tests/precompute/test_first_layer.py; literal version:
               tests/precompute/literal_first_layer.py
    Tutorial:  tutorials/03_before_the_first_token.py
    """
    return swap(lm, Transformer, with_table)


# Online ------------------------------------------------------------------------------------------


@part
class FirstLayerTable(Part):
    """Token ids to rows [s, q, k, v]. It takes the embedding's field in the tree."""

    w: np.ndarray  # (V, D + H*d + 2*K*d)

    def __call__(self, ids, positions):  # positions are unused
        return ops.rows(self.w, ids)  # (..., T, D + H*d + 2*K*d)


@part
class FirstBlock(Part):
    """Serial block 0 from rows of the table: the rest of attention, then the FFN."""

    split: Part
    attn: Attention
    ffn: Part

    def __call__(self, rows, layer: Layer):
        x, q, k, v = self.split(rows)
        x = x + self.attn.from_qkv(q, k, v, layer)  # (..., T, D)
        return x + self.ffn(x, layer)


@part
class FirstParallelBlock(Part):
    """Parallel block 0 from rows of the table, whose s includes the output of the FFN."""

    split: Part
    attn: Attention

    def __call__(self, rows, layer: Layer):
        s, q, k, v = self.split(rows)
        return s + self.attn.from_qkv(q, k, v, layer)  # (..., T, D)


@part
class FirstParallelBlockAndFFN(Part):
    """Parallel block 0 from rows of the table, with an FFN that cannot go into the table."""

    split: Part
    attn: Attention
    ffn: Part

    def __call__(self, rows, layer: Layer):
        x, q, k, v = self.split(rows)
        return x + self.attn.from_qkv(q, k, v, layer) + self.ffn(x, layer)  # (..., T, D)


@part
class Split(Part):
    """A row of the table to its four pieces."""

    width: int  # D
    q_width: int  # H * d
    k_width: int  # K * d

    def __call__(self, rows):
        b = self.width + self.q_width
        c = b + self.k_width
        return rows[..., : self.width], rows[..., self.width : b], rows[..., b:c], rows[..., c:]


@part
class InTable(Part):
    """Instead of the norm and of the projections, whose results are in the table."""

    def __call__(self, x):
        raise MinitxError(
            "The norm and the projections of block 0 are rows of first_layer's table and cannot "
            "be called on their own; leave first_layer out."
        )

    q = kv = __call__  # for Attention.attend_from and Attention.backfill


# Offline -----------------------------------------------------------------------------------------

ROWS = 1024  # of the embedding at a time, so that the FFN's hidden neurons fit in memory


def with_table(model: Transformer) -> Transformer:
    need(model.embed, TokenEmbedding, PositionEmbedding)
    need(model.stack, Stack)
    block = model.stack.blocks[0]
    need(block, Block, ParallelBlock)
    need(block.attn, Attention)
    norm, qkv = in_float64(block.attn.norm), in_float64(block.attn.qkv)
    ffn = None
    if type(model.embed) is TokenEmbedding:
        if type(block) is ParallelBlock and type(block.ffn) is FFN:
            ffn = in_float64(block.ffn)
        embed = FirstLayerTable(token_table(model.embed.w, norm, qkv, ffn))
    else:
        need(model.embed.tokens, TokenEmbedding)
        embed = added_tables(model.embed.tokens.w, model.embed.w, norm, qkv)
    first = first_block(block, split_like(norm, qkv, model.config.width), ffn is not None)
    stack = replace(model.stack, blocks=(first, *model.stack.blocks[1:]))
    return replace(model, embed=embed, stack=stack)


def token_table(embedding, norm: Part, qkv: Part, ffn: Part | None) -> np.ndarray:
    """[s, q, k, v] for each row x of the embedding (V, D); s = x + ffn(x), or x without an FFN.
    Whatever parts are there compute it, folded or fused ones too."""

    def rows(x):
        s = x if ffn is None else x + ffn(x, None)  # an FFN needs no cache
        return np.concatenate([s, *qkv(norm(x))], axis=-1)

    with np.errstate(over="ignore"):  # exp overflows harmlessly in silu: x / Inf = 0
        return in_pieces(rows, embedding)


def first_block(block: Part, split: Split, ffn_in_table: bool) -> Part:
    attn = replace(block.attn, norm=InTable(), qkv=InTable())
    if type(block) is Block:
        return FirstBlock(split, attn, block.ffn)
    if ffn_in_table:
        return FirstParallelBlock(split, attn)
    return FirstParallelBlockAndFFN(split, attn, block.ffn)


def split_like(norm: Part, qkv: Part, width: int) -> Split:
    """For pieces as wide as the outputs of these parts for a hidden state of that width."""
    q, k, _ = qkv(norm(np.zeros((1, width))))
    return Split(width, q.shape[-1], k.shape[-1])


def in_pieces(make: Callable, embedding) -> np.ndarray:
    """``make(rows)`` for all rows, in float64, rounded once to the embedding's dtype."""
    pieces = [embedding[a : a + ROWS] for a in range(0, len(embedding), ROWS)]
    return np.concatenate(
        [make(piece.astype(np.float64)).astype(embedding.dtype) for piece in pieces]
    )


def in_float64(node: Part) -> Part:
    return map_weights(node, lambda w: w.astype(np.float64) if w.dtype.kind == "f" else w)


# Learned positions -------------------------------------------------------------------------------
# x = tokens[t] + positions[p]: no table over tokens alone can hold the projections x W. But a norm
# with gain g and bias b is linear up to one scalar r(x) per token:
#
#     [q, k, v] = r(x) * (y(tokens[t]) + y(positions[p])) + c
#     r(x) = 1 / sqrt(mean(x^2) + eps),  y(x) = (x * g) W,  c = b W + bias of W
#     (a LayerNorm: x - mean(x) instead of x, in both r and y)
#
# Two tables of rows [x, y(x)], one over tokens and one over positions, are added row by row. c and
# y come from calling the parts: c = qkv(norm(0)),  y(x) = (qkv(norm(x)) - c) / r(x).


@part
class AddedTables(Part):
    """Token ids and positions to rows [x, q, k, v]: the rows of two tables are added, then q, k, v
    scaled by r and shifted by c."""

    tokens: np.ndarray  # (V, D + H*d + 2*K*d)
    positions: np.ndarray  # (context, D + H*d + 2*K*d)
    c: np.ndarray  # (H*d + 2*K*d,)
    scale: Callable
    eps: float

    def __call__(self, ids, where):
        rows = ops.rows(self.tokens, ids) + ops.rows(self.positions, where)  # a new array
        width = rows.shape[-1] - len(self.c)
        qkv = rows[..., width:]  # a view
        qkv *= self.scale(rows[..., :width], self.eps)
        qkv += self.c
        return rows  # (..., T, D + H*d + 2*K*d)


def added_tables(tokens, positions, norm: Part, qkv: Part) -> AddedTables:
    """The two tables, from token embeddings (V, D) and position embeddings (context, D)."""
    width = tokens.shape[-1]
    zero, one = np.zeros((1, width)), np.ones((1, width))

    def project(x):
        return np.concatenate(qkv(norm(x)), axis=-1)  # (..., H*d + 2*K*d)

    # A LayerNorm gives the same for every constant row, an RMSNorm does not. This compares
    # behaviour, not type: it also works for norms that fold_norms has replaced.
    scale = layer_scale if np.array_equal(norm(one), norm(zero)) else rms_scale
    eps = getattr(norm, "eps", 0.0)
    c = project(zero)

    def rows(x):
        return np.concatenate([x, (project(x) - c) / scale(x, eps)], axis=-1)

    # The sum holds only for such a norm and linear projections: test it on a few rows.
    e, p = (table[: min(len(tokens), len(positions), 8)] for table in (tokens, positions))
    x = e.astype(np.float64) + p
    expected, found = project(x), (rows(e) + rows(p))[:, width:] * scale(x, eps) + c
    if not abs(found - expected).max() <= 1e-5 * abs(expected).max():
        other = next((part for _, part in children(qkv) if type(part) is not Linear), None)
        if other is not None:
            raise NoSuchPart(Linear, found=other)
        raise NoSuchPart(RMSNorm, LayerNorm, found=norm)
    tables = in_pieces(rows, tokens), in_pieces(rows, positions)
    return AddedTables(*tables, c[0].astype(tokens.dtype), scale, eps)


def rms_scale(x, eps):
    """r (..., 1) by which an RMSNorm scales the rows x (..., D)."""
    mean_square = np.einsum("...d,...d->...", x, x) / x.shape[-1]
    return 1 / np.sqrt(mean_square + eps)[..., None]


def layer_scale(x, eps):
    """r (..., 1) by which a LayerNorm scales the rows x (..., D) minus their means."""
    return rms_scale(x - x.mean(-1, keepdims=True), eps)


# Notes:
#
# - W_o and the FFN of a serial block stay: their input has seen other tokens.
# - With A = (H + 2 K) d, a pass over B tokens reads D A weights less and B A numbers of the table
#   more: less in all while B < D. In a parallel block while B < D + 2 D F / A, or D + 3 D F / A
#   with a gate.
# - Learned positions: a token takes D multiplications for mean(x^2) and A for the scaling by r(x),
#   and no matrix product. 2 B A numbers are read and (V + context) A stored, instead of B A and
#   V A.
#   The FFN of a parallel block stays, because its activation is not linear: FFN(tokens[t]) and
#   FFN(positions[p]) do not add up to FFN(x).
# - An FFN that another technique has replaced stays out of the table and runs as before: it may
#   have a state of its own.
# - Speed: minitx compare -m stories --first-layer, and with stories-parallel; one BLAS thread.
