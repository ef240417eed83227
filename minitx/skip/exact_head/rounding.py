"""How far rounding may move a logit or a bound. A search that allows for it never skips the token
of the dense head.

A dot product of D numbers, in whatever order it is summed, errs by at most about D eps / 2 times
the product of the two lengths (eps: the distance from 1 to the next float). The slacks below are
shares of the largest possible logit, |h| times the longest row of W.
"""

import math

import numpy as np

from minitx.errors import MinitxError


def tie_slack(rows) -> float:
    """How close two computed logits may be while their order is unsure.

    Two logits, each computed here and by the dense head, make four errors: 2 D eps. The rest is for
    smaller roundings.
    """
    return 3 * rows.shape[1] * float(np.finfo(rows.dtype).eps)


def preview_slack(rows) -> float:
    """How far a logit may exceed its computed upper bound.

    Each of the D numbers of g = R^T h may err by D eps / 2 of |h|, so g as a vector by sqrt(D)
    times as much. That moves P by at most sqrt(D) D eps / 2, and tail |g[rank:]| by as much again.
    All else that is rounded (P, B, low, z in the dense head) is less than 8 D eps.
    """
    D = rows.shape[1]
    return (math.sqrt(D) + 8) * D * float(np.finfo(rows.dtype).eps)


def unique_argmax(z, ids, slack: float) -> int | None:
    """The token of the largest of the logits z: ids[i] is the token of z[i], and ids may be longer.
    None if another is so close that rounding may decide, which is left to the dense head."""
    near = np.flatnonzero(z >= float(z.max()) - slack)
    return int(ids[near[0]]) if len(near) == 1 else None


def representable(slack: float) -> bool:
    """Is the slack far from overflow and underflow? False for NaN too: then the dense head is
    asked, which has the error message for a damaged model."""
    return 1e-25 < slack < 1e25


def norm(x) -> float:
    """|x|, in float64 because the square of a float32 may overflow."""
    wide = x.astype(np.float64)
    return math.sqrt(wide @ wide)


def row_norms(rows) -> np.ndarray:
    """|W[v]| for rows (V, D), in float64; MinitxError if one is not finite."""
    norms = np.sqrt(np.einsum("vd,vd->v", rows, rows, dtype=np.float64))
    if not np.isfinite(norms).all():
        token = int(np.flatnonzero(~np.isfinite(norms))[0])
        raise MinitxError(
            f"exact_head: expected finite weights in the head, but those of token {token} have the "
            f"length {norms[token]}: the weights are damaged or too large."
        )
    return norms
