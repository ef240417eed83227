"""Norms without weights: gains and biases go into the matrices that follow (FlashNorm)."""

from dataclasses import replace

import numpy as np

from minitx import ops
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attention,
    Head,
    LayerNorm,
    Linear,
    RMSNorm,
    SwiGLU,
    Transformer,
)
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None)
def fold_norms(lm):
    """Multiply every norm's gain into the matrices that read its output.

    Paper: Nils Graef, Andrew Wasielewski and Matthew Clapp, 2024, "FlashNorm: fast normalization
        for LLMs", arXiv 2407.09577, the part on weightless norms.
    Kind: exact in real arithmetic; float32 rounds differently.
    Skips or precomputes: the gain g of every norm, and the bias b of a LayerNorm.
    Offline: for each matrix W (in, out) with bias c that reads the norm's output, c* = c + b W with
        the W of before, then W* = diag(g) W. Done in float64 and rounded once.
    Online: z = (a / rms(a)) W* + c* in the place of z = (a / rms(a) g) W + c. For a LayerNorm,
        a - mean(a) stands for a and its standard deviation for rms(a).
    Saves: D weights a norm (2 D a LayerNorm, which may give its matrices biases), and D
        multiplications a norm and token; no multiply-add of a product, which is all that the ledger
        counts. What the paper measures on GPUs comes from one fused kernel and from dividing after
        the product, so that norm and product run side by side: NumPy does one thing at a time, so
        that is left out here.
    Neutral: nothing to set.
    Not for: the last norm of a model whose head is the embedding table (tied): the gain would go
        into the embedding too, so that norm stays as it is.
    """
    lm = swap(lm, Attention, lambda attn: fold(attn, "qkv", QKV))
    lm = swap(lm, FFN, lambda ffn: fold(ffn, "expand", SwiGLU, Activated))
    return swap(lm, Transformer, lambda model: fold(model, "head", Head, optional=True))


def fold(node: Part, reader: str, *kinds: type, optional: bool = False) -> Part:
    """``node`` with the weights of its ``norm`` folded into the part that reads the norm."""
    norm, inner = node.norm, getattr(node, reader)
    if optional and type(inner) not in kinds:
        return node  # a tied head
    need(inner, *kinds)
    need(norm, RMSNorm, LayerNorm)
    gain = norm.gain.astype(np.float64)
    if type(norm) is RMSNorm:
        bare, bias = BareRMSNorm(norm.eps), None
    else:
        bare, bias = BareLayerNorm(norm.eps), norm.bias.astype(np.float64)
    return replace(node, norm=bare, **{reader: folded(inner, gain, bias)})


def folded(reader: Part, gain, bias) -> Part:
    """The linear maps of ``reader`` (itself, or its children) with gain and bias (in,) in them."""
    if type(reader) in (Linear, Head):
        w = reader.w.astype(np.float64)
        b = reader.b
        if bias is not None:
            b = (bias @ w + (0 if b is None else b)).astype(reader.w.dtype)
        return replace(reader, w=(gain[:, None] * w).astype(reader.w.dtype), b=b)
    maps = {name: child for name, child in vars(reader).items() if isinstance(child, Part)}
    for child in maps.values():
        need(child, Linear)  # whatever else reads the norm would miss its gain
    return replace(reader, **{name: folded(child, gain, bias) for name, child in maps.items()})


@part
class BareRMSNorm(Part):
    """x / rms(x)"""

    eps: float

    def __call__(self, x):
        return ops.rms_norm(x, 1, self.eps)


@part
class BareLayerNorm(Part):
    """(x - mean(x)) / std(x)"""

    eps: float

    def __call__(self, x):
        return ops.layer_norm(x, 1, 0, self.eps)
