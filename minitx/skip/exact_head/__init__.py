"""The exact head: bound every logit, compute only those that could be the largest.

Here: the card and the options, the head that greedy decoding asks, the search by an SVD preview,
and the share of multiply-adds that is left. norm_search.py is the baseline, a simpler bound that
hardly ever pays; rounding.py says how close two logits may be before rounding decides.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np

from minitx import ledger, ops
from minitx.config import Config
from minitx.errors import MinitxError
from minitx.model import Head, TiedHead
from minitx.shared.break_even import head, warn
from minitx.skip.exact_head.norm_search import norm_search
from minitx.skip.exact_head.rounding import (
    norm,
    preview_slack,
    representable,
    row_norms,
    tie_slack,
    unique_argmax,
)
from minitx.technique import NoSuchPart, at_least, kinds, swap, technique
from minitx.tree import Part, part


@technique(
    level="head",
    exact=True,
    neutral=None,
    demo={"rank": 12},
    event=("head rows read", "head rows"),
)
def exact_head(
    lm,
    *,
    method: Annotated[
        Literal["svd", "norms"],
        "the bound: svd previews each logit, norms (a baseline) goes by the rows' lengths",
    ] = "svd",
    rank: Annotated[
        int | None, "singular directions in the preview, of D; default D // 4", at_least(1)
    ] = None,
    block: Annotated[
        int | None,
        "method=norms: rows per product, and the least that are read; default: V // 16, at most "
        "2048",
        at_least(1),
    ] = None,
):
    """Find the argmax token exactly without computing every logit.

    Paper:     none has all of it. The preview is from Shim et al., "SVD-Softmax: Fast Softmax
               Approximation on Large Vocabulary Neural Networks", NIPS 2017, which is approximate.
    Fidelity:  a reconstruction from that paper's abstract, a re-implementation's README and a
               survey. Deciding by a bound, so that the result is exact, is ours.
    Kind:      exact: the token of the dense head; ties go to the lower index.
    Idea:      Greedy decoding needs only the token v with the largest logit z[v] = W[v] . h (h the
               hidden state; W the head, V rows, one per token, of width D). By Cauchy-Schwarz a dot
               product is at most the product of the two lengths, a . b <= |a| |b|, which bounds
               each logit from above. A row whose bound is below a logit that is already known
               cannot win, so skip it.
    Offline:   B = W R;  R (D, D): right singular vectors of W, strongest first, so that most of the
                         length of each row lies in its first columns
               tail[v] = |B[v, rank:]|
    Online:    g = R^T h                                   a rotation, so z[v] = B[v] . g
               P[v] = B[v, :rank] . g[:rank]               preview of every logit
               u[v] = P[v] + tail[v] |g[rank:]| >= z[v]    Cauchy-Schwarz for the other columns
               low  = z[v] of the v with the largest P
               compute z[v] for the candidates u[v] >= low; the largest of these is the argmax.
               Dense fallback: if there are more than V // 8 + 1 candidates, or if the two largest
               logits are so close that rounding could decide between them.
    Saves:     V D - (D^2 + V (rank + 1) + D (1 + c)) multiply-adds for c candidates: the more, the
               larger the head's share of the model. Weights read: 0.94x in stories-draft (0.80x at
               rank=32), 0.96x in stories, whose head is 7 % of it. Memory:
               V (rank + 1) + D^2 more numbers, and a copy of W by rows if the head is not tied.
    In NumPy:  no time on the shipped models: with V = 1,022 the search's own steps take longer than
               the dense product. It pays with a large V if the singular values of W decay.
    Not for:   sampling, evaluation and verifying drafts, which need all logits (and get them from
               the dense head); random weights, whose singular values are nearly equal.
    Proof:     tests/skip/test_exact_head.py; literal version: tests/skip/literal_exact_head.py
    """
    D = lm.model.config.width
    rank = max(1, D // 4) if rank is None else rank
    block = min(2048, max(1, lm.model.config.vocab_size // 16)) if block is None else block
    if rank > D:
        raise MinitxError(f"exact_head: rank must be at most {D}, the model's width; got {rank}.")

    check_search(lm.model.config, method, rank, block)

    def change(head: Part) -> "ExactHead":
        rows, biased = head_rows(head)
        search = norm_search(rows, block) if method == "norms" else preview_search(rows, rank)
        return ExactHead(head, search, biased)

    if not kinds(lm) & {Head, TiedHead}:
        raise NoSuchPart(Head, TiedHead)
    lm = swap(lm, TiedHead, change, optional=True)
    return swap(lm, Head, change, optional=True)


def check_search(c: Config, method: str, rank: int, block: int) -> None:
    """Warn if the search takes as many multiply-adds as the dense head, however few rows it reads:
    at least one, or one block."""
    V, D, dense = c.vocab_size, c.width, head(c)
    least = D * D + V * (rank + 1) + 2 * D if method == "svd" else min(block, V) * D
    if least >= dense:
        smaller = "a smaller rank" if method == "svd" else f"a block below {V:,}"
        instead = f"use {smaller}" if V > D + 2 else "leave it out: the vocabulary is too small"
        warn(
            f"exact_head: the search takes at least {least:,} multiply-adds per token and the "
            f"dense head {dense:,}, so it can never pay; {instead}."
        )


# Online ------------------------------------------------------------------------------------------


@part
class ExactHead(Part):
    """Greedy decoding asks the search. What the search cannot decide, and everything that needs all
    logits, goes to the dense head."""

    head: Part
    search: Part  # search(x) returns (argmax token, or None if undecided; rows multiplied)
    biased: bool  # True: each row of the search ends with its bias, so x is extended by a 1

    def __call__(self, x):
        return self.head(x)  # (..., V)

    def argmax(self, x) -> int:
        """The index of the largest logit of one row x (D,), as the dense head would find it."""
        token, read = self.search(np.append(x, x.dtype.type(1)) if self.biased else x)
        V = len(self.search.rows)
        if token is None:
            ledger.event("dense fallbacks")
            token, read = self.head.argmax(x), read + V
        ledger.event("head rows", V)
        ledger.event("head rows read", read)
        return token


@part
class PreviewSearch(Part):
    """Previews every logit with ``rank`` of D products, then multiplies the rows that could win."""

    rows: np.ndarray  # W (V, D)
    directions: np.ndarray  # R (D, D), right singular vectors of W, strongest first
    preview: np.ndarray  # (rank, V): the first columns of B = W R, transposed
    tail: np.ndarray  # (V,): length of the other columns of B, in each row
    longest: float  # length of the longest row of W
    tie: float  # how close two logits may be before rounding decides, and
    slack: float  # how far a logit may exceed its bound: shares of the largest possible logit

    def __call__(self, x) -> tuple[int | None, int]:
        largest = norm(x) * self.longest  # no logit is larger
        if not representable(self.tie * largest):  # over- or underflow: leave it to the dense head
            return None, 0
        P, u = self.bounds(x)
        top = int(P.argmax())
        low = float(ops.logits(x, self.rows[top : top + 1])[0])
        candidates = np.flatnonzero(u >= low - self.slack * largest)  # top is one of them
        if len(candidates) > len(self.rows) // 8 + 1:  # gathering more rows costs more than BLAS
            return None, 0
        z = ops.logits(x, self.rows[candidates])  # (candidates,)
        return unique_argmax(z, candidates, self.tie * largest), len(candidates)

    def bounds(self, x):
        """The previews P (V,) and the upper bounds u (V,) of the logits of x (D,)."""
        rank = len(self.preview)
        g = ops.linear(x, self.directions)  # (D,)
        P = ops.linear(g[:rank], self.preview)  # (V,)
        ledger.count(self.tail.size, self.tail.nbytes)
        return P, P + self.tail * float(norm(g[rank:]))


# Offline -----------------------------------------------------------------------------------------


def preview_search(rows, rank: int) -> PreviewSearch:
    """The search for the rows of W (V, D)."""
    longest = float(row_norms(rows).max())
    exact = rows.astype(np.float64)
    # The right singular vectors of W are the eigenvectors of W^T W; eigh has the weakest first.
    _, directions = np.linalg.eigh(exact.T @ exact)
    directions = directions[:, ::-1]
    B = exact @ directions
    preview, tail = B[:, :rank].T, np.linalg.norm(B[:, rank:], axis=1)
    arrays = [np.ascontiguousarray(a, rows.dtype) for a in (directions, preview, tail)]
    return PreviewSearch(rows, *arrays, longest, tie_slack(rows), preview_slack(rows))


def head_rows(head: Part) -> tuple[np.ndarray, bool]:
    """One row per token (V, D), and whether the head has a bias, which is then one more column."""
    if type(head) is TiedHead:
        return head.w, False
    if head.b is None:
        return np.ascontiguousarray(head.w.T), False
    return np.concatenate([head.w.T, head.b[:, None]], axis=1), True


# Cost --------------------------------------------------------------------------------------------


def share_of_dense(lm, texts: Sequence, **options) -> float:
    """Multiply-adds of ``exact_head`` relative to the dense head's, counted over the greedy token
    after each token of some texts (lists of ids, or strings); above 1 it is a loss.

    lm: without exact_head; options: those of exact_head. The speedup is smaller than this share
    suggests: ``minitx compare`` measures it.
    """
    changed = exact_head(lm, **options)
    model, tokens = changed.model, 0
    with ledger.counting(changed) as counts:
        for text in texts:
            for x in model.norm(model.hidden(changed.encode(text))):  # (T, D)
                model.head.argmax(x)
                tokens += 1
    if not tokens:
        raise MinitxError(
            "exact_head: expected at least one token of text to measure on, got none."
        )
    config = lm.model.config
    return counts.total("model.head").multiply_adds / (tokens * config.vocab_size * config.width)


# Notes:
#
# - The arrays belong to these weights: change the head afterwards and the bounds are wrong.
# - B and tail are computed in float64 and rounded once. Every comparison leaves slack for what
#   float32 may have rounded (rounding.py), so the token is that of the dense head's arithmetic.
# - A head with a bias is one with a column more: z[v] = [W[v], b[v]] . [h, 1].
# - method=norms is the scan by length of LEMP (SIGMOD 2015): norm_search.py.
# - rank = D // 4 is our choice; a re-implementation of SVD-Softmax takes D // 8.
# - If the dense head has to be asked, its V D multiply-adds come on top of the search's.
# - With V = 1,022, method=norms with block=64 (the default is V // 16) reads 6 % fewer rows, in 150
#   us per token; with a single block it reads every row, in 60 us. Dense takes 34 us.
# - Not here: searches that may miss the argmax (a preview of fixed size without a bound, a
#   shortlist of frequent tokens), and sampling without all logits.
