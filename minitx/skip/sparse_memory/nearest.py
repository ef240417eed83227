"""From candidates to the top k: score what an index proposes, keep the largest inner products.

An index only proposes candidates. They are scored exactly here, so an index may miss a key but
never give it a wrong score. It is a part with

- ``precompute(k)``: a tuple of arrays (..., K, n, any), what it stores per key (hash codes);
- ``__call__(q, k, codes, built)``: the candidates, booleans (..., K, G, T, n), for queries q
  (..., K, G, T, d) and keys k (..., K, n, d) with these codes; None if all keys are candidates;
- ``has_history``: True if it builds a data structure key by key (k-d trees). Then ``empty()`` and
  ``insert(...)`` make it, one for each memory, and the call gets the list of them as ``built``.
"""

import numpy as np

from minitx import fast, ledger
from minitx.shared.sparse_attention import Visible, top_k
from minitx.tree import Part, part


@part
class LinearScan(Part):
    """The plain index: every key is a candidate."""

    def precompute(self, k) -> tuple:
        return ()

    def __call__(self, q, k, codes, built=None) -> None:
        return None


def top_k_of_candidates(
    index: Part, keep: int, q, k, codes, visible: Visible, built=None, order=None
):
    """(kept, scores), both (..., K, G, T, n): the ``keep`` candidates with the largest q . k; ties
    go to the lower index. Scores of other keys are MASKED. order (..., n): how recent each key is,
    if not in the order of k."""
    candidates = index(q, k, codes, built)
    if candidates is not None:
        may_see = visible.hide(np.ones_like(candidates), False)
        candidates = add_latest(candidates & may_see, keep, may_see, order)
        ledger.event("candidates", candidates)
    scores = visible.hide(score_candidates(q, k, candidates))
    kept = top_k(scores, min(keep, k.shape[-2]))
    if candidates is not None or visible.mask is not None:
        kept &= scores > fast.MASKED  # where there are fewer than ``keep``
    return kept, scores


def score_candidates(q, k, candidates):
    """q . k (..., K, G, T, n) for q (..., K, G, T, d) and k (..., K, n, d); MASKED for keys that
    are not candidates (None: all are).

    For a single query only the candidates are multiplied; for many, the full product is faster.
    """
    *lead, G, T, d = q.shape
    n = k.shape[-2]
    if candidates is None or T > 1:
        scores = (q.reshape(*lead, G * T, d) @ k.swapaxes(-1, -2)).reshape(*lead, G, T, n)
        if candidates is not None:
            scores[~candidates] = fast.MASKED
        ledger.count(q.size * n, cache_bytes=k.nbytes)
        return scores
    *head, member, row, key = np.nonzero(candidates)  # each (pairs,)
    keys = k[(*head, key)]  # (pairs, d)
    scores = np.full((*lead, G, T, n), fast.MASKED, q.dtype)
    scores[candidates] = np.einsum("nd,nd->n", q[(*head, member, row)], keys)
    ledger.count(keys.size, cache_bytes=keys.nbytes)
    return scores


def add_latest(candidates, keep: int, may_see, order=None):
    """The candidates (..., T, n), and where a query has fewer than ``keep``, the latest other keys
    that it may see. Latest: the last ones, or those with the largest ``order`` (..., n)."""
    missing = keep - candidates.sum(-1, keepdims=True)  # (..., T, 1)
    if (missing <= 0).all():
        return candidates
    others = may_see & ~candidates
    if order is not None:  # sort the keys from the oldest to the latest
        by_age = np.broadcast_to(order.argsort(-1)[..., None, None, :], others.shape)
        others = np.take_along_axis(others, by_age, -1)
    others &= others[..., ::-1].cumsum(-1)[..., ::-1] <= missing  # the last ``missing`` of them
    if order is None:
        return candidates | others
    found = candidates.copy()
    np.put_along_axis(found, by_age, others | np.take_along_axis(found, by_age, -1), -1)
    return found
