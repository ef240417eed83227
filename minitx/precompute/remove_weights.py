"""Skipless transformers (without residual adds and norms) lose their W_q and W_o.

The card and the option, the parts that run (online), the merged matrices (offline), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attention,
    Block,
    Linear,
    NoNorm,
    ParallelBlock,
    PositionEmbedding,
    SkiplessBlock,
    SkiplessParallelBlock,
    Stack,
    SwiGLU,
    TokenEmbedding,
    Transformer,
)
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None)
def remove_weights(
    lm,
    *,
    matrix: Annotated[
        Literal["q", "k", "v"],
        "which of W_q, W_k, W_v is merged; k and v only if query heads do not share them",
    ] = "q",
):
    """Merge W_q and W_o of a skipless model into the FFN matrices before and after them.

    Paper:     Graef, "Transformer tricks: Removing weights for skipless transformers", 2024,
               arXiv 2404.12362, figure 1 (b). Its P, M, O are W_o, W_up, W_down here.
    Fidelity:  the paper's text. Biases, learned positions and parallel blocks are our extension.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               2e-6 of the largest one), the more the worse W_q is conditioned.
    Idea:      Skipless: without residual adds and norms. Then matrices follow each other directly:
               W_down of one block and W_q of the next, W_o and W_up. Each such pair is one matrix.
    Offline:   W_down* = W_down W_q,  b_down* = b_down W_q + b_q    W_q, b_q of the next block;
                                                the last block's W_down, b_down stay as they are
               embedding* = embedding W_q + b_q                     W_q, b_q of block 0
               W_k*    = W_q^-1 W_k,  b_k*    = b_k - b_q W_k*      W_v and b_v alike
               W_up*   = W_o W_up,    b_up*   = b_o W_up + b_up     W_gate and b_gate alike
               matrix=k, matrix=v: the same with W_k or W_v in the role of W_q.
    Online:    q = x;  k = x W_k* + b_k*;  v = x W_v* + b_v*       then RoPE and the KV cache
               x = act(attention(q, k, v) W_up* + b_up*) W_down* + b_down*
    Saves:     2 L D^2 weights (L blocks of width D), and as many multiply-adds per token; half of
               that in parallel blocks, which keep W_o. A tied head keeps the old embedding: V D
               weights more for V tokens.
    In NumPy:  faster, since whole products go: decoding and prompts 1.1x on stories-skipless.
    Not for:   models with residual adds or norms, so nearly all: both tie input and output of a
               block to one basis. Matrices that are not square, or not invertible.
    Proof:     tests/precompute/test_remove_weights.py; literal version:
               tests/precompute/literal_remove_weights.py
    """
    return swap(lm, Transformer, lambda model: merge(model, matrix))


# Online ------------------------------------------------------------------------------------------


@part
class InputIsQ(Part):
    """The queries are the input itself: W_q is merged into the matrices around it."""

    k: Part
    v: Part
    condition: float  # condition number of the W_q that was removed

    def __call__(self, x):
        return x, self.k(x), self.v(x)

    def q(self, x):
        """Queries only."""
        return x

    def kv(self, x):
        """Keys and values only."""
        return self.k(x), self.v(x)


@part
class InputIsK(Part):
    """The keys are the input itself: W_k is merged into the matrices around it."""

    q: Part
    v: Part
    condition: float  # condition number of the W_k that was removed

    def __call__(self, x):
        return self.q(x), x, self.v(x)

    def kv(self, x):
        """Keys and values only."""
        return x, self.v(x)


@part
class InputIsV(Part):
    """The values are the input itself: W_v is merged into the matrices around it."""

    q: Part
    k: Part
    condition: float  # condition number of the W_v that was removed

    def __call__(self, x):
        return self.q(x), self.k(x), x

    def kv(self, x):
        """Keys and values only."""
        return self.k(x), x


@part
class MergedIntoFFN(Part):
    """Instead of the output projection W_o, which is merged into W_up (and W_gate)."""

    def __call__(self, x):
        return x


# Offline -----------------------------------------------------------------------------------------
# Removing W_q changes the basis of the hidden state x that enters the block to x' = x W_q + b_q,
# which is q. What writes x has to write x', and what reads x has to read x'.


def merge(model: Transformer, matrix: str) -> Transformer:
    """The model without W_q (or W_k, W_v) and, in serial blocks, without W_o."""
    check_parts(model)
    blocks = model.stack.blocks
    bases = [basis_of(b.attn.qkv, matrix, number) for number, b in enumerate(blocks)]
    following = [*bases[1:], None]  # what the last block writes stays as it is
    merged = tuple(
        merge_block(block, matrix, base, next_base)
        for block, base, next_base in zip(blocks, bases, following)
    )
    embed = new_embedding(model.embed, bases[0])
    return replace(model, embed=embed, stack=replace(model.stack, blocks=merged))


def merge_block(block: Part, matrix: str, base: "Basis", next_base: "Basis | None") -> Part:
    attn, ffn = block.attn, block.ffn
    qkv = remaining_projections(attn.qkv, matrix, base)
    out, down = attn.out, ffn.down
    if type(block) is SkiplessBlock:
        out = MergedIntoFFN()
        expand = change_inputs(ffn.expand, lambda w, b: after(attn.out, w, b))
    else:  # parallel: W_up reads x, and W_o and W_down both write the next x
        expand = change_inputs(ffn.expand, base.reading)
        if next_base is not None:
            # W_o and W_down both write x; the offset is added by one of them, W_down.
            out = change(out, lambda w, b: next_base.writing(w, b, offset=False))
    if next_base is not None:
        down = change(down, next_base.writing)
    return replace(
        block,
        attn=replace(attn, qkv=qkv, out=out),
        ffn=replace(ffn, expand=expand, down=down),
    )


def after(out: Linear, w, b):
    """Weights and bias that compute (x W_o + b_o) w + b from x. A bias may be None."""
    w_o, b_o = as_float64(out.w), as_float64(out.b)
    return w_o @ w, (b if b_o is None else b_o @ w + (0 if b is None else b))


class Basis:
    """The basis x' = x matrix + offset, and how weights that write or read x change with it. All
    arrays are float64; a bias may be None."""

    def __init__(self, matrix, offset, condition: float):
        self.matrix, self.offset = matrix, offset  # (D, D), (D,) or None
        self.condition = condition

    def writing(self, w, b, offset: bool = True):
        """Weights and bias that wrote x: now x' (or, without the offset, x matrix)."""
        new = None if b is None else b @ self.matrix
        if offset and self.offset is not None:
            new = self.offset if new is None else new + self.offset
        return w @ self.matrix, new

    def reading(self, w, b):
        """Weights and bias that read x: now x'."""
        new = np.linalg.solve(self.matrix, w)
        if self.offset is not None:
            b = -self.offset @ new + (0 if b is None else b)
        return new, b


LARGEST_CONDITION = 1e6  # our choice: beyond it float32 keeps three digits or fewer


def basis_of(qkv: QKV, matrix: str, number: int) -> Basis:
    """The basis in which W_q (or W_k, W_v) of block ``number`` is the identity."""
    removed = getattr(qkv, matrix)
    w = as_float64(removed.w)
    if w.shape[0] != w.shape[1]:
        advice = "" if matrix == "q" else "; try matrix=q, since queries are not shared"
        raise MinitxError(
            f"remove_weights needs a square W_{matrix}, which has an inverse; this one is "
            f"{w.shape[0]} x {w.shape[1]}{advice}."
        )
    condition = float(np.linalg.cond(w))
    if not condition <= LARGEST_CONDITION:
        raise MinitxError(
            f"remove_weights cannot invert W_{matrix} of block {number}: its condition number is "
            f"{condition:.0e}, expected at most {LARGEST_CONDITION:.0e}; try another matrix (q, k "
            "or v)."
        )
    return Basis(w, as_float64(removed.b), condition)


def remaining_projections(qkv: QKV, matrix: str, base: Basis) -> Part:
    """Two of the three projections, reading the new basis."""
    kind = {"q": InputIsQ, "k": InputIsK, "v": InputIsV}[matrix]
    others = {name: getattr(qkv, name) for name in "qkv" if name != matrix}
    changed = {name: change(linear, base.reading) for name, linear in others.items()}
    return kind(**changed, condition=base.condition)


def new_embedding(embed: Part, base: Basis) -> Part:
    """The embedding in the basis of block 0. A tied head keeps the old table."""
    if type(embed) is PositionEmbedding:  # token + position: the offset goes into one of the two
        need(embed.tokens, TokenEmbedding)
        w, _ = base.writing(as_float64(embed.w), None, offset=False)
        return replace(embed, tokens=new_embedding(embed.tokens, base), w=w.astype(embed.w.dtype))
    w, b = base.writing(as_float64(embed.w), None)
    return replace(embed, w=(w if b is None else w + b).astype(embed.w.dtype))


def input_matrices(expand: Part) -> dict[str, Part]:
    """W_up, and W_gate if there is one."""
    return {name: node for name, node in vars(expand).items() if isinstance(node, Part)}


def change_inputs(expand: Part, how) -> Part:
    maps = input_matrices(expand)
    return replace(expand, **{name: change(linear, how) for name, linear in maps.items()})


def change(linear: Linear, how) -> Linear:
    """``how(w, b)`` in float64, rounded to the dtype of w."""
    w, b = how(as_float64(linear.w), as_float64(linear.b))
    dtype = linear.w.dtype
    return Linear(w.astype(dtype), None if b is None else b.astype(dtype))


def as_float64(array):
    return None if array is None else array.astype(np.float64)


def check_parts(model: Transformer) -> None:
    """Raise unless the model is skipless and its weights are plain matrices."""
    need(model.stack, Stack)
    need(model.embed, TokenEmbedding, PositionEmbedding)
    for block in model.stack.blocks:
        check_skipless(block)
        need(block.attn, Attention)
        need(block.attn.qkv, QKV)
        need(block.ffn, FFN)
        need(block.attn.norm, NoNorm)
        need(block.ffn.norm, NoNorm)
        need(block.ffn.expand, Activated, SwiGLU)
        projections = vars(block.attn.qkv).values()
        inputs = input_matrices(block.ffn.expand).values()
        for node in (block.attn.out, block.ffn.down, *projections, *inputs):
            need(node, Linear)


def check_skipless(block: Part) -> None:
    if type(block) in (Block, ParallelBlock):
        raise MinitxError(
            f"remove_weights is for skipless models, and this one has a {type(block).__name__}: "
            "residual adds and norms tie input and output of a block to one basis, so no matrix "
            "can be merged through them; use it with stories-skipless, or use shrink."
        )
    need(block, SkiplessBlock, SkiplessParallelBlock)


# Notes:
#
# - Parallel blocks: W_up reads the same x as W_q, and W_o and W_down both write the next one:
#
#       W_up*   = W_q^-1 W_up,   b_up*   = b_up - b_q W_up*        W_k, W_v, W_gate alike
#       W_o*    = W_o W_q,       b_o*    = b_o W_q                 W_q, b_q of the next block
#       W_down* = W_down W_q,    b_down* = b_down W_q + b_q        W_q, b_q of the next block
#
#   W_o stays: removing it too would take a second basis for the same hidden state. The paper's
#   figure 3 drops both, which is another function (a test shows it).
# - The paper's versions with residual adds (figure 4) need training from scratch.
# - Arithmetic is float64, rounded once. The condition number of each removed matrix is in the tree:
#   it tells how many digits float32 may lose.
