"""Without residual adds and norms, two of attention's four matrices go into their neighbours."""

from dataclasses import replace
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attention,
    Block,
    Linear,
    ParallelBlock,
    PositionEmbedding,
    Stack,
    SwiGLU,
    TokenEmbedding,
    Transformer,
)
from minitx.skipless import NoNorm, SkiplessBlock, SkiplessParallelBlock
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None)
def remove_weights(lm, *, matrix: Literal["q", "k", "v"] = "q"):
    """Leave out the projection of the queries and the output projection of a skipless model.

    Paper: Nils Graef, 2024, "Transformer tricks: Removing weights for skipless transformers", arXiv
        2404.12362: figure 1 (b) is matrix=q; k and v are its further variants for multi-head
        attention. What happens to biases and to learned positions, and that parallel blocks lose
        one matrix only, was derived here.
    Kind: exact in real arithmetic; in float32 as far as the condition numbers of the removed
        matrices allow.
    Skips or precomputes: W_q, or W_k or W_v in its place where it is square (multi-head attention),
        and the output projection P, in every block.
    Offline: with A_i, a_i the matrix and bias to remove from block i: the stream that enters the
        block becomes x A_i + a_i. So of the FFN before it O* = O A_i, b_O* = b_O A_i + a_i (before
        the first: E* = E A_1 + a_1 of tokens, E A_1 of learned positions); each W of W_q, W_k, W_v
        that is left becomes W* = A_i^-1 W, b_W* = b_W - a_i W*. The last O stays. P goes into the
        FFN: M* = P M, b_M* = b_P M + b_M (M is gate and up in a gated FFN).
        Parallel blocks: O and P both write the next stream and M reads it: O* = O A_i,
        P* = P A_i, b_O* = b_O A_i + a_i, b_P* = b_P A_i; M* = A_i^-1 M, b_M* = b_M - a_i M*; and P
        stays.
        cond in the tree is the condition number of A_i, which says how many digits may get lost. In
        float64 and rounded once.
    Online: q = x (or k = x, or v = x), split into heads and rotated as ever;
        x = act(attend(q, k, v) M* + b_M*) O* + b_O*.
    Saves: 2 L D^2 weights, and as many multiply-adds a token; L D^2 in parallel blocks. A tied head
        keeps the embedding as it was, which makes that two tables: V D weights more. Whole products
        fall away and nothing takes their place, so NumPy saves that time too.
    Neutral: nothing to set.
    Not for: models with residual adds or norms, which is nearly all of them: what is added, or
        scaled by its length, ties both ends of a block to one basis, so that nothing can be merged
        through. (The paper's versions with residuals, figure 4, are models to train anew.) Parallel
        blocks keep P: a second matrix would need a second basis for the same stream; the paper's
        figure 3 drops both, which is another model. Matrices that cannot be inverted.
    """
    return swap(lm, Transformer, lambda model: without(model, matrix))


def without(model: Transformer, matrix: str) -> Transformer:
    need(model.stack, Stack)
    need(model.embed, TokenEmbedding, PositionEmbedding)
    for block in model.stack.blocks:
        need_skipless(block)
        need(block.attn, Attention)
        need(block.attn.qkv, QKV)
        need(block.ffn, FFN)
        for norm in (block.attn.norm, block.ffn.norm):
            need(norm, NoNorm)
        inner = block.ffn.expand
        need(inner, Activated, SwiGLU)
        linear = (
            block.attn.out,
            block.ffn.down,
            *vars(block.attn.qkv).values(),
            *readers(inner).values(),
        )
        for node in linear:
            need(node, Linear)
    bases = [
        Basis.of(getattr(block.attn.qkv, matrix), matrix, number)
        for number, block in enumerate(model.stack.blocks)
    ]
    blocks = []
    for block, base, after in zip(model.stack.blocks, bases, [*bases[1:], None]):
        if type(block) is SkiplessBlock:
            blocks.append(serial(block, matrix, base, after))
        else:
            blocks.append(parallel(block, matrix, base, after))
    stack = replace(model.stack, blocks=tuple(blocks))
    return replace(model, embed=new_embedding(model.embed, bases[0]), stack=stack)


def need_skipless(block: Part) -> None:
    if type(block) in (Block, ParallelBlock):
        raise MinitxError(
            "remove_weights is for skipless models, and this one has a part of type "
            f"{type(block).__name__}: its residual adds and norms tie both ends of a block to one "
            "basis, so no matrix can be merged through them; use it with stories-skipless, or "
            "shrink with any model."
        )
    need(block, SkiplessBlock, SkiplessParallelBlock)


# Offline -----------------------------------------------------------------------------------------

WORST = 1e6  # condition number beyond which float32 keeps no digit worth having


class Basis:
    """A new basis of the stream: x' = x A + a, and how matrices change that write or read it."""

    def __init__(self, A, a, cond: float):
        self.A, self.a, self.cond = A, a, cond  # (D, D), (D,) or None

    @staticmethod
    def of(removed: Linear, matrix: str, number: int) -> "Basis":
        """The basis that makes ``removed``, of block ``number``, the identity."""
        A, a = wide(removed.w), wide(removed.b)
        if A.shape[0] != A.shape[1]:
            advice = "" if matrix == "q" else "; matrix=q may fit, for queries are not shared"
            raise MinitxError(
                f"remove_weights needs a square W_{matrix} and this one is {A.shape[0]} x "
                f"{A.shape[1]}, which has no inverse{advice}."
            )
        cond = float(np.linalg.cond(A))
        if not cond <= WORST:
            raise MinitxError(
                f"remove_weights cannot invert W_{matrix} of block {number}: its condition number "
                f"is {cond:.0e}, more than {WORST:.0e}; try another matrix (q, k or v)."
            )
        return Basis(A, a, cond)

    def written(self, w, b, moved: bool = True):
        """w, b (float64; b may be None) that wrote x, writing x' (or x A alone)."""
        new = None if b is None else b @ self.A
        if moved and self.a is not None:
            new = self.a if new is None else new + self.a
        return w @ self.A, new

    def read(self, w, b):
        """w, b that read x, reading x'."""
        new = np.linalg.solve(self.A, w)
        if self.a is not None:
            b = -self.a @ new + (0 if b is None else b)
        return new, b


def serial(block: SkiplessBlock, matrix: str, base: Basis, after: Basis | None) -> Part:
    attn, ffn = block.attn, block.ffn
    P, p = wide(attn.out.w), wide(attn.out.b)

    def fed(w, b):  # M reads what attention mixes, and not what P makes of it
        return P @ w, b if p is None else p @ w + (0 if b is None else b)

    inner = replace(ffn.expand, **changed(readers(ffn.expand), fed))
    down = ffn.down if after is None else change(ffn.down, after.written)
    attn = replace(attn, qkv=left(attn.qkv, matrix, base), out=InFFN())
    return replace(block, attn=attn, ffn=replace(ffn, expand=inner, down=down))


def parallel(block: SkiplessParallelBlock, matrix: str, base: Basis, after: Basis | None) -> Part:
    attn, ffn = block.attn, block.ffn
    inner = replace(ffn.expand, **changed(readers(ffn.expand), base.read))
    out, down = attn.out, ffn.down
    if after is not None:
        out = change(out, lambda w, b: after.written(w, b, moved=False))  # the sum moves only once
        down = change(down, after.written)
    attn = replace(attn, qkv=left(attn.qkv, matrix, base), out=out)
    return replace(block, attn=attn, ffn=replace(ffn, expand=inner, down=down))


def left(qkv: QKV, matrix: str, base: Basis) -> Part:
    """The projections without one of them."""
    others = {name: getattr(qkv, name) for name in "qkv" if name != matrix}
    kind = {"q": StreamIsQ, "k": StreamIsK, "v": StreamIsV}[matrix]
    return kind(**changed(others, base.read), cond=base.cond)


def new_embedding(embed: Part, base: Basis) -> Part:
    """The embedding in the basis of the first block. A tied head holds the old one and keeps it."""
    if type(embed) is PositionEmbedding:
        need(embed.tokens, TokenEmbedding)
        w, _ = base.written(wide(embed.w), None, moved=False)
        return replace(embed, tokens=new_embedding(embed.tokens, base), w=w.astype(embed.w.dtype))
    w, b = base.written(wide(embed.w), None)
    return replace(embed, w=(w if b is None else w + b).astype(embed.w.dtype))


def readers(inner: Part) -> dict[str, Part]:
    """The matrices of an FFN that read the stream: up, and gate if it has one."""
    return {name: node for name, node in vars(inner).items() if isinstance(node, Part)}


def changed(maps: dict[str, Linear], how) -> dict[str, Linear]:
    return {name: change(linear, how) for name, linear in maps.items()}


def change(linear: Linear, how) -> Linear:
    """``how(w, b)`` in float64, rounded to the type of w."""
    w, b = how(wide(linear.w), wide(linear.b))
    dtype = linear.w.dtype
    return Linear(w.astype(dtype), None if b is None else b.astype(dtype))


def wide(array):
    return None if array is None else array.astype(np.float64)


# Online ------------------------------------------------------------------------------------------


@part
class StreamIsQ(Part):
    """The queries are the stream itself; W_q is in the matrices around it."""

    k: Part
    v: Part
    cond: float  # condition number of the W_q that was removed

    def __call__(self, x):
        return x, self.k(x), self.v(x)

    def q(self, x):
        """Queries alone."""
        return x

    def kv(self, x):
        """Keys and values alone."""
        return self.k(x), self.v(x)


@part
class StreamIsK(Part):
    """The keys are the stream itself; W_k is in the matrices around it."""

    q: Part
    v: Part
    cond: float  # condition number of the W_k that was removed

    def __call__(self, x):
        return self.q(x), x, self.v(x)

    def kv(self, x):
        """Keys and values alone."""
        return x, self.v(x)


@part
class StreamIsV(Part):
    """The values are the stream itself; W_v is in the matrices around it."""

    q: Part
    k: Part
    cond: float  # condition number of the W_v that was removed

    def __call__(self, x):
        return self.q(x), self.k(x), x

    def kv(self, x):
        """Keys and values alone."""
        return self.k(x), x


@part
class InFFN(Part):
    """In the place of the output projection, which is in the FFN's first matrices."""

    def __call__(self, x):
        return x
