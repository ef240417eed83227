"""CATS: neurons of a SwiGLU FFN whose gate is small are skipped in the two other matrices.

The card and options, the FFN that runs (online), the thresholds (offline), notes.

Letters: D width, F hidden neurons, n of them active.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import FFN, Activated, Linear, SwiGLU
from minitx.shared.activation_threshold import AboveThreshold, AsManyAtRandom, Magnitudes
from minitx.shared.gathered_rows import PROMPTS, NeuronRows, at_rows, token_by_token, union_of
from minitx.shared.observed_inputs import Rows, watch_inputs
from minitx.shared.quality_monitor import LIMIT, MONITOR, monitored
from minitx.state import Layer
from minitx.technique import SEEDS, above, at_least, blocks_of, need, swap, technique
from minitx.tree import Part, part, walk


@technique(
    level="matrices",
    exact=False,
    neutral={"sparsity": 0.0},
    after=(
        *("low_rank", "lut_bit_serial", "lut_centroid", "lut_product", "order_products"),
        *("pack_zeros", "perforate", "quantize", "separate_magnitudes", "separate_signs"),
    ),
    demo={"sparsity": 0.5, "stories": 1},
    event=("neurons active", "neurons"),
    presets={"aggressive": {"sparsity": 0.9}},
)
def cats(
    lm,
    *,
    sparsity: Annotated[
        float, "share of the neurons to skip, on the calibration text", at_least(0, below=1)
    ] = 0.5,
    choose: Annotated[
        Literal["gate", "random"],
        "which neurons are active: those with the largest gates, or, as a baseline, as many at "
        "random",
    ] = "gate",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 8,
    prompts: Annotated[Literal["union", "skip"], PROMPTS] = "union",
    monitor: Annotated[int, MONITOR, at_least(0)] = 0,
    limit: Annotated[float, LIMIT, above(0)] = 0.3,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Skip neurons of a SwiGLU FFN whose gate is below a threshold.

    Paper:     Lee et al., "CATS: Contextually-Aware Thresholding for Sparsity in Large Language
               Models", 2024, arXiv 2404.08763.
    Fidelity:  the authors' code for the rule and the threshold. Exact quantiles instead of a
               histogram; nothing is fine-tuned afterwards.
    Kind:      approximate; exact at sparsity=0.
    Idea:      A hidden neuron is silu(gate) * up. Where |silu(gate)| is small, the neuron is nearly
               0 unless up is huge. So compute all gates, and up and down only for the others.
    Offline:   t = the ``sparsity`` quantile of |silu(x W_gate)|, one per layer, over calibration
               tokens. W_up is stored transposed: one neuron per row, as in W_down.
    Online:    g    = silu(x W_gate)                                all F neurons
               rows = the active neurons: |g| > t
               y    = (g[rows] * (x W_up[:, rows])) W_down[rows]    only these rows are read
    Saves:     2 D (F - n) multiply-adds of 3 D F per token, for n active neurons; F comparisons are
               added. Tokens that run at once (a prompt) use the union of their neurons (prompts).
    In NumPy:  slower than dense on stories at every sparsity below 95 %, since its FFN is small. An
               FFN with D = 576 and F = 1,536 is as fast as dense at 75 %, 1.6x as fast at 90 %.
    Not for:   FFNs without a gate: after ReLU, zeros are skipped exactly (zero_skip), and GELU or
               SiLU alone need x W_up to know what is small. Matrices in another format (quantize).
    Proof:     tests/skip/test_cats.py; literal version: tests/skip/literal_cats.py
    Tutorial:  tutorials/15_zeros_and_negatives.py
    """
    ffns = gated_ffns(lm)
    if sparsity == 0:
        return lm
    texts = calibration_ids("cats", lm, stories)
    thresholds = gate_thresholds(lm, texts, sparsity)

    def change(ffn: FFN) -> Part:
        t = thresholds[id(ffn.expand)]
        select: Part = AboveThreshold(t)
        if choose == "random":
            select = AsManyAtRandom.of(t, ffn.expand.gate.w.shape[1], (seed, ffns.index(ffn)))
        return monitored(ffn, [KINDS[prompts].of(ffn, select)], monitor, limit)

    return swap(lm, FFN, change)


# Online ------------------------------------------------------------------------------------------


@part
class ThresholdedFFN(Part):
    """A SwiGLU FFN that computes all gates, and the rest for the active neurons."""

    needs_inner_first = True  # the thresholds are of these weights

    norm: Part
    gate: Part
    select: Part
    up: NeuronRows  # W_up^T (F, D)
    down: NeuronRows  # W_down (F, D)

    @classmethod
    def of(cls, ffn: FFN, select: Part) -> "ThresholdedFFN":
        up, down = ffn.expand.up, ffn.down
        rows = NeuronRows(np.ascontiguousarray(up.w.T), up.b), NeuronRows(down.w, down.b)
        return cls(ffn.norm, ffn.expand.gate, select, *rows)

    def __call__(self, x, layer: Layer):
        return self.run(self.norm(x))

    def run(self, x):
        """x (..., D) -> (..., D), over the neurons that at least one of these tokens needs."""
        g = ops.silu(self.gate(x))  # (..., F)
        active = self.select(g)
        ledger.event("neurons active", active)
        ledger.event("neurons", active.size)
        rows = union_of(active)
        h = at_rows(g, active, rows) * self.up.dot(x, rows)  # (..., n)
        return self.down.sum(h, rows)


@part
class EachTokenFFN(ThresholdedFFN):
    """The same, for one token after another."""

    def __call__(self, x, layer: Layer):
        return token_by_token(self.run, self.norm(x))


KINDS = {"union": ThresholdedFFN, "skip": EachTokenFFN}


# Offline -----------------------------------------------------------------------------------------


def gate_thresholds(lm, texts, sparsity: float) -> dict[int, float]:
    """The threshold of each FFN, by the id of its SwiGLU part."""
    inputs = watch_inputs(lm, SwiGLU, texts, Rows, "cats: calibrate")
    found = {}
    for node in {id(node): node for _, node in walk(lm.model) if type(node) is SwiGLU}.values():
        with np.errstate(over="ignore"):  # silu far below 0
            gates = ops.silu(node.gate(inputs[id(node)].all))
        found[id(node)] = Magnitudes(gates).threshold(sparsity)
    return found


def gated_ffns(lm) -> list[FFN]:
    """The FFNs of the model, all of which must have a gate and plain matrices."""
    blocks_of(lm)  # or NoSuchPart
    ffns = [node for _, node in walk(lm.model) if type(node) is FFN]
    for ffn in ffns:
        if type(ffn.expand) is Activated:
            raise MinitxError(
                "cats thresholds the gates of SwiGLU and this model's feed-forward networks have "
                "none; use a llama-like model, or teal (zero_skip for ReLU)."
            )
        need(ffn.expand, SwiGLU)
        for linear in (ffn.expand.gate, ffn.expand.up, ffn.down):
            need(linear, Linear)
    return ffns


# Notes:
#
# - Figures on stories (minitx sweep cats sparsity=0.5,0.8,0.9,0.95 --stories 60, and with
#   sparsity=0.2,0.5 choose=random; one BLAS thread, a busy machine). Loss: above dense, in nats per
#   token. Hops: % of answers that are right, by the facts that they combine. Counts include the
#   prompt of 32 tokens, which needs nearly all neurons up to sparsity=0.8.
#
#       sparsity  choose   multiply-adds  loss      1 / 2 / 3 hops   speed
#       dense                  1.000x     0.0000    99 / 93 / 100    1.0x
#       0.5       gate         0.874x    +0.0015    99 / 93 / 100    0.7x
#       0.8       gate         0.794x    +0.0056    99 / 91 / 100    0.8x
#       0.9       gate         0.751x    +0.0094    99 / 91 / 100    0.8x
#       0.95      gate         0.701x    +0.0348    98 / 91 /  94    0.9x
#       0.2       random       0.950x    +0.3861    93 / 89 /  89    0.6x
#       0.5       random       0.868x    +1.9129    54 / 51 /  53    0.7x
#
# - SmolLM2-135M-Instruct (not shipped) is less sparse: at 0.5, calibrated on other text, it loses
#   0.08 nats per token on a short English text (2.99 dense) and executes 0.88x of its
#   multiply-adds.
# - The FFN alone, one token, its time relative to dense at the sparsities 0.5 / 0.75 / 0.9 / 0.95
#   (best of 25): D = 128, F = 352: 2.2 / 2.2 / 1.4 / 1.0; D = 576, F = 1,536: 1.6 / 1.0 / 0.6 /
#   0.5.
# - Thresholding |g * up| would be more accurate and save nothing in W_up: it has to be known first.
# - The monitor compares the FFN's own output, whose relative error is large long before the loss
#   moves: at sparsity=0.9 with limit=0.3, 40 % of the checks send an FFN back to exact.
# - Random neurons are drawn so that tokens differ, as many as the gates of the token would select.
