"""The two operations that take nearly all the time, arranged for speed: the product with a weight
matrix, and attention.

ops.py says what they compute; here is only how to compute it fast. Tests check both against the
plain formulas (tests/core/test_fast.py). Skip this file on a first reading.
"""

from functools import cache

import numpy as np

from minitx import ledger

# Products with a weight matrix --------------------------------------------------------------------

LARGE = 32 << 10  # numbers in a matrix above which reading it costs more than the call
FEW = 4  # rows of x up to which each may read the matrix by itself ...
REREAD = 375_000  # ... if the rows after the first read at most this many elements, from L2 cache
SEVERAL = 16  # rows of x up to which BLAS would spend most of its time on copying the matrix
MANY = 128  # rows of x from which on transposing the matrix costs next to nothing
WIDE = 2 << 10  # outputs beyond which the sum, updated for every input, leaves the L1 cache


def matmul(x, w):
    """``x @ w``: x (..., in), w (in, out) -> (..., out).

    With few rows in x, almost all of the time goes into reading w, so w is read contiguously:
    column by column where it is column-major (memory_layout.py), row by row (as the sum
    ``x[0] w[0] + x[1] w[1] + ...``) where it is row-major. BLAS's own vector-matrix product strides
    through a row-major matrix and takes 1.2 to 1.5 times as long as that sum.
    """
    if w.size > LARGE and x.size <= SEVERAL * len(w):
        if w.flags.f_contiguous:
            if x.size <= FEW * len(w) and (x.size - len(w)) * w.shape[1] <= REREAD:
                return np.vecdot(w.T, x[..., None, :])  # each row's dot product with each column
            if x.size * w.shape[1] > SMALL and type(x) is type(w) is np.ndarray:  # not in training
                return several_rows(x.reshape(-1, len(w)), w).reshape(*x.shape[:-1], w.shape[1])
        elif x.size == len(w) and w.shape[1] <= WIDE:
            return np.einsum("i,io->o", x.reshape(-1), w).reshape(*x.shape[:-1], w.shape[1])
    if x.ndim > 2:  # one large product instead of one small product per row of the batch
        return product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])
    return product(x, w)


def product(x, w):
    """``x @ w`` of matrices, x (n, in) -> (n, out)."""
    if w.size > LARGE and len(x) <= MANY and w.flags.f_contiguous:
        return (w.T @ x.T.copy()).T  # BLAS would transpose x and w, but only x is small
    return x @ w


# Several rows, as in a batch or when draft tokens are verified. BLAS first packs the matrix into a
# layout of its own, and for 2 to 16 rows that copy takes most of the time: 5 rows take up to 6
# times as long as one. OpenBLAS multiplies small matrices without packing, so here the matrix is
# cut into blocks of columns, each a small product (python -m minitx.lab.rows measures it).

SMALL = 900_000  # multiply-adds of a small product; OpenBLAS's limit is a million
BLOCK = 125_000  # elements that stay in the L2 cache until the second product of their block
FETCHED = 8  # rows up to which it pays to load a block with the first row's dot products
CACHED = 16 << 20  # bytes of a model's matrices up to which the CPU's caches hold most of them


def several_rows(x, w):
    """``x @ w`` for 2 to 16 rows x (n, in) and a column-major w (in, out) -> (n, out)."""
    n, columns = len(x), w.T  # (out, in), contiguous
    if n <= FETCHED and bytes_with(w) > CACHED:
        return blocks_from_memory(x, columns)
    rows = x.T.copy()  # (in, n)
    y = np.empty((len(columns), n), np.result_type(x, w))
    for a, b in column_blocks(columns, SMALL // n):
        np.matmul(columns[a:b], rows, out=y[a:b])
    return y.T


def blocks_from_memory(x, columns):
    """``several_rows`` for a matrix in memory, where the kernel for small products is slowed down
    by cache misses. Dot products with the first row read a block at full memory bandwidth, and
    leave it in the cache for the product with the other rows."""
    n, first, others = len(x), x[0].copy(), x[1:].T.copy()  # others: (in, n - 1)
    y = np.empty((n, len(columns)), np.result_type(x, columns))
    for a, b in column_blocks(columns, min(BLOCK, SMALL // (n - 1))):
        block = columns[a:b]
        np.vecdot(block, first, out=y[0, a:b])
        y[1:, a:b] = (block @ others).T
    return y


def column_blocks(columns, elements: int):
    """(a, b): blocks of columns with at most so many elements, but at least one column."""
    step = max(elements // columns.shape[1], 1)
    for a in range(0, len(columns), step):
        yield a, a + step


def bytes_with(w) -> int:
    """Bytes of the array that w is a view of: those of all the model's matrices, which lie in one
    block of memory (memory_layout.py)."""
    return w.nbytes if w.base is None else getattr(w.base, "nbytes", w.nbytes)


# Attention ----------------------------------------------------------------------------------------

ROWS = 64  # queries in a block


def attention(q, k, v, scale, mask=None):
    """``ops.attention``, one block of queries at a time: so most of the masked half of T x S is
    never computed, and scores never take more memory than one block's."""
    T, S = q.shape[-2], k.shape[-2]
    if T == 1:
        return attend_rows(q, k, v, scale, mask)
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    for a, b, end in query_blocks(T, S, mask):
        near = block_mask(b - a) if mask is None else mask[..., a:b, :end]
        block = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
        out[..., a:b, :] = attend_rows(*block, scale, near)
    return out


def query_blocks(T: int, S: int, mask=None):
    """(a, b, end): a block of queries a .. b - 1 that sees only keys before ``end``."""
    if mask is None:
        yield from causal_blocks(T, S)
        return
    for a in range(0, T, ROWS):
        b = min(a + ROWS, T)
        seen = ~mask[..., a:b, :].reshape(-1, S).all(0)  # (S,): visible to any of these queries?
        yield a, b, int(np.flatnonzero(seen)[-1]) + 1 if seen.any() else 1


def causal_blocks(T: int, S: int):
    """``query_blocks`` under the causal mask of the T newest of S tokens: the last key that a block
    sees is that of its last query."""
    for a in range(0, T, ROWS):
        b = min(a + ROWS, T)
        yield a, b, S - T + b


def attend_rows(q, k, v, scale, mask=None):
    """Attention of q (..., H, T, d) over k, v (..., K, S, d); mask as for
    ``unnormalized_weights``."""
    p = attention_scores(q, k, scale)
    return weighted_values(exponentials(p, mask, q.shape[-2]), q, k, v)


def weighted_values(p, q, k, v):
    """The second half of attention: the values weighted by the exponentials p (..., K, G*T, S) of q
    and k -> (..., H, T, n). Counts the multiply-adds of both halves."""
    if ledger.active:  # checked here because this runs for every token and layer
        work = q.size // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        ledger.count(work, cache_bytes=cached_bytes(k, v))
    return weighted_sum(p, v).reshape(*q.shape[:-1], v.shape[-1])


def cached_bytes(k, v) -> int:
    """Bytes of keys and values in memory: one array may be both, and a broadcast head counts
    once."""
    once = [a[tuple(slice(None if step else 1) for step in a.strides)] for a in (k, v)]
    return once[0].nbytes + (0 if np.may_share_memory(k, v) else once[1].nbytes)


def weighted_sum(p, v):
    """The softmax-weighted sum of the values: ``p / sum(p) @ v`` for exponentials p (..., T, S) and
    v (..., S, d)."""
    total = p @ v
    total /= p.sum(-1, keepdims=True)  # dividing d columns is cheaper than dividing S
    return total


def unnormalized_weights(q, k, scale, mask=None):
    """``exp(scale * q k^T - row maximum)`` (..., K, G*T, S): the softmax before it is normalized.

    mask: booleans that broadcast to (..., K, G, T, n), True where a query must not see one of the
    n newest keys (n = S, or fewer if all queries see the others); None if nothing is masked.
    """
    p = attention_scores(q, k, scale)
    return exponentials(p, mask, q.shape[-2])


def attention_scores(q, k, scale):
    """``scale * q k^T`` (..., K, G*T, S) for q (..., H, T, d) and k (..., K, S, d)."""
    *lead, H, T, d = q.shape
    K = k.shape[-3]
    q = q.reshape(*lead, K, H // K * T, d) * scale  # one product for all query heads of a group
    return q @ k.swapaxes(-1, -2)


def exponentials(p, mask, T: int):
    """``exp(p - row maximum)`` of the scores p (..., K, G*T, S), 0 where masked; overwrites p."""
    if mask is not None:
        S = p.shape[-1]
        by_head = p.reshape(*p.shape[:-2], -1, T, S)  # a view into p
        np.copyto(by_head[..., S - mask.shape[-1] :], MASKED, where=mask)
    p -= p.max(-1, keepdims=True)
    return np.exp(p, out=p)


MASKED = (
    -1e30
)  # finite, so that a row that sees nothing (padding) gives finite numbers instead of NaN


@cache
def block_mask(T: int) -> np.ndarray:
    """(T, T) ``causal_mask`` of one block. T is at most ROWS, so few are ever cached."""
    return np.arange(T) > np.arange(T)[:, None]


def newest_mask(T: int):
    """The causal mask (T, T) of the T newest queries over their own keys; None if T is 1."""
    return None if T == 1 else block_mask(T)


# BLAS threads ------------------------------------------------------------------------------------

THREAD_VARIABLES = (  # of OpenMP, OpenBLAS, MKL, Accelerate and BLIS
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "BLIS_NUM_THREADS",
)
# The environment of a new process with one BLAS thread. BLAS reads it when NumPy is imported, so it
# is too late to set it in a process that is already running.
ONE_THREAD = dict.fromkeys(THREAD_VARIABLES, "1")
