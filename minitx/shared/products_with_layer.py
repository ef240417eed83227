"""Attention and FFN whose products with a matrix also get the ``Layer``, for products that remember
what they computed for earlier tokens of the sequence.

A ``Linear`` is called with x alone. ``replace_products`` replaces those of every block by parts
that are called as product(x, layer). Matrices with the same input are joined: [W_k W_v] and
[W_gate W_up]. W_q stays separate, since some techniques compute queries at another time than keys
and values.
"""

from collections.abc import Callable
from dataclasses import fields

from minitx import ops
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attention,
    Linear,
    SwiGLU,
    merge_heads,
    split_heads,
)
from minitx.shared.linears import side_by_side
from minitx.shared.row_by_row import each_sequence
from minitx.state import Layer
from minitx.technique import file_of, need, swap, wrap
from minitx.tree import Part, part

WHERE = {  # the products of a block, by the value of an option
    "all": ("q", "kv", "out", "up", "down"),
    "attention": ("q", "kv", "out"),
    "ffn": ("up", "down"),
    "down": ("down",),
    "qkv": ("q", "kv"),
    "out": ("out",),
}


@part
class StatefulProduct(Part):
    """Base class: a product that remembers earlier tokens of its sequence. Subclasses have
    ``one(x, layer)`` for x (T, in) of one sequence, whose tokens come in ascending order."""

    has_history = True
    one_sequence = True  # what it remembers belongs to one sequence

    def __call__(self, x, layer: Layer):
        if x.ndim > 2:
            because = f"{file_of(type(self))} remembers earlier tokens of one sequence at a time"
            return each_sequence(self.one, x, layer, because)
        return self.one(x, layer)


@part
class LayerAttention(Attention):
    """Attention in which the products q, kv and out are called with the layer, too."""

    def __call__(self, x, layer: Layer):
        x = self.norm(x)
        return self.from_qkv(self.qkv.q(x, layer), *self.qkv.kv(x, layer), layer)

    def backfill(self, x, layer: Layer):
        self.store(*self.qkv.kv(self.norm(x), layer), layer)

    def attend_from(self, x, layer: Layer):
        return self.read(self.qkv.q(self.norm(x), layer), layer)

    def read(self, q, layer: Layer):
        q = self.rope(split_heads(q, self.heads), layer.tokens)  # (..., H, T, d)
        k, v = self.cache.read(layer)  # (..., K, S, d)
        return self.out(merge_heads(self.attend(q, k, v, layer)), layer)  # (..., T, D)


@part
class LayerQKV(Part):
    """Queries from one product, keys and values from another."""

    q: Part
    both: Part  # keys and values
    k_width: int  # K * d

    def kv(self, x, layer: Layer):
        y = self.both(x, layer)
        return y[..., : self.k_width], y[..., self.k_width :]


@part
class LayerFFN(FFN):
    """An FFN in which the products are called with the layer, too."""

    def __call__(self, x, layer: Layer):
        return self.down(self.expand(self.norm(x), layer), layer)


@part
class LayerSwiGLU(Part):
    """Hidden neurons silu(gate) * up, with gate and up from one product."""

    both: Part

    def __call__(self, x, layer: Layer):
        y = self.both(x, layer)
        F = y.shape[-1] // 2
        return ops.swiglu(y[..., :F], y[..., F:])  # (..., F)


@part
class LayerActivated(Part):
    """Hidden neurons activation(up)."""

    up: Part
    activation: Callable

    def __call__(self, x, layer: Layer):
        return self.activation(self.up(x, layer))  # (..., F)


@part
class StatelessProduct(Part):
    """A product that remembers nothing."""

    linear: Part

    def __call__(self, x, layer: Layer):
        return self.linear(x)


# Offline -----------------------------------------------------------------------------------------


def replace_products(lm, where: str, make: Callable[[Linear, str, int], Part], layers=None):
    """The model with ``make(linear, name, index)`` instead of the products that ``where`` names
    (``WHERE``), in the blocks with these indices (None: all)."""
    names = WHERE[where]

    def product(name: str, index: int, *linears: Part) -> Part:
        for linear in linears:
            need(linear, Linear)
        one = side_by_side(*linears) if len(linears) > 1 else linears[0]
        return make(one, name, index) if name in names else StatelessProduct(one)

    def attention(attn: Attention, index: int) -> Part:
        need(attn.qkv, QKV)
        parts = {f.name: getattr(attn, f.name) for f in fields(attn)}
        q, k, v = attn.qkv.q, attn.qkv.k, attn.qkv.v
        both = product("kv", index, k, v)
        parts["qkv"] = LayerQKV(product("q", index, q), both, k.w.shape[1])
        return LayerAttention(**parts | {"out": product("out", index, attn.out)})

    def expand(inner: Part, index: int) -> Part:
        need(inner, SwiGLU, Activated)
        if type(inner) is SwiGLU:
            return LayerSwiGLU(product("up", index, inner.gate, inner.up))
        return LayerActivated(product("up", index, inner.up), inner.activation)

    def ffn(ffn: FFN, index: int) -> Part:
        return LayerFFN(ffn.norm, expand(ffn.expand, index), product("down", index, ffn.down))

    def change_attention(node: Part, index: int) -> Part:
        if layers is not None and index not in layers:
            return node
        need(node, Attention)  # nothing around it, which might call its products without the layer
        return attention(node, index)

    def change_ffn(node: Part, index: int) -> Part:
        if layers is not None and index not in layers:
            return node
        return swap(node, FFN, lambda found: ffn(found, index))

    if set(names) & {"q", "kv", "out"}:
        lm = wrap(lm, "attn", change_attention)
    if "down" in names:
        lm = wrap(lm, "ffn", change_ffn)
    return lm
