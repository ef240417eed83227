"""The arithmetic: every product, norm, softmax and activation of the model, as plain functions.

Shapes: T new tokens, S all tokens so far, D width, H query heads, K key/value heads, d head width.
Leading batch axes are allowed everywhere and written "...". Everything stays in the type of its
input (float32 in use, float64 for proofs), so Python floats are used for constants: a NumPy scalar
would promote float32 to float64.

Every product reports its cost to the ledger (see ledger.py).
"""

import math
from functools import cache, wraps

import numpy as np

from minitx import ledger
from minitx.errors import MinitxError


def op(f):
    """Mark an operation that is worth a gradient rule of its own.

    A plain array just runs it. Any other array-like (the traced arrays of training) is asked
    instead, by its method ``__op__``: so training runs through these same functions.
    """

    @wraps(f)
    def call(x, *rest):
        if isinstance(x, np.ndarray):
            return f(x, *rest)
        return x.__op__(call, x, *rest)

    call.plain = f
    return call


def linear(x, w, b=None):
    """``x @ w + b``: x (..., in), w (in, out), b (out,) or None -> (..., out).

    Few rows against a large matrix are a matter of reading it, which is quickest from end to end:
    column after column where it lies by columns (see placement.py). Where it lies by rows, as NumPy
    makes it, one row is summed up as ``x[0] w[0] + x[1] w[1] + ...``; BLAS's own product of a row
    and a matrix hops about in it and takes 1.2 to 1.5 times as long.
    """
    ledger.product(x, w)
    few = w.size > LARGE and x.size <= FEW * len(w)
    if few and w.flags.f_contiguous:
        y = np.vecdot(w.T, x[..., None, :])  # for each row of x, its dot product with each column
    elif few and x.size == len(w) and w.shape[1] <= WIDE:
        y = np.einsum("i,io->o", x.reshape(-1), w).reshape(*x.shape[:-1], w.shape[1])
    elif x.ndim > 2:  # one large product instead of one small product per row of the batch
        y = product(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], w.shape[1])
    else:
        y = product(x, w)
    return y if b is None else y + b


def product(x, w):
    """``x @ w`` of matrices, x (n, in) -> (n, out)."""
    if w.size > LARGE and len(x) <= MANY and w.flags.f_contiguous:
        return (w.T @ x.T.copy()).T  # BLAS would have to turn over x and w, but x is small
    return x @ w


LARGE = 32 << 10  # numbers in a matrix above which how it is read matters more than the call
FEW = 4  # rows up to which reading takes longer than multiplying
MANY = 128  # rows from which on turning over a matrix takes no time to speak of
WIDE = 2 << 10  # results beyond which the sum, read and written once a row of w, is too long itself


def scores(x, table):
    """``x @ table.T``: x (..., D), table (V, D) -> (..., V)."""
    return linear(x, table.T)  # which lies by columns


def rows(table, ids):
    """The rows ``table[ids]``: table (V, D), ids (...) whole numbers or a slice -> (..., D)."""
    found = table[ids]
    ledger.count(weight_bytes=lambda: found.nbytes)
    return found


def largest(logits) -> int:
    """The id of the largest of logits (V,), the smallest among equals; MinitxError if that is no
    finite number."""
    best = int(logits.argmax())  # of NaN if there is one anywhere: so one look finds it
    if not math.isfinite(logits[best]):
        raise MinitxError(
            f"The model gave the score {logits[best]} to token {best}, so no next token can be "
            "chosen: its numbers are too large for their type, or its weights are damaged."
        )
    return best


# Norms -------------------------------------------------------------------------------------------


@op
def rms_norm(x, gain, eps):
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last axis (Zhang and Sennrich, 2019)."""
    squares = np.vecdot(x, x)  # faster than (x * x).sum(-1)
    if squares.size == 1:  # one row: a Python number is quicker than an array of one
        return x * (gain / math.sqrt(squares.item() / x.shape[-1] + eps))
    return x * (gain / np.sqrt(squares / x.shape[-1] + eps)[..., None])


@op
def layer_norm(x, gain, bias, eps):
    """``(x - mean) / sqrt(variance + eps) * gain + bias`` over the last axis (Ba et al., 2016)."""
    return rms_norm(x - x.mean(-1, keepdims=True), gain, eps) + bias


# Activations -------------------------------------------------------------------------------------


@op
def silu(x):
    """``x * sigmoid(x)``, also called swish."""
    return x / (1 + np.exp(-x))


@op
def relu(x):
    return np.maximum(x, 0)


@op
def gelu(x):
    """``x * P(X <= x)`` for a standard normal X (Hendrycks and Gimpel, 2016), by the exact erf."""
    return x * (0.5 + 0.5 * erf(x * math.sqrt(0.5)))


@op
def gelu_tanh(x):
    """The tanh approximation of GELU, which GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


ACTIVATIONS = {"silu": silu, "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def erf(x):
    """The error function, which NumPy lacks, to about 1e-15.

    A Taylor polynomial around the nearest point of a grid of exact values (``math.erf``):
    erf(c + t) = erf(c) + erf'(c) (t - c t^2 + (4c^2 - 2) t^3 / 6 + ...), the factors being the
    Hermite polynomials that differentiating exp(-c^2) gives.
    """
    values, slopes = _erf_grid(x.dtype)
    i = np.fmax(np.fmin(np.rint(x * _ERF_STEPS), _ERF_END), -_ERF_END).astype(np.int32)  # not NaN
    c = i.astype(x.dtype) * (1 / _ERF_STEPS)
    t = np.clip(x - c, -1 / _ERF_STEPS, 1 / _ERF_STEPS)  # beyond the grid erf is +-1 anyway
    cc = c * c
    series = 12 - 48 * cc + 16 * cc * cc
    series = c * (12 - 8 * cc) / 24 + series * t * (1 / 120)
    series = (4 * cc - 2) / 6 + series * t
    series = 1 + t * (series * t - c)
    i += _ERF_END
    return values[i] + slopes[i] * t * series


_ERF_STEPS = 256  # grid points per unit: |t| < 1/512, so the next term is below 1e-16
_ERF_END = 6 * _ERF_STEPS  # erf(6) differs from 1 by 2e-17


@cache
def _erf_grid(dtype) -> tuple[np.ndarray, np.ndarray]:
    grid = [i / _ERF_STEPS for i in range(-_ERF_END, _ERF_END + 1)]
    values = [math.erf(c) for c in grid]
    slopes = [2 / math.sqrt(math.pi) * math.exp(-c * c) for c in grid]
    return np.array(values, dtype), np.array(slopes, dtype)


@op
def swiglu(gate, up):
    """``silu(gate) * up`` (Shazeer, 2020)."""
    y = np.exp(-gate)
    y += 1
    np.divide(gate, y, out=y)
    y *= up
    return y


# Positions ---------------------------------------------------------------------------------------


def rope_tables(width: int, context: int, base: float, dtype) -> tuple[np.ndarray, np.ndarray]:
    """Rotary angles (Su et al., 2021): cos and sin (context, width), ready for ``rotate``.

    Column pair (i, i + width/2) turns by position * base^(-2i/width). The minus sign of the
    rotation is kept in the first half of the sin table.
    """
    exponent = np.arange(0, width, 2, dtype=dtype) / width
    frequency = (1.0 / base**exponent).astype(dtype)
    angle = np.outer(np.arange(context, dtype=dtype), frequency)  # (context, width/2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)


@op
def rotate(x, cos, sin):
    """Turn the first columns of x (..., T, d) by the angles cos, sin (..., T, width <= d)."""
    width = cos.shape[-1]
    half = width // 2
    swapped = np.concatenate([x[..., half:width], x[..., :half]], -1)
    if width == x.shape[-1]:
        swapped *= sin
        swapped += x * cos
        return swapped
    return np.concatenate([x[..., :width] * cos + swapped * sin, x[..., width:]], -1)


# Attention ---------------------------------------------------------------------------------------

ROWS = 64  # queries handled at a time, so that most of the masked half of S x S is never computed


@op
def attention(q, k, v, scale, mask=None):
    """``softmax(scale * q k^T + mask) v``, shapes q (..., H, T, d), k and v (..., K, S, d).

    Query heads share key heads in groups of G = H / K. mask: None for causal attention of the T
    newest of S tokens, where query t sees the first S - T + t + 1 keys; otherwise booleans that
    broadcast to (..., K, G, T, S), True where a query must not see a key. Returns (..., H, T, d).

    The values may be of another width n than the keys, and one head of them may serve all: then v
    is (..., K or 1, S, n) and the result (..., H, T, n).
    """
    T, S = q.shape[-2], k.shape[-2]
    if T == 1:
        return attend_rows(q, k, v, scale, mask)
    out = np.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
    for a, b, end in query_blocks(T, S, mask):
        block_mask = causal_mask(b - a) if mask is None else mask[..., a:b, :end]
        block = q[..., a:b, :], k[..., :end, :], v[..., :end, :]
        out[..., a:b, :] = attend_rows(*block, scale, block_mask)
    return out


def query_blocks(T: int, S: int, mask=None):
    """(a, b, end): blocks of queries a .. b - 1, none of which sees a key from ``end`` on."""
    if mask is None:
        yield from causal_blocks(T, S)
        return
    for a in range(0, T, ROWS):
        b = min(a + ROWS, T)
        seen = ~mask[..., a:b, :].reshape(-1, S).all(0)  # (S,) does any of these queries see it?
        yield a, b, int(np.flatnonzero(seen)[-1]) + 1 if seen.any() else 1


def causal_blocks(T: int, S: int):
    """``query_blocks`` of the T newest of S tokens: a block ends with its last query's own key."""
    for a in range(0, T, ROWS):
        b = min(a + ROWS, T)
        yield a, b, S - T + b


def attend_rows(q, k, v, scale, mask=None):
    """Attention of q (..., H, T, d) over k, v (..., K, S, d); mask as for ``attention_weights``."""
    p = attention_scores(q, k, scale)
    return weighted_values(exponentials(p, mask, q.shape[-2]), q, k, v)


def weighted_values(p, q, k, v):
    """The end of attention: the values weighted by p (..., K, G*T, S), which came of q and k, as
    (..., H, T, n). Counts the work of the whole."""
    if ledger.active:  # asked here, since this runs for every token and layer
        work = q.size // q.shape[-1] * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        ledger.count(work, cache_bytes=cached_bytes(k, v))
    return mix(p, v).reshape(*q.shape[:-1], v.shape[-1])


def cached_bytes(k, v) -> int:
    """Bytes of keys and values as they lie in memory: one array may be both, one head stand for
    several."""
    once = [a[tuple(slice(None if step else 1) for step in a.strides)] for a in (k, v)]
    return once[0].nbytes + (0 if np.may_share_memory(k, v) else once[1].nbytes)


def mix(p, v):
    """The weighted sum of the values v (..., S, d): ``p / sum(p) @ v`` for p (..., T, S)."""
    mixed = p @ v
    mixed /= p.sum(-1, keepdims=True)  # dividing d columns is cheaper than dividing S
    return mixed


def attention_weights(q, k, scale, mask=None):
    """``exp(scale * q k^T - row maximum)`` (..., K, G*T, S): the softmax before its division.

    mask: booleans that broadcast to (..., K, G, T, n), True where a query must not see one of the
    n newest keys (n = S, or fewer where the others are visible to all); None if nothing is masked.
    """
    p = attention_scores(q, k, scale)
    return exponentials(p, mask, q.shape[-2])


def attention_scores(q, k, scale):
    """``scale * q k^T`` (..., K, G*T, S) for q (..., H, T, d) and k (..., K, S, d)."""
    *lead, H, T, d = q.shape
    K = k.shape[-3]
    q = q.reshape(*lead, K, H // K * T, d) * scale  # a group's rows meet their keys in one product
    return q @ k.swapaxes(-1, -2)


def exponentials(p, mask, T: int):
    """``exp(p - row maximum)`` of the scores p (..., K, G*T, S), without those that are masked;
    p is overwritten."""
    if mask is not None:
        S = p.shape[-1]
        by_head = p.reshape(*p.shape[:-2], -1, T, S)  # a view: what is written here is written in p
        np.copyto(by_head[..., S - mask.shape[-1] :], MASKED, where=mask)
    p -= p.max(-1, keepdims=True)
    return np.exp(p, out=p)


MASKED = -1e30  # finite, so that a row that may see nothing (padding) gives numbers and not NaN


@cache
def causal_mask(T: int) -> np.ndarray:
    """(T, T) booleans: key s comes after query t. T is at most ROWS, so few are ever kept."""
    return np.arange(T) > np.arange(T)[:, None]


def newest_mask(T: int):
    """The mask of the T newest queries over their own keys, (T, T); None for a single one."""
    return None if T == 1 else causal_mask(T)
