"""Matrices that read the same input become one, and the attention's scale goes into the queries."""

from dataclasses import replace

import numpy as np

from minitx import ops
from minitx.model import QKV, Attend, Attention, Linear, SwiGLU
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None)
def fuse_projections(lm):
    """Queries, keys and values come from one product, gate and up from another.

    Paper: no single one; it is standard practice, which llama.cpp and vLLM for instance follow.
        That 1/sqrt(d) can go into W_q is plain algebra.
    Kind: exact in real arithmetic; BLAS may sum a wider product in another order.
    Skips or precomputes: two of three calls of the product (one of two in a SwiGLU) with all that a
        call costs, and H T S multiplications of the scores by 1/sqrt(d).
    Offline: W_qkv = [W_q / sqrt(d), W_k, W_v] (D, H d + 2 K d), W_gu = [W_gate, W_up] (D, 2 F);
        biases alike. Rotary positions turn q without changing its length, so the scale may go
        before them.
    Online: q, k, v = split(x W_qkv);  gate, up = split(x W_gu);  softmax(q k^T) v.
    Saves: no multiply-add and no byte; 3 of 7 products of a llama layer, which counts where a
        product is short: one row, a narrow model.
    Neutral: nothing to set.
    Not for: an FFN without a gate has nothing to fuse there, and keeps its one product.
    """
    lm = swap(lm, Attention, fused_attention)
    return swap(lm, SwiGLU, FusedSwiGLU.of, optional=True)


def fused_attention(attn: Attention) -> Attention:
    need(attn.qkv, QKV)
    need(attn.attend, Attend)
    q, k, v = attn.qkv.q, attn.qkv.k, attn.qkv.v
    q = Linear(*(None if a is None else a * attn.attend.scale for a in (q.w, q.b)))
    fused = FusedQKV(side_by_side(q, k, v), q.w.shape[1], k.w.shape[1])
    return replace(attn, qkv=fused, attend=Attend(1.0))


def side_by_side(*maps: Linear) -> Linear:
    """One linear map with the outputs of all, one after another."""
    biases = [np.zeros_like(m.w[0]) if m.b is None else m.b for m in maps]
    without = all(m.b is None for m in maps)
    w = np.concatenate([m.w for m in maps], axis=1)
    return Linear(w, None if without else np.concatenate(biases))


@part
class FusedQKV(Part):
    """Queries, keys and values in one product, split by columns."""

    all: Part
    q_width: int  # H * d
    k_width: int  # K * d

    def __call__(self, x):
        y = self.all(x)  # (..., T, H*d + 2*K*d)
        end = self.q_width + self.k_width
        return y[..., : self.q_width], y[..., self.q_width : end], y[..., end:]

    def q(self, x):
        """Queries alone, from their columns."""
        return self.all.outputs(x, slice(self.q_width))  # (..., T, H*d)

    def kv(self, x):
        """Keys and values alone, from their columns."""
        y = self.all.outputs(x, slice(self.q_width, None))  # (..., T, 2*K*d)
        return y[..., : self.k_width], y[..., self.k_width :]


@part
class FusedSwiGLU(Part):
    """Gate and up in one product, split by columns."""

    both: Part
    width: int  # F

    @staticmethod
    def of(inner: SwiGLU) -> "FusedSwiGLU":
        return FusedSwiGLU(side_by_side(inner.gate, inner.up), inner.gate.w.shape[1])

    def __call__(self, x):
        y = self.both(x)  # (..., 2*F)
        return ops.swiglu(y[..., : self.width], y[..., self.width :])  # (..., F)
