"""What happens inside one block: the values after each of its steps, for ``minitx check``.

A block that computes something wrong has a first step that does. Here the steps get their names,
and a copy of a model records them in one of its blocks. ``tests/reference/make.py`` records the
same steps in Hugging Face transformers.
"""

from dataclasses import replace

import numpy as np

from minitx.model import FFN, Activated, Attention, Block, ParallelBlock, SwiGLU, Transformer
from minitx.tree import Part, part, rebuild

# In the order of the computation, with the names of the axes after the position. A family without
# a step (GPT-2 has no rotation, only llama has a gate, parallel blocks add once) leaves it out.
STEPS = {
    "attention norm": ("column",),
    "queries": ("column",),
    "keys": ("column",),
    "values": ("column",),
    "rotated queries": ("head", "column"),
    "rotated keys": ("head", "column"),
    "attention weights": ("head", "key"),
    "weighted sum of the values": ("column",),
    "attention output": ("column",),
    "residual after attention": ("column",),
    "FFN norm": ("column",),
    "FFN gate": ("neuron",),
    "FFN up": ("neuron",),
    "hidden neurons": ("neuron",),
    "FFN output": ("column",),
}


@part
class Recorded(Part):
    """A part that records its output, and its input if that has a name."""

    inner: Part
    output: str
    into: dict
    input: str = ""

    def __call__(self, x, *rest):
        if self.input:
            self.into[self.input] = x
        y = self.into[self.output] = self.inner(x, *rest)
        return y


@part
class RecordedAttend(Part):
    """Records what attention compares, and its weights: with an identity matrix instead of the
    values, the weighted sum of the values is the weights themselves."""

    inner: Part
    into: dict

    def __call__(self, q, k, v, layer):
        self.into["rotated queries"] = by_token(q)
        self.into["rotated keys"] = by_token(k)
        identity = np.eye(k.shape[-2], dtype=q.dtype)[None]  # (1, S, S): the same for all heads
        self.into["attention weights"] = by_token(self.inner(q, k, identity, layer))  # (T, H, S)
        return self.inner(q, k, v, layer)


def by_token(x):
    """(heads, T, ...) -> (T, heads, ...)"""
    return x.swapaxes(0, 1)


def inside(model: Transformer, block: int, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The values after each step (T, ...) in this block, in one pass over ids (T,); only those that
    the block has."""
    into: dict[str, np.ndarray] = {}
    blocks = list(model.stack.blocks)
    blocks[block] = rebuild(blocks[block], lambda node: recorded(node, into))
    stack = replace(model.stack, blocks=tuple(blocks))
    replace(model, stack=stack).hidden(ids)
    return into


def recorded(node: Part, into: dict) -> Part | None:
    """A copy of a block, with everything inside it recorded; None for other parts."""
    if type(node) not in (Block, ParallelBlock):
        return None
    attn = rebuild(node.attn, lambda inner: recorded_attention(inner, into))
    ffn = rebuild(node.ffn, lambda inner: recorded_ffn(inner, into))
    return replace(
        node,
        attn=Recorded(attn, "attention output", into),
        ffn=Recorded(ffn, "FFN output", into, input="residual after attention"),
    )


def recorded_attention(node: Part, into: dict) -> Part | None:
    if type(node) is not Attention:
        return None
    q, k, v = node.qkv.q, node.qkv.k, node.qkv.v
    return replace(
        node,
        norm=Recorded(node.norm, "attention norm", into),
        qkv=replace(
            node.qkv,
            q=Recorded(q, "queries", into),
            k=Recorded(k, "keys", into),
            v=Recorded(v, "values", into),
        ),
        attend=RecordedAttend(node.attend, into),
        out=Recorded(node.out, "product with W_o", into, input="weighted sum of the values"),
    )


def recorded_ffn(node: Part, into: dict) -> Part | None:
    if type(node) is not FFN:
        return None
    expand = node.expand
    if type(expand) in (SwiGLU, Activated):
        expand = replace(expand, up=Recorded(expand.up, "FFN up", into))
    if type(expand) is SwiGLU:
        expand = replace(expand, gate=Recorded(expand.gate, "FFN gate", into))
    return replace(
        node,
        norm=Recorded(node.norm, "FFN norm", into),
        expand=Recorded(expand, "hidden neurons", into),
    )
