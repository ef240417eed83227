"""The baseline of exact_head: bound each logit by lengths alone.

Cauchy-Schwarz: z[v] = W[v] . h <= |W[v]| |h|. Sort the rows of W by length, multiply them block by
block from the longest on, and stop once the next row is too short for its bound to reach the best
logit so far: no later row can win. Exact, and hardly ever worth it: the rows of a trained head are
of similar length, so nearly all are read. It keeps a sorted copy of W. (LEMP, SIGMOD 2015, after a
survey.)
"""

import math

import numpy as np

from minitx import ops
from minitx.skip.exact_head.rounding import (
    norm,
    representable,
    row_norms,
    tie_slack,
    unique_argmax,
)
from minitx.tree import Part, part


@part
class NormSearch(Part):
    """Multiplies blocks of rows, the longest rows first, while one of them could win."""

    rows: np.ndarray  # (V, D), sorted by length
    ids: np.ndarray  # (V,): the token of each row
    norms: np.ndarray  # (V / block,): length of each block's first row, its longest
    block: int
    tie: float  # how close two logits may be before rounding decides: a share of the largest

    def __call__(self, x) -> tuple[int | None, int]:
        """(argmax token, or None if rounding may decide; rows multiplied), for x (D,)."""
        length = norm(x)
        slack = self.tie * length * float(self.norms[0])
        if not representable(slack):  # over- or underflow: leave it to the dense head
            return None, 0
        best, found = -math.inf, []
        for i, longest in enumerate(self.norms.tolist()):
            if longest * length < best - slack:
                break
            block = self.rows[i * self.block : (i + 1) * self.block]
            found.append(ops.logits(x, block))
            best = max(best, float(found[-1].max()))
        z = np.concatenate(found)  # (rows read,)
        return unique_argmax(z, self.ids, slack), len(z)


def norm_search(rows, block: int) -> NormSearch:
    """The search for the rows of W (V, D)."""
    norms = row_norms(rows)
    order = np.argsort(-norms, kind="stable")
    longest = norms[order][::block].astype(rows.dtype)
    return NormSearch(rows[order], order, longest, block, tie_slack(rows))
