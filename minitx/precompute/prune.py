"""Zeros in the places of the least important weights: magnitude, Wanda, N:M."""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.block_by_block import block_by_block
from minitx.shared.linears import change_linears, linears
from minitx.shared.share import share_of
from minitx.technique import technique

RUNS = {"2:4": (2, 4), "4:8": (4, 8)}  # N kept of M consecutive inputs


@technique(level="pruning", exact=False, neutral={"sparsity": 0.0})
def prune(
    lm,
    *,
    sparsity: float = 0.5,
    method: Literal["wanda", "magnitude"] = "wanda",
    scope: Literal["output", "matrix", "global", "2:4", "4:8"] = "output",
    matrices: Literal["all", "ffn", "attention"] = "all",
    stories: int = 16,
):
    """Set the least important weights of every matrix to zero.

    Paper: Mingjie Sun, Zhuang Liu, Anna Bair and J. Zico Kolter, 2023, "A Simple and Effective
        Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695, after the authors'
        code. Magnitude pruning is older than any one paper.
    Kind: approximate; which tokens change depends on how much is left out.
    Skips or precomputes: the share ``sparsity`` of the weights W (in, out) of a block's matrices,
        those with the smallest scores. Embedding, head, norms and biases stay.
    Offline: the score of a weight is |W_ij| ("magnitude") or |W_ij| ||X_i|| ("wanda"), ||X_i|| the
        length of column i of all inputs that the matrix reads in ``stories`` calibration stories
        (the paper takes 128 texts; 16 are our choice). Wanda goes block by block: inputs are those
        behind the blocks that are pruned already. Compared are the weights of one output ("output":
        a column here, a row in the paper, where W is stored the other way round), of one matrix, of
        all matrices together ("global"), or of every run of M consecutive inputs of one output, of
        which N stay ("2:4", "4:8"). Of n weights int(n sparsity) go, of equal ones the first.
    Online: y = x W + b as before, with zeros in W.
    Saves: in NumPy nothing, neither time nor memory: a zero in a dense array is multiplied and kept
        like any other number, and the ledger counts it. Zeros can be packed (--pack-zeros), which
        saves memory and costs time; only hardware or kernels that know a pattern (2:4) turn them
        into speed. What gets faster here is --prune-structure, which takes whole neurons and heads.
    Neutral: sparsity=0.
    Not for: Wanda compared across a whole matrix or model, which is another method.
    """
    check(sparsity, method, scope)
    wanted = linears(lm.model, matrices)
    if not sparsity:
        return lm
    if scope == "global":
        return prune_together(lm, wanted, sparsity)
    texts = []
    if method == "wanda":
        from minitx.training.calibration import texts_for

        texts = texts_for("prune", lm, stories)
    choose = chooser(scope, sparsity)

    def change(block, found):
        def pruned(linear):
            norms = found[id(linear)].norms if texts else np.ones(len(linear.w))
            return without(linear, choose(abs(linear.w) * norms[:, None]))

        return change_linears(block, wanted, pruned)

    return block_by_block(lm, texts, ColumnNorms, change)


def check(sparsity: float, method: str, scope: str) -> None:
    if not 0 <= sparsity < 1:
        raise MinitxError(f"prune needs a sparsity of at least 0 and below 1, not {sparsity:g}.")
    if scope in RUNS and sparsity not in (0, 0.5):
        raise MinitxError(
            f"prune with scope={scope} leaves out half of the weights; give sparsity=0.5, not "
            f"{sparsity:g}, or another scope."
        )
    if method == "wanda" and scope in ("matrix", "global"):
        raise MinitxError(
            f"prune compares Wanda's scores within one output, not with scope={scope}; use "
            "scope=output, or method=magnitude."
        )


class ColumnNorms:
    """The lengths of the columns of all inputs that a matrix reads."""

    def __init__(self):
        self.squares = 0.0  # (in,)

    def add(self, rows) -> None:
        rows = rows.astype(np.float64)
        self.squares = self.squares + np.einsum("ni,ni->i", rows, rows)

    @property
    def norms(self) -> np.ndarray:
        """(in,)"""
        return np.sqrt(self.squares)


# Which weights go --------------------------------------------------------------------------------


def smallest(scores, count: int, axis: int):
    """Booleans that mark the ``count`` smallest scores along the axis, of equal ones the first."""
    order = np.argsort(scores, axis=axis, kind="stable")
    marked = np.zeros(scores.shape, bool)
    np.put_along_axis(marked, order.take(range(count), axis=axis), True, axis=axis)
    return marked


def chooser(scope: str, sparsity: float) -> Callable:
    """A function from the scores (in, out) of one matrix to the weights that go."""
    if scope == "matrix":
        return lambda s: smallest(s.ravel(), share_of(s.size, sparsity), 0).reshape(s.shape)
    if scope == "output":
        return lambda s: smallest(s, share_of(len(s), sparsity), 0)
    return lambda s: smallest_of_runs(s, *RUNS[scope])


def smallest_of_runs(scores, n: int, m: int):
    """All but the n largest of every m consecutive inputs: scores (in, out)."""
    inputs, outputs = scores.shape
    if inputs % m:
        raise MinitxError(
            f"prune with {n}:{m} needs matrices whose number of inputs is a multiple of {m}; one "
            f"has {inputs}. Use scope=output."
        )
    runs = scores.reshape(inputs // m, m, outputs)
    return smallest(runs, m - n, 1).reshape(scores.shape)


def prune_together(lm, wanted: dict[int, Linear], sparsity: float):
    """The smallest weights of all matrices together, wherever they are."""
    sizes = [abs(linear.w).ravel() for linear in wanted.values()]
    marked = smallest(np.concatenate(sizes), share_of(sum(map(len, sizes)), sparsity), 0)
    pieces = np.split(marked, np.cumsum([len(s) for s in sizes])[:-1])
    masks = dict(zip(wanted, pieces))
    return change_linears(lm, wanted, lambda part: without(part, masks[id(part)]))


def without(linear: Linear, marked) -> Linear:
    """The same matrix with zeros where it is marked."""
    w = linear.w.copy()
    w[marked.reshape(w.shape)] = 0
    return replace(linear, w=w)
