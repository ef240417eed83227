"""Low-rank factorization: each weight matrix becomes the product of two thin ones.

The card, the factorization (offline), the part that runs (online), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx.calibration import calibration_ids
from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.shared.block_by_block import block_by_block
from minitx.shared.linears import change_linears, linears
from minitx.shared.observed_inputs import Moments
from minitx.shared.share import share_of
from minitx.technique import above, at_least, technique
from minitx.tree import Part, part

ENERGY = 0.996  # the default


@technique(
    level="matrices",
    exact=False,
    neutral={"share": 1.0},
    demo={"share": 0.75, "stories": 4},
    presets={"aggressive": {"share": 0.75}},
)
def low_rank(
    lm,
    *,
    share: Annotated[
        float | None,
        "the two factors together have at most this share of the matrix's weights",
        above(0, 1),
    ] = None,
    rank: Annotated[int | None, "rank of every matrix, instead of share", at_least(1)] = None,
    energy: Annotated[
        float | None,
        "instead of share: the smallest rank whose squared singular values sum to this share of "
        "the sum of all squared singular values; default: 0.996, unless share or rank is given",
        above(0, 1),
    ] = None,
    weighted: Annotated[
        bool, "minimize the error of outputs on calibration stories, not that of weights"
    ] = True,
    damping: Annotated[
        float, "added to the diagonal of X^T X, in units of its mean, if weighted", above(0, 100)
    ] = 0.01,
    matrices: Annotated[Literal["all", "ffn", "attention"], "which are factorized"] = "all",
    stories: Annotated[
        int,
        "calibration stories (with calibrate: passages of the text), if weighted",
        at_least(1, limit=1000),
    ] = 64,
):
    """Factorize each weight matrix by truncated SVD.

    Paper:     none alone: truncated SVD is the best approximation of rank r (Eckart and Young,
               1936); weighting it by the inputs is plain algebra.
    Fidelity:  ours: damping and defaults.
    Kind:      approximate. A matrix whose factors would be no smaller stays, bit for bit. Of the
               shipped models it pays on stories-relu; on stories, whose spectra are flatter, no
               setting saves 5 % at a small loss (Notes).
    Idea:      Often most of a matrix lies in a few directions. Keep those, as two thin factors.
    Offline:   plain:     W = u s v (SVD, s the singular values, largest first)
                          left = u_r sqrt(s_r) (in, r),  right = sqrt(s_r) v_r (r, out)
               weighted:  c c^T = X^T X + damping mean(diag(X^T X)) I  (Cholesky)
                          c^T W = u s v,  left = c^-T u_r sqrt(s_r),  right = sqrt(s_r) v_r
                          X (tokens, in) are the calibration inputs. For E = W - left right this
                          minimizes ||c^T E||, which is ||X E|| but for damping: c c^T = X^T X.
    Online:    y = (x left) right + bias;  W itself if the two factors would be no smaller
    Saves:     in*out - r (in + out) multiply-adds per token and as many weights, of each matrix.
    In NumPy:  faster where matrices are large; in a narrow model (stories, D = 128) the second call
               takes what is saved.
    Not for:   matrices with a flat spectrum: `minitx show --low-rank energy=0.9` lists the ranks.
    Proof:     tests/precompute/test_low_rank.py;
               literal version: tests/precompute/literal_low_rank.py
    Tutorial:  tutorials/09_fewer_weights.py
    """
    options = {"share": share, "rank": rank, "energy": energy}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise MinitxError(f"low_rank: got {' and '.join(given)}; give only one of them.")
    wanted = linears(lm.model, matrices)
    if share == 1:
        return lm
    if not given:
        energy = ENERGY
    texts = calibration_ids("low_rank", lm, stories, "use weighted=false") if weighted else []

    def change(block, seen):
        def factorized(linear: Linear) -> Part:
            w = linear.w.astype(np.float64)
            c = root_of(seen[id(linear)].gram, damping) if weighted else np.eye(len(w))
            u, s, v = np.linalg.svd(c.T @ w, full_matrices=False)
            r = chosen_rank(s, w.shape, share, rank, energy)
            return factors(linear, c, u[:, :r], s[:r], v[:r]) if pays(r, *w.shape) else linear

        return change_linears(block, wanted, factorized)

    how = dict(label="low rank", wanted=wanted, after_changes=False)
    return block_by_block(lm, texts, Moments, change, **how)


# Offline -----------------------------------------------------------------------------------------


def factors(linear: Linear, c, u, s, v) -> "LowRank":
    """left = c^-T u sqrt(s) (in, r) and right = sqrt(s) v (r, out). Each gets sqrt(s), so that
    neither is much larger than the other, which matters if they are quantized."""
    dtype, root = linear.w.dtype, np.sqrt(s)
    left = np.linalg.solve(c.T, u * root)
    right = root[:, None] * v
    return LowRank(Linear(left.astype(dtype)), Linear(right.astype(dtype), linear.b))


def root_of(gram, damping: float):
    """c (in, in), lower triangular, with c c^T = gram + damping * mean(diagonal) * I (Cholesky)."""
    size = np.trace(gram) / len(gram) or 1.0  # if all inputs are 0, they weigh the same
    return np.linalg.cholesky(gram + damping * size * np.eye(len(gram)))


def chosen_rank(s, shape: tuple[int, int], share, rank, energy) -> int:
    """r for a matrix of this shape with singular values s."""
    if rank is not None:
        return min(rank, len(s))
    if energy is not None:
        cumulative = np.cumsum(s * s)
        return min(int(np.searchsorted(cumulative, energy * cumulative[-1])) + 1, len(s))
    return max(1, share_of(break_even(*shape), share))


def break_even(inputs: int, outputs: int) -> float:
    """The rank at which the factors have as many weights as the matrix."""
    return inputs * outputs / (inputs + outputs)


def pays(r: int, inputs: int, outputs: int) -> bool:
    """Are the factors smaller than the matrix?"""
    return r * (inputs + outputs) < inputs * outputs


# Online ------------------------------------------------------------------------------------------


@part
class LowRank(Part):
    """``(x @ left) @ right + bias``"""

    left: Part  # (in, r)
    right: Part  # (r, out), with the bias

    def __call__(self, x):
        return self.right(self.left(x))

    def outputs(self, x, columns):
        """Only these columns of the result: a slice or an array of indices."""
        return self.right.outputs(self.left(x), columns)


# Notes:
#
# - The SVD runs in float64 and the factors are rounded once. Embedding and head stay as they are.
# - With weighted, energy is measured on the singular values of c^T W: a share of the outputs.
# - Damping keeps c invertible where an input is always 0 or where there are fewer calibration
#   inputs than rows of W.
# - Figures from minitx sweep low-rank energy=0.996,0.99 -m stories-relu --stories 60, the same on
#   stories, and there share=0.75 (preset=aggressive); one BLAS thread. Loss is above dense, in nats
#   per token:
#
#       model         setting       multiply-adds  memory  loss     speed
#       stories-relu  energy=0.996      0.94x      0.94x   +0.0056  0.9x
#       stories-relu  energy=0.99       0.82x      0.83x   +0.0331  0.9x
#       stories       energy=0.996      0.98x      0.98x   +0.0089  0.9x
#       stories       energy=0.99       0.95x      0.95x   +0.0274  0.9x
#       stories       share=0.75        0.77x      0.77x   +0.2662  0.9x
#
# - More calibration text helps, since energy is measured on it: at share=0.75 16 stories instead of
#   64 cost +0.339.
# - Nor does any setting pay on SmolLM2-135M-Instruct (not shipped): calibrated on 16,384 tokens of
#   text, it loses 0.46 nats per token of another at energy=0.995, for 0.96x of the multiply-adds,
#   and 0.21 at 0.998, for 0.99x.
