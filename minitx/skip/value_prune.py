"""SpAtten's local value pruning: values with small attention weights are not read.

The card and options, the attention that runs (online), notes.
"""

from typing import Annotated, Literal

import numpy as np

from minitx import fast, ledger
from minitx.model import Attend
from minitx.shared.coarse import coarse
from minitx.shared.random_baseline import random_scores
from minitx.shared.sparse_attention import need_equal_groups, top_k
from minitx.state import Layer
from minitx.technique import SEEDS, above, blocks_of, swap, technique, wrap
from minitx.tree import Part, part, table


@technique(
    level="scores",
    exact=False,
    neutral={"keep": 1.0},
    demo={"keep": 0.5},
    event=("values kept", "values seen"),
    presets={"aggressive": {"keep": 0.25}},
)
def value_prune(
    lm,
    *,
    keep: Annotated[
        float, "share of the values that a query sees to use, rounded up; 1: all", above(0, 1)
    ] = 0.35,
    choose: Annotated[
        Literal["weights", "random"], "the largest attention weights, or a random baseline"
    ] = "weights",
    seed: Annotated[int, "of choose=random", SEEDS] = 0,
):
    """Use only the values with the largest attention weights of each query (SpAtten).

    Paper:     Wang et al., "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and
               Head Pruning", HPCA 2021, arXiv 2012.09852 (local value pruning).
    Fidelity:  a reconstruction from a review of the paper. Ours: the number of values is a share of
               the keys that each query sees, so a prompt read at once or in chunks gives the same.
    Kind:      approximate; exact at keep=1.
    Idea:      The softmax gives most keys a weight near 0, and their values add next to nothing.
               All keys are scored, but only the values with the largest weights are read.
    Offline:   nothing.
    Online:    for each query and head, which sees n keys:
               p    = softmax(q k^T / sqrt(d))        over all n keys
               kept = the ceil(keep n) largest of p   (ties go to the lower index)
               out  = sum over kept of p_j v_j        not renormalized: the p_j of the others are
                                                      missing, as if their values were 0
               If values have a common mean, out shrinks with the weight that is missing, and
               dividing by the sum of the kept p_j is better; without one, it is not (Notes).
    Saves:     S - r of S products p_j v_j: 2 S d becomes S d + r d multiply-adds per query head and
               token (r: values kept, heads of width d), and the bytes of the values not read, but
               query heads that share values read those that each of them keeps.
    In NumPy:  slower, 0.3x of dense: values are gathered query by query and head by head.
    Not for:   techniques that select keys before scoring them (elsa, a3, ...), after which few
               values are left.
    Proof:     tests/skip/test_value_prune.py; literal version: tests/skip/literal_value_prune.py
    Tutorial:  tutorials/13_which_heads_matter.py
    """
    if keep == 1:
        return lm
    random = None
    if choose == "random":
        random = random_scores(len(blocks_of(lm)), lm.model.config.context, seed)

    def change(attn: Part, index: int) -> Part:
        need_equal_groups(attn)
        drawn = None if random is None else random[index]
        return swap(attn, Attend, lambda dense: PrunedValues(dense.scale, keep, drawn))

    return wrap(lm, "attn", change)


def values_kept(keep: float, n):
    """How many of n values a query uses; n may be an array."""
    return np.ceil(keep * n - 1e-9).astype(int)  # 1e-9: 0.07 * 100 = 7.000000000000001 counts as 7


# Online ------------------------------------------------------------------------------------------


@part
class PrunedValues(Part):
    """Softmax attention that reads only the values with the largest weights."""

    scale: float  # 1 / sqrt(d)
    keep: float
    random: np.ndarray | None = table(default=None)  # (context,) scores of the baseline

    @property
    def one_sequence(self) -> bool:
        """True: no batches of different lengths. Random scores are by position, which differs
        between the sequences of a padded batch."""
        return self.random is not None

    def __call__(self, q, k, v, layer: Layer):
        T, S = q.shape[-2], k.shape[-2]
        mask, out = layer.mask(), np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        positions = layer.row_tokens().array  # (S,), or (..., K, S)
        # A block of t = b - a queries at a time: a .. b - 1, which see only rows before ``end``.
        for a, b, end in fast.query_blocks(T, S, mask):
            hidden = fast.newest_mask(b - a) if mask is None else mask[..., a:b, :end]
            queries, keys = q[..., a:b, :], k[..., :end, :]
            ledger.count(queries.size * end, cache_bytes=keys.nbytes)
            p = fast.unnormalized_weights(queries, keys, self.scale, hidden)  # (..., K, G*t, end)
            p /= p.sum(-1, keepdims=True)
            p = p.reshape(*k.shape[:-2], -1, b - a, end)  # (..., K, G, t, end)
            kept = self.select(p, hidden, positions[..., :end])
            out[..., a:b, :] = weighted(p, kept, v[..., :end, :]).reshape(out[..., a:b, :].shape)
        return out  # (..., H, T, d)

    def select(self, p, hidden, positions):
        """Booleans like the weights p (..., K, G, t, S): which values to use."""
        visible = np.ones(p.shape, bool)
        if hidden is not None:
            np.logical_not(hidden, out=visible[..., p.shape[-1] - hidden.shape[-1] :])
        n = visible.sum(-1)  # (..., K, G, t)
        scores = coarse(p) if self.random is None else self.random[positions]
        if scores.ndim > 1 and self.random is not None:
            scores = scores[..., None, None, :]
        scores = np.where(visible, scores, -1)
        kept = top_k(scores, np.maximum(values_kept(self.keep, n), 1)) & visible
        ledger.event("values seen", n)
        ledger.event("values kept", kept)
        return kept


def weighted(p, kept, v):
    """sum of p_j v_j over the kept j: p and kept (..., K, G, t, S), v (..., K, S, d) -> (..., K, G,
    t, d). One query of one head at a time, since each keeps other values."""
    S, d = v.shape[-2:]
    p, kept, v = p.reshape(-1, S), kept.reshape(-1, S), v.reshape(-1, S, d)
    out = np.empty((len(p), d), p.dtype)
    for i, row in enumerate(kept):
        index = np.flatnonzero(row)
        values = v[i * len(v) // len(p)].take(index, 0)  # (r, d)
        ledger.count(values.size, cache_bytes=values.nbytes)
        np.dot(p[i, index], values, out=out[i])
    return out


# Notes:
#
# - Scores cost S d per query head, so at most half of attention can be saved. Bytes: keys are read
#   once per key head, values r d per query head, since heads that share values keep others: with G
#   query heads per key head, 1 + G keep instead of 2.
# - Not renormalized, as in the paper. When is it better to divide by the weight that was kept? 40
#   random queries, keys and values of width 8, keep=0.4, error relative to dense attention:
#
#       values of mean    not renormalized    renormalized
#       0                 0.32                0.50
#       1                 0.27                0.19
#       2                 0.26                0.10
#
# - Ranked by weights rounded to 20 bits (shared/coarse.py), so that equal weights tie whatever runs
#   beside them. keep below 1 / n still uses one value.
# - In a prompt, all scores of a block of queries are one dense product, masked ones included; only
#   the values are gathered for each query.
# - Figures on stories, 4 chains of 512 tokens (several stories joined), one BLAS thread:
#       minitx sweep value-prune keep=0.5,0.35,0.25 --chains 4 --stories 20
#       minitx sweep value-prune keep=0.5,0.35 choose=random --chains 4 --stories 20
#   Loss is above dense, in nats per token; the hops are right answers to questions that need 1, 2
#   or 3 facts (dense: 100 / 100 / 100 %):
#
#       keep    choose     multiply-adds    loss      1 / 2 / 3 hops      speed
#       0.5     weights    0.92x            +0.000    100 / 100 / 100 %   0.26x
#       0.35    weights    0.90x            +0.002    100 / 100 / 100 %   0.28x
#       0.25    weights    0.89x            +0.014    100 /  89 / 100 %   0.28x
#       0.5     random     0.92x            +1.513     33 /  56 /  57 %   0.33x
#       0.35    random     0.90x            +2.328     19 /  33 /  57 %   0.34x
#
#   On single stories (about 200 tokens) attention is a smaller part: 0.98x at keep=0.25.
