"""The greedy token without the whole product with the vocabulary, and never another token.

Two searches that leave out tokens which provably cannot win, and the head that asks one of them.
Not here: searches that may miss the best token (a preview of fixed size, a shortlist), and sampling
without all logits.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from minitx import ledger, ops
from minitx.errors import MinitxError
from minitx.model import Head, TiedHead
from minitx.technique import NoSuchPart, kinds, swap, technique
from minitx.tree import Part, part


@technique(
    level="head",
    exact=True,
    neutral=None,
    demo={"k": 12},
    event=("head rows read", "head rows"),
)
def exact_head(
    lm,
    *,
    method: Literal["svd", "norms"] = "svd",
    k: int | None = None,
    block: int = 2048,
):
    """Find the greedy token by bounds, without the logits of tokens that cannot win.

    Paper: none describes it whole. The preview is after Kyuhong Shim et al., 2017, "SVD-Softmax:
        Fast Softmax Approximation on Large Vocabulary Neural Networks", NIPS 2017, which keeps a
        fixed number of rows and is approximate; the scan by length after LEMP (SIGMOD 2015). Both
        are known here from an abstract, a re-implementation's README and a survey. Choosing rows by
        a proven bound, so that the result is exact, was put together here.
    Kind: exact: the dense head's token, in its own arithmetic, the smallest id on ties.
    Skips or precomputes: rows W_v (one for each token) of the logits z_v = W_v h, where only their
        argmax is asked for. Sampling, evaluation and verification get all logits, as before.
    Offline: norms: n_v = |W_v|, and the rows sorted by it, longest first. svd: W = U S V^T,
        B = W V, of which the first k columns are the preview; r_v = |B_v[k:]|. In float64 and
        rounded once; V comes from the eigenvectors of W^T W. k = D // 4 where none is given: chosen
        here, a re-implementation of the paper takes D // 8.
    Online: norms: rows are multiplied in blocks, until the next block's longest has n_v |h| < the
        best z so far: by Cauchy-Schwarz no row that is left can win. svd: g = V^T h, P = B[:, :k]
        g[:k], u_v = P_v + r_v |g[k:]| >= z_v; with lo = z of the row whose P is largest, only
        candidates u_v >= lo are multiplied; if they are more than V / 8, where picking rows costs
        more than it spares, the dense head is asked.
        All comparisons leave room for what float32 may have rounded. If several rows are so close
        that rounding decides between them, the dense head is asked too, which settles ties.
    Saves: norms: D multiply-adds for each row not reached. svd: V D - (D^2 + V (k + 1) + D (1 + c))
        for c candidates. When the dense head has to be asked, all of that comes on top of it.
        Memory: norms keeps W once more. svd keeps V (k + 1) + D^2 numbers more, and W once more
        (by rows) if the head is not the embedding. share_of_dense, in this file, tells in advance
        what is left to multiply on some text, and compare counts the head rows that were read.
    Neutral: nothing to set: every setting gives the dense model's tokens.
    Not for: a small vocabulary, where the search's own steps take longer than the product: on the
        shipped models it multiplies less and gains no time. Norms are hardly ever worth it: they
        differ too little in a trained head, so nearly all rows are read. svd pays where the
        spectrum of W decays, or the winner stands out, and is a loss where neither holds (random
        weights). A table is of these weights: change them and it is wrong.
    """
    D = lm.model.config.width
    k = max(1, D // 4) if k is None else k
    if not 1 <= k <= D:
        raise MinitxError(
            f"exact_head: k is {k}; it must be at least 1 and at most {D}, the model's width."
        )
    if block < 1:
        raise MinitxError(f"exact_head: block is {block}; it must be at least 1.")

    def search(head: Part) -> "ExactHead":
        rows, biased = rows_of(head)
        found = scan(rows, block) if method == "norms" else preview(rows, k)
        return ExactHead(head, found, biased)

    if not kinds(lm) & {Head, TiedHead}:
        raise NoSuchPart(Head, TiedHead)
    lm = swap(lm, TiedHead, search, optional=True)
    return swap(lm, Head, search, optional=True)


def rows_of(head: Part) -> tuple[np.ndarray, bool]:
    """A row of numbers for each token (V, D), and whether there is a bias, which is then one number
    more in each row: x has a 1 there."""
    if type(head) is TiedHead:
        return head.w, False
    if head.b is None:
        return np.ascontiguousarray(head.w.T), False
    return np.concatenate([head.w.T, head.b[:, None]], axis=1), True


@part
class ExactHead(Part):
    """All logits by the dense head; the best of them by the search, where it can tell."""

    head: Part
    search: Part  # called with a row x (D,): the id of its largest logit, or None: cannot tell
    biased: bool

    def __call__(self, x):
        return self.head(x)  # (..., V)

    def argmax(self, x) -> int:
        """The id of the largest logit of one row x (D,), as the dense head would have it."""
        found = self.search(np.append(x, x.dtype.type(1)) if self.biased else x)
        if found is None:
            note(read=len(self.search.rows), in_full=1)
            return self.head.argmax(x)
        return found


def note(rows: int = 0, read: int = 0, in_full: int = 0) -> None:
    """Count rows of the head that there are and that were multiplied, and dense heads asked."""
    ledger.event("head rows", rows)
    ledger.event("head rows read", read)
    ledger.event("heads in full", in_full)


# Norms -------------------------------------------------------------------------------------------


@part
class NormScan(Part):
    """Multiplies rows from the longest on, until all that are left are too short to win."""

    rows: np.ndarray  # (V, D), the longest first
    ids: np.ndarray  # (V,) the token of each row
    n: np.ndarray  # (V / block,) the length of the first row of each block, which is its longest
    block: int
    tie: float  # what rounding may do to two logits, as a share of the largest possible one

    def __call__(self, x) -> int | None:
        length = norm(x)
        slack = self.tie * length * float(self.n[0])
        V = len(self.rows)
        note(rows=V)
        if not in_range(slack):
            return None
        best, found = -math.inf, []
        for number, n in enumerate(self.n.tolist()):
            if n * length < best - slack:
                break
            a = number * self.block
            found.append(ops.scores(x, self.rows[a : a + self.block]))
            best = max(best, float(found[-1].max()))
        z = np.concatenate(found)  # (rows read,)
        note(read=len(z))
        return settle(z, self.ids, slack)


def scan(rows, block: int) -> NormScan:
    """A search in rows (V, D) by their lengths."""
    n = lengths(rows)
    order = np.argsort(-n, kind="stable")
    tie = tie_of(rows)
    return NormScan(rows[order], order, n[order][::block].astype(rows.dtype), block, tie)


# Preview -----------------------------------------------------------------------------------------


@part
class Preview(Part):
    """Multiplies only rows that could win, judging by their k strongest directions."""

    rows: np.ndarray  # (V, D)
    rotation: np.ndarray  # (D, D) the directions V, strongest first
    b: np.ndarray  # (k, V) the first columns of B = rows @ rotation, transposed
    r: np.ndarray  # (V,) lengths of what is left of B
    longest: float  # of the rows
    tie: float  # what rounding may do to two logits, as a share of the largest possible one
    doubt: float  # the same for a bound and a logit

    def __call__(self, x) -> int | None:
        V = len(self.rows)
        largest = norm(x) * self.longest
        note(rows=V)
        if not in_range(self.tie * largest):
            return None
        P, u = self.bounds(x)
        top = int(P.argmax())
        lo = float(ops.scores(x, self.rows[top : top + 1])[0])
        candidates = np.flatnonzero(u >= lo - self.doubt * largest)  # top is one of them
        if len(candidates) > V // 8 + 1:
            return None
        note(read=len(candidates))
        z = ops.scores(x, self.rows[candidates])  # (candidates,)
        return settle(z, candidates, self.tie * largest)

    def bounds(self, x):
        """Previews P (V,) of the logits of x (D,), and u (V,), which no logit exceeds by more than
        rounding."""
        k = len(self.b)
        g = ops.linear(x, self.rotation)  # (D,)
        P = ops.linear(g[:k], self.b)  # (V,)
        ledger.count(self.r.size, self.r.nbytes)
        return P, P + self.r * float(norm(g[k:]))


def preview(rows, k: int) -> Preview:
    """A search in rows (V, D) with a preview k wide."""
    n = lengths(rows)
    exact = rows.astype(np.float64)
    _, rotation = np.linalg.eigh(exact.T @ exact)  # weakest first
    rotation = rotation[:, ::-1]
    B = exact @ rotation
    b, r = B[:, :k].T, np.linalg.norm(B[:, k:], axis=1)
    arrays = [np.ascontiguousarray(a, rows.dtype) for a in (rotation, b, r)]
    # Each of the D numbers of g may be wrong by D eps / 2 of |x|, so g itself by sqrt(D) times as
    # much. What else is rounded (P, B, lo, and z in the dense head) is less than 8 times D eps.
    D = rows.shape[1]
    doubt = (math.sqrt(D) + 8) * D * float(np.finfo(rows.dtype).eps)
    return Preview(rows, *arrays, float(n.max()), tie_of(rows), doubt)


# Both --------------------------------------------------------------------------------------------


def lengths(rows) -> np.ndarray:
    """|W_v| of rows (V, D) in float64; MinitxError if one is no number that can be used."""
    n = np.sqrt(np.einsum("vd,vd->v", rows, rows, dtype=np.float64))
    if not np.isfinite(n).all():
        bad = int(np.flatnonzero(~np.isfinite(n))[0])
        raise MinitxError(
            f"exact_head: the head's weights for token {bad} have the length {n[bad]}, so the "
            "weights are damaged or too large; finite ones are needed."
        )
    return n


def norm(x) -> float:
    """|x| of a row, in float64: a float32 square may overflow."""
    wide = x.astype(np.float64)
    return math.sqrt(wide @ wide)


def tie_of(rows) -> float:
    """How close two computed logits may be while their order is unsure, as a share of |W_v| |h|.

    However a dot product of D numbers is summed up, it errs by at most D eps / 2 of that. Two rows,
    each multiplied here and by the dense head, make 2 D eps; the rest is for smaller roundings.
    """
    return 3 * rows.shape[1] * float(np.finfo(rows.dtype).eps)


def in_range(slack: float) -> bool:
    """Is this a size at which nothing overflows or vanishes? (NaN is not.) Otherwise the dense head
    is asked, which knows what to do, and what to say about a damaged model."""
    return 1e-25 < slack < 1e25


def settle(z, ids, slack: float) -> int | None:
    """The token whose logit is the largest of z, if no other is so close that rounding may decide;
    ids: the tokens of z, from its first on."""
    near = np.flatnonzero(z >= float(z.max()) - slack)
    return int(ids[near[0]]) if len(near) == 1 else None


# In advance --------------------------------------------------------------------------------------


def share_of_dense(lm, texts: Sequence, **options) -> float:
    """Multiply-adds with which ``exact_head`` finds the greedy token after each token of some texts
    (lists of ids, or strings), over those of the dense head: above 1 it is a loss.

    lm: without exact_head; options: those of exact_head. Time is another matter: less is gained
    than this says, see ``minitx compare``.
    """
    changed = exact_head(lm, **options)
    model, tokens = changed.model, 0
    with ledger.counting(changed) as counts:
        for text in texts:
            for x in model.norm(model.hidden(changed.encode(text))):  # (T, D)
                model.head.argmax(x)
                tokens += 1
    if not tokens:
        raise MinitxError("exact_head: there is no text to try it on; give at least one.")
    config = lm.model.config
    return counts.total("model.head").multiply_adds / (tokens * config.vocab_size * config.width)
