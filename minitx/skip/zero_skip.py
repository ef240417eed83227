"""Zero skipping: after a ReLU, only the rows of W_down whose neurons are not 0 are read.

The card and options, the product that runs (online), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.model import FFN, Linear
from minitx.shared.relu_ffn import need_relu
from minitx.technique import at_least, need, swap, technique
from minitx.tree import Part, part


@technique(
    level="ffn",
    exact=True,
    neutral={"min_sparsity": 1.1},
    event=("rows of W_down read", "rows of W_down"),
)
def zero_skip(
    lm,
    *,
    min_sparsity: Annotated[
        float,
        "a token skips rows if at least this share of its neurons is 0, and is multiplied densely "
        "otherwise; above 1: always densely",
        at_least(0),
    ] = 0.0,
    prompts: Annotated[
        Literal["skip", "dense"],
        "when several tokens run at once. skip: skip the zeros of each token; dense: multiply all "
        "of them by the whole matrix, which is faster in NumPy",
    ] = "skip",
):
    """Skip the multiply-adds of neurons that ReLU set to 0: read only the other rows of W_down.

    Paper:     zero skipping, as David Spuler's page on calculation skipping lists it. For the FFNs
               of transformers: Liu et al., "Deja Vu", ICML 2023, which predicts the zeros.
    Fidelity:  common practice: no prediction, a zero is skipped when it is seen.
    Kind:      exact: only products with 0 are left out. The order of the sum may differ.
    Idea:      After a ReLU most neurons of a token are exactly 0 (stories-relu: three of four), and
               a zero times its row of W_down adds nothing.
    Offline:   W_down (F, D) is stored row-major, so that the row of a neuron is contiguous.
    Online:    h  = relu(x W_up + b_up)                      as before
               nz = the neurons with h != 0                  F comparisons
               y  = h[nz] W_down[nz] + b_down                r rows of F
               Each token has its own nz, so several tokens are computed one by one. A token of
               which less than the share min_sparsity is 0 is multiplied densely.
    Saves:     r D + F multiply-adds per token instead of F D (a comparison counted as one), which
               is less once more than F / D neurons are 0. Bytes: r rows of W_down are read, not F.
    In NumPy:  copying rows costs more than BLAS saves until most are 0. Break-even on this machine
               (one BLAS thread): never at 512 x 128 (stories-relu), 85 % of zeros at 2,048 x 512,
               70 % at 4,096 x 1,024. stories-relu decodes 0.8x as fast as dense and reads prompts
               0.5x as fast, which prompts=dense avoids.
    Not for:   SwiGLU and GELU, whose neurons are small but not 0: dropping those is approximate.
               W_down in another format (quantize, low_rank, ...).
    Proof:     tests/skip/test_zero_skip.py; literal version: tests/skip/literal_zero_skip.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    if min_sparsity > 1:
        return lm

    def change(ffn: FFN) -> Part:
        need_relu("zero_skip", ffn)
        need(ffn.down, Linear)
        down = ZeroSkippingLinear(ffn.down.w, ffn.down.b, min_sparsity, prompts)
        return replace(ffn, down=down)

    return swap(lm, FFN, change)


# Online ------------------------------------------------------------------------------------------


@part
class ZeroSkippingLinear(Part):
    """h w + b, h (..., F) -> (..., D), reading only the rows of w whose h is not 0."""

    matrix_layout = "row-major"  # a neuron's row is contiguous
    w: np.ndarray  # (F, D)
    b: np.ndarray | None
    min_sparsity: float
    prompts: str

    def __call__(self, h):
        rows = h.reshape(-1, h.shape[-1])
        if len(rows) == 1:
            y = self.one_token(rows[0])[None]
        elif self.prompts == "skip":
            y = np.empty((len(rows), self.w.shape[1]), h.dtype)
            for t, row in enumerate(rows):
                y[t] = self.one_token(row)
        else:
            y = self.dense(rows)
        return y.reshape(*h.shape[:-1], y.shape[-1])

    def one_token(self, h):
        """h (F,) -> (D,)"""
        nz = np.flatnonzero(h)  # (r,)
        ledger.count(multiply_adds=h.size)  # a comparison for each neuron
        if len(nz) > (1 - self.min_sparsity) * len(h):
            return self.dense(h)
        note(len(nz), h)
        return ops.linear(h[nz], self.w.take(nz, 0), self.b)

    def dense(self, h):
        """h (..., F) -> (..., D), reading every row."""
        note(h.size, h)
        return ops.linear(h, self.w, self.b)


def note(read: int, h) -> None:
    ledger.event("rows of W_down", h.size)
    ledger.event("rows of W_down read", read)


# Notes:
#
# - Zeros and multiply-adds of each layer, and the time of gathered rows against the dense product:
#       python -m minitx.lab.zero_activations stories-relu
#       python -m minitx.lab.zero_activations stories-relu hidden=4096 width=1024
#   On 4 held-out stories:
#
#       layer    zero neurons    multiply-adds of W_down
#       0        70.3 %          0.305x
#       1        87.8 %          0.130x
#       2        79.1 %          0.217x
#       3        65.3 %          0.355x
#
#   Time of one token's product at 4,096 x 1,024, dense 0.30 ms: with 50 % of zeros 0.66 ms, 70 %
#   0.27, 80 % 0.18, 90 % 0.10, 99 % 0.02. At 512 x 128, dense 4.8 us: 50 % 10.0, 90 % 6.6.
# - Rows, never columns: gathering columns of a matrix is some twenty times slower, since each of
#   their numbers is in another cache line.
# - Tokens of a prompt share hardly any zeros: the rows that at least one of them needs are soon all
#   rows. So skipping them together would save nothing, and one by one they read rows several times.
# - negative_skip and negative_predict find zeros before the first matrix has computed them. With
#   both matrices: minitx compare -m stories-relu --zero-skip --negative-predict --stories 4 gives
#   0.46x of the FFNs' multiply-adds and 0.69x of all, at +0.001 nats.
# - Zero *weights* are another matter: pack_zeros.
