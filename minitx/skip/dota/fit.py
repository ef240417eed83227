"""fit=post-hoc: detectors by least squares on calibration text, for a model that stays as it is.

A weaker substitute for DOTA's joint training (training/detector.py), in which the model also learns
to have scores that a detector can estimate.

For each block, find w_q (a rank x rank matrix per query head) and w_k (one per key head) that
minimize

    sum over i and j <= i of (s_ij - q~_i . k~_j)^2,    q~_i = y_i w_q R_i,    k~_j = y_j w_k R_j

where s_ij = q_i . k_j / sqrt(d) is the exact score, y = x p, and R_t the rotation at position t
(narrow_rope; the identity in a model that is not rotary).

With w_k fixed, the estimate is linear in w_q; with w_q fixed, it is linear in w_k. Either way there
are rank^2 unknowns, so the normal equations are small (``solve``).

With rotation: start with w_k = I and solve for w_q, then for w_k and w_q in turn (alternating least
squares). Without rotation only the product w_q w_k^T counts, so w_k = I loses nothing: solve once
for w_q, then split it by SVD into w_q and w_k of similar magnitude, which suits few bits.
"""

from collections.abc import Sequence

import numpy as np

from minitx.errors import MinitxError
from minitx.model import Rope, Stack
from minitx.progress import bar
from minitx.shared.block_by_block import Stream
from minitx.skip.dota.detector import Detector, narrow_rope, projection, record_attention
from minitx.state import Tokens
from minitx.technique import need
from minitx.tree import Part

STORIES = 8  # or passages; about 1,600 tokens: a few seconds for the shipped models
RIDGE = 1e-9  # of the mean diagonal, added to it: equal columns would make the equations singular
ROUNDS = 2  # of alternating least squares after the first solution; more gain next to nothing


def fit_detectors(model, texts: Sequence, rank: int, seed: int = 0) -> tuple[Detector, ...]:
    """One detector for each block of the model; texts: lists of token ids."""
    if not texts:
        raise MinitxError("dota: a detector is fitted to texts, and there are none; give one.")
    recorded, recordings = record_attention(model)
    need(recorded.stack, Stack)
    streams = [Stream(model.embed, ids) for ids in texts]
    rng = np.random.default_rng(seed)
    found = []
    # one block after another, so that only one block's queries and keys are in memory
    shown = bar(recorded.stack.blocks, "dota: fit detectors", unit="block", delay=1.0)
    for index, (block, recording) in enumerate(zip(shown, recordings)):
        passes = []
        for stream in streams:
            stream.x = stream.through(block, index)
            passes.append(recording.last())
        p = projection(model.config.width, rank, rng)
        found.append(fit_block(p, recording.attn, passes))
    return tuple(found)


def fit_block(p, attn, passes: Sequence[tuple]) -> Detector:
    """The detector of one block with the projection p (D, rank). passes: for each text, x (T, D),
    q (H, T, d) and k (K, T, d) (``Recording``)."""
    x, q, k = passes[0]
    rope = narrow_rope(attn.rope, p.shape[1], q.shape[-1])
    p = p.astype(x.dtype)
    groups = [
        fit_group([Text(p, attn, rope, found, group) for found in passes], type(rope) is Rope)
        for group in range(len(k))
    ]
    w_q = np.concatenate([w for w, _ in groups], axis=1).astype(x.dtype)
    w_k = np.concatenate([w for _, w in groups], axis=1).astype(x.dtype)
    return Detector(p, w_q, w_k)


def fit_group(texts: Sequence["Text"], rotary: bool):
    """w_q (rank, G*rank) and w_k (rank, rank) of the G query heads that share a key head."""
    rank, heads = texts[0].y.shape[1], range(len(texts[0].s))
    w_k = np.eye(rank)
    w_q = [solve([text.query_sums(w_k, head) for text in texts]) for head in heads]
    for _ in range(ROUNDS if rotary else 0):
        w_k = solve([text.key_sums(w_q) for text in texts])
        w_q = [solve([text.query_sums(w_k, head) for text in texts]) for head in heads]
    if not rotary:
        u, s, v = np.linalg.svd(np.concatenate(w_q), full_matrices=False)
        w_q, w_k = np.split(u * s**0.5, len(heads)), v.T * s**0.5
    return np.concatenate(w_q, axis=1), w_k


class Text:
    """What the normal equations need of one text, for the heads of one group, in float64.

    y (T, rank); s (G, T, T): the exact scores, 0 where masked; turn (T, rank, rank): the R_t.
    """

    def __init__(self, p, attn, rope: Part, recorded: tuple, group: int):
        x, q, k = (a.astype(np.float64) for a in recorded)
        T, rank = len(x), p.shape[1]
        self.y = x @ p
        q = q.reshape(len(k), -1, *q.shape[1:])[group]  # (G, T, d)
        self.s = np.tril(q @ k[group].T) * attn.attend.scale
        unit_rows = np.broadcast_to(np.eye(rank)[:, None], (rank, T, rank))
        self.turn = rope(unit_rows, Tokens(slice(0, T))).swapaxes(0, 1)

    def rotated(self, w):
        """The rows y_t w R_t, (T, rank)."""
        return np.einsum("tk,tkn->tn", self.y @ w, self.turn)

    def query_sums(self, w_k, head: int):
        """For ``solve`` to find a head's w_q: sums over the keys j <= i that each query i sees."""
        keys = self.rotated(w_k)
        return self, outer_products(keys).cumsum(0), self.s[head] @ keys

    def key_sums(self, w_q):
        """For ``solve`` to find w_k: sums over the queries i >= j that see each key j, of all
        heads."""
        queries = [self.rotated(w) for w in w_q]
        squares = sum(outer_products(rows) for rows in queries)[::-1].cumsum(0)[::-1]
        return self, squares, sum(s.T @ rows for s, rows in zip(self.s, queries))


def outer_products(rows):
    """Of each row (T, rank) with itself: (T, rank, rank)."""
    return rows[:, :, None] * rows[:, None, :]


def solve(sums: Sequence[tuple]):
    """The w (rank, rank) that minimizes the sum of (s_ij - y_i w R_i . o_j)^2, by its normal
    equations. o_j: the fixed side of the dot product (k~_j if w is w_q, q~_j if it is w_k).

    sums: for each text (text, squares, products). squares (T, rank, rank) is for each i the sum
    over j of o_j o_j^T, and products (T, rank) the sum over j of s_ij o_j.
    """
    left, right = 0, 0
    for text, squares, products in sums:
        y, turn = text.y, text.turn
        rank = y.shape[1]
        squares = turn @ squares @ turn.swapaxes(-1, -2)
        # Between the unknowns w_ac and w_a'c': sum_i y_ia y_ia' squares_icc'. Computed with the
        # rows (a, a') and columns (c, c'), then reordered to rows (a, c) and columns (a', c').
        both = outer_products(y).reshape(-1, rank**2).T @ squares.reshape(-1, rank**2)
        left = left + both.reshape([rank] * 4).swapaxes(1, 2).reshape(rank**2, rank**2)
        right = right + y.T @ np.einsum("tkn,tn->tk", turn, products)
    ridge = RIDGE * np.trace(left) / len(left) or 1.0  # 1: all is zero, and so will w be
    left = left + ridge * np.eye(len(left))
    return np.linalg.solve(left, right.reshape(-1)).reshape(right.shape)
