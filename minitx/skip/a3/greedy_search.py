"""A3's search: which keys have the most extreme products with a query, number by number.

The paper's M iterations, in each of which the largest product that is left is taken, and the
smallest unless the sum of all that was taken is negative by then. What comes largest first, and
what smallest first, does not depend on that; only how many of the smallest are taken does. So both
sides are put in order as far as M at once, and ``pops`` tells where the smallest stop.

Shapes: queries q (..., K, G, T, d) with M (..., K, G, T) iterations each, columns (..., K, d, n).
"""

import math
from typing import NamedTuple

import numpy as np

from minitx import ledger
from minitx.skip.a3.sorted_columns import Columns
from minitx.tree import Part, part

NUMBERS = 1 << 20  # products held at a time, so that a long prompt does not fill the memory


@part
class GreedySearch(Part):
    """Sums, key by key, of those of its products that are among the most extreme of all keys'."""

    def __call__(self, q, columns: Columns, first, end, M, S: int):
        """greedy (..., K, G, T, S), 0 for keys not looked at. Each query sees those of the sorted
        keys from ``first`` up to ``end``, both (..., K, G, T)."""
        greedy = np.zeros((*q.shape[:-1], S))
        d, n = columns.rows.shape[-2:]
        if not n:
            return greedy
        b = math.isqrt(n)
        hidden = n - int((end - first).min())
        R = -(-(int(M.max()) + hidden * d) // b) + d
        step = max(1, NUMBERS // (q[..., 0, 0].size * R * b))  # queries at a time
        for a in range(0, q.shape[-2], step):
            t = (..., slice(a, a + step))
            rows = first[t], end[t], M[t]
            up, down = (side(sign * q[(*t, slice(None))], columns, *rows, b, R) for sign in (1, -1))
            taken = pops(up.best, down.best, M[t])
            greedy[(*t, slice(None))] = up.by_key(M[t], S) - down.by_key(taken, S)
        ledger.event("products by the paper", 2 * M)
        return greedy


# One side ----------------------------------------------------------------------------------------


class Side(NamedTuple):
    """Products of each query with numbers at one end of some columns, N of them."""

    p: np.ndarray  # (..., K, G, T, N), not positive if of a key not seen
    rows: np.ndarray  # the key of each, same shape
    columns: np.ndarray  # and the column, same shape
    best: np.ndarray  # (..., K, G, T, m): the positive parts of the m largest, descending

    def by_key(self, count, S: int):
        """The ``count`` (..., K, G, T) largest, added up by key: (..., K, G, T, S)."""
        least = at(self.best, count)
        taken = (self.p >= least) & (self.p > 0)
        if (taken.sum(-1) > count).any():
            taken &= self._earlier_of_equals(least, count)
        *lead, N = self.p.shape
        place = np.flatnonzero(taken)
        key = place // N * S + self.rows.reshape(-1)[place]
        # In float64 and column after column, so that a sum does not depend on how the keys came.
        found = np.bincount(key, self.p.reshape(-1)[place], math.prod(lead) * S)
        return found.reshape(*lead, S)

    def _earlier_of_equals(self, least, count):
        """Of the products that equal the least one those of earlier keys, of the same key those of
        earlier columns: so it does not matter how many were looked at."""
        more, equal = self.p > least, self.p == least
        turn = self.rows.astype(int) * (self.columns.max() + 1) + self.columns
        order = np.sort(np.where(equal, turn, np.iinfo(int).max), -1)
        return more | equal & (turn <= at(order, np.maximum(count - more.sum(-1), 1)))


def at(ordered, count):
    """The ``count``-th (...) of ordered (..., m), or the last if they are fewer: (..., 1)."""
    last = np.minimum(count, ordered.shape[-1])[..., None] - 1
    return np.take_along_axis(ordered, last, -1)


def side(q, columns: Columns, first, end, M, b: int, R: int) -> Side:
    """The side of the largest products; with -q, that of the smallest.

    Each column is cut into pieces of b numbers, from the end that q's sign favours, so that a
    piece's first product is its largest. Only the R pieces whose first products are the largest are
    looked into. Say a product x is in none of them. Then of those R all have numbers above x alone,
    but for the last one of each column: with R = d + M / b, M products at least are larger than x.
    """
    n = columns.rows.shape[-1]
    firsts = np.arange(0, n, b)
    heads, _ = products(q[..., None], columns, np.arange(q.shape[-1])[:, None], firsts)
    heads = heads.reshape(*q.shape[:-1], -1)  # (..., K, G, T, d * n / b)
    while True:
        pieces, left_out = outermost(heads, R)
        column = pieces // len(firsts)
        e = (pieces % len(firsts) * b)[..., None] + np.arange(b)
        q_j = np.take_along_axis(q, column, -1)[..., None]
        p, place = products(q_j, columns, column[..., None], e)  # (..., K, G, T, R, b)
        rows = columns.rows[place]
        ledger.count(cache_bytes=rows.nbytes)
        # What is not seen is stepped over, without counting as one of the M: R has room for it.
        seen = (e < n) & (rows >= first[..., None, None]) & (rows < end[..., None, None])
        p = np.where(seen, p, 0)
        p, rows = p.reshape(*M.shape, -1), rows.reshape(*M.shape, -1)  # (..., K, G, T, R * b)
        best = descending(p, int(M.max()))
        if ((left_out < at(best, M)) | (left_out <= 0)).all():
            return Side(p, rows, np.repeat(column, b, -1), best)
        R = heads.shape[-1]  # the M-th has equals outside: look into all, to see which are first


def outermost(heads, R: int):
    """Where the R largest of heads (..., N) are, in ascending order: (..., R); and the largest of
    the others, 0 if there are none: (..., 1)."""
    N = heads.shape[-1]
    if R >= N:
        return np.broadcast_to(np.arange(N), heads.shape), np.zeros_like(heads[..., :1])
    order = np.argpartition(-heads, R, -1)
    left_out = np.take_along_axis(heads, order[..., R : R + 1], -1)
    return np.sort(order[..., :R], -1), left_out


def products(q_j, columns: Columns, column, e):
    """Products of q_j with the e-th number of its column, counted from the end at which they are
    the largest, and where in the columns that is: q_j (..., K, G, T, m, 1), column and e of shapes
    that fit it -> (..., K, G, T, m, any)."""
    *lead, _, n = columns.rows.shape
    head = (x[..., None, None, None, None] for x in np.ogrid[tuple(map(slice, lead))])
    place = (*head, column, np.where(q_j > 0, n - 1 - e, e).clip(0, n - 1))
    values = columns.values[place]
    ledger.count(values.size, cache_bytes=values.nbytes)
    return q_j * values, place


def descending(p, m: int):
    """The positive parts of the m largest numbers of each row of p (..., N), or of all N, in
    descending order."""
    left_out = max(0, p.shape[-1] - m)
    p = np.partition(p, left_out, -1)[..., left_out:]
    return np.maximum(np.sort(p, -1)[..., ::-1], 0)


# Both sides --------------------------------------------------------------------------------------


def pops(up, down, M):
    """How many of the smallest products are taken in M (...) iterations: (...).

    up, down (..., m): the positive parts of the largest products, and of the smallest with their
    signs turned, both in descending order. The j-th of the smallest is taken at the first iteration
    t after the one before it at which P_t, the sum of the t largest, makes up for the sum of the
    j - 1 smallest that were taken until then. With a_j the first iteration at which P does, that is
    t_j = max(t_(j-1) + 1, a_j), or t_j - j = max over all i <= j of a_i - i: so no loop is needed.
    """
    P = up.cumsum(-1, dtype=np.float64)
    before = down.cumsum(-1, dtype=np.float64)[..., :-1]
    before = np.concatenate([np.zeros((*M.shape, 1)), before], -1)  # what P has to make up for
    m, n = P.shape[-1], before.shape[-1]
    # a_j is 1 more than the number of P below before_j, of which there are as many as come before
    # it where both are put in one order. A stable sort leaves equals in the order they are given.
    order = np.concatenate([before, P], -1).argsort(-1, kind="stable")
    place = np.nonzero(order < n)[-1].reshape(before.shape)
    j = np.arange(1, n + 1)
    a = place - j + 2
    t = j + np.maximum.accumulate(a - j, -1)
    return ((a <= m) & (t <= M[..., None])).sum(-1)  # P does not grow after the m-th
