"""FlashNorm's weightless norms: gains and biases move into the matrices that read the norm.

The card, the two norms that run (online), the folding (offline), notes.
"""

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
    RMSNorm,
    SwiGLU,
    Transformer,
)
from minitx.shared.folding import fold_into
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None)
def fold_norms(lm):
    """Fold each norm's gain and bias into the next projection.

    Paper:     Graef, Wasielewski and Clapp, "FlashNorm: fast normalization for LLMs", 2024,
               arXiv 2407.09577; of it, the weightless norms (Notes: what is left out).
    Fidelity:  the paper's text.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               1e-6 of the largest one).
    Idea:      A gain scales the columns of the norm's output. Scaling the rows of the next matrix
               does the same, once and for all tokens.
    Offline:   for each matrix W (in, out) with bias c that reads a norm  n(x) * g + b
               with gain g and bias b:
                   c* = c + b W
                   W* = diag(g) W
    Online:    z = n(x) W* + c*    instead of    z = (n(x) * g + b) W + c
               n(x) = x / rms(x),  rms(x) = sqrt(mean(x^2) + eps);  a LayerNorm does the same
               with x - mean(x) instead of x
    Saves:     D weights per RMSNorm (D: its width) and D multiplications per norm and token;
               another D weights and D additions per LayerNorm. No matrix product gets smaller.
    In NumPy:  about as fast as before: 1.0x to 1.1x decoding on the shipped models.
    Not for:   the last norm before a tied head. That head's matrix is the embedding; folding the
               gain into it would change the embedding, so this norm keeps its gain.
    Proof:     tests/precompute/test_fold_norms.py; literal version:
               tests/precompute/literal_fold_norms.py
    Tutorial:  tutorials/03_before_the_first_token.py
    """
    lm = swap(lm, Attention, lambda attn: fold(attn, "qkv", QKV))
    lm = swap(lm, FFN, lambda ffn: fold(ffn, "expand", SwiGLU, Activated))
    return swap(lm, Transformer, lambda model: fold(model, "head", Head, optional=True))


# Online ------------------------------------------------------------------------------------------


@part
class WeightlessRMSNorm(Part):
    """x / sqrt(mean(x^2) + eps)"""

    eps: float

    def __call__(self, x):
        return ops.rms_norm(x, 1, self.eps)


@part
class WeightlessLayerNorm(Part):
    """y / sqrt(mean(y^2) + eps) with y = x - mean(x)"""

    eps: float

    def __call__(self, x):
        return ops.layer_norm(x, 1, 0, self.eps)


# Offline -----------------------------------------------------------------------------------------


def fold(node: Part, field: str, *kinds: type, optional: bool = False) -> Part:
    """The node with its ``norm`` folded into the part that reads it, which is in this field and has
    one of these types."""
    norm, reader = node.norm, getattr(node, field)
    if optional and type(reader) not in kinds:
        return node  # a tied head
    need(reader, *kinds)
    need(norm, RMSNorm, LayerNorm)
    gain = norm.gain.astype(np.float64)
    if type(norm) is RMSNorm:
        weightless, bias = WeightlessRMSNorm(norm.eps), None
    else:
        weightless, bias = WeightlessLayerNorm(norm.eps), norm.bias.astype(np.float64)
    return replace(node, norm=weightless, **{field: fold_into(reader, gain, bias)})


# Notes:
#
# - Arithmetic is float64, rounded once. A LayerNorm's bias may give a matrix a bias that had none.
# - Left out of the paper: dividing by rms(x) after the product instead of before it, so that norm
#   and product run in parallel. That, in a fused kernel, is what the paper measures on GPUs; NumPy
#   does one thing at a time. Also left out: two RMSNorms in a row, of which the second changes
#   nothing (no model here has them), and 1 / rms(x) merged into the rotary tables. What these would
#   save: minitx cost fold-norms --config weights/stories/config.json
# - Speed: minitx compare -m stories --fold-norms, and with stories-relu; one BLAS thread.
