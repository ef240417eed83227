"""Zero skipping: after a ReLU, only the rows of W_down whose neurons are not 0 are read.

The card and options, the product that runs (online), notes.
"""

from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.model import FFN, Linear
from minitx.shared.gathered_rows import sum_of_rows, token_by_token
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
               (one BLAS thread): never at 512 x 128 (stories-relu), 80 % of zeros at 2,048 x 512,
               75 % at 4,096 x 1,024. stories-relu generates 0.85x as fast as dense and reads
               prompts 0.5x as fast, which prompts=dense avoids.
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
        down = KINDS[prompts](ffn.down.w, ffn.down.b, min_sparsity)
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

    def __call__(self, h):
        return token_by_token(self.one_token, h)

    def one_token(self, h):
        """h (F,) -> (D,)"""
        nz = np.flatnonzero(h)  # (r,)
        ledger.count(multiply_adds=h.size)  # a comparison for each neuron
        if len(nz) > (1 - self.min_sparsity) * len(h):
            return self.dense(h)
        note(len(nz), h)
        return sum_of_rows(h[..., nz], self.w, nz, self.b)

    def dense(self, h):
        """h (..., F) -> (..., D), reading every row."""
        note(h.size, h)
        return ops.linear(h, self.w, self.b)


@part
class DensePrompts(ZeroSkippingLinear):
    """The same for one token; several at once are multiplied by the whole matrix."""

    def __call__(self, h):
        return super().__call__(h) if h.size == h.shape[-1] else self.dense(h)


KINDS = {"skip": ZeroSkippingLinear, "dense": DensePrompts}


def note(read: int, h) -> None:
    ledger.event("rows of W_down", h.size)
    ledger.event("rows of W_down read", read)


# Notes:
#
# - The rows that each layer reads, and the time of one token's product with W_down:
#       python -m minitx.lab.layer_events zero_skip -m stories-relu
#       python -m minitx.lab.product_times zero_skip 4096 1024
#   On 4 held-out stories, layers 0 to 3 read 29.7, 12.2, 20.9 and 34.7 % of the rows. At 4,096 x
#   1,024 the time relative to dense is 1.8x with 50 % of zeros, 1.1x with 70 %, 0.7x with 80 %,
#   0.4x with 90 % and 0.1x with 99 %; at 512 x 128 it is 2.0x with 50 % and 1.4x with 90 %.
#   Speed of generation and of prompts:
#       minitx compare --zero-skip -m stories-relu --stories 10
#       minitx first-token --zero-skip -m stories-relu --shared 200
# - Rows, never columns: gathering columns of a matrix is some twenty times slower, since each of
#   their numbers is in another cache line.
# - Tokens of a prompt share hardly any zeros: the rows that at least one of them needs are soon all
#   rows. So skipping them together would save nothing, and one by one they read rows several times.
# - negative_skip and negative_predict find zeros before the first matrix has computed them. With
#   both matrices: minitx compare -m stories-relu --zero-skip --negative-predict --stories 4 gives
#   0.46x of the FFNs' multiply-adds and 0.69x of all, at +0.001 nats.
# - Zero *weights* are another matter: pack_zeros.
