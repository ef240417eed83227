"""Skip norms: a constant, measured on calibration text, replaces 1 / rms(x).

The card and options, the one part that runs (online), measuring, ranking and folding (offline),
notes.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import (
    FFN,
    QKV,
    Activated,
    Attention,
    Head,
    LayerNorm,
    NoNorm,
    RMSNorm,
    SwiGLU,
    Transformer,
)
from minitx.progress import bar
from minitx.shared.folding import fold_into
from minitx.shared.least_loss import mean_loss
from minitx.technique import SEEDS, at_least, blocks_of, need, technique, wrap
from minitx.tree import Part, part


@technique(
    level="pruning",
    exact=False,
    neutral={"count": 0},
    after=(
        *("prune", "prune_structure", "head_prune", "layer_merge", "layer_fusion", "vocab_prune"),
    ),
    demo={"count": 2, "stories": 1},
)
def norm_skip(
    lm,
    *,
    count: Annotated[
        int | None,
        "how many norms are skipped; default: an eighth of those in where, at least 1",
        at_least(0),
    ] = None,
    where: Annotated[
        Literal["attn", "ffn", "final", "all"],
        "which norms may be skipped: before attention, before the FFN, before the head, or all",
    ] = "all",
    choose: Annotated[
        Literal["loss", "random"], "the one without which the loss is lowest, or a random baseline"
    ] = "loss",
    stories: Annotated[
        int, "calibration stories (with calibrate: passages of the text)", at_least(1, limit=1000)
    ] = 2,
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Skip norms: replace the per-token 1/rms with a constant, folded into the next matrix.

    Paper:     Baroni et al., "Transformers Don't Need LayerNorm at Inference Time: Scaling
               LayerNorm Removal to GPT-2 XL and the Implications for Mechanistic
               Interpretability", 2025, arXiv 2507.02559. Before it: Heimersheim, "You Can Remove
               GPT2's LayerNorm by Fine-Tuning", 2024, arXiv 2409.13710.
    Fidelity:  a reconstruction from the abstract and the authors' code for the constants. They
               fine-tune while norms are removed; here nothing is trained. The greedy choice,
               RMSNorm and the folding are ours.
    Kind:      approximate. No setting pays on the shipped models: norms take no multiply-adds of
               a matrix, so nearly nothing is saved; what it costs in loss is the point.
    Idea:      A norm divides each token x by its own rms. Where all tokens have about the same rms,
               a constant does as well, and a constant is part of the next matrix.
    Offline:   repeat count times:
                 c_i  = 1 / mean rms(x) over the calibration tokens, for each norm i that is left
                 skip the norm i for which the loss with c_i is lowest
               W* = diag(c g) W,  c* = c + b W     for each matrix W that reads a norm with gain g
               LayerNorm, with bias b: rms(x - mean(x)) instead of rms(x). Subtracting the mean is
               linear, so it is folded too, exactly: subtract from each column of W* its mean.
    Online:    z = x W* + c*    instead of    z = (x / rms(x) * g + b) W + c
               A final norm before a tied head keeps  x * (c g): that matrix is the embedding too.
    Saves:     the whole norm: about 2 D multiply-adds per token (squares, scale; a LayerNorm about
               twice that), beside 2 D F and more in the FFN alone, and D weights (2 D). No matrix
               gets smaller.
    In NumPy:  a little faster, since each norm is a few calls: decoding 1.1x on stories-relu with 4
               of its 9 norms skipped.
    Not for:   norms whose inputs have rms of very different size (attention in stories). Text of
               another kind than the calibration text. Skipless models, which have no norms;
               fold_norms.
    Proof:     tests/precompute/test_norm_skip.py; literal version:
               tests/precompute/literal_norm_skip.py
    """
    units = units_of(lm, where)
    count = max(1, len(units) // 8) if count is None else count
    if count > len(units):
        raise MinitxError(
            f"norm_skip: count is {count}; expected at most {len(units)}, the norms that "
            f"where={where} allows."
        )
    if not count:
        return lm
    texts = calibration_ids("norm_skip", lm, stories)
    drawn = np.random.default_rng(seed).permutation(len(units))[:count]
    plan = [units[i] for i in drawn] if choose == "random" else [None] * count
    for n, unit in enumerate(plan):
        constants = measure(lm, units, texts)
        if unit is None:
            shown = bar(units, f"norm skip: {n + 1} of {count}", unit="candidate", delay=1.0)
            losses = [loss(skip_norm(lm, u, constants[u]), texts) for u in shown]
            unit = units[lowest(losses)]
        lm = skip_norm(lm, unit, constants[unit])
        units.remove(unit)
    return lm


# Online ------------------------------------------------------------------------------------------


@part
class FixedScale(Part):
    """A norm before a tied head, with a constant for 1/rms."""

    gain: np.ndarray  # (D,) the norm's gain times the constant
    bias: np.ndarray | None  # (D,) a LayerNorm's
    centered: bool  # a LayerNorm subtracts the mean of x

    def __call__(self, x):
        x = x - x.mean(-1, keepdims=True) if self.centered else x
        return x * self.gain if self.bias is None else x * self.gain + self.bias


# Offline -----------------------------------------------------------------------------------------


class Unit(NamedTuple):
    """One norm: that before the attention or FFN of a block, or the final one."""

    slot: str  # "attn", "ffn" or "final"
    index: int


def units_of(lm, where: str) -> list[Unit]:
    slots = ("attn", "ffn") if where == "all" else (where,)
    found = [Unit(s, i) for i in range(len(blocks_of(lm))) for s in slots if s != "final"]
    return found + [Unit("final", 0)] * (where in ("all", "final"))


def skip_norm(lm, unit: Unit, constant: float):
    """The model without this norm, whose 1/rms is the constant."""
    if unit.slot == "final":
        return replace(lm, model=without_norm(lm.model, constant))

    def change(node: Part, index: int) -> Part:
        return without_norm(node, constant) if index == unit.index else node

    return wrap(lm, unit.slot, change)


READERS = {Attention: ("qkv", QKV), FFN: ("expand", SwiGLU, Activated), Transformer: ("head", Head)}


def without_norm(node: Part, constant: float) -> Part:
    """The node with NoNorm, and its norm's scale in the matrices that read it."""
    need(node, *READERS)
    norm, (field, *kinds) = node.norm, READERS[type(node)]
    need(norm, RMSNorm, LayerNorm)
    centered = type(norm) is LayerNorm
    gain = norm.gain.astype(np.float64) * constant
    bias = norm.bias.astype(np.float64) if centered else None
    reader = getattr(node, field)
    if type(node) is Transformer and type(reader) is not Head:  # a tied head
        dtype = norm.gain.dtype
        bias = None if bias is None else bias.astype(dtype)
        return replace(node, norm=FixedScale(gain.astype(dtype), bias, centered))
    need(reader, *kinds)
    return replace(node, norm=NoNorm(), **{field: fold_into(reader, gain, bias, centered)})


# Offline: measuring ------------------------------------------------------------------------------


def measure(lm, units: Sequence[Unit], texts) -> dict[Unit, float]:
    """The constant of each norm: 1 / the mean rms of its inputs, over all tokens of the texts."""
    found: dict[Unit, list] = {unit: [] for unit in units}

    def watched(node: Part, unit: Unit) -> Part:
        if unit not in found:
            return node
        need(node, *READERS)
        need(node.norm, RMSNorm, LayerNorm)
        return replace(node, norm=Watched(node.norm, found[unit]))

    for slot in {unit.slot for unit in units} - {"final"}:
        lm = wrap(lm, slot, lambda node, index, slot=slot: watched(node, Unit(slot, index)))
    model = watched(lm.model, Unit("final", 0))
    for ids in bar(texts, "norm skip: measure", unit="text", delay=1.0):
        with np.errstate(over="ignore", invalid="ignore"):  # where norms are gone already
            model.norm(model.hidden(ids))
    return {unit: float(1 / np.concatenate(pieces).mean()) for unit, pieces in found.items()}


@part
class Watched(Part):
    """Runs a norm and records the rms of each token (of x - mean(x), for a LayerNorm)."""

    inner: Part
    found: list

    def __call__(self, x):
        y = x.astype(np.float64)
        y = y - y.mean(-1, keepdims=True) if type(self.inner) is LayerNorm else y
        self.found.append(np.sqrt((y * y).mean(-1) + self.inner.eps).reshape(-1))
        return self.inner(x)


def lowest(losses) -> int:
    """The index of the lowest loss; ties go to the earlier one. NaN, where a model overflows, ranks
    last."""
    return int(np.argmin(np.nan_to_num(losses, nan=np.inf)))


def loss(lm, texts) -> float:
    """The mean negative log-likelihood of the texts' tokens, in nats; a model without norms may
    overflow."""
    with np.errstate(over="ignore", invalid="ignore"):
        return mean_loss(lm, texts)


# Notes:
#
# - Loss above dense in nats per token, and % of answers right by hops (the facts they combine):
#   minitx sweep norm-skip count=2,4,6 choose=loss,random -m stories-relu --stories 60, and with
#   count=2,4 on stories. stories-relu answers few questions at all.
#
#       model          count    choose    loss       1 / 2 / 3 hops
#       stories         0 of 17            0.0000    99 / 93 / 100
#                       2       loss      +0.0022    99 / 93 /  97
#                       2       random    +0.2232    74 / 65 /  53
#                       4       loss      +0.0350    99 / 91 /  97
#                       4       random    +0.1995    72 / 67 /  53
#       stories-relu    0 of 9             0.0000    54 / 62 /  28
#                       2       loss      +0.0021    52 / 65 /  39
#                       2       random    +0.0113    36 / 55 /  39
#                       4       loss      +0.0053    54 / 65 /  39
#                       4       random    +0.0769    36 / 58 /  31
#                       6       loss      +0.1412    52 / 62 /  28
#
# - What is selected: norms before an FFN, nearly always. Attention depends more on the scale of its
#   input: queries and keys are both made of it, so a score grows with its square.
# - The choice is greedy because norms depend on each other. Ranked one at a time, the best four of
#   stories cost +5.7 nats together: its rms grows with depth for a few tokens (standard deviation
#   above the mean from layer 4 on), and where several norms are gone, nothing brings them down. All
#   17 at once give NaN. The papers fine-tune after each removal, and report +0.03 nats without any
#   norm for GPT-2 XL (abstract).
# - The authors measure one constant for the first token of a text and one for the others, because
#   GPT-2's first token is far larger. Here one serves all: then it can be folded.
# - Decoding, CPU time per token, one BLAS thread, a busy machine: stories-relu 418 us, with 4 norms
#   skipped 368, with all 9 311; stories-parallel 717, with 4 676, with 9 618; stories 775, with 3
#   803 (noise).
