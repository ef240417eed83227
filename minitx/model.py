"""The transformer, top to bottom like the equations. No flag, no hook, no technique.

Every class is a part (tree.py): it holds weights and smaller parts, and calling it computes. x
(..., T, D) is the residual stream, one row per token. ``layer`` is the block's KV cache (state.py).
"""

from collections.abc import Callable

import numpy as np

from minitx import ops
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.state import Layer, State, Tokens
from minitx.tree import Part, part, table


@part
class Transformer(Part):
    """Token ids in, one logit per vocabulary entry out."""

    embed: Part
    stack: Part
    norm: Part
    head: Part
    config: Config

    def __call__(self, ids, state: State | None = None):
        """Logits (..., T, V) for ids (..., T): row t scores the token that follows ids[t].

        With a state, the ids continue its sequence; without one, they are a whole sequence.
        """
        return self.head(self.norm(self.hidden(ids, state)))

    def next_logits(self, ids, state: State | None = None):
        """Logits (..., V) after the last of the ids: the only row that sampling needs."""
        return self.head(self.last(ids, state))

    def next_argmax(self, ids, state: State | None = None) -> int:
        """The argmax of ``next_logits`` for one sequence: all that greedy decoding needs. A head
        may find it without computing every logit."""
        return self.head.argmax(self.last(ids, state))

    def last(self, ids, state: State | None = None):
        """The normalized hidden state (..., D) of the last of the ids: the input of the head."""
        return self.norm(self.hidden(ids, state)[..., -1:, :])[..., 0, :]

    def hidden(self, ids, state: State | None = None):
        """The hidden states (..., T, D): the residual stream after the last block."""
        ids = np.asarray(ids)
        state = self.new_state(remember=False) if state is None else state
        self.check(ids, state)
        x = self.embed(ids, state.take(ids.shape[-1]).lookup)
        with np.errstate(over="ignore"):  # silu(x) far below 0 is x / exp(-x) = x / Inf = 0
            x = self.stack(x, state)
        state.position += ids.shape[-1]
        return x

    def check(self, ids, state: State) -> None:
        """Refuse ids that are not integers, and a state of another model or batch: NumPy might
        broadcast them, or look up positions beyond the end of a table, without a word."""
        if ids.ndim == 0 or ids.dtype.kind not in "iu":
            raise MinitxError(
                f"Expected token ids as a list or an array of integers, got {ids.dtype} of shape "
                f"{ids.shape}; use lm.encode(text) to make them from text."
            )
        if len(state.layers) != len(self.stack.blocks) or state.capacity > self.config.context:
            raise MinitxError(
                f"The state is for {len(state.layers)} blocks and a context of {state.capacity}, "
                f"and this model has {len(self.stack.blocks)} and {self.config.context}; make one "
                "with model.new_state()."
            )
        state.need_batch(ids.shape[:-1])

    def new_state(self, start=None, remember: bool = True) -> State:
        """An empty state for one sequence, or for a batch padded on the left up to ``start``
        (B,)."""
        return State(len(self.stack.blocks), self.config.context, start, remember)


@part
class TokenEmbedding(Part):
    """One row of a table per token. ``positions`` (an index into a table of positions) is
    unused."""

    w: np.ndarray  # (V, D)

    def __call__(self, ids, positions):
        return ops.rows(self.w, ids)  # (..., T, D)


@part
class PositionEmbedding(Part):
    """One row per token plus one row per position, both learned (GPT-2)."""

    tokens: Part
    w: np.ndarray  # (context, D), the table of positions; that of tokens is in ``tokens``

    def __call__(self, ids, positions):
        return self.tokens(ids, positions) + ops.rows(self.w, positions)  # (..., T, D)


@part
class Stack(Part):
    """The blocks, one after another."""

    blocks: tuple

    def __call__(self, x, state: State):
        return self.run(x, state, 0, len(self.blocks))

    def run(self, x, state: State, first: int, last: int):
        """Run blocks first .. last - 1 on the tokens of this step."""
        for block, layer in zip(self.blocks[first:last], state.layers[first:last], strict=True):
            layer.tokens = state.tokens
            x = block(x, layer)
        return x


@part
class Block(Part):
    """Attention, then the feed-forward network, each added to the residual stream."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        x = x + self.attn(x, layer)
        return x + self.ffn(x, layer)

    def backfill(self, x, layer: Layer):
        """Only fill the KV cache for tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Run the block for tokens x whose keys and values are already cached."""
        x = x + self.attn.attend_from(x, layer)
        return x + self.ffn(x, layer)


@part
class ParallelBlock(Part):
    """Attention and feed-forward network read the same x and are added together (GPT-NeoX)."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        return x + self.attn(x, layer) + self.ffn(x, layer)

    def backfill(self, x, layer: Layer):
        """Only fill the KV cache for tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Run the block for tokens x whose keys and values are already cached."""
        return x + self.attn.attend_from(x, layer) + self.ffn(x, layer)


@part
class SkiplessBlock(Part):
    """Attention, then the feed-forward network, without residual adds: each replaces the hidden
    state (He et al., 2023, arXiv 2302.10322, train such models)."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        return self.ffn(self.attn(x, layer), layer)

    def backfill(self, x, layer: Layer):
        """Only fill the KV cache for tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Run the block for tokens x whose keys and values are already cached."""
        return self.ffn(self.attn.attend_from(x, layer), layer)


@part
class SkiplessParallelBlock(Part):
    """Attention and feed-forward network read the same x; their sum replaces it."""

    attn: Part
    ffn: Part

    def __call__(self, x, layer: Layer):
        return self.attn(x, layer) + self.ffn(x, layer)

    def backfill(self, x, layer: Layer):
        """Only fill the KV cache for tokens x: see ``Attention.backfill``."""
        self.attn.backfill(x, layer)

    def attend_from(self, x, layer: Layer):
        """Run the block for tokens x whose keys and values are already cached."""
        return self.attn.attend_from(x, layer) + self.ffn(x, layer)


@part
class Attention(Part):
    """Normalize; project to queries, keys and values; rotate; cache keys and values; attend;
    project.

    ``__call__`` does two things that techniques also call separately: fill the KV cache for some
    tokens (``backfill``), and attend from some tokens (``attend_from``).
    """

    norm: Part
    qkv: Part
    rope: Part
    cache: Part
    attend: Part
    out: Part
    heads: int  # H
    kv_heads: int  # K

    def __call__(self, x, layer: Layer):
        return self.from_qkv(*self.qkv(self.norm(x)), layer)

    def backfill(self, x, layer: Layer):
        """Only cache the keys and values of tokens x (..., T, D), which skip this layer but must be
        visible to later tokens."""
        self.store(*self.qkv.kv(self.norm(x)), layer)

    def attend_from(self, x, layer: Layer):
        """Attention from tokens x (..., T, D) whose keys and values are already cached."""
        return self.read(self.qkv.q(self.norm(x)), layer)

    def from_qkv(self, q, k, v, layer: Layer):
        """Everything after the projections q (..., T, H*d), k and v (..., T, K*d)."""
        self.store(k, v, layer)
        return self.read(q, layer)

    def store(self, k, v, layer: Layer):
        k = self.rope(split_heads(k, self.kv_heads), layer.tokens)  # (..., K, T, d)
        self.cache.store(k, split_heads(v, self.kv_heads), layer)

    def read(self, q, layer: Layer):
        q = self.rope(split_heads(q, self.heads), layer.tokens)  # (..., H, T, d)
        k, v = self.cache.read(layer)  # (..., K, S, d)
        return self.out(merge_heads(self.attend(q, k, v, layer)))  # (..., T, D)


@part
class QKV(Part):
    """Three projections of the same input."""

    q: Part
    k: Part
    v: Part

    def __call__(self, x):
        return self.q(x), self.k(x), self.v(x)

    def kv(self, x):
        """Keys and values only."""
        return self.k(x), self.v(x)


def split_heads(x, heads: int):
    """(..., T, heads*d) -> (..., heads, T, d)"""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads).swapaxes(-3, -2)


def merge_heads(x):
    """(..., heads, T, d) -> (..., T, heads*d)"""
    x = x.swapaxes(-3, -2)
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


@part
class Rope(Part):
    """Rotary position embedding: rotate pairs of columns by an angle proportional to the
    position."""

    cos: np.ndarray = table()  # (context, rotated columns)
    sin: np.ndarray = table()  # (context, rotated columns)

    def __call__(self, x, tokens: Tokens):
        """Rotate x (..., heads, T, d) to the positions of these T tokens."""
        where = tokens.lookup
        cos, sin = self.cos[where], self.sin[where]  # (T, width); ragged batch: (B, T, width)
        if tokens.start is not None:
            cos, sin = cos[:, None], sin[:, None]  # (B, 1, T, width): the same for every head
        return ops.rotate(x, cos, sin)


@part
class NoRope(Part):
    """No rotation: learned positions were added to the embedding."""

    def __call__(self, x, tokens: Tokens):
        return x


@part
class Cache(Part):
    """The KV cache, in the dtype of the model."""

    def store(self, k, v, layer: Layer):
        layer.store(k, v)  # (..., K, T, d)

    def read(self, layer: Layer):
        return layer.rows()  # (..., K, S, d)


@part
class Attend(Part):
    """Softmax attention of the queries over the visible cached keys."""

    scale: float  # 1 / sqrt(d)

    def __call__(self, q, k, v, layer: Layer):
        return ops.attention(q, k, v, self.scale, layer.mask())  # (..., H, T, d)


@part
class AttendUnequalGroups(Part):
    """The same if key heads serve different numbers of query heads: one query head at a time."""

    scale: float  # 1 / sqrt(d)
    key_head: np.ndarray = table()  # (H,): the key head of each query head

    def __call__(self, q, k, v, layer: Layer):
        mask, out = layer.mask(), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        for h, j in enumerate(self.key_head):
            one, its = slice(h, h + 1), slice(j, j + 1)
            head_mask = mask[..., its, :, :, :] if mask is not None and by_head(mask) else mask
            values = v[..., its, :, :] if v.shape[-3] > 1 else v
            rows = q[..., one, :, :], k[..., its, :, :], values
            out[..., one, :, :] = ops.attention(*rows, self.scale, head_mask)
        return out  # (..., H, T, d)


def by_head(mask) -> bool:
    """Is a mask (..., K or 1, G or 1, T, S) different for each key head?"""
    return mask.ndim > 3 and mask.shape[-4] > 1


@part
class FFN(Part):
    """Normalize; expand to F hidden neurons; project back to D."""

    norm: Part
    expand: Part
    down: Part

    def __call__(self, x, layer: Layer):
        return self.down(self.expand(self.norm(x)))  # (..., F) -> (..., D)


@part
class SwiGLU(Part):
    """Hidden neurons silu(gate) * up (llama)."""

    gate: Part
    up: Part

    def __call__(self, x):
        return ops.swiglu(self.gate(x), self.up(x))  # (..., F)


@part
class Activated(Part):
    """Hidden neurons activation(up) (GPT-2, GPT-NeoX)."""

    up: Part
    activation: Callable

    def __call__(self, x):
        return self.activation(self.up(x))  # (..., F)


@part
class Linear(Part):
    """x @ w + b, with w stored (in, out)."""

    matrix_layout = "column-major"
    w: np.ndarray
    b: np.ndarray | None = None

    def __call__(self, x):
        return ops.linear(x, self.w, self.b)

    def outputs(self, x, columns):
        """Only these output columns: a slice, or an array of indices."""
        return ops.linear(x, self.w[:, columns], None if self.b is None else self.b[columns])


@part
class Head(Part):
    """The output head: one column of weights, and one logit, per vocabulary entry."""

    matrix_layout = "column-major"
    w: np.ndarray  # (D, V)
    b: np.ndarray | None = None  # (V,): no model has one, but folding a norm can produce one

    def __call__(self, x):
        return ops.linear(x, self.w, self.b)  # (..., V)

    def argmax(self, x) -> int:
        """The token with the largest logit for one row x (D,)."""
        return ops.argmax_token(self(x))


@part
class TiedHead(Part):
    """A head that shares the embedding table: logits are dot products with its rows."""

    w: np.ndarray  # (V, D), the same array as the embedding

    def __call__(self, x):
        return ops.logits(x, self.w)  # (..., V)

    def argmax(self, x) -> int:
        """The token with the largest logit for one row x (D,)."""
        return ops.argmax_token(self(x))


@part
class RMSNorm(Part):
    gain: np.ndarray  # (D,)
    eps: float

    def __call__(self, x):
        return ops.rms_norm(x, self.gain, self.eps)


@part
class LayerNorm(Part):
    gain: np.ndarray  # (D,)
    bias: np.ndarray  # (D,)
    eps: float

    def __call__(self, x):
        return ops.layer_norm(x, self.gain, self.bias, self.eps)


@part
class NoNorm(Part):
    """No normalization (skipless models)."""

    def __call__(self, x):
        return x
