"""Weight pruning: the least important weights become zero (magnitude, Wanda, N:M).

The card, the scores and the selection (all offline; online the model is as before), notes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.block_by_block import block_by_block
from minitx.shared.linears import change_linears, linears
from minitx.shared.share import share_of
from minitx.technique import at_least, technique

SPARSITY = 0.2  # the default
HALF = 0.5  # what 2:4 and 4:8 zero


@technique(
    level="pruning",
    exact=False,
    neutral={"sparsity": 0.0},
    presets={"paper": {"sparsity": 0.5}},
)
def prune(
    lm,
    *,
    sparsity: Annotated[
        float | None,
        "share of the weights that become zero; default: 0.2, or half with scope=N:M",
        at_least(0, below=1),
    ] = None,
    method: Annotated[Literal["wanda", "magnitude"], "how a weight is scored"] = "wanda",
    scope: Annotated[
        Literal["output", "matrix", "global", "2:4", "4:8"],
        "weights that are compared: of one output, of one matrix, of all matrices; N:M keeps N of "
        "each M consecutive inputs of an output",
    ] = "output",
    matrices: Annotated[Literal["all", "ffn", "attention"], "which matrices are pruned"] = "all",
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text) for wanda",
        at_least(1, limit=1000),
    ] = 16,
):
    """Zero the least important weights (magnitude, Wanda, or N:M).

    Paper:     wanda: Sun et al., "A Simple and Effective Pruning Approach for Large Language
               Models", 2023, arXiv 2306.11695. magnitude is older than any one paper.
    Fidelity:  the authors' code. Ours: 16 calibration stories where the paper takes 128 texts.
    Kind:      approximate. Alone it saves nothing: a zero is stored and multiplied like any other
               number. With pack_zeros it saves memory (stories: 0.85x).
    Idea:      A weight matters as much as what it adds to the output: its magnitude times that of
               its input. So a small weight on a large input may matter more than a large weight.
    Offline:   of a matrix W (in, out); ||X_i|| is the norm of input i over all calibration tokens:
                 magnitude: score_ij = |W_ij|
                 wanda:     score_ij = |W_ij| ||X_i||
               of the n weights that are compared, int(n sparsity) with the lowest scores become 0.
               Block by block: a block's X comes from the earlier blocks, already pruned.
    Online:    y = x W + b as before, with zeros in W.
    Saves:     in a dense array nothing: a zero is stored and multiplied like any other number.
               pack_zeros stores it in a bit; 2:4 is a pattern that some GPUs skip.
    In NumPy:  as fast as before. For speed see prune_structure, which removes neurons and heads.
    Not for:   wanda with scope=matrix or global: its scores can be compared only within one output.
    Proof:     tests/precompute/test_prune.py; literal version: tests/precompute/literal_prune.py
    Tutorial:  tutorials/09_fewer_weights.py
    """
    if sparsity is None:
        sparsity = HALF if scope in N_OF_M else SPARSITY
    check_scope(sparsity, method, scope)
    wanted = linears(lm.model, matrices)
    if not sparsity:
        return lm
    if scope == "global":
        return prune_globally(lm, wanted, sparsity)
    texts = []
    if method == "wanda":
        texts = calibration_ids("prune", lm, stories, "use method=magnitude")
    select = selector(scope, sparsity)

    def change(block, seen):
        def pruned(linear):
            norms = seen[id(linear)].norms if texts else np.ones(len(linear.w))
            scores = abs(linear.w) * norms[:, None]
            return with_zeros(linear, select(scores))

        return change_linears(block, wanted, pruned)

    return block_by_block(lm, texts, InputNorms, change, label="prune", wanted=wanted)


N_OF_M = {"2:4": (2, 4), "4:8": (4, 8)}


def check_scope(sparsity: float, method: str, scope: str) -> None:
    if scope in N_OF_M and sparsity not in (0, HALF):
        raise MinitxError(
            f"prune: scope={scope} zeroes half of the weights, but sparsity is {sparsity:g}; use "
            "sparsity=0.5 or another scope."
        )
    if method == "wanda" and scope in ("matrix", "global"):
        raise MinitxError(
            f"prune: wanda compares scores within one output, not with scope={scope}; use "
            "scope=output or method=magnitude."
        )


# Scores ------------------------------------------------------------------------------------------


class InputNorms:
    """||X_i||: the norm of each input of a matrix over all rows that it reads."""

    def __init__(self):
        self.squares = 0.0  # (in,)

    def add(self, rows) -> None:
        rows = rows.astype(np.float64)
        self.squares = self.squares + np.einsum("ni,ni->i", rows, rows)

    @property
    def norms(self) -> np.ndarray:
        """(in,)"""
        return np.sqrt(self.squares)


# Selection ---------------------------------------------------------------------------------------
# Masks are True for weights that become 0.


def lowest_mask(scores, count: int, axis: int):
    """Marks the ``count`` lowest scores along the axis; ties go to the lower index."""
    order = np.argsort(scores, axis=axis, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order.take(range(count), axis=axis), True, axis=axis)
    return mask


def selector(scope: str, sparsity: float) -> Callable:
    """A function from the scores (in, out) of one matrix to a mask (in, out), True for
    weights that become 0."""
    if scope == "matrix":
        return lambda s: lowest_mask(s.ravel(), share_of(s.size, sparsity), 0).reshape(s.shape)
    if scope == "output":
        return lambda s: lowest_mask(s, share_of(len(s), sparsity), 0)
    return lambda s: n_of_m_mask(s, *N_OF_M[scope])


def n_of_m_mask(scores, n: int, m: int):
    """Marks all but the n highest scores of each m consecutive inputs: scores (in, out)."""
    inputs, outputs = scores.shape
    if inputs % m:
        raise MinitxError(
            f"prune: scope={n}:{m} needs a multiple of {m} inputs, and a matrix has {inputs}; use "
            "scope=output."
        )
    groups = scores.reshape(inputs // m, m, outputs)
    return lowest_mask(groups, m - n, 1).reshape(scores.shape)


def prune_globally(lm, wanted: dict[int, Linear], sparsity: float):
    """Zero the smallest weights of all matrices, compared with each other."""
    magnitudes = [abs(linear.w).ravel() for linear in wanted.values()]
    sizes = [len(m) for m in magnitudes]
    mask = lowest_mask(np.concatenate(magnitudes), share_of(sum(sizes), sparsity), 0)
    pieces = np.split(mask, np.cumsum(sizes)[:-1])
    masks = dict(zip(wanted, pieces))
    return change_linears(lm, wanted, lambda linear: with_zeros(linear, masks[id(linear)]))


def with_zeros(linear: Linear, mask) -> Linear:
    """The matrix with zeros where the mask is True."""
    w = linear.w.copy()
    w[mask.reshape(w.shape)] = 0
    return replace(linear, w=w)


# Notes:
#
# - An output is a column of W here and a row in the paper, which stores W transposed.
# - The embedding, the head, norms and biases are not pruned.
# - Figures on stories (minitx sweep prune sparsity=0.2,0.3,0.5 --stories 100, and prune scope=2:4).
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts:
#
#       sparsity  scope     loss      1 hop / 2 hops / 3 hops
#       (dense)                       100 / 94 / 100 %
#       0.2       output    +0.0015   100 / 93 / 100 %
#       0.3       output    +0.0045   100 / 93 / 100 %
#       0.5       output    +0.0762    98 / 89 /  95 %
#       0.5       2:4       +0.5605    78 / 60 /  45 %
#
# - A general model has less to spare: SmolLM2-135M-Instruct (not shipped), calibrated on 4,096
#   tokens of text, loses 0.03 nats per token of another text at 0.2, 0.14 at 0.3 and 1.04 at 0.5.
