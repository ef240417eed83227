"""Each matrix as the product of two thin ones, by its largest singular values."""

import math
from typing import Literal

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.linears import change_linears, linears
from minitx.shared.share import share_of
from minitx.technique import technique
from minitx.tree import Part, part


@technique(level="matrices", exact=False, neutral={"share": 1.0})
def low_rank(
    lm,
    *,
    share: float = 0.75,
    rank: int | None = None,
    energy: float | None = None,
    weighted: bool = True,
    damping: float = 0.01,
    matrices: Literal["all", "ffn", "attention"] = "all",
    stories: int = 16,
):
    """Replace each matrix by two thin ones whose product is near it.

    Paper: no single one; truncated SVD is optimal among matrices of rank r (Eckart and Young,
        1936). That weighing it with the inputs gives the least error of the outputs is plain
        algebra.
    Kind: approximate; exact but for rounding where the rank is full.
    Skips or precomputes: of W (in, out) all but the r largest singular values.
    Offline: plain: U S V = W, A = U_r sqrt(S_r) (in, r), B = sqrt(S_r) V_r (r, out). Weighted: with
        G = X^T X over the inputs X that the matrix reads in ``stories`` calibration stories,
        G + damping mean(diag G) I = C C^T (Cholesky), U S V = C^T W, and C^-T U_r stands for U_r:
        then A B is the matrix of rank r with the least ||C^T (W - A B)||, the error of the outputs.
        r is ``rank``, or the smallest with which the squares of the singular values (of C^T W, if
        weighted) sum up to the share ``energy`` of all, or else the largest with which A and B have
        no more than the share ``share`` of the weights of W. In float64 and rounded once. Damping
        and defaults were chosen here.
    Online: y = (x A) B + b. Where r (in + out) >= in out, W itself stays.
    Saves: in out - r (in + out) multiply-adds a token, and as many weights, of each matrix; and
        costs a second call. So it is faster in NumPy where the matrix is large beside a call; of
        the small matrices of a narrow model most of what is saved is lost again.
    Neutral: share=1: every matrix stays as it is.
    Not for: a flat spectrum, for which look at ``--low-rank energy=0.9`` first: what it leaves as
        it is cannot be had with few. Embedding and head stay as they are.
    """
    check(share, rank, energy, damping, weighted)
    wanted = linears(lm.model, matrices)
    if rank is None and energy is None and share == 1:
        return lm
    found = {}
    if weighted:
        from minitx.training.calibration import matrix_inputs

        found = matrix_inputs("low_rank", lm, stories)

    def thin(linear: Linear) -> Part:
        w = linear.w.astype(np.float64)
        c = root_of(found[id(linear)].gram, damping) if weighted else np.eye(len(w))
        u, s, v = np.linalg.svd(c.T @ w, full_matrices=False)
        r = chosen_rank(s, w.shape, share, rank, energy)
        return factored(linear, c, u[:, :r], s[:r], v[:r]) if pays(r, *w.shape) else linear

    return change_linears(lm, wanted, thin)


def check(share, rank, energy, damping, weighted) -> None:
    if rank is not None and energy is not None:
        raise MinitxError("low_rank takes a rank or an energy, not both; leave one out.")
    if rank is not None and rank < 1:
        raise MinitxError(f"low_rank needs a rank of at least 1, not {rank}.")
    for name, value in (("a share", share), ("an energy", energy)):
        if value is not None and not 0 < value <= 1:
            raise MinitxError(f"low_rank needs {name} above 0 and at most 1, not {value:g}.")
    if weighted and not 0 < damping < math.inf:
        raise MinitxError(f"low_rank needs a damping above 0, not {damping:g}.")


# Offline -----------------------------------------------------------------------------------------


def root_of(gram, damping: float):
    """C (in, in), lower triangular, with C C^T = gram + damping * mean(diagonal) * I."""
    size = np.trace(gram) / len(gram) or 1.0  # inputs that are always 0 weigh all the same
    return np.linalg.cholesky(gram + damping * size * np.eye(len(gram)))


def chosen_rank(s, shape: tuple[int, int], share, rank, energy) -> int:
    """r for singular values s of a matrix of that shape."""
    if rank is not None:
        return min(rank, len(s))
    if energy is not None:
        kept = np.cumsum(s * s)
        return min(int(np.searchsorted(kept, energy * kept[-1])) + 1, len(s))
    return max(1, share_of(break_even(*shape), share))


def break_even(inputs: int, outputs: int) -> float:
    """The rank at which two factors have as many weights as the matrix."""
    return inputs * outputs / (inputs + outputs)


def pays(r: int, inputs: int, outputs: int) -> bool:
    return r * (inputs + outputs) < inputs * outputs


def factored(linear: Linear, c, u, s, v) -> "LowRank":
    """The two factors: C^-T U sqrt(S) (in, r) and sqrt(S) V (r, out), so that neither is much
    larger than the other (to rounding in few bits that matters)."""
    dtype, root = linear.w.dtype, np.sqrt(s)
    a = np.linalg.solve(c.T, u * root)
    b = root[:, None] * v
    return LowRank(Linear(a.astype(dtype)), Linear(b.astype(dtype), linear.b))


# Online ------------------------------------------------------------------------------------------


@part
class LowRank(Part):
    """(x @ A) @ B + b"""

    a: Part  # in -> r
    b: Part  # r -> out

    def __call__(self, x):
        return self.b(self.a(x))

    def outputs(self, x, columns):
        """Only these columns of the outputs: a slice, or an array of indices."""
        return self.b.outputs(self.a(x), columns)
