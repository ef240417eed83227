"""One matrix product instead of several with the same input.

The card, the two parts that run (online), the concatenation (offline), notes.
"""

from dataclasses import replace

from minitx import ops
from minitx.model import QKV, Attend, Attention, Linear, SwiGLU
from minitx.shared.linears import side_by_side
from minitx.technique import need, swap, technique
from minitx.tree import Part, part


@technique(level="weights", exact=True, neutral=None, after=("fold_norms",))
def fuse_projections(lm):
    """Fuse W_q, W_k, W_v into one matrix, and W_gate, W_up into another.

    Paper:     none; standard practice (llama.cpp and vLLM, for instance). That 1/sqrt(d) can go
               into W_q is plain algebra.
    Fidelity:  our own formulation.
    Kind:      exact in real arithmetic; float32 rounds differently (measured: logits differ by
               8e-7 of the largest one), since 1/sqrt(d) is multiplied in earlier, and BLAS may sum
               a wider product in another order. On the shipped models it saves calls (time), and
               no work that is counted.
    Idea:      Matrices that read the same input can stand side by side: one call, one pass
               over the input, and the result is split by columns.
    Offline:   W_qkv = [W_q / sqrt(d), W_k, W_v]    (D, (H + 2 K) d)     biases alike
               W_gu  = [W_gate, W_up]               (D, 2 F)
               for width D, H query heads and K key/value heads of width d, F hidden neurons.
               RoPE is linear, so 1/sqrt(d) may come before it.
    Online:    q, k, v  = split(x W_qkv);   attention weights softmax(q k^T), without a scale
               gate, up = split(x W_gu)
    Saves:     3 of the 7 matrix-product calls in a llama block; the multiply-adds and weights
               stay. No score is multiplied by 1/sqrt(d): H T S multiplications less for T new
               tokens and S cached ones.
    In NumPy:  faster where a call costs more than its product: one row, a narrow model. Decoding
               1.1x on stories; on stories-parallel, where only q, k, v are fused, 0.9x to 1.0x;
               prompts 1.0x.
    Not for:   projections that another technique has replaced. An FFN without a gate stays.
    Proof:     tests/precompute/test_fuse_projections.py; literal version:
               tests/precompute/literal_fuse_projections.py
    Tutorial:  tutorials/03_before_the_first_token.py
    """
    lm = swap(lm, Attention, fuse_attention)
    return swap(lm, SwiGLU, fuse_swiglu, optional=True)


# Online ------------------------------------------------------------------------------------------


@part
class FusedQKV(Part):
    """Queries, keys and values from one product, split by columns. Some techniques compute the
    queries at another time than the keys and values: ``q`` and ``kv``."""

    all: Part
    q_width: int  # H * d
    k_width: int  # K * d

    def __call__(self, x):
        y = self.all(x)  # (..., T, H*d + 2*K*d)
        end = self.q_width + self.k_width
        return y[..., : self.q_width], y[..., self.q_width : end], y[..., end:]

    def q(self, x):
        """Queries only, from their columns."""
        return self.all.outputs(x, slice(self.q_width))  # (..., T, H*d)

    def kv(self, x):
        """Keys and values only, from their columns."""
        y = self.all.outputs(x, slice(self.q_width, None))  # (..., T, 2*K*d)
        return y[..., : self.k_width], y[..., self.k_width :]


@part
class FusedSwiGLU(Part):
    """Gate and up from one product, split by columns."""

    both: Part
    width: int  # F

    def __call__(self, x):
        y = self.both(x)  # (..., T, 2*F)
        return ops.swiglu(y[..., : self.width], y[..., self.width :])  # (..., T, F)


# Offline -----------------------------------------------------------------------------------------


def fuse_attention(attn: Attention) -> Attention:
    need(attn.qkv, QKV)
    need(attn.attend, Attend)
    q, k, v = attn.qkv.q, attn.qkv.k, attn.qkv.v
    for linear in (q, k, v):
        need(linear, Linear)
    scale = attn.attend.scale  # 1 / sqrt(d)
    q = Linear(q.w * scale, None if q.b is None else q.b * scale)
    fused = FusedQKV(side_by_side(q, k, v), q.w.shape[1], k.w.shape[1])
    return replace(attn, qkv=fused, attend=Attend(1.0))


def fuse_swiglu(inner: SwiGLU) -> FusedSwiGLU:
    for linear in (inner.gate, inner.up):
        need(linear, Linear)
    return FusedSwiGLU(side_by_side(inner.gate, inner.up), inner.gate.w.shape[1])


# Notes:
#
# - Scaling the queries rounds nothing if sqrt(d) is a power of two (d = 16, 64, 256).
# - Speed: minitx compare -m stories --fuse-projections; one BLAS thread.
