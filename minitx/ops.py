"""The arithmetic of the model: matrix products, norms, activations, softmax and attention.

Shapes: T new tokens, S all tokens so far, D width, H query heads, K key/value heads, d head width.
Any number of leading batch axes is allowed, written "...". Every function keeps the dtype of its
input (float32 in use, float64 in tests), so constants are Python floats: a NumPy scalar would
promote float32 to float64.

Every product reports its multiply-adds and bytes to the ledger (ledger.py).
"""

import math
from functools import cache, wraps

import numpy as np

from minitx import fast, ledger
from minitx.errors import MinitxError


def op(f):
    """Mark an operation that has a gradient rule of its own (training/autograd/op_rules.py).

    Called with a plain array, it just runs. Called with a traced array (training), it hands over to
    the array's ``__op__`` method, so training runs the same forward pass as inference.
    """

    @wraps(f)
    def call(x, *rest):
        if isinstance(x, np.ndarray):
            return f(x, *rest)
        return x.__op__(call, x, *rest)

    call.plain = f
    return call


def linear(x, w, b=None):
    """``x @ w + b``: x (..., in), w (in, out), b (out,) or None -> (..., out)."""
    ledger.product(x, w)
    y = fast.matmul(x, w)  # x @ w, in the order in which this matrix is read fastest
    return y if b is None else y + b


def logits(x, table):
    """``x @ table.T``: x (..., D), table (V, D) -> (..., V)."""
    return linear(x, table.T)  # the transpose is column-major


def rows(table, ids):
    """The rows ``table[ids]``: table (V, D), ids (...) integers or a slice -> (..., D)."""
    found = table[ids]
    ledger.count(weight_bytes=lambda: found.nbytes)
    return found


def argmax_token(logits) -> int:
    """The token with the largest logit, logits (V,); ties go to the lower id. MinitxError if the
    largest is not finite."""
    best = int(logits.argmax())  # argmax returns the first NaN if there is any
    if not math.isfinite(logits[best]):
        raise MinitxError(
            f"The model's logit for token {best} is {logits[best]}, so no next token can be "
            f"chosen: {logits.dtype} overflowed, or the weights are damaged."
        )
    return best


# Norms --------------------------------------------------------------------------------------------


@op
def rms_norm(x, gain, eps):
    """``x / sqrt(mean(x^2) + eps) * gain`` over the last axis (Zhang and Sennrich, 2019)."""
    squares = np.vecdot(x, x)  # faster than (x * x).sum(-1)
    if squares.size == 1:  # one row: a Python float is faster than an array of size 1
        return x * (gain / math.sqrt(squares.item() / x.shape[-1] + eps))
    return x * (gain / np.sqrt(squares / x.shape[-1] + eps)[..., None])


@op
def layer_norm(x, gain, bias, eps):
    """``(x - mean) / sqrt(variance + eps) * gain + bias`` over the last axis (Ba et al., 2016)."""
    mean = x.sum(-1, keepdims=True) / x.shape[-1]  # in half the time of x.mean for one row
    return rms_norm(x - mean, gain, eps) + bias


# Activations --------------------------------------------------------------------------------------


@op
def silu(x):
    """``x * sigmoid(x)``, also called swish."""
    return x / (1 + np.exp(-x))


@op
def relu(x):
    return np.maximum(x, 0)


@op
def gelu(x):
    """``x * Phi(x)``, Phi the standard normal CDF (Hendrycks and Gimpel, 2016), with the exact
    erf."""
    return x * (0.5 + 0.5 * erf(x * math.sqrt(0.5)))


@op
def gelu_tanh(x):
    """The tanh approximation of GELU that GPT-2 was trained with."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


ACTIVATIONS = {"silu": silu, "relu": relu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def erf(x):
    """The error function, which NumPy lacks, to about 1e-15.

    A Taylor polynomial around the nearest point c of a grid: with t = x - c,
    erf(c + t) = erf(c) + erf'(c) (t - c t^2 + (4c^2 - 2) t^3 / 6 + ...). The factors of the powers
    of t are Hermite polynomials in c: they come from differentiating exp(-c^2).
    """
    i = np.fmax(np.fmin(np.rint(x * _ERF_STEPS), _ERF_END), -_ERF_END).astype(np.int32)  # not NaN
    t = x - i.astype(x.dtype) * (1 / _ERF_STEPS)
    t = np.minimum(np.maximum(t, -1 / _ERF_STEPS), 1 / _ERF_STEPS)  # beyond the grid erf is +-1
    i += _ERF_END
    highest, *others = _erf_grid(x.dtype)
    y = highest[i]
    for factors in others:
        y = y * t + factors[i]
    return y


_ERF_STEPS = 256  # grid points per unit: |t| < 1/512, so the next term is below 1e-16
_ERF_END = 6 * _ERF_STEPS  # erf(6) differs from 1 by 2e-17


@cache
def _erf_grid(dtype) -> list[np.ndarray]:
    """For each grid point c the factors of t^5, t^4, ..., t, 1, one array per power of t."""
    c = np.arange(-_ERF_END, _ERF_END + 1) / _ERF_STEPS
    cc, slope = c * c, 2 / math.sqrt(math.pi) * np.exp(-c * c)  # erf'(c)
    factors = [
        slope * (12 - 48 * cc + 16 * cc * cc) / 120,
        slope * c * (12 - 8 * cc) / 24,
        slope * (4 * cc - 2) / 6,
        slope * -c,
        slope,
        [math.erf(point) for point in c],
    ]
    return [np.array(each, dtype) for each in factors]


@op
def swiglu(gate, up):
    """``silu(gate) * up`` (Shazeer, 2020)."""
    y = np.exp(-gate)
    y += 1
    np.divide(gate, y, out=y)
    y *= up
    return y


# Positions ----------------------------------------------------------------------------------------


def rope_tables(
    width: int, context: int, base: float, dtype, scaling=None
) -> tuple[np.ndarray, np.ndarray]:
    """Rotary position embedding (RoPE, Su et al., 2021): cos and sin (context, width) for
    ``rotate``.

    Columns (i, i + width/2) rotate by the angle position * base^(-2i/width). The minus sign of the
    rotation matrix is stored in the first half of the sin table. scaling: a function that changes
    the frequencies (width/2,), in radians per position.
    """
    exponent = np.arange(0, width, 2, dtype=dtype) / width
    frequency = (1.0 / base**exponent).astype(dtype)  # (width/2,)
    if scaling is not None:
        frequency = scaling(frequency)
    angle = np.outer(np.arange(context, dtype=dtype), frequency)  # (context, width/2)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([cos, cos], -1), np.concatenate([-sin, sin], -1)


def linear_rope_scaling(frequency, factor: float):
    """Position interpolation (Chen et al., 2023, arXiv:2306.15595): rotate ``factor`` times slower,
    so that a context ``factor`` times as long needs no angle that training has not seen."""
    return frequency / factor


def llama3_rope_scaling(frequency, factor: float, low: float, high: float, context: int):
    """The scaling of Llama 3.1 (Grattafiori et al., 2024): slow frequencies, which make at most
    ``low`` full turns in the ``context`` of the first training, are divided by ``factor``; fast
    ones (``high`` turns or more) tell neighbors apart and stay; those between are interpolated."""
    turns = context * frequency / (2 * math.pi)
    fast = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, 1: fast
    return (1 - fast) * frequency / factor + fast * frequency


@op
def rotate(x, cos, sin):
    """Rotate the first ``width`` columns of x (..., T, d); cos and sin (..., T, width <= d)."""
    width = cos.shape[-1]
    half = width // 2
    swapped = np.concatenate([x[..., half:width], x[..., :half]], -1)
    if width == x.shape[-1]:
        swapped *= sin
        swapped += x * cos
        return swapped
    return np.concatenate([x[..., :width] * cos + swapped * sin, x[..., width:]], -1)


# Attention ----------------------------------------------------------------------------------------


def softmax(x):
    """``exp(x) / sum(exp(x))`` over the last axis. Subtracting the maximum first changes nothing in
    the result and keeps exp from overflowing."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def causal_mask(T: int, S: int):
    """(T, S) booleans for the T newest of S tokens: True where key s comes after query t, which
    must not see it."""
    return np.arange(S) > np.arange(S - T, S)[:, None]


def plain_attention(q, k, v, scale, mask):
    """``softmax(scale * q k^T) v`` where the mask is False, one step a line, as papers write it:
    q (..., H, T, d), k and v (..., H, S, d), mask (T, S) -> (..., H, T, d)."""
    scores = scale * q @ k.swapaxes(-1, -2)  # (..., H, T, S)
    scores = np.where(mask, fast.MASKED, scores)
    weights = softmax(scores)  # each row sums to 1
    return weights @ v


@op
def attention(q, k, v, scale, mask=None):
    """What ``plain_attention`` computes, several times faster (fast.py says how), and with fewer
    key heads than query heads: q (..., H, T, d), k and v (..., K, S, d) -> (..., H, T, d).

    Query heads share key heads in groups of G = H / K (grouped-query attention). mask: None for the
    causal mask of the T newest of S tokens; otherwise booleans that broadcast to (..., K, G, T, S),
    True where a query must not see a key.

    The values may have another width n than the keys, and one head of them may serve all: then v is
    (..., K or 1, S, n) and the result (..., H, T, n).
    """
    return fast.attention(q, k, v, scale, mask)
